"use strict";
// The page of a look. All data stands in this file: `meta` (names, sizes, words) and `arrays` (numbers, deflated).
// Weights are stored as the square root in 8 bits: 0.3 is round(255 * sqrt(0.3)), so small weights keep their digits.

const $ = (id) => document.getElementById(id);
const meta = JSON.parse($("meta").textContent);
const arrays = {};
const state = { screen: "flow", token: 0, layer: 0, head: -1, patch: -1, column: 0 };
const L = meta.layers, H = meta.heads.length, A = meta.answer.length, P = meta.patches, g = meta.grid, n = meta.images;

async function decode() {
  const packed = Uint8Array.from(atob($("arrays").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  for (const [name, a] of Object.entries(meta.arrays)) {
    arrays[name] = new kinds[a.dtype](bytes.slice(a.offset, a.offset + a.bytes));
  }
}
const WEIGHTS = Float64Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);
const weight = (byte) => WEIGHTS[byte];
const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + "%";
const readable = (text) => text.replace(/\n/g, "\u21b5") || "\u2205";

function element(kind, text, attributes = {}) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text; // never innerHTML: tokens and prompts may hold anything
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function table(head, rows) {
  const made = element("table"), top = element("tr");
  for (const name of head) top.append(name ? element("th", name, { scope: "col" }) : element("td"));
  made.append(top);
  for (const row of rows) {
    const line = element("tr");
    for (const cell of row) line.append(cell instanceof Node ? cell : element("td", cell));
    made.append(line);
  }
  return made;
}

// ---------------------------------------------------------------------------------------------- maps over the picture

const pictures = [];
async function openPictures() {
  for (const source of meta.pictures) {
    const image = new Image();
    image.src = source;
    await image.decode();
    pictures.push(image);
  }
}

const SIDE = 640, GAP = n > 1 ? 16 : 0; // of a picture on its canvas; it is shown smaller, so words are sharp
const cell = SIDE / g;

// Pictures side by side, and over every patch a number in [0, 1], on an absolute scale: 0 is dark, 1 is bright.
function drawMap(canvas, values, marked = [], tint = "rgb(255, 140, 60)") {
  const w = canvas.getContext("2d");
  canvas.width = n * SIDE + (n - 1) * GAP;
  canvas.height = SIDE;
  pictures.forEach((picture, image) => {
    const x0 = image * (SIDE + GAP), wide = picture.width / g, high = picture.height / g;
    w.drawImage(picture, x0, 0, SIDE, SIDE);
    w.fillStyle = "rgba(0, 0, 0, 0.62)";
    w.fillRect(x0, 0, SIDE, SIDE);
    w.fillStyle = tint;
    for (let p = 0; p < g * g; p++) {
      const value = values[image * g * g + p];
      if (!(value > 0.002)) continue;
      const column = p % g, row = Math.floor(p / g), at = [x0 + column * cell, row * cell, cell, cell];
      w.globalAlpha = Math.min(1, Math.sqrt(value) * 1.3);
      w.drawImage(picture, column * wide, row * high, wide, high, ...at);
      w.globalAlpha = Math.min(0.6, Math.sqrt(value) * 0.6);
      w.fillRect(...at);
    }
  });
  w.globalAlpha = 1;
  w.strokeStyle = "#fff";
  w.lineWidth = 2;
  for (const p of marked) w.strokeRect(left(p) + 1, above(p) + 1, cell - 2, cell - 2);
}
const left = (p) => Math.floor(p / (g * g)) * (SIDE + GAP) + (p % g) * cell, above = (p) => Math.floor((p % (g * g)) / g) * cell;
function patchAt(canvas, event) {
  const box = canvas.getBoundingClientRect(), within = (x) => Math.max(0, Math.min(g - 1, Math.floor(x)));
  const x = ((event.clientX - box.left) / box.width) * canvas.width, y = ((event.clientY - box.top) / box.height) * SIDE;
  const image = Math.min(n - 1, Math.floor(x / (SIDE + GAP)));
  return image * g * g + within(y / cell) * g + within((x - image * (SIDE + GAP)) / cell);
}
// The patch that an arrow leads to; pictures stand side by side.
function beside(p, arrow) {
  const right = { ArrowLeft: -1, ArrowRight: 1 }[arrow] || 0, down = { ArrowUp: -1, ArrowDown: 1 }[arrow] || 0;
  const x = Math.floor(p / (g * g)) * g + (p % g) + right, y = Math.floor((p % (g * g)) / g) + down;
  return x < 0 || x >= n * g || y < 0 || y >= g ? p : Math.floor(x / g) * g * g + y * g + (x % g);
}
const place = (p) => (n > 1 ? `picture ${Math.floor(p / (g * g)) + 1}, ` : "") + `row ${Math.floor((p % (g * g)) / g) + 1}, column ${(p % g) + 1}`;
function largest(values, count, name) {
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, count);
  return order.map((p) => [place(p), name(values[p])]);
}
function fillTable(id, head, rows) {
  $(id).replaceChildren(table(head, rows));
}

