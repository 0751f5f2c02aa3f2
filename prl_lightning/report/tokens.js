// One completion and the credit of each of its tokens.

const QUANTITIES = [
  {
    key: "process_part",
    name: "process reward minus outcome, rₜ − r",
    about:
      "What the process term adds to the outcome reward for the prefix up to this token: " +
      "−β times the log-ratios of all tokens after it.",
  },
  {
    key: "process",
    name: "process reward, rₜ",
    about:
      "Sum of outcome reward and process term for the prefix up to this token; " +
      "at the last token it is the outcome reward.",
  },
  {
    key: "advantage",
    name: "advantage, Aₜ",
    about: "Above zero: the update made this token more likely. Below zero: less likely.",
  },
  {
    key: "advantage_part",
    name: "advantage minus outcome advantage, Aₜ − A",
    about: "What the process term adds to the token's outcome advantage.",
  },
  {
    key: "log_ratio",
    name: "log-ratio, log π − log π ref",
    about: "Above zero: the policy likes this token more than the reference does.",
  },
  {
    key: "policy",
    name: "policy log-probability, log π",
    about: "Near zero: the policy was confident in this token.",
  },
];

const FIELDS = [
  ["token", "token"],
  ["place", "position"],
  ["process", "rₜ"],
  ["advantage", "advantage"],
  ["policy", "log π"],
  ["reference", "log π ref"],
  ["log_ratio", "log-ratio"],
];

let chosenQuantity = null; // stays the same for the next completion

const has = (completion, key) => completion[key]?.some(isNumber) ?? false;

// The completions of a group share one scale, so they can be compared; the largest 2% saturate.
function scaleOf(group, key) {
  const sizes = group.completions.flatMap((one) => one[key] ?? []).filter(isNumber).map(Math.abs);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor((sizes.length - 1) * 0.98)] || sizes.at(-1) || 0;
}

function paint(spans, values, scale) {
  spans.forEach((span, i) => {
    const value = values?.[i] ?? 0;
    const share = scale ? Math.min(1, Math.abs(value) / scale) : 0;
    span.classList.toggle("positive", value > 0);
    span.classList.toggle("negative", value < 0);
    span.style.setProperty("--share", `${(share * 100).toFixed(1)}%`);
  });
}

function tokenSpans(completion) {
  const ends = new Set(completion.step_ends);
  const context = new Set(completion.context);
  return completion.tokens.map((token, i) => {
    const span = element("span", { className: "token", tabIndex: i ? -1 : 0 }, token);
    span.dataset.place = i;
    span.classList.toggle("newline", token.includes("\n"));
    span.classList.toggle("ends", ends.has(i));
    span.classList.toggle("context", context.has(i));
    return span;
  });
}

function quantityChooser(completion, onChange) {
  const select = element("select", { id: "quantity" });
  for (const { key, name } of QUANTITIES) {
    select.append(element("option", { value: key, disabled: !has(completion, key) }, name));
  }
  const usable = QUANTITIES.filter(({ key }) => has(completion, key)).map(({ key }) => key);
  select.value = usable.includes(chosenQuantity) ? chosenQuantity : (usable[0] ?? "policy");
  select.addEventListener("change", () => {
    chosenQuantity = select.value;
    onChange(select.value);
  });
  return select;
}

function colourLegend() {
  const ends = [element("span"), element("span")];
  const bar = element("span", { className: "gradient", "aria-hidden": "true" });
  const node = element("div", { className: "scale" }, ends[0], bar, ends[1]);
  return {
    node,
    set(scale) {
      ends[0].textContent = scale ? show(-scale, 2) : "";
      ends[1].textContent = scale ? `+${show(scale, 2)}` : "all are 0";
      bar.hidden = !scale;
    },
  };
}

