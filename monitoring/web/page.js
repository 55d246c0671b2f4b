// Draws the run view from /api/history; refreshes it while the page is visible.

import {chart, element, number} from "./chart.js";

const REFRESH_MS = 5000;
const $ = (id) => document.getElementById(id);
let span = "whole", newest = null;

const timeOfDay = (time) => time === null ? "" : new Date(time * 1000).toLocaleTimeString();
const percent = (ratio) => ratio === null || ratio === undefined ? "–" : `${number(100 * ratio)} %`;
const total = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${number(seconds)} s`;
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours.toLocaleString("en")} h ${minutes % 60} min` : `${minutes} min`;
}

const formatCounts = (counts) => [total(counts).toLocaleString("en"),
  ...Object.entries(counts).map(([name, count]) => `${name} ${count}`)].join(" · ");

function charts(view) {
  const {step, values} = view[span];
  const withPrefix = (prefix, scale = 1) => Object.keys(values).filter((name) => name.startsWith(prefix))
    .map((name) => ({name: name.slice(prefix.length).replace(/^_/, "") || "total",
      values: values[name].map((value) => value === null ? null : scale * value)}));
  const single = (name, label, scale = 1) => values[name] ? [{name: label,
    values: values[name].map((value) => value === null ? null : scale * value)}] : [];
  $("charts").replaceChildren(
    chart("Losses", "nats", step, withPrefix("loss")),
    chart("Throughput", "videos/s", step, single("videos_per_second", "videos/s")),
    chart("Step phases", "seconds", step, withPrefix("phase:")),
    chart("Data wait", "% of step time", step, single("data_wait_ratio", "data wait", 100)),
    chart("Gradient norm", "L2", step, single("gradient_norm", "gradient norm")),
    ...accuracies(view.evaluations),
    chart("Learning rate", "", step, single("learning_rate", "learning rate")),
    chart("Similarities", "cosine", step, withPrefix("similarity")));
}

// Online kNN evaluations; always of the whole run.
function accuracies({step, values}) {
  if (!step.length) return [];
  const curves = Object.keys(values).filter((name) => name !== "seconds")
    .map((name) => ({name: name.replace("_", " "), values: values[name].map((value) => value === null ? null : 100 * value)}));
  return [chart("Online kNN", "% accuracy", step, curves)];
}

function newestScore({step, values}) {
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
    ...newestScore(view.evaluations),
    ["checkpoints failed", counts.checkpoints_failed],
    ["steps skipped", counts.skipped], ["loss spikes", counts.spikes], ["starts", counts.starts],
    ["restarts", formatCounts(view.restarts)], ["goodput", percent(view.goodput)]];
  if (loader) rows.push(["batches ready", loader.queue], ["bad samples", formatCounts(loader.bad_samples)],
    ["retries", formatCounts(loader.retries)], ["samples unaccounted", loader.unaccounted]);
  $("facts").replaceChildren(...rows.flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, String(value))]));
}

function ranks(view) {
  const names = ["rank", "data wait", "batches ready", "bad samples", "retries", "last report"];
  const row = (rank) => [rank.rank, percent(rank.wait_ratio), rank.queue, rank.bad_samples, rank.retries,
    rank.time === null ? "–" : `${duration(Math.max(0, view.now - rank.time))} ago`];
  const tableRow = (kind, cells) => element("tr", {}, ...cells.map((cell) => element(kind, {}, String(cell ?? "–"))));
  if (!view.ranks.length) {
    $("ranks").replaceChildren(tableRow("td", ["no reports yet"]));
    return;
  }
  $("ranks").replaceChildren(tableRow("th", names), ...view.ranks.map((rank) => tableRow("td", row(rank))));
}

function draw(view) {
  document.title = `${view.run}: ${view.state}`;
  $("run").textContent = view.run;
  $("state").textContent = view.state;
  $("state").dataset.state = view.state;
  $("why").textContent = view.why;
  $("progress").value = view.total_steps ? view.step / view.total_steps : 0;
  const hasEnded = ["finished", "failed", "stopped"].includes(view.state);
  $("pace").textContent = [`step ${view.step.toLocaleString("en")}` +
    (view.total_steps ? ` of ${view.total_steps.toLocaleString("en")}` : ""),
    view.epoch === null ? "" : `epoch ${view.epoch}`,
    hasEnded || view.seconds_left === null ? "" : `${duration(view.seconds_left)} left`,
    view.updated === null ? "" : `last step at ${timeOfDay(view.updated)}`].filter(Boolean).join(" · ");
  $("warnings").replaceChildren(...view.warnings.map((text) => element("li", {}, text)));
  charts(view);
  facts(view);
  ranks(view);
  $("messages").replaceChildren(...view.messages.toReversed().map((message) =>
    element("li", {class: message.level}, element("time", {}, timeOfDay(message.time)), message.text)));
}

async function refresh() {
  try {
    const response = await fetch("api/history");
    if (!response.ok) throw new Error(`the server returned status ${response.status}`);
    newest = await response.json();
    draw(newest);
  } catch (error) {
    $("state").textContent = newest ? `${newest.state} (last known)` : "unreachable";
    $("warnings").replaceChildren(element("li", {}, `No newer data: ${error.message}`));
  }
}

for (const name of ["whole", "recent"]) {
  $(name).addEventListener("click", () => {
    span = name;
    for (const other of ["whole", "recent"]) $(other).setAttribute("aria-pressed", String(other === name));
    if (newest) draw(newest);
  });
}
setInterval(() => document.hidden || refresh(), REFRESH_MS);
refresh();
