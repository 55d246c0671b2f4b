// A small line chart: gaps where there is no value, a step's values where one points.

const WIDTH = 480, HEIGHT = 200, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;

export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function limits(curves) {
  const known = curves.flatMap((curve) => curve.values).filter((value) => value !== null);
  if (!known.length) return null;
  let low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  return [low, high];
}

function path(steps, values, across, up) {
  let words = "", isDrawing = false;
  values.forEach((value, index) => {
    if (value === null) { isDrawing = false; return; }
    const point = `${across(steps[index]).toFixed(1)} ${up(value).toFixed(1)}`;
    // A value between two gaps would be a line of no length, and so is drawn as a dot.
    words += isDrawing ? `L${point}` : `M${point}h.01`;
    isDrawing = true;
  });
  return words;
}

// A card with a title, its unit, the curves and a legend that shows the newest or the pointed-at values.
export function chart(title, unit, steps, curves) {
  const card = element("section", {class: "card"}, element("h2", {}, `${title} (${unit})`));
  const range = limits(curves);
  if (!range) {
    card.append(element("p", {class: "soft"}, "nothing yet"));
    return card;
  }
  const [low, high] = range, first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
  const across = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
  const up = (value) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low);
  const svg = drawn("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} in ${unit}, by step`});
  for (const share of [0, 0.5, 1]) {
    const value = low + share * (high - low), y = up(value);
    svg.append(drawn("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y}),
      drawn("text", {x: LEFT - 5, y: y + 4, "text-anchor": "end"}, number(value)));
  }
  svg.append(drawn("text", {x: LEFT, y: HEIGHT - 6}, `step ${first.toLocaleString("en")}`),
    drawn("text", {x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end"}, steps[steps.length - 1].toLocaleString("en")));
  curves.forEach((curve, index) =>
    svg.append(drawn("path", {class: `curve s${index % 7}`, d: path(steps, curve.values, across, up)})));
  const cursor = drawn("line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  svg.append(cursor);
  const legend = element("div", {class: "legend"});
  const show = (index) => {
    legend.replaceChildren(...curves.map((curve, order) => element("span", {},
      element("i", {class: `s${order % 7}`}), `${curve.name} ${number(curve.values[index])}`)));
    if (index !== steps.length - 1) legend.prepend(element("span", {}, `step ${steps[index].toLocaleString("en")}:`));
  };
  show(steps.length - 1);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const near = steps.reduce((best, step, index) => Math.abs(step - at) < Math.abs(steps[best] - at) ? index : best, 0);
    for (const key of ["x1", "x2"]) cursor.setAttribute(key, across(steps[near]));
    cursor.setAttribute("visibility", "visible");
    show(near);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    show(steps.length - 1);
  });
  card.append(svg, legend);
  return card;
}