function tokenStrip(completion) {
  const cells = FIELDS.map(([key, name]) => {
    const value = element("dd", {}, "–");
    value.dataset.field = key;
    return { key, value, node: element("div", {}, element("dt", {}, name), value) };
  });
  const node = element("dl", { className: "strip", "aria-live": "polite" }, ...cells.map((cell) => cell.node));
  return {
    node,
    set(place) {
      for (const { key, value } of cells) {
        if (key === "token") value.textContent = JSON.stringify(completion.tokens[place]);
        else if (key === "place") value.textContent = `${place + 1} of ${completion.tokens.length}`;
        else value.textContent = show(completion[key]?.[place]);
      }
    },
  };
}

function logprobPlot(holder, completion, onHover) {
  const x = completion.tokens.map((_, i) => i + 1);
  const series = [];
  if (has(completion, "reference")) series.push({ name: "reference", x, y: completion.reference, colour: 4, exact: true });
  if (has(completion, "policy")) series.push({ name: "policy", x, y: completion.policy, colour: 0, exact: true });
  if (!series.length) return null;
  return new LinePlot(holder, {
    title: "Log-probability of each token",
    xName: "token",
    series,
    height: 150,
    rules: completion.step_ends.map((place) => place + 1),
    onHover: (at) => onHover(at - 1),
  });
}

function missingReasons(completion) {
  const reasons = [];
  if (completion.context.length) {
    reasons.push("Underlined: what the environment wrote. It is not trained on and has no numbers.");
  }
  if (!has(completion, "reference")) {
    reasons.push(
      "No reference model in this run, so there are no log-ratios and no process rewards. " +
        "Only advantage and policy log-probability can be shown.",
    );
  } else if (!has(completion, "process")) {
    reasons.push("This epoch has no process rewards.");
  }
  if ("text" in completion) {
    reasons.push(
      "Decoded one by one, some tokens are parts of a character or lose a space. " +
        "The whole text is below.",
    );
  }
  return reasons.map((reason) => element("p", { className: "muted small" }, reason));
}

// Hover, tap and focus select a token; left and right move between tokens.
function followTokens(text, spans, onToken) {
  const placeOf = (event) => {
    const span = event.target.closest(".token");
    return span ? Number(span.dataset.place) : null;
  };
  const follow = (event) => {
    const place = placeOf(event);
    if (place !== null) onToken(place);
  };
  text.addEventListener("pointerover", follow);
  text.addEventListener("click", follow);
  text.addEventListener("focusin", follow);
  text.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const place = placeOf(event);
    if (!move || place === null) return;
    event.preventDefault();
    event.stopPropagation(); // otherwise the arrows would change the epoch
    const next = spans[place + move];
    if (!next) return;
    spans[place].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

function showCompletion(holder, group, completion) {
  holder.replaceChildren();
  const spans = tokenSpans(completion);
  const label = "Tokens of the completion; move with the left and right arrow keys";
  const text = element("div", { className: "tokens", role: "group", "aria-label": label }, ...spans);
  const strip = tokenStrip(completion);
  const legend = colourLegend();
  const about = element("p", { className: "muted small about" });
  const shade = (key) => {
    const scale = scaleOf(group, key);
    paint(spans, completion[key], scale);
    legend.set(scale);
    const quantity = QUANTITIES.find((one) => one.key === key);
    about.textContent = `${quantity.about} The completions of a group share one scale.`;
  };
  const select = quantityChooser(completion, shade);
  const chooser = element("label", {}, "Shade by ", select);
  holder.append(
    element("h3", {}, "Credit of each token"),
    element("div", { className: "controls" }, chooser, legend.node),
    about,
    ...missingReasons(completion),
    element("div", {}, text, strip.node), // the strip stays visible while the text is
  );
  if ("text" in completion) {
    holder.append(element("details", {}, element("summary", {}, "Whole text"), element("pre", {}, completion.text)));
  }
  let plot = null;
  let last = null;
  const toToken = (place) => {
    spans[last]?.classList.remove("here");
    spans[place].classList.add("here");
    last = place;
    strip.set(place);
    plot?.point(place + 1);
  };
  if (completion.tokens.length) {
    plot = logprobPlot(holder, completion, toToken);
    followTokens(text, spans, toToken);
    shade(select.value);
    toToken(0);
  } else {
    text.append("(no token)");
  }
}
