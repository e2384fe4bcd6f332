// The page of a report: what is shown of a trial, selection everywhere at once, legends, copying, and the live page.

const signed = (alpha) => (alpha === 0 ? "0" : (alpha > 0 ? "+" : "−") + Math.abs(alpha).toFixed(3));
const place = (trial) => `${trial.base.label}, epoch ${trial.epoch}, alpha ${signed(trial.alpha)}`;
const shown = (value, step) => value.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step))))).replace("-", "−");

function read() {
  data = JSON.parse(document.getElementById("data").textContent);
  trials = data.trials.map(([number, base, epoch, alpha, walk, front, marks, values, texts]) => ({
    number, base: { ...data.bases[base], index: base }, epoch, alpha, walk, front: Boolean(front), marks, values, texts,
  }));
  places = new Map(trials.map((trial) => [trial.number, trial]));
}

// ---- what is shown of a trial ----

function facts(parent, trial, before) {
  const list = make("div", { class: "facts" }, parent);
  data.columns.forEach((head, at) => {
    make("span", {}, list, head);
    make("span", { class: "n" }, list, trial.texts[at]);
    if (before) make("span", { class: "n note" }, list, data.initial && data.initial[at] !== "–" ? `was ${data.initial[at]}` : "");
  });
}

const command = (trial) => `uipe export ${data.export[0]} --trial ${trial.number} --to ${data.export[1]}${trial.number} --as model`;