// ---------------------------------------------------------------------------------------------- screens

function tokenStrip(id) {
  $(id).replaceChildren(...meta.answer.map((text, t) => {
    const button = element("button", readable(text), { "aria-pressed": String(t === state.token), "data-token": t });
    button.append(element("small", percent(Math.exp(arrays.logprobs[t]))));
    button.onclick = () => go({ token: t });
    return button;
  }));
}

const EMPTY = "The answer is empty: there is no word to ask about.";

function flow() {
  fillTable("flow-table", ["step", "tensors", "ms", "code"], meta.flow.map((s) => {
    const shapes = Object.entries(s.shapes).map(([name, shape]) => `${name} [${shape.join(", ")}]`).join("; ");
    const step = element("td");
    const link = element("a", s.name, { href: "#" + s.screen });
    step.append(link);
    return [step, shapes, s.ms.toFixed(1), `${s.file} ${s.calls.join(", ")}`];
  }));
}

// Attention of the query that predicts a token: weights [L, 1 + H, A, S'], S' = patches (maybe pooled), then text. Of the
// rows of a layer the first is the mean of all heads, which is "head" -1 here.
const keys = meta.attention_patches + meta.text.length;
function weightsOf(layer, head, token) {
  const start = ((layer * (1 + H) + 1 + head) * A + token) * keys;
  return Float32Array.from(arrays.attention.subarray(start, start + keys), weight);
}
// The share on the picture of every row, [L * (1 + H)], for a token; kept, since layer and head are changed more often.
let shares = { token: -1 };
function sharesOf(token) {
  if (shares.token === token) return shares.values;
  const values = new Float32Array(L * (1 + H));
  for (let row = 0; row < values.length; row++) {
    const start = (row * A + token) * keys;
    for (let k = 0; k < meta.attention_patches; k++) values[row] += WEIGHTS[arrays.attention[start + k]];
  }
  shares = { token, values };
  return values;
}
function onPatches(found) { // pooled patches share their weight evenly
  const values = new Float32Array(P), pool = meta.pool, small = g / pool;
  for (let p = 0; p < P; p++) {
    const image = Math.floor(p / (g * g)), q = p % (g * g);
    const k = image * small * small + Math.floor(Math.floor(q / g) / pool) * small + Math.floor((q % g) / pool);
    values[p] = found[k] / (pool * pool);
  }
  return values;
}
function attention() {
  tokenStrip("attention-tokens");
  if (!A) {
    $("attention-said").textContent = EMPTY;
    return;
  }
  const grid = [], onPicture = sharesOf(state.token);
  for (let layer = 0; layer < L; layer++) {
    const row = [element("th", "layer " + layer, { scope: "row" })];
    for (let h = -1; h < H; h++) {
      const share = onPicture[layer * (1 + H) + 1 + h];
      const cell = element("td", percent(share), { class: "heat", "data-layer": layer, "data-head": h });
      cell.style.background = `rgba(var(--cell), ${0.75 * share})`;
      if (layer === state.layer && h === state.head) cell.style.outline = "2px solid var(--accent)";
      cell.onclick = () => go({ layer, head: h });
      row.push(cell);
    }
    grid.push(row);
  }
  fillTable("attention-grid", ["", "mean", ...meta.heads.map((h) => "head " + h)], grid);
  const found = weightsOf(state.layer, state.head, state.token), values = onPatches(found);
  drawMap($("attention-map"), values.map((v) => v * 4));
  const share = found.slice(0, meta.attention_patches).reduce((a, b) => a + b, 0);
  $("attention-said").textContent = `Predicting ${JSON.stringify(meta.answer[state.token])}: layer ${state.layer}, ` +
    (state.head < 0 ? "mean of the heads" : "head " + meta.heads[state.head]) + `. ${percent(share)} is on the picture.`;
  const words = meta.text.map((text, i) => [readable(text), found[meta.attention_patches + i]]).filter((w) => w[1] > 0.005);
  words.sort((a, b) => b[1] - a[1]);
  fillTable("attention-words", ["text attended", "weight"], words.slice(0, 10).map(([t, v]) => [t, percent(v)]));
  fillTable("attention-table", ["patch", "weight"], largest(values, 10, percent));
}

