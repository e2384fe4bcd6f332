"use strict";
// Draw the charts of a report as SVG: axes, marks, points that can be hovered, reached by keys and selected; zoom.
// `report.js`, which follows, reads the data and holds the rest of the page. Texts are set as texts: names come from files.

const state = { selected: null, hidden: new Set(), byThird: null, windows: {}, tag: null };
let data, trials, places;

const NS = "http://www.w3.org/2000/svg";
const KEPT_UTILITY = 1, FORGETTING = 0, THIRD = 2;

function make(tag, attributes, parent, text) {
  const node = ["svg", "g", "path", "line", "rect", "text", "polyline"].includes(tag) ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Marker paths around the origin, within a radius r.
const SHAPES = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  square: (r) => `M${-r},${-r}H${r}V${r}H${-r}z`,
  up: (r) => `M0,${-1.2 * r}L${1.15 * r},${0.85 * r}H${-1.15 * r}z`,
  down: (r) => `M0,${1.2 * r}L${1.15 * r},${-0.85 * r}H${-1.15 * r}z`,
  diamond: (r) => `M0,${-1.25 * r}L${1.25 * r},0L0,${1.25 * r}L${-1.25 * r},0z`,
  cross: (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
  plus: (r) => `M${-1.2 * r},0H${1.2 * r}M0,${-1.2 * r}V${1.2 * r}`,
  tee: (r) => `M${-r},${-r}L0,0L${r},${-r}M0,0V${1.2 * r}`,
  star: (r) => "M" + [...Array(10).keys()].map((n) => {
    const length = (n % 2 ? 0.55 : 1.35) * r, angle = (n * Math.PI) / 5 - Math.PI / 2;
    return `${length * Math.cos(angle)},${length * Math.sin(angle)}`;
  }).join("L") + "z",
};

function padded(values, share, least) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return [0, 1];
  const low = Math.min(...known), high = Math.max(...known), margin = Math.max((high - low) * share, least);
  return [low - margin, high + margin];
}

function ticks([low, high], count, whole) {
  const raw = (high - low) / Math.max(1, count), unit = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((each) => each * unit).find((each) => each >= raw);
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high; at += 1) found.push(at * step);
  return { step, at: found };
}

// A plot keeps its limits in state.windows under its keys, so that they survive drawing again, and linked plots share them.
function plot(host, { keys, whole, titles, height, label, draw, whole_ticks }) {
  host.replaceChildren();
  const width = Math.max(220, host.clientWidth), margin = { left: 52, right: 12, top: titles.y ? 26 : 10, bottom: titles.x ? 42 : 24 };
  const window_ = { x: state.windows[keys.x] || whole.x, y: state.windows[keys.y] || whole.y };
  const root = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label }, host);
  const inner = { width: width - margin.left - margin.right, height: height - margin.top - margin.bottom };
  const x = (value) => margin.left + ((value - window_.x[0]) / (window_.x[1] - window_.x[0])) * inner.width;
  const y = (value) => margin.top + (1 - (value - window_.y[0]) / (window_.y[1] - window_.y[0])) * inner.height;
  const back = make("g", {}, root);
  const across = ticks(window_.x, inner.width / 75, whole_ticks), up = ticks(window_.y, inner.height / 45, false);
  for (const at of across.at) {
    make("line", { class: "grid", x1: x(at), x2: x(at), y1: margin.top, y2: height - margin.bottom }, back);
    make("text", { class: "tick", x: x(at), y: height - margin.bottom + 16, "text-anchor": "middle" }, back, shown(at, across.step));
  }
  for (const at of up.at) {
    make("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(at), y2: y(at) }, back);
    make("text", { class: "tick", x: margin.left - 7, y: y(at) + 4, "text-anchor": "end" }, back, shown(at, up.step));
  }
  if (titles.x) make("text", { x: margin.left + inner.width / 2, y: height - 6, "text-anchor": "middle" }, back, titles.x);
  if (titles.y) make("text", { x: 4, y: 15 }, back, titles.y);
  const clip = make("svg", { x: margin.left, y: margin.top, width: inner.width, height: inner.height, viewBox: `${margin.left} ${margin.top} ${inner.width} ${inner.height}`, overflow: "hidden" }, root);
  const body = make("g", {}, clip);
  draw({ body, x, y, window: window_, box: { ...margin, ...inner, right: width - margin.right, bottom: height - margin.bottom } });
  make("path", { class: "axis", d: `M${margin.left},${margin.top}V${height - margin.bottom}H${width - margin.right}`, fill: "none" }, root);
  zoomByDragging(root, { keys, x0: margin.left, y0: margin.top, ...inner, window: window_ });
}