function showTip(node, trial) {
  const tip = document.getElementById("tip");
  tip.replaceChildren();
  make("b", {}, tip, `trial ${trial.number}`);
  make("div", {}, tip, [place(trial), ...trial.marks].join(" · "));
  facts(tip, trial, false);
  tip.hidden = false;
  const box = node.getBoundingClientRect(), width = tip.offsetWidth, height = tip.offsetHeight, wide = document.documentElement.clientWidth;
  const left = box.right + 10 + width < wide ? box.right + 10 : Math.max(4, Math.min(wide - width - 4, box.left - 10 - width));
  const top = box.top > height + 8 ? box.top - height - 6 : box.bottom + 8;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

function showSelected() {
  const box = document.getElementById("selected"), trial = places.get(state.selected);
  if (!box) return;
  box.replaceChildren();
  if (!trial) {
    make("p", { class: "note" }, box, "Select a point of a chart, or the number of a trial in a table, to see what it says and how to export it.");
    return;
  }
  make("h3", {}, box, `Trial ${trial.number}`);
  make("p", {}, box, [place(trial), trial.front ? "on the front" : "not on the front", ...trial.marks].join(" · "));
  facts(box, trial, true);
  const line = make("div", { class: "command" }, box);
  make("code", { tabindex: 0 }, line, command(trial));
  make("button", { type: "button", class: "copy" }, line, "Copy");
  const texts = data.answers && data.answers.trials[trial.number];
  if (!texts) {
    if (data.answers) make("p", { class: "note" }, box, "Its answers are not in this page.");
    return;
  }
  // One answer of each kind at once, the others on demand.
  const first = new Set(), list = make("dl", {}, box), more = make("details", {}, box);
  make("summary", {}, more, "More answers");
  const others = make("dl", {}, more);
  data.answers.items.forEach(([role, question, , before], at) => {
    const parent = first.has(role) ? others : list;
    first.add(role);
    make("dt", {}, parent, `${role}: ${question}`);
    const said = make("dd", {}, parent, texts[at] || "(nothing)");
    make("small", {}, said, before === texts[at] ? " (as before)" : ` (was: ${before || "nothing"})`);
  });
}

function select(number) {
  state.selected = places.has(number) ? number : null;
  for (const node of document.querySelectorAll("[data-trial]")) {
    const chosen = Number(node.dataset.trial) === state.selected;
    if (node.localName === "tr") chosen ? node.setAttribute("aria-current", "true") : node.removeAttribute("aria-current");
    else node.setAttribute("aria-pressed", chosen);
    if (chosen && node.localName === "path" && !node.matches(":focus")) node.parentNode.append(node);
  }
  showSelected();
}

// ---- legends and tools ----

function toggle(parent, name, { shape, colour, title }) {
  const button = make("button", { type: "button", class: "toggle", "aria-pressed": visible(name), title: title || "show or hide" }, parent);
  const mark = make("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, button);
  const open = ["cross", "plus", "tee"].includes(shape);
  make("path", { d: SHAPES[shape](5.5), style: open ? `fill: none; stroke: ${colour}; stroke-width: 2` : `fill: ${colour}` }, mark);
  button.append(name);
  button.addEventListener("click", () => {
    visible(name) ? state.hidden.add(name) : state.hidden.delete(name);
    button.setAttribute("aria-pressed", visible(name));
    drawAll();
  });
}

function press(parent, text, action, pressed) {
  const button = make("button", { type: "button", class: "toggle choice", "aria-pressed": pressed }, parent, text);
  button.addEventListener("click", action);
}

function zoomBy(factor) {
  const whole = frontWindow(false);
  for (const [key, side] of [["forgetting", "x"], ["utility", "y"]]) {
    const [low, high] = state.windows[key] || whole[side], middle = (low + high) / 2, half = ((high - low) / 2) * factor;
    state.windows[key] = [middle - half, middle + half];
  }
  drawAll();
}

function drawTools() {
  const front = document.getElementById("front-tools"), curves = document.getElementById("curve-tools");
  if (front) {
    front.replaceChildren();
    data.methods.forEach((name, n) => toggle(front, name, { shape: "circle", colour: `var(--method-${n % 8})` }));
    make("span", { class: "gap" }, front);
    data.walks.forEach((walk, n) => trials.some((trial) => trial.walk === n) && toggle(front, walk.name, { shape: walk.shape, colour: "var(--muted)" }));
    data.controls.forEach((control, kind) => data.controlled.some((each) => each[0] === kind) && toggle(front, control.name, { shape: control.shape, colour: "var(--muted)" }));
    make("span", { class: "gap" }, front);
    const zoomTo = (window_) => () => { state.windows.forgetting = window_ && window_.x; state.windows.utility = window_ && window_.y; drawAll(); };
    press(front, "All trials", zoomTo(null));
    press(front, "The front", zoomTo(frontWindow(true)));
    press(front, "Zoom in", () => zoomBy(0.6));
    press(front, "Zoom out", () => zoomBy(1 / 0.6));
    if (data.objectives[THIRD]) {
      const colouring = (byThird) => () => { state.byThird = byThird; drawTools(); drawAll(); };
      press(front, "Colour: method", colouring(false), !state.byThird);
      press(front, `Colour: ${data.objectives[THIRD].title}`, colouring(true), state.byThird);
      const range = padded(trials.map((trial) => trial.values[THIRD]), 0, 0);
      if (state.byThird) {
        const scale = make("span", { class: "scale" }, front, range[0].toFixed(3).replace("-", "−"));
        make("i", {}, scale);
        scale.append(range[1].toFixed(3).replace("-", "−"));
      }
    }
  }
  if (curves) {
    curves.replaceChildren();
    const epochs = [...new Set(trials.map((trial) => trial.epoch))].sort((a, b) => a - b);
    epochs.forEach((epoch, n) => toggle(curves, `epoch ${epoch}`, { shape: "circle", colour: onScale(epochs.length > 1 ? n / (epochs.length - 1) : 1) }));
    press(curves, "Whole range", () => { for (const key of ["alpha", "alpha 0", "alpha 1"]) delete state.windows[key]; drawAll(); });
  }
}

function drawAll() {
  hideTip();
  drawFront();
  drawCurves();
}

// ---- the page ----

async function copy(button) {
  const text = button.parentNode.querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { readonly: "" }, document.body);
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function start() {
  if (!document.getElementById("data")) return;
  read();
  if (state.byThird === null) state.byThird = Boolean(data.objectives[THIRD]);
  drawTools();
  drawAll();
  select(state.selected === null ? data.recommended : state.selected);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy, button.pick");
  if (button && button.matches(".copy")) copy(button);
  else if (button) select(Number(button.dataset.trial));
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width && document.getElementById("data")) { width = window.innerWidth; drawAll(); } });
start();

// Served by `uipe watch`, the page asks for itself again and takes over what has changed; selection and zoom stay.
async function refresh() {
  const answer = await fetch(window.location.href, { cache: "no-store", headers: state.tag ? { "If-None-Match": state.tag } : {} });
  if (answer.status !== 200) return;
  state.tag = answer.headers.get("ETag");
  const page = new DOMParser().parseFromString(await answer.text(), "text/html"), top = window.scrollY;
  const focused = document.activeElement.closest("[data-trial]"), host = focused && focused.closest("[id]").id;
  document.querySelector("main").replaceWith(page.querySelector("main"));
  start();
  const again = focused && document.querySelector(`#${host} [data-trial="${focused.dataset.trial}"]`);
  if (again) again.focus({ preventScroll: true });
  window.scrollTo(0, top);
}
const seconds = Number(document.body.dataset.live);
if (seconds) setInterval(() => refresh().catch(() => { document.body.dataset.lost = "yes"; }), 1000 * seconds);
