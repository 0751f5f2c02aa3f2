"use strict";
// Elements, numbers and axes. Text from the run becomes text nodes only, never markup.

const RUN = JSON.parse(document.getElementById("data").textContent);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const isNumber = (value) => value !== null && value !== undefined;

function show(value, digits = 4) {
  if (!isNumber(value)) return "–";
  const short = Number.isInteger(value) ? value : Number(value.toPrecision(digits));
  return String(short).replaceAll("-", "−");
}

function niceTicks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  if (whole) step = Math.max(1, step);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

// The smallest range that holds the values; it starts at zero if zero is near.
function rangeOf(values) {
  const finite = values.filter(isNumber);
  if (!finite.length) return [0, 1];
  let low = finite.reduce((a, b) => Math.min(a, b));
  let high = finite.reduce((a, b) => Math.max(a, b));
  if (low >= 0 && low <= high / 2) low = 0;
  if (high <= 0 && high >= low / 2) high = 0;
  if (low === high) return low < 0 ? [low * 1.5, 0] : [0, high * 1.5 || 1];
  const room = (high - low) * 0.06;
  return [low === 0 ? 0 : low - room, high === 0 ? 0 : high + room];
}

function figure(holder, title, label) {
  const readout = element("span", { className: "readout" });
  const legend = element("div", { className: "legend" });
  const svg = shape("svg", { role: "img", "aria-label": label });
  const caption = element("figcaption", {}, element("b", {}, title), readout);
  holder.append(element("figure", {}, caption, legend, svg));
  return { svg, legend, readout };
}

// Draws labelled axes and returns the scales.
function axes(svg, width, height, x, y) {
  const left = 12 + 6.6 * Math.max(...y.ticks.map((tick) => show(tick).length));
  const box = { left, right: width - 10, top: 8, bottom: height - 38 };
  const place = x.log2 ? Math.log2 : (value) => value;
  const [x0, x1] = x.range.map(place);
  const share = (value) => (x1 > x0 ? (place(value) - x0) / (x1 - x0) : 0.5); // one x: in the middle
  const toX = (value) => box.left + share(value) * (box.right - box.left);
  const [y0, y1] = y.range;
  const toY = (value) => box.bottom - ((value - y0) / (y1 - y0 || 1)) * (box.bottom - box.top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  for (const tick of y.ticks) {
    const at = toY(tick).toFixed(1);
    svg.append(
      shape("line", { class: "rule", x1: box.left, x2: box.right, y1: at, y2: at }),
      shape("text", { x: box.left - 6, y: at, dy: "0.32em", class: "end" }, show(tick)),
    );
  }
  for (const tick of x.ticks) {
    const at = Math.min(toX(tick), box.right - 2).toFixed(1);
    svg.append(shape("text", { x: at, y: box.bottom + 18, class: "middle" }, show(tick)));
  }
  const middle = (box.left + box.right) / 2;
  svg.append(shape("text", { x: middle, y: height - 4, class: "middle name" }, x.name));
  return { toX, toY, box };
}

function nearestIndex(xs, x) {
  let best = 0;
  xs.forEach((value, i) => {
    if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i;
  });
  return best;
}