const wordOf = (layer, p) => readable(meta.words[arrays.words[layer * P + p]]);
const wordProbability = (layer, p) => percent(weight(arrays.word_probability[layer * P + p]));
let wordsShown = -1; // the layer of the table of all words, which is filled anew for another layer only
function words() {
  const range = $("words-layer");
  range.value = state.layer;
  $("words-said").textContent = (state.layer === 0 ? "Before the first layer." : `After ${state.layer} of ${L} layers.`) +
    (state.patch < 0 ? "" : ` The patch at ${place(state.patch)}: ${wordOf(state.layer, state.patch)}, ${wordProbability(state.layer, state.patch)}.`);
  const canvas = $("words-map"), w = canvas.getContext("2d");
  drawMap(canvas, new Float32Array(P).fill(0.12), state.patch >= 0 ? [state.patch] : [], "transparent");
  w.textAlign = "center";
  w.textBaseline = "middle";
  w.fillStyle = "#fff";
  for (let p = 0; p < P; p++) {
    const text = meta.words[arrays.words[state.layer * P + p]].trim();
    w.font = Math.max(8, Math.min(cell / 2.2, (1.7 * cell) / Math.max(1, text.length))) + "px system-ui, sans-serif";
    w.fillText(text, left(p) + cell / 2, above(p) + cell / 2, cell - 2);
  }
  const chosen = Math.max(0, state.patch);
  fillTable("words-table", ["state", `patch at ${place(chosen)}`, "probability"], [...Array(L + 1).keys()].map((layer) => [
    layer === 0 ? "embedded" : `after ${layer} of ${L} layers`,
    wordOf(layer, chosen),
    wordProbability(layer, chosen),
  ]));
  if (wordsShown === state.layer) return;
  wordsShown = state.layer;
  fillTable("words-all", ["", ...[...Array(g).keys()].map((column) => "column " + (column + 1))], [...Array(n * g).keys()].map((row) => [
    element("th", place(row * g).split(", column")[0], { scope: "row" }),
    ...[...Array(g).keys()].map((column) => wordOf(state.layer, row * g + column)),
  ]));
}

function knockOut() {
  tokenStrip("knock-out-tokens");
  if (!meta.arrays.drop || !A) {
    $("knock-out-said").textContent = meta.left_out["knock-out"] || EMPTY;
    document.querySelector("#knock-out .side").hidden = true;
    return;
  }
  const drops = new Float32Array(P);
  for (let p = 0; p < P; p++) drops[p] = arrays.drop[p * A + state.token];
  const most = Math.max(...drops);
  drawMap($("knock-out-map"), drops.map((d) => Math.max(0, d) / 10), state.patch >= 0 ? windowOf(state.patch) : []);
  const at = state.patch >= 0 ? ` Without the marked window: ${drops[state.patch].toFixed(2)} nats, ` +
    `${percent(Math.exp(arrays.logprobs[state.token]))} becomes ${percent(Math.exp(arrays.logprobs[state.token] - drops[state.patch]))}.` : "";
  $("knock-out-said").textContent = `${JSON.stringify(meta.answer[state.token])} loses at most ${most.toFixed(2)} nats (full brightness: 10).` + at;
  fillTable("knock-out-table", ["window around", "lost, nats"], largest(drops.map((d, p) => (isFirst(p) ? d : -Infinity)), Math.min(10, n * k * k), (d) => d.toFixed(2)));
}
// A block is one patch, or, in a coarse grid of k x k, all patches that were replaced together.
const k = meta.knock_out_grid, blockOf = (x) => Math.floor((x * k) / g), firstOf = (block) => Math.ceil((block * g) / k);
function windowOf(p) {
  const half = Math.floor(meta.window / 2), image = Math.floor(p / (g * g)), q = p % (g * g), found = [];
  const within = (x) => [Math.max(0, firstOf(blockOf(x)) - half), Math.min(g, firstOf(blockOf(x) + 1) + half)];
  const [top, bottom] = within(Math.floor(q / g)), [left, right] = within(q % g);
  for (let row = top; row < bottom; row++) for (let column = left; column < right; column++) found.push(image * g * g + row * g + column);
  return found;
}
// Of each block its first patch, so that a table names it once.
const isFirst = (p) => [Math.floor((p % (g * g)) / g), p % g].every((x) => firstOf(blockOf(x)) === x);