function zoomByDragging(root, area) {
  let start = null, box = null;
  const at = (event) => {
    const frame = root.getBoundingClientRect(), scale = root.viewBox.baseVal.width / frame.width;
    const clamp = (value, most) => Math.min(most, Math.max(0, value));
    return [clamp((event.clientX - frame.left) * scale - area.x0, area.width), clamp((event.clientY - frame.top) * scale - area.y0, area.height)];
  };
  root.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" || event.button !== 0 || event.target.closest(".point")) return;
    start = at(event);
    root.setPointerCapture(event.pointerId);
  });
  root.addEventListener("pointermove", (event) => {
    if (!start) return;
    const now = at(event);
    box = box || make("rect", { class: "zoom" }, root);
    const [left, top] = [0, 1].map((n) => Math.min(start[n], now[n]));
    const sizes = { x: area.x0 + left, y: area.y0 + top, width: Math.abs(now[0] - start[0]), height: Math.abs(now[1] - start[1]) };
    for (const [name, value] of Object.entries(sizes)) box.setAttribute(name, value);
  });
  root.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [from, to] = [start, at(event)];
    start = null;
    if (box) box.remove();
    box = null;
    if (Math.abs(from[0] - to[0]) < 8 || Math.abs(from[1] - to[1]) < 8) return;
    const [wx, wy] = [area.window.x, area.window.y];
    const dx = (pixel) => wx[0] + (pixel / area.width) * (wx[1] - wx[0]), dy = (pixel) => wy[1] - (pixel / area.height) * (wy[1] - wy[0]);
    state.windows[area.keys.x] = [from[0], to[0]].sort((a, b) => a - b).map(dx);
    state.windows[area.keys.y] = [from[1], to[1]].sort((a, b) => b - a).map(dy);
    drawAll();
  });
  root.addEventListener("dblclick", () => {
    delete state.windows[area.keys.x];
    delete state.windows[area.keys.y];
    drawAll();
  });
}

// Points of a plot: one of them is reached by Tab, the others from there by the arrow keys.
function addPoints(body, points) {
  const nodes = points.sort((a, b) => a.x - b.x || a.y - b.y).map(({ trial, x, y, shape, size, colour, classes }) => {
    const node = make("path", {
      class: `point ${classes}`, d: SHAPES[shape](size), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, style: `--colour: ${colour}`,
      role: "button", tabindex: -1, "data-trial": trial.number, "aria-pressed": trial.number === state.selected,
      "aria-label": `trial ${trial.number}, ${place(trial)}: ${data.columns.map((head, n) => `${head} ${trial.texts[n]}`).join(", ")}`,
    });
    node.addEventListener("pointerenter", () => showTip(node, trial));
    node.addEventListener("pointerleave", hideTip);
    node.addEventListener("focus", () => showTip(node, trial));
    node.addEventListener("blur", hideTip);
    node.addEventListener("click", () => select(trial.number));
    return { node, trial };
  });
  for (const { node, trial } of [...nodes].sort((a, b) => a.trial.front - b.trial.front)) if (trial.number !== state.selected) body.append(node);
  for (const { node, trial } of nodes) if (trial.number === state.selected) body.append(node);
  const first = nodes.find(({ trial }) => trial.number === state.selected) || nodes[nodes.length - 1];
  if (first) first.node.setAttribute("tabindex", 0);
  body.addEventListener("keydown", (event) => {
    const now = nodes.findIndex(({ node }) => node === event.target);
    if (now < 0) return;
    const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") select(nodes[now].trial.number);
    else if (to === undefined || !nodes[to]) return;
    else {
      nodes[now].node.setAttribute("tabindex", -1);
      nodes[to].node.setAttribute("tabindex", 0);
      nodes[to].node.focus();
    }
    event.preventDefault();
  });
}

