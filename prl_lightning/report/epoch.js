// Completions of the chosen epoch: histograms, groups, single completions.

const rewardRange = RUN.epochs.flatMap((epoch) => epoch.rewards).filter(isNumber);
const lowestReward = rewardRange.reduce((a, b) => Math.min(a, b), 0);
const highestReward = rewardRange.reduce((a, b) => Math.max(a, b), lowestReward);

function rewardSquare(reward) {
  const square = element("i", { className: "square" });
  const share = (reward - lowestReward) / (highestReward - lowestReward || 1);
  square.style.setProperty("--share", `${(share * 100).toFixed(1)}%`);
  return square;
}

function showHistograms(epoch) {
  const holder = document.getElementById("histograms");
  holder.replaceChildren();
  new Histogram(holder, { title: "Reward", xName: "reward", values: epoch.rewards, parts: [{ colour: 0, has: () => true }] });
  const cut = epoch.finished.filter((finished) => !finished).length;
  new Histogram(holder, {
    title: "Length",
    xName: "tokens",
    values: epoch.lengths,
    parts: [
      { name: "finished", colour: 0, has: (i) => epoch.finished[i] },
      ...(cut ? [{ name: `cut at the limit (${cut})`, colour: 1, has: (i) => !epoch.finished[i] }] : []),
    ],
  });
}

function groupButton(group, onChoose) {
  const squares = group.completions.map(({ reward }) => rewardSquare(reward));
  const facts = [`mean ${show(group.mean, 3)}, sd ${show(group.std, 3)}`];
  if (!group.std) facts.push("no signal");
  if (group.set !== "train") facts.push(group.set);
  const button = element(
    "button",
    { type: "button", className: "group" },
    element("span", { className: "start" }, group.prompt.trim().slice(0, 200)),
    element("span", { className: "squares", "aria-hidden": "true" }, ...squares),
    element("span", { className: "muted small" }, facts.join(" · ")),
  );
  button.addEventListener("click", onChoose);
  return button;
}

function completionButton(completion, number, onChoose) {
  const facts = [`A ${show(completion.outcome_advantage, 3)}`, `${completion.length} tokens`];
  if (!completion.finished) facts.push("cut");
  const label = `Completion ${number}: reward ${show(completion.reward)}, ${facts.join(", ")}`;
  const button = element(
    "button",
    { type: "button", className: "choice", "aria-label": label },
    element("span", {}, rewardSquare(completion.reward), element("b", {}, show(completion.reward, 3))),
    ...facts.map((fact) => element("span", { className: "muted small" }, fact)),
  );
  button.addEventListener("click", onChoose);
  return button;
}

function press(buttons, chosen) {
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
}

function showGroup(group) {
  document.querySelector("#group .prompt").textContent = group.prompt;
  const choose = (i) => {
    press(buttons, i);
    showCompletion(document.getElementById("completion"), group, group.completions[i]);
  };
  const buttons = group.completions.map((one, i) => completionButton(one, i + 1, () => choose(i)));
  document.querySelector("#group .completions").replaceChildren(...buttons);
  const rewards = group.completions.map(({ reward }) => reward ?? 0);
  choose(rewards.indexOf(Math.max(...rewards)));
}

function epochFacts({ step, rewards, groups, groups_stored: stored, groups_sampled: sampled }) {
  const facts = [`Sampled at step ${step}: ${rewards.length} completions in ${sampled} groups.`];
  if (stored < sampled) facts.push(`The plots show all of them; ${stored} groups are stored with their tokens.`);
  if (groups.length < stored) {
    facts.push(`To keep this page small, only the ${groups.length} groups with most signal are shown.`);
  }
  return facts.join(" ");
}

function showEpoch(epoch) {
  document.getElementById("epoch-title").textContent = `Completions of epoch ${epoch.epoch}`;
  document.getElementById("epoch-facts").textContent = epochFacts(epoch);
  showHistograms(epoch);
  const choose = (i) => {
    press(buttons, i);
    showGroup(epoch.groups[i]);
  };
  const detail = document.getElementById("group");
  const chooseAndShow = (i) => {
    choose(i);
    // On a phone the details are below the list.
    if (detail.getBoundingClientRect().top > innerHeight * 0.6) detail.scrollIntoView();
  };
  const buttons = epoch.groups.map((group, i) => groupButton(group, () => chooseAndShow(i)));
  document.querySelector("ol.groups").replaceChildren(...buttons.map((button) => element("li", {}, button)));
  document.querySelector(".browser").hidden = !buttons.length;
  if (buttons.length) choose(0);
}

function fillRewardLegend() {
  const legend = document.getElementById("reward-legend");
  const example = (reward) => element("span", {}, rewardSquare(reward), ` ${show(reward)}`);
  legend.append("Completions by reward: ", example(lowestReward));
  if (highestReward > lowestReward) legend.append(" to ", example(highestReward));
}
