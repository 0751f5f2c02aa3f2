// Line plots with intervals, a marked x and one that follows the pointer.

const RAW_POINTS = 150; // longer curves also get a moving average

function pathThrough(xs, ys) {
  let path = "";
  let drawing = false;
  xs.forEach((x, i) => {
    if (isNumber(ys[i])) path += `${drawing ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`;
    drawing = isNumber(ys[i]);
  });
  return path;
}

function bandBetween(xs, low, high) {
  const both = xs.map((_, i) => i).filter((i) => isNumber(low[i]) && isNumber(high[i]));
  const corner = (i, ys) => `${xs[i].toFixed(1)} ${ys[i].toFixed(1)}`;
  const there = both.map((i) => corner(i, high));
  const back = both.reverse().map((i) => corner(i, low));
  return both.length > 1 ? `M${[...there, ...back].join("L")}Z` : "";
}

function movingAverage(values) {
  const reach = Math.max(2, Math.round(values.length / 50));
  return values.map((value, i) => {
    if (!isNumber(value)) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter(isNumber);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function drawSeries(svg, series, toX, toY) {
  const xs = series.x.map(toX);
  const scaled = (values) => values.map((value) => (isNumber(value) ? toY(value) : null));
  const ys = scaled(series.y);
  const many = xs.length > RAW_POINTS && !series.exact;
  const kind = `series c${series.colour}`;
  if (series.low) {
    const band = bandBetween(xs, scaled(series.low), scaled(series.high));
    svg.append(shape("path", { class: `band c${series.colour}`, d: band }));
  }
  svg.append(shape("path", { class: many ? `${kind} raw` : kind, d: pathThrough(xs, ys) }));
  if (many) svg.append(shape("path", { class: kind, d: pathThrough(xs, movingAverage(ys)) }));
  if (xs.length > 32) return;
  xs.forEach((x, i) => {
    if (isNumber(ys[i])) svg.append(shape("circle", { class: kind, cx: x, cy: ys[i], r: 2.2 }));
  });
}

/* options: title, xName, series [{name, x, y, low, high, colour, exact}], log2, range (of y), height,
   stops (x values that can be picked), rules (thin marks at x), onPick(x), onHover(x). */
class LinePlot {
  constructor(holder, options) {
    this.options = options;
    this.series = options.series;
    this.allX = [...new Set(this.series.flatMap((one) => one.x))].sort((a, b) => a - b);
    Object.assign(this, figure(holder, options.title, this.describe()));
    this.values = this.series.map(() => element("span", { className: "value" }));
    if (this.series.length > 1) this.fillLegend();
    this.overlay = shape("g");
    this.marked = null;
    this.pointed = null;
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg.parentNode);
  }

  describe() {
    const { title, xName } = this.options;
    const parts = this.series.map(({ name, x, y }) => {
      const first = `from ${show(y[0])} at ${xName} ${show(x[0])}`;
      return `${name}: ${first} to ${show(y.at(-1))} at ${show(x.at(-1))}`;
    });
    return `${title}. ${parts.join("; ")}`;
  }

  fillLegend() {
    this.series.forEach(({ name, colour }, i) => {
      const line = element("i", { className: `c${colour}` });
      this.legend.append(element("span", {}, line, name, this.values[i]));
    });
  }

  listen() {
    const { onHover, onPick } = this.options;
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.scales) return;
      this.point(this.under(event));
      onHover?.(this.pointed);
    });
    this.svg.addEventListener("pointerleave", () => this.point(null));
    if (!onPick) return;
    this.svg.classList.add("pickable");
    this.svg.addEventListener("click", (event) => this.scales && onPick(this.under(event)));
  }

  under(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    return this.allX[nearestIndex(this.allX.map(this.scales.toX), x)];
  }

  mark(x) {
    this.marked = Math.min(Math.max(x, this.allX[0]), this.allX.at(-1));
    this.drawOverlay();
  }

  point(x) {
    this.pointed = x;
    this.drawOverlay();
  }

  yRange() {
    const all = this.series.flatMap(({ y, low, high }) => [...y, ...(low ?? []), ...(high ?? [])]);
    return this.options.range ?? rangeOf(all);
  }

  draw() {
    const { svg, allX, series, options } = this;
    const { width } = svg.getBoundingClientRect();
    if (width < 60 || !allX.length) return;
    svg.replaceChildren();
    const span = [allX[0], allX.at(-1)];
    const ticks = options.log2 ? powersOfTwo(...span) : niceTicks(...span, Math.max(2, width / 90), true);
    const x = { range: span, ticks, name: options.xName, log2: options.log2 };
    const range = this.yRange();
    const y = { range, ticks: niceTicks(...range, 5) };
    this.scales = axes(svg, width, options.height ?? 180, x, y);
    this.drawRules();
    for (const one of series) drawSeries(svg, one, this.scales.toX, this.scales.toY);
    svg.append(this.overlay);
    this.drawOverlay();
  }

  drawRules() {
    const { toX, box } = this.scales;
    for (const at of (this.options.rules ?? []).map(toX)) {
      this.svg.append(shape("line", { class: "step", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 5 }));
    }
    for (const stop of this.options.stops ?? []) {
      const at = Math.min(Math.max(toX(stop), box.left), box.right);
      this.svg.append(shape("path", { class: "stop", d: `M${at} ${box.bottom}l-4 6h8z` }));
    }
  }

  drawOverlay() {
    this.overlay.replaceChildren();
    if (!this.scales) return;
    const { toX, box } = this.scales;
    for (const [x, kind] of [[this.marked, "marked"], [this.pointed, "pointed"]]) {
      if (!isNumber(x)) continue;
      const at = toX(x);
      this.overlay.append(shape("line", { class: kind, x1: at, x2: at, y1: box.top, y2: box.bottom }));
    }
    const at = this.pointed ?? this.allX.at(-1);
    const texts = this.series.map((one, i) => (this.values[i].textContent = this.valueAt(one, at)));
    const where = `${this.options.xName} ${show(at)}`;
    this.readout.textContent = this.series.length > 1 ? where : `${where}: ${texts[0]}`;
  }

  // Returns the value as text, and draws a dot if it is under the pointer.
  valueAt({ x, y, low, high, colour }, at) {
    const i = nearestIndex(x, at);
    if (x[i] !== at || !isNumber(y[i])) return "–";
    if (isNumber(this.pointed)) {
      const { toX, toY } = this.scales;
      this.overlay.append(shape("circle", { class: `series c${colour}`, cx: toX(at), cy: toY(y[i]), r: 4 }));
    }
    const interval = isNumber(low?.[i]) && this.series.length < 3; // there is no room for more
    return show(y[i], 3) + (interval ? ` [${show(low[i], 3)}, ${show(high[i], 3)}]` : "");
  }
}

function powersOfTwo(low, high) {
  const ticks = [];
  for (let power = 1; power <= high; power *= 2) if (power >= low) ticks.push(power);
  return ticks;
}