const marks = (trial) => (trial.marks.includes("flagged") || trial.marks.includes("collapsed") ? " flagged" : "");
const onScale = (share) => {
  const at = Math.min(3, Math.floor(share * 4));
  return `color-mix(in oklab, var(--scale-${at + 1}) ${Math.round((share * 4 - at) * 100)}%, var(--scale-${at}))`;
};
const visible = (...names) => names.every((name) => !state.hidden.has(name));

function frontWindow(onlyFront) {
  const named = data.controlled.filter(([kind]) => data.controls[kind].named).map(([, , , values]) => values);
  const points = [...trials.filter((trial) => trial.front || !onlyFront).map((trial) => trial.values), ...(onlyFront ? named : data.controlled.map((each) => each[3]))];
  const least = data.objectives[0].whole ? 0.4 : 0.01;
  return { x: padded(points.map((each) => each[FORGETTING]), 0.06, least), y: padded(points.map((each) => each[KEPT_UTILITY]), 0.07, 0.01) };
}

function drawFront() {
  const host = document.getElementById("front-chart");
  if (!host) return;
  const third = data.objectives[THIRD], range = third && padded(trials.map((trial) => trial.values[THIRD]), 0, 1e-9);
  const colour = (trial) => state.byThird && trial.values[THIRD] !== null ? onScale((trial.values[THIRD] - range[0]) / (range[1] - range[0])) : `var(--method-${trial.base.method % 8})`;
  plot(host, {
    keys: { x: "forgetting", y: "utility" }, whole: frontWindow(false), height: Math.round(Math.min(520, Math.max(320, host.clientWidth * 0.62))),
    titles: { x: `${data.objectives[0].title} (${data.definition})`, y: data.objectives[1].title }, whole_ticks: data.objectives[0].whole,
    label: `${data.objectives[1].title} over ${data.objectives[0].title}: arrow keys move from trial to trial, Enter selects`,
    draw({ body, x, y, window, box }) {
      if (data.ceiling !== null && data.ceiling < window.x[1]) {
        const left = Math.max(box.left, x(data.ceiling));
        make("rect", { class: "band", x: left, y: box.top, width: box.right - left, height: box.height }, body);
        if (box.right - left > 40) make("text", { class: "tick", x: (left + box.right) / 2, y: box.bottom - 8, "text-anchor": "middle" }, body, "noise");
      }
      for (const { corners } of data.surfaces) {
        const path = [...corners].reverse().map(([across, up], n) => (n ? `V${y(up)}H${x(across)}` : `M${Math.min(box.left, x(across))},${y(up)}H${x(across)}`)).join("");
        if (path) make("path", { class: "surface", d: `${path}V${box.bottom}` }, body);
      }
      const line = trials.filter((trial) => trial.front && !third).map(({ values }) => values).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
      if (line.length) make("path", { class: "front", d: line.map(([across, up], n) => (n ? `V${y(up)}H${x(across)}` : `M${x(across)},${y(up)}`)).join("") }, body);
      data.controlled.forEach(([kind, , , values, texts]) => {
        const control = data.controls[kind];
        if (!visible(control.name) || values[0] === null || values[1] === null) return;
        const node = make("path", { class: control.named ? "control named" : "control", d: SHAPES[control.shape](control.named ? 6 : 4), transform: `translate(${x(values[0])},${y(values[1])})` }, body);
        make("title", {}, node, `${control.name}: ${texts.join(", ")}`);
        if (control.named) {
          const right = x(values[0]) > box.right - 90;
          make("text", { class: "named", x: x(values[0]) + (right ? -10 : 10), y: y(values[1]) - 9, "text-anchor": right ? "end" : "start" }, body, control.name);
        }
      });
      addPoints(body, trials.filter((trial) => trial.number === state.selected || visible(data.methods[trial.base.method], data.walks[trial.walk].name)).filter(({ values }) => values[0] !== null && values[1] !== null).map((trial) => ({
        trial, x: x(trial.values[0]), y: y(trial.values[1]), shape: data.walks[trial.walk].shape, size: trial.front ? 6 : 4.5, colour: colour(trial), classes: (trial.front ? "on" : "off") + marks(trial),
      })));
    },
  });
}

