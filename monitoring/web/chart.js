// Line chart with gaps for missing values; the legend shows the values at the pointer.

const WIDTH = 480, HEIGHT = 200, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;

export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svgElement(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function valueRange(curves) {
  const known = curves.flatMap((curve) => curve.values).filter((value) => value !== null);
  if (!known.length) return null;
  let low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  return [low, high];
}

function path(steps, values, toX, toY) {
  let commands = "", isDrawing = false;
  values.forEach((value, index) => {
    if (value === null) { isDrawing = false; return; }
    const point = `${toX(steps[index]).toFixed(1)} ${toY(value).toFixed(1)}`;
    // A value between two gaps is drawn as a dot: a line of length 0.01.
    commands += isDrawing ? `L${point}` : `M${point}h.01`;
    isDrawing = true;
  });
  return commands;
}

// A card with title, unit, curves, and a legend that shows the newest values or those at the pointer.
export function chart(title, unit, steps, curves) {
  const heading = unit ? `${title} (${unit})` : title;
  const card = element("section", {class: "card"}, element("h2", {}, heading));
  const range = valueRange(curves);
  if (!range) {
    card.append(element("p", {class: "soft"}, "no data yet"));
    return card;
  }
  const [low, high] = range, first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
  const toX = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
  const toY = (value) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low);
  const svg = svgElement("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${heading} by step`});
  for (const fraction of [0, 0.5, 1]) {
    const value = low + fraction * (high - low), y = toY(value);
    svg.append(svgElement("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y}),
      svgElement("text", {x: LEFT - 5, y: y + 4, "text-anchor": "end"}, number(value)));
  }
  svg.append(svgElement("text", {x: LEFT, y: HEIGHT - 6}, `step ${first.toLocaleString("en")}`),
    svgElement("text", {x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end"}, steps[steps.length - 1].toLocaleString("en")));
  curves.forEach((curve, index) =>
    svg.append(svgElement("path", {class: `curve s${index % 7}`, d: path(steps, curve.values, toX, toY)})));
  const cursor = svgElement("line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
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
    const pointed = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const distance = (step) => Math.abs(step - pointed);
    const nearest = steps.reduce((best, step, index) => distance(step) < distance(steps[best]) ? index : best, 0);
    for (const key of ["x1", "x2"]) cursor.setAttribute(key, toX(steps[nearest]));
    cursor.setAttribute("visibility", "visible");
    show(nearest);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    show(steps.length - 1);
  });
  card.append(svg, legend);
  return card;
}
