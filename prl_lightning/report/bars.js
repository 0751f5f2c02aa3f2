// Histograms.

const FEW = 8; // up to this many distinct values, each gets a bar

// One bar per value if there are few distinct values, otherwise bars of equal width.
function binsOf(values) {
  const distinct = [...new Set(values.filter(isNumber))].sort((a, b) => a - b);
  if (distinct.length <= FEW) {
    const gaps = distinct.slice(1).map((value, i) => value - distinct[i]);
    const half = Math.min(...gaps, distinct.length > 1 ? Infinity : 1) / 2;
    return distinct.map((value) => ({ from: value - half, to: value + half, name: show(value) }));
  }
  const [low, high] = [distinct[0], distinct.at(-1)];
  const size = niceTicks(low, high, 16)[1] - niceTicks(low, high, 16)[0];
  const bins = [];
  for (let i = Math.floor(low / size); i * size <= high; i++) {
    bins.push({ from: i * size, to: (i + 1) * size, name: `${show(i * size)} to ${show((i + 1) * size)}` });
  }
  return bins;
}

// options: title, xName, values, parts [{name, colour, has(i)}], stacked from below.
class Histogram {
  constructor(holder, { title, xName, values, parts }) {
    Object.assign(this, { xName, parts, count: values.length, bins: binsOf(values) });
    const places = [...values.keys()].filter((i) => isNumber(values[i]));
    this.counts = this.bins.map(({ from, to }) => {
      const inside = places.filter((i) => values[i] >= from && values[i] < to);
      return parts.map(({ has }) => inside.filter(has).length);
    });
    this.totals = this.counts.map((bin) => bin.reduce((a, b) => a + b, 0));
    const label = this.bins.map(({ name }, i) => `${this.totals[i]} at ${name}`).join(", ");
    Object.assign(this, figure(holder, title, `${title}: ${label}`));
    if (parts.length > 1) this.fillLegend();
    this.read(null);
    new ResizeObserver(() => this.draw()).observe(this.svg.parentNode);
  }

  fillLegend() {
    for (const { name, colour } of this.parts) {
      this.legend.append(element("span", {}, element("i", { className: `c${colour}` }), name));
    }
  }

  read(bin) {
    const text = bin === null ? `${this.count} completions` : `${this.bins[bin].name}: ${this.totals[bin]}`;
    this.readout.textContent = text;
  }

  draw() {
    const { svg, bins } = this;
    const { width } = svg.getBoundingClientRect();
    if (width < 60 || !bins.length) return;
    svg.replaceChildren();
    const highest = Math.max(...this.totals);
    const range = [bins[0].from, bins.at(-1).to];
    const middles = bins.map(({ from, to }) => (from + to) / 2);
    const ticks = bins.length <= FEW ? middles : niceTicks(...range, Math.max(2, width / 70));
    const y = { range: [0, highest * 1.06], ticks: niceTicks(0, highest, 4, true) };
    const scales = axes(svg, width, 150, { range, ticks, name: this.xName }, y);
    bins.forEach((_, i) => this.drawBin(i, scales));
  }

  drawBin(i, { toX, toY, box }) {
    const { from, to } = this.bins[i];
    const room = toX(to) - toX(from);
    const width = Math.max(1, Math.min(this.bins.length <= FEW ? room / 2 : room - 2, 64));
    const x = (toX(from) + toX(to) - width) / 2;
    let below = 0;
    this.parts.forEach(({ colour }, part) => {
      const height = toY(below) - toY(below + this.counts[i][part]);
      below += this.counts[i][part];
      this.svg.append(shape("rect", { class: `bar c${colour}`, x, y: toY(below), width, height }));
    });
    const target = shape("rect", { class: "target", x, y: box.top, width, height: box.bottom - box.top });
    target.addEventListener("pointerenter", () => this.read(i));
    target.addEventListener("pointerleave", () => this.read(null));
    this.svg.append(target);
  }
}