function drawCurves() {
  const epochs = [...new Set(trials.map((trial) => trial.epoch))].sort((a, b) => a - b);
  const shade = (epoch) => onScale(epochs.length > 1 ? epochs.indexOf(epoch) / (epochs.length - 1) : 1);
  const random = data.controls.findIndex((control) => control.name === "random direction");
  const started = data.controlled.filter(([kind]) => data.controls[kind].named);
  const start = started.find(([kind]) => data.controls[kind].shape === "diamond");
  const alphas = padded([...trials.map((trial) => trial.alpha), trials.some((trial) => trial.alpha < 0) ? -1 : -0.02, 0.02], 0.04, 0.05);
  for (const host of document.querySelectorAll("[data-panel]")) {
    const [base, objective] = host.dataset.panel.split(" ").map(Number);
    const own = trials.filter((trial) => trial.base.index === base);
    const everything = [...trials.map((trial) => trial.values[objective]), ...data.controlled.filter(([kind]) => kind === random || data.controls[kind].named).map((each) => each[3][objective])];
    plot(host, {
      keys: { x: "alpha", y: `alpha ${objective}` }, whole: { x: alphas, y: padded(everything, 0.07, data.objectives[objective].whole ? 0.4 : 0.01) },
      height: 190, titles: { x: objective ? "alpha" : "", y: data.objectives[objective].title },
      label: `${data.objectives[objective].title} of ${data.bases[base].label} over alpha`,
      draw({ body, x, y, window, box }) {
        if (objective === FORGETTING && data.ceiling !== null && data.ceiling < window.y[1]) make("rect", { class: "band", x: box.left, y: box.top, width: box.width, height: Math.max(0, y(data.ceiling) - box.top) }, body);
        for (const at of [-1, 0]) make("line", { class: "guide", x1: x(at), x2: x(at), y1: box.top, y2: box.bottom }, body);
        if (objective === KEPT_UTILITY) started.forEach(([kind, , , values]) => {
          if (values[1] === null) return;
          const level = make("line", { class: data.controls[kind].shape === "diamond" ? "level" : "level other", x1: box.left, x2: box.right, y1: y(values[1]), y2: y(values[1]) }, body);
          make("title", {}, level, `utility of the ${data.controls[kind].name}`);
        });
        data.controlled.forEach(([kind, of, alpha, values]) => {
          if (kind !== random || of !== base || values[objective] === null || !visible(data.controls[kind].name)) return;
          make("path", { class: "control", d: SHAPES.cross(3), transform: `translate(${x(alpha)},${y(values[objective])})` }, body);
        });
        const points = [];
        for (const epoch of epochs.filter((each) => visible(`epoch ${each}`))) {
          const line = own.filter((trial) => trial.epoch === epoch && trial.values[objective] !== null).sort((a, b) => a.alpha - b.alpha);
          if (!line.length) continue;
          if (start && start[3][objective] !== null && line[0].alpha > -1 && line[0].alpha < 0)
            make("line", { class: "curve ahead", style: `stroke: ${shade(epoch)}`, x1: x(-1), y1: y(start[3][objective]), x2: x(line[0].alpha), y2: y(line[0].values[objective]) }, body);
          make("polyline", { class: "curve", style: `stroke: ${shade(epoch)}`, points: line.map((trial) => `${x(trial.alpha)},${y(trial.values[objective])}`).join(" ") }, body);
          points.push(...line.map((trial) => ({ trial, x: x(trial.alpha), y: y(trial.values[objective]), shape: "circle", size: 4, colour: shade(epoch), classes: (trial.front ? "on" : "") + marks(trial) })));
        }
        addPoints(body, points);
      },
    });
  }
}

