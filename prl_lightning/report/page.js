// The page from top to bottom, and the epoch that all its parts show.

const PANELS = [
  ["Reward", ["rollout/reward"]],
  ["KL to the reference per token", ["train/kl_ref", "train/kl_ref_k3"]],
  ["Entropy per token", ["train/entropy"]],
  ["Completion length in tokens", ["rollout/completion_length"]],
  ["Gradient norm", ["train/grad_norm"]],
  ["Share of groups without signal", ["rollout/groups_without_signal"]],
  ["Process term", ["train/process_term_mean", "train/process_term_std"]],
];
const SHORT = {
  "train/kl_ref": "log-ratio (k1)",
  "train/kl_ref_k3": "k3",
  "train/process_term_mean": "mean",
  "train/process_term_std": "standard deviation",
};

const curvePlots = [];
let chosenEpoch = RUN.epochs.length - 1;

function chooseEpoch(index) {
  if (index < 0 || index >= RUN.epochs.length) return;
  chosenEpoch = index;
  const epoch = RUN.epochs[index];
  press([...document.querySelectorAll(".epochs button.epoch")], index);
  const marked = document.getElementById("marked");
  marked.replaceChildren("Marked: ", element("a", { href: "#epoch" }, `epoch ${epoch.epoch}`));
  marked.append(". Click on a curve to see completions of the nearest stored epoch (▲).");
  for (const plot of curvePlots) plot.mark(epoch.step);
  showEpoch(epoch);
}

function pickNearest(step) {
  chooseEpoch(nearestIndex(RUN.epochs.map((epoch) => epoch.step), step));
}

function curvePanel(holder, title, series, range) {
  const plot = new LinePlot(holder, {
    title,
    series,
    range,
    xName: "step",
    stops: RUN.epochs.map((epoch) => epoch.step),
    onPick: RUN.epochs.length ? pickNearest : undefined,
  });
  curvePlots.push(plot);
}

function seriesOf(names) {
  const known = names.filter((name) => RUN.curves[name]?.[0].length);
  return known.map((name, colour) => ({ name: SHORT[name] ?? name, x: RUN.curves[name][0], y: RUN.curves[name][1], colour }));
}

function evaluationSeries({ main, points }) {
  return main.map((name, colour) => {
    const having = points.filter((point) => point.metrics[name]);
    const column = (i) => having.map((point) => point.metrics[name][i]);
    return { name, colour, x: having.map((point) => point.step), y: column(0), low: column(1), high: column(2) };
  });
}

function fillCurves() {
  const panels = document.getElementById("panels");
  const [reward, ...others] = PANELS;
  const panel = ([title, names]) => {
    const series = seriesOf(names);
    if (series.length) curvePanel(panels, title, series);
  };
  panel(reward);
  for (const [name, set] of Object.entries(RUN.sets)) {
    const series = evaluationSeries(set);
    if (series.length) curvePanel(panels, `Evaluation: ${name}`, series, [0, 1.03]);
  }
  others.forEach(panel);
  fillOthers();
  document.getElementById("curves").hidden = !panels.children.length;
}

function fillOthers() {
  const shown = new Set(PANELS.flatMap(([, names]) => names));
  for (const [set, { main }] of Object.entries(RUN.sets)) main.forEach((name) => shown.add(`val/${set}/${name}`));
  const rest = Object.keys(RUN.curves).filter((name) => !shown.has(name)).sort();
  const details = document.getElementById("others");
  details.hidden = !rest.length;
  details.querySelector("summary").textContent = `${rest.length} other metrics`;
  // Drawn on first opening: a long run has many curves.
  details.addEventListener("toggle", () => {
    for (const name of rest) curvePanel(details.querySelector(".grid"), name, seriesOf([name]));
    if (RUN.epochs.length) curvePlots.forEach((plot) => plot.mark(RUN.epochs[chosenEpoch].step));
  }, { once: true });
}

function fillPasses() {
  const holder = document.querySelector("#passes .grid");
  for (const [name, { points }] of Object.entries(RUN.sets)) {
    const having = points.filter((point) => point.pass_curve);
    const ends = having.length > 1 ? [having[0], having.at(-1)] : having;
    const series = ends.map(({ step, pass_curve: curve }, i) => ({
      name: `step ${step}`, x: curve.k, y: curve.pass, low: curve.low, high: curve.high, exact: true,
      colour: ends.length > 1 && i === 0 ? 4 : 0,
    }));
    if (series.length) new LinePlot(holder, { title: name, series, xName: "k", log2: true, height: 220 });
  }
  document.getElementById("passes").hidden = !holder.children.length;
}

function tile(set, name, first, last) {
  const score = (value) => (isNumber(value) ? value.toFixed(3) : "–");
  const interval = ([, low, high]) => (isNumber(low) ? `[${score(low)}, ${score(high)}]` : "");
  const value = (triple) => element("span", {}, element("b", {}, score(triple[0])), element("small", {}, interval(triple)));
  const arrow = element("span", { className: "arrow", "aria-label": "to" }, "→");
  const values = first === last ? [value(last)] : [value(first), arrow, value(last)];
  const label = element("p", { className: "muted" }, `${set} · ${name}`);
  return element("div", { className: "tile" }, label, element("p", { className: "values" }, ...values));
}

function fillHeader() {
  document.title = `${RUN.name}: training report`;
  document.getElementById("name").textContent = RUN.name;
  const counts = [[RUN.updates, "update"], [RUN.iterations, "epoch"]]
    .filter(([count]) => isNumber(count))
    .map(([count, what]) => `${count} ${what}${count === 1 ? "" : "s"}`);
  document.getElementById("progress").textContent = counts.join(" · ");
  const tiles = document.getElementById("tiles");
  const columns = Math.max(1, ...Object.values(RUN.sets).map(({ main }) => main.length));
  tiles.style.setProperty("--columns", columns);
  for (const [set, { main, points }] of Object.entries(RUN.sets)) {
    for (const name of main) {
      const values = points.map((point) => point.metrics[name]).filter(Boolean);
      if (values.length) tiles.append(tile(set, name, values[0], values.at(-1)));
    }
  }
  document.getElementById("notes").append(...RUN.notes.map((note) => element("li", {}, note)));
}

function fillEpochs() {
  document.getElementById("epoch").hidden = !RUN.epochs.length;
  const nav = document.querySelector("nav.epochs");
  nav.hidden = RUN.epochs.length < 2;
  const step = (name, label, by) => {
    const button = element("button", { type: "button", "aria-label": label }, name);
    button.addEventListener("click", () => chooseEpoch(chosenEpoch + by));
    return button;
  };
  nav.append(step("‹", "Previous epoch", -1), step("›", "Next epoch", 1));
  RUN.epochs.forEach(({ epoch }, i) => {
    const button = element("button", { type: "button", className: "epoch", "aria-label": `Epoch ${epoch}` }, String(epoch));
    button.addEventListener("click", () => chooseEpoch(i));
    nav.append(button);
  });
  nav.append(element("span", { className: "muted small keys" }, "or the arrow keys"));
}

function moveByKey(event) {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const modified = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
  if (!move || modified || event.target.closest("select, input, textarea")) return;
  event.preventDefault();
  chooseEpoch(chosenEpoch + move);
}

fillHeader();
fillCurves();
fillPasses();
fillEpochs();
fillRewardLegend();
document.querySelector("#config pre").textContent = RUN.config ?? "";
document.getElementById("config").hidden = RUN.config === null;
document.addEventListener("keydown", moveByKey);
chooseEpoch(chosenEpoch);