function locations() {
  const boxes = [...new Set(meta.edges.map((e) => e.box))];
  if (!boxes.length) {
    $("locations-said").textContent = "This answer has no locations.";
    return;
  }
  $("locations-boxes").replaceChildren(...boxes.map((b) => {
    const button = element("button", "box " + (b + 1), { "aria-pressed": String(b === (state.column % boxes.length)) });
    button.onclick = () => go({ column: b });
    return button;
  }));
  const canvas = $("locations-map"), w = canvas.getContext("2d"), margin = 120;
  canvas.width = canvas.height = SIDE + 2 * margin;
  w.drawImage(pictures[0], margin, margin, SIDE, SIDE);
  const shown = meta.edges.filter((e) => e.box === state.column % boxes.length), at = {};
  w.strokeStyle = w.fillStyle = "rgb(255, 140, 60)";
  for (const edge of shown) {
    const row = meta.edges.indexOf(edge), highest = Math.max(1, ...arrays.mass.slice(row * 1024, row * 1024 + 1024));
    at[edge.name] = margin + (edge.mean / 1024) * SIDE;
    for (let bin = 0; bin < 1024; bin++) {
      const length = weight(arrays.mass[row * 1024 + bin]) / weight(highest) * (margin - 12), from = margin + (bin / 1024) * SIDE, wide = 2;
      if (edge.name === "x0") w.fillRect(from, margin - length, wide, length);
      if (edge.name === "x1") w.fillRect(from, margin + SIDE, wide, length);
      if (edge.name === "y0") w.fillRect(margin - length, from, length, wide);
      if (edge.name === "y1") w.fillRect(margin + SIDE, from, length, wide);
    }
  }
  w.lineWidth = 3;
  w.strokeRect(at.x0, at.y0, at.x1 - at.x0, at.y1 - at.y0);
  fillTable("locations-table", ["edge", "mean, px", "spread, px"], shown.map((e) => [e.name, e.pixels.toFixed(1), e.pixel_spread.toFixed(1)]));
}

function heat(id, names, columns, value) {
  fillTable(id, ["", ...columns], names.map((name, r) => [element("th", name, { scope: "row" }), ...columns.map((_, c) => {
    const v = value(r, c), cell = element("td", v.toFixed(2).replace("-0.00", "0.00"), { class: "heat" });
    cell.style.background = `rgba(var(--cell), ${Math.max(0, Math.min(1, v)) * 0.75})`;
    return cell;
  })]));
}
const layerNames = () => [...Array(L).keys()].map((layer) => "layer " + layer);
function routes() {
  $("routes-tokens").replaceChildren(...meta.routes.map((r, i) => {
    const button = element("button", readable(meta.answer[r.token]), { "aria-pressed": String(i === state.column % meta.routes.length) });
    button.onclick = () => go({ column: i });
    return button;
  }));
  if (!meta.routes.length) {
    $("routes-said").textContent = meta.left_out.routes || EMPTY;
    $("routes-said").hidden = false;
    return;
  }
  const chosen = state.column % meta.routes.length, route = meta.routes[chosen];
  let start = 0;
  for (let i = 0; i < chosen; i++) start += meta.routes[i].names.length * L;
  heat("routes-table", route.names.map((x) => x.replace("->", " \u2192 ")), layerNames(), (r, c) => arrays.routes[start + r * L + c]);
}
function compare() {
  if (!meta.compare) return;
  $("compare-said").textContent = meta.compare.said;
  heat("compare-table", meta.compare.names, layerNames(), (r, c) => arrays.restored[r * L + c]);
  const values = new Float32Array(P);
  for (let p = 0; p < P; p++) values[p] = Math.max(0, arrays.per_patch[Math.min(state.layer, L - 1) * P + p]);
  drawMap($("compare-map"), values);
  $("compare-map-said").textContent = `Single patches, put in before layer ${Math.min(state.layer, L - 1)}.`;
  fillTable("compare-patches", ["patch", "restored"], largest(values, 10, (v) => v.toFixed(2)));
}

