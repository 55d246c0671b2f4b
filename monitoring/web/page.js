// Draws the view that /api/history tells, again and again while somebody looks.

import {chart, element, number} from "./chart.js";

const PAUSE = 5000;
const $ = (id) => document.getElementById(id);
let span = "whole", newest = null;

const clock = (time) => time === null ? "" : new Date(time * 1000).toLocaleTimeString();
const percent = (ratio) => ratio === null || ratio === undefined ? "–" : `${number(100 * ratio)} %`;
const total = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${number(seconds)} s`;
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours.toLocaleString("en")} h ${minutes % 60} min` : `${minutes} min`;
}

const counted = (counts) => [total(counts).toLocaleString("en"),
  ...Object.entries(counts).map(([name, count]) => `${name} ${count}`)].join(" · ");

function charts(view) {
  const {step, values} = view[span];
  const named = (prefix, scale = 1) => Object.keys(values).filter((name) => name.startsWith(prefix))
    .map((name) => ({name: name.slice(prefix.length).replace(/^_/, "") || "total",
      values: values[name].map((value) => value === null ? null : scale * value)}));
  const one = (name, label, scale = 1) => values[name] ? [{name: label,
    values: values[name].map((value) => value === null ? null : scale * value)}] : [];
  $("charts").replaceChildren(
    chart("Losses", "nats", step, named("loss")),
    chart("Throughput", "videos/s", step, one("videos_per_second", "videos/s")),
    chart("Step phases", "seconds", step, named("phase:")),
    chart("Waiting for data", "% of a step", step, one("data_wait_ratio", "waiting", 100)),
    chart("Gradient norm", "2-norm", step, one("gradient_norm", "norm")),
    ...accuracies(view.evaluations),
    chart("Learning rate", "per step", step, one("learning_rate", "rate")),
    chart("Similarities", "cosine", step, named("similarity")));
}

// Only where a run is evaluated on its way; whichever span is chosen, all there are.
function accuracies({step, values}) {
  if (!step.length) return [];
  const curves = Object.keys(values).filter((name) => name !== "seconds")
    .map((name) => ({name: name.replace("_", " "), values: values[name].map((value) => value === null ? null : 100 * value)}));
  return [chart("kNN of held-out videos", "% right", step, curves)];
}

function scored({step, values}) {
  const last = step.length - 1;
  return last < 0 ? [] : [["kNN top-1", `${percent(values.top1[last])} at step ${step[last].toLocaleString("en")}, ` +
    `took ${duration(values.seconds[last])}`]];
}

function facts(view) {
  const {checkpoint, loader, counts} = view;
  const rows = [
    ["step time", duration(view.latest.seconds)],
    ["checkpoint", checkpoint ? `step ${checkpoint.step.toLocaleString("en")}, ` +
      `${duration(view.now - checkpoint.time)} ago, took ${duration(checkpoint.seconds)}` : "none yet"],
    ...scored(view.evaluations),
    ["checkpoints failed", counts.checkpoints_failed],
    ["steps skipped", counts.skipped], ["loss leaps", counts.spikes], ["starts", counts.starts],
    ["restarts", counted(view.restarts)], ["goodput", percent(view.goodput)]];
  if (loader) rows.push(["batches ready", loader.queue], ["bad samples", counted(loader.bad_samples)],
    ["retries", counted(loader.retries)], ["samples unaccounted for", loader.unaccounted]);
  $("facts").replaceChildren(...rows.flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, String(value))]));
}

function ranks(view) {
  const names = ["rank", "waiting", "batches ready", "bad samples", "retries", "heard"];
  const row = (rank) => [rank.rank, percent(rank.wait_ratio), rank.queue, rank.bad_samples, rank.retries,
    rank.time === null ? "–" : `${duration(Math.max(0, view.now - rank.time))} ago`];
  const line = (kind, cells) => element("tr", {}, ...cells.map((cell) => element(kind, {}, String(cell ?? "–"))));
  if (!view.ranks.length) {
    $("ranks").replaceChildren(line("td", ["no reports yet"]));
    return;
  }
  $("ranks").replaceChildren(line("th", names), ...view.ranks.map((rank) => line("td", row(rank))));
}

function draw(view) {
  document.title = `${view.run}: ${view.state}`;
  $("run").textContent = view.run;
  $("state").textContent = view.state;
  $("state").dataset.state = view.state;
  $("why").textContent = view.why;
  $("progress").value = view.total_steps ? view.step / view.total_steps : 0;
  const isOver = ["finished", "failed", "stopped"].includes(view.state);
  $("pace").textContent = [`step ${view.step.toLocaleString("en")}` +
    (view.total_steps ? ` of ${view.total_steps.toLocaleString("en")}` : ""),
    view.epoch === null ? "" : `epoch ${view.epoch}`,
    isOver || view.seconds_left === null ? "" : `${duration(view.seconds_left)} left`,
    view.updated === null ? "" : `last step at ${clock(view.updated)}`].filter(Boolean).join(" · ");
  $("warnings").replaceChildren(...view.warnings.map((text) => element("li", {}, text)));
  charts(view);
  facts(view);
  ranks(view);
  $("messages").replaceChildren(...view.messages.toReversed().map((message) =>
    element("li", {class: message.level}, element("time", {}, clock(message.time)), message.text)));
}

async function look() {
  try {
    const answer = await fetch("api/history");
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    newest = await answer.json();
    draw(newest);
  } catch (error) {
    $("state").textContent = newest ? `${newest.state}, as last heard` : "unreachable";
    $("warnings").replaceChildren(element("li", {}, `No newer figures: ${error.message}`));
  }
}

for (const name of ["whole", "recent"]) {
  $(name).addEventListener("click", () => {
    span = name;
    for (const other of ["whole", "recent"]) $(other).setAttribute("aria-pressed", String(other === name));
    if (newest) draw(newest);
  });
}
setInterval(() => document.hidden || look(), PAUSE);
look();