// ---------------------------------------------------------------------------------------------- the view and its link

const screens = { flow, attention, words, "knock-out": knockOut, locations, routes, compare };
function draw() {
  for (const section of document.querySelectorAll("section")) section.classList.toggle("shown", section.id === state.screen);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.screen === state.screen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const start = performance.now(), focused = document.activeElement, buttons = focused.parentElement;
  screens[state.screen]();
  if (!focused.isConnected && buttons.isConnected) buttons.querySelector('[aria-pressed="true"]')?.focus({ preventScroll: true });
  document.documentElement.dataset.ms = (performance.now() - start).toFixed(2);
}
function go(change) {
  Object.assign(state, change);
  draw();
  writeLinkIn(0);
}
// Once for all changes of a moment. Browsers take a limited number of addresses in some seconds, and pass over or refuse
// more; then it is written again a second later, until the address is that of the view.
let willWrite = false;
function writeLinkIn(ms) {
  if (willWrite) return;
  willWrite = true;
  setTimeout(() => {
    const { screen, token, layer, head, patch, column } = state;
    const link = `#${screen}?token=${token}&layer=${layer}&head=${head}&patch=${patch}&column=${column}`;
    willWrite = false;
    try {
      if (location.hash !== link) history.replaceState(null, "", link);
    } catch (error) {
      if (error.name !== "SecurityError") throw error;
    }
    if (location.hash !== link) writeLinkIn(1000);
  }, ms);
}
function fromLink() {
  const [screen, query] = location.hash.slice(1).split("?");
  if (screens[screen] && $(screen)) state.screen = screen;
  for (const [name, value] of new URLSearchParams(query)) if (name in state && name !== "screen" && Number.isInteger(+value)) state[name] = +value;
  const within = (x, low, high) => Math.max(low, Math.min(high, x));
  state.token = within(state.token, 0, Math.max(0, A - 1));
  state.layer = within(state.layer, 0, state.screen === "words" ? L : L - 1);
  state.head = within(state.head, -1, H - 1);
  state.patch = within(state.patch, -1, P - 1);
  state.column = Math.max(0, state.column);
}
const maps = ["words-map", "knock-out-map"]; // whose patches can be chosen
const uses = { attention: ["token", "layer"], words: ["layer"], "knock-out": ["token"], compare: ["layer"] }; // on others arrows scroll
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, summary")) return;
  const last = state.screen === "words" ? L : L - 1, step = { ArrowLeft: ["token", -1], ArrowRight: ["token", 1], ArrowUp: ["layer", -1], ArrowDown: ["layer", 1] }[event.key];
  if (step && maps.includes(event.target.id)) {
    go({ patch: state.patch < 0 ? 0 : beside(state.patch, event.key) });
    event.preventDefault();
  } else if (step) {
    if (!uses[state.screen]?.includes(step[0])) return;
    const [name, by] = step, most = name === "token" ? Math.max(0, A - 1) : last;
    go({ [name]: Math.max(0, Math.min(most, state[name] + by)) });
    event.preventDefault();
  } else if (/^[0-9]$/.test(event.key) && meta.heads.includes(+event.key)) go({ head: meta.heads.indexOf(+event.key) });
  else if (event.key === "m") go({ head: -1 });
});
window.addEventListener("hashchange", () => { fromLink(); go({}); }); // the links of the screens name the screen alone
for (const id of maps) $(id).onclick = (event) => go({ patch: patchAt($(id), event) });
$("words-map").onmousemove = (event) => { const patch = patchAt($("words-map"), event); if (patch !== state.patch) go({ patch }); };
$("words-layer").oninput = (event) => go({ layer: +event.target.value });

(async () => {
  await decode();
  await openPictures();
  $("words-layer").max = L;
  state.layer = L - 1;
  fromLink();
  go({}); // so that the way back leads to this view
  document.documentElement.dataset.ready = "1";
})();
