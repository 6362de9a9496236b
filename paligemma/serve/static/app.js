// The page: one picture, one task, one answer.
//
// `running` is the request that is being answered. Whatever arrives for another one is dropped: after Stop, after a new
// picture, after a second press. All text of models, servers and people goes into the page as text, never as markup.

import { chipField } from "./chips.js";
import { resized } from "./masks.js";
import { boxesIn, draw, itemAt, styles, withMasks } from "./overlay.js";
import { openPicture, pictureIn } from "./picture.js";
import * as server from "./server.js";
import { copy, curl, drawnPicture, save } from "./share.js";

const $ = (id) => document.getElementById(id);
let model = null; // {id} as the server tells
let picture = null; // see picture.js
let opening = 0; // counts the pictures chosen, so that a slow one does not replace a later one
let running = null; // {abort, picture, prompt}
let answered = null; // {picture, prompt, text, answer, items, style}
let chosen = -1; // the item under the pointer or the focus
let pinned = -1; // the item that was clicked

// ---------------------------------------------------------------------------------------------- the task

const chips = chipField($("chips"), $("labels"), $("label"), taskChanged);
const task = () => document.querySelector("input[name=task]:checked").value;

// The prompt that the model gets, and the field that is still empty, if one is.
function request() {
  const field = (id) => $(id).value.replace(/\s+/g, " ").trim();
  const language = field("language") || "en";
  switch (task()) {
    case "caption": return { prompt: `caption ${language}` };
    case "ask": return { prompt: `answer ${language} ${field("question")}`, lacking: !field("question") && "question" };
    case "ocr": return { prompt: "ocr" };
    case "free": return { prompt: $("free").value.trim(), lacking: !$("free").value.trim() && "free" };
    default: return { prompt: `${task()} ${chips.labels().join(" ; ")}`, lacking: !chips.labels().length && "label" };
  }
}

function taskChanged() {
  for (const field of document.querySelectorAll("[data-tasks]")) field.hidden = !field.dataset.tasks.split(" ").includes(task());
  $("prompt").textContent = request().prompt;
  const style = styles(chips.labels());
  for (const swatch of document.querySelectorAll("#labels .swatch")) swatch.style.background = style[swatch.dataset.label].css;
}

// ---------------------------------------------------------------------------------------------- the picture

async function usePicture(file, details = {}) {
  if (!file) return showError("There is no picture in this. A file or a copied picture works; an address does not: this page loads nothing from elsewhere.");
  const mine = ++opening;
  drop();
  clearAnswer();
  say("Opening the picture …");
  try {
    const opened = await openPicture(file);
    if (mine !== opening) return URL.revokeObjectURL(opened.shown);
    drop(); // of what was asked about the picture before, while this one was opened
    clearAnswer();
    if (picture) URL.revokeObjectURL(picture.shown);
    picture = { ...opened, ...details };
    const { width, height, sentWidth, sentHeight, shown, name } = picture;
    $("picture").src = shown;
    await $("picture").decode();
    if (mine !== opening) return;
    $("frame").style.setProperty("--ratio", width / height);
    $("frame").style.setProperty("--pixels", width);
    $("picture-name").textContent = `${name} · ${width} × ${height}` + (sentWidth < width ? `, sent as ${sentWidth} × ${sentHeight}` : "");
    $("empty").hidden = true;
    $("frame").hidden = $("caption").hidden = false;
    say("");
    redraw();
  } catch (error) {
    if (mine === opening) showError(error.message);
  }
}

async function useExample() {
  const blob = await server.example();
  if (!$("question").value) $("question").value = "what color is the umbrella ?";
  if (!chips.labels().length) chips.set(["book", "umbrella", "house"]);
  taskChanged();
  await usePicture(new File([blob], "example.png", { type: "image/png" }), { isExample: true });
  $("run").focus();
}

// ---------------------------------------------------------------------------------------------- one run

async function run() {
  if (running) return;
  if (task() === "detect" || task() === "segment") chips.take();
  const { prompt, lacking } = request();
  if (!picture) return say("Choose a picture first."), $("choose").focus();
  if (lacking) return say("Fill in this field first."), $(lacking).focus();
  clearAnswer();
  const controller = new AbortController(), started = performance.now();
  const mine = { abort: () => controller.abort(), picture, prompt, text: "" };
  const seconds = () => ((performance.now() - started) / 1000).toFixed(1) + " s";
  running = mine;
  showRunning(true);
  say("Waiting for the model …");
  const clock = setInterval(() => ($("clock").textContent = seconds()), 100);
  let last = null, usage = null;
  try {
    for await (const event of server.answer(model?.id ?? "", picture.data, prompt, controller.signal)) {
      if (running !== mine) return;
      const delta = event.choices?.[0]?.delta ?? {};
      if (delta.content) showPiece(mine, delta.content);
      last = delta.paligemma ?? last;
      usage = event.usage ?? usage;
    }
    if (running === mine) showAnswer(mine, last, `Done in ${seconds()}` + (usage ? `, ${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"}` : ""));
  } catch (error) {
    if (running !== mine) return;
    if (error.name === "AbortError") say(`Stopped after ${seconds()}.`);
    else showError(error.message, error.status);
  } finally {
    clearInterval(clock);
    if (running === mine) {
      running = null;
      showRunning(false);
    }
  }
}

// Closing the connection is what stops the server too.
function stop() {
  running?.abort();
}
// The same where nobody waits for the answer any more.
function drop() {
  stop();
  running = null;
  showRunning(false);
}

function showRunning(on) {
  $("run").setAttribute("aria-disabled", on); // not disabled: that would take the focus away
  if (!on && document.activeElement === $("stop")) $("run").focus();
  $("stop").hidden = $("progress").hidden = !on;
  $("text").setAttribute("aria-busy", on);
  if (!on) $("clock").textContent = "";
}

const hasBoxes = (text) => /<loc\d{4}>/.test(text);

function showPiece(mine, piece) {
  if (!mine.text) say("Writing …");
  mine.text += piece;
  $("answer").hidden = false;
  $("text").append(piece);
  if (!hasBoxes(mine.text)) return;
  const items = boxesIn(mine.text, mine.picture.width, mine.picture.height);
  answered = { ...mine, items, style: styleOf(items), answer: null };
  redraw();
}

// A label has the colour of its chip, whatever the order of the boxes.
const styleOf = (items) => styles([...(/^(detect|segment)$/.test(task()) ? chips.labels() : []), ...items.map((item) => item.label)]);

function showAnswer(mine, answer, done) {
  const { picture, prompt, text } = mine;
  $("answer").hidden = false;
  if (!answer) return showError("The server sent no result: is it another version than this page?");
  const [width, height] = answer.image_size ?? [picture.sentWidth, picture.sentHeight];
  if (width !== picture.sentWidth || height !== picture.sentHeight) {
    return showError(`The server saw ${width} × ${height} pixels where the page sent ${picture.sentWidth} × ${picture.sentHeight}: the boxes would be in the wrong place.`);
  }
  const inFile = inPixelsOf(picture, answer);
  const found = [...inFile.detections, ...inFile.segments], style = styleOf(found);
  answered = { picture, prompt, text, answer: inFile, style, items: withMasks(found, style) };
  const looked = found.length || hasBoxes(text) || /^(detect|segment)\b/.test(prompt);
  $("text").hidden = looked;
  $("raw").hidden = !looked;
  $("raw-text").textContent = text || "(nothing)";
  if (!looked && !text) $("text").textContent = "(an empty answer)";
  $("found").hidden = !looked;
  $("actions").hidden = false;
  $("score-line").hidden = !found.some((item) => typeof item.score === "number");
  const notes = [done];
  if (!looked && typeof answer.score === "number") notes.push(`score ${answer.score.toFixed(2)}`);
  if (answer.finished === false) notes.push("cut off at its limit of tokens");
  if (answer.invalid?.length) notes.push(`${answer.invalid.length} ${answer.invalid.length > 1 ? "parts" : "part"} could not be read`);
  say(notes.join(" · "));
  showRows();
}

// Boxes and masks in pixels of the file, where a smaller copy of it was sent.
function inPixelsOf({ width, height, sentWidth, sentHeight }, answer) {
  const boxes = { detections: answer.detections ?? [], segments: answer.segments ?? [] };
  if (width === sentWidth) return { ...answer, ...boxes };
  const x = width / sentWidth, y = height / sentHeight;
  const enlarged = (item) => ({
    ...item,
    box: item.box.map((edge, i) => edge * (i % 2 ? y : x)),
  });
  return { ...answer, image_size: [width, height], detections: boxes.detections.map(enlarged), segments: boxes.segments.map(enlarged) };
}

function clearAnswer() {
  answered = null;
  chosen = pinned = -1;
  for (const id of ["answer", "found", "raw", "actions", "error"]) $(id).hidden = true;
  $("text").hidden = false;
  $("text").replaceChildren();
  $("rows").replaceChildren();
  redraw();
}

// ---------------------------------------------------------------------------------------------- what was found

const shownItems = () => (answered?.items ?? []).filter((item) => item.score === null || item.score === undefined || item.score >= +$("score").value);

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showRows() {
  const items = shownItems(), all = answered?.items.length ?? 0;
  chosen = pinned = -1;
  $("score-value").textContent = (+$("score").value).toFixed(2);
  $("rows").replaceChildren(...items.map((item, i) => {
    const row = element("tr"), head = element("th"), button = element("button", undefined, "row"), swatch = element("i", undefined, "swatch");
    head.scope = "row";
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    swatch.style.background = answered.style[item.label].css;
    button.append(swatch, item.label || "(no label)");
    head.append(button);
    row.append(head, element("td", typeof item.score === "number" ? item.score.toFixed(2) : "", "number"));
    for (const edge of item.box) row.append(element("td", edge.toFixed(0), "number"));
    row.onmouseenter = button.onfocus = () => choose(i);
    row.onmouseleave = button.onblur = () => choose(pinned);
    row.onclick = () => {
      pin(i);
      $("frame").scrollIntoView({ block: "nearest" }); // on a telephone it is above the table
    };
    return row;
  }));
  for (const part of document.querySelectorAll("#found .scroll, #found .note")) part.hidden = !items.length;
  $("count").textContent = !all ? "Nothing found." : items.length < all ? `${items.length} of ${all} shown.` : "";
  redraw();
}

function choose(i) {
  if (i === chosen) return;
  chosen = i;
  [...$("rows").children].forEach((row, j) => row.classList.toggle("chosen", j === i));
  redraw();
}
function pin(i) {
  pinned = pinned === i ? -1 : i;
  [...$("rows").children].forEach((row, j) => row.querySelector("button").setAttribute("aria-pressed", j === pinned));
  choose(pinned);
}

function redraw() {
  const canvas = $("overlay"), box = canvas.getBoundingClientRect();
  if (!picture || !box.width) return;
  const density = Math.min(devicePixelRatio || 1, 4096 / Math.max(box.width, box.height));
  canvas.width = Math.round(box.width * density);
  canvas.height = Math.round(box.height * density);
  const items = shownItems();
  canvas.setAttribute("aria-label", items.length ? `Boxes: ${items.map((item) => item.label || "no label").join(", ")}. The table has their places.` : "No boxes");
  if (!items.length) return;
  const size = { width: canvas.width, height: canvas.height, scale: canvas.width / picture.width };
  draw(canvas.getContext("2d"), items, answered.style, { ...size, chosen, unit: density });
}

function pointed(event) {
  const box = $("overlay").getBoundingClientRect(), scale = picture.width / box.width;
  return itemAt(shownItems(), (event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
}

// ---------------------------------------------------------------------------------------------- messages

function say(text) {
  $("status").textContent = text;
}
function showError(text, status) {
  say("");
  $("error").textContent = text;
  $("error").hidden = false;
  if (status === 401) askForKey();
}
function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}
async function withButton(button, work) { // tells on the button itself that it is done
  const before = (button.dataset.text ??= button.textContent); // its own words, also where it still says "Copied"
  try {
    await work();
    button.textContent = "Copied";
    say("Copied.");
  } catch (error) {
    showError(error.message);
  }
  setTimeout(() => (button.textContent = before), 1500);
}

// In a new tab, opened at once: a browser would take one that opens seconds after the click for an advertisement.
async function lookInside() {
  if ($("explore").getAttribute("aria-disabled") === "true") return;
  const tab = window.open("about:blank");
  const { picture, prompt } = answered;
  $("explore").setAttribute("aria-disabled", true);
  say("Computing the look-inside page …");
  try {
    if (tab) tab.document.body.textContent = "Computing the look-inside page …";
    const address = await server.explore(picture.data, prompt);
    if (!tab) throw new Error("The browser kept the new tab from opening.");
    tab.opener = null;
    tab.location.replace(address);
    say("The look-inside page is open in a new tab.");
  } catch (error) {
    tab?.close();
    showError(error.message, error.status);
  }
  $("explore").setAttribute("aria-disabled", false);
}

// ---------------------------------------------------------------------------------------------- the server

async function connect() {
  try {
    model = await server.model();
    $("key-form").hidden = true;
    $("model").textContent = model.id;
    document.body.dataset.state = "ready";
    $("banner").hidden = !(model.paligemma?.embedded ?? model.id === "tiny");
    return true;
  } catch (error) {
    document.body.dataset.state = "waiting";
    $("model").textContent = error.status === 401 ? "needs a key" : error.message;
    if (error.status === 401) askForKey();
    else setTimeout(connect, 2000); // it may be loading its model
    return false;
  }
}

// ---------------------------------------------------------------------------------------------- events

$("form").onsubmit = (event) => { event.preventDefault(); run(); };
$("form").addEventListener("input", taskChanged);
$("stop").onclick = stop;
$("key-form").onsubmit = async (event) => {
  event.preventDefault();
  server.setKey($("key").value.trim());
  $("key").value = "";
  if (await connect()) { $("error").hidden = true; $("run").focus(); }
};
for (const id of ["choose", "replace"]) $(id).onclick = () => $("file").click();
for (const id of ["camera", "camera-again"]) $(id).onclick = () => $("camera-file").click();
for (const id of ["file", "camera-file"]) $(id).onchange = () => { const [file] = $(id).files; $(id).value = ""; if (file) usePicture(file); };
$("example").onclick = () => useExample().catch((error) => showError(error.message));

addEventListener("paste", (event) => {
  const file = pictureIn(event.clipboardData);
  if (file) { event.preventDefault(); usePicture(file); }
});
const dragsFile = (event) => ["Files", "text/uri-list"].some((type) => event.dataTransfer.types.includes(type)); // and no text
addEventListener("dragover", (event) => { if (dragsFile(event)) { event.preventDefault(); $("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  if (!dragsFile(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  usePicture(pictureIn(event.dataTransfer));
});

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  else if (event.key === "Escape") running ? stop() : pin(pinned);
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.matches("button.row")) {
    event.preventDefault();
    const row = event.target.closest("tr"), next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
    next?.querySelector("button").focus();
  }
});
$("overlay").onmousemove = (event) => { const i = pointed(event); choose(i >= 0 ? i : pinned); };
$("overlay").onmouseleave = () => choose(pinned);
$("overlay").onclick = (event) => {
  const i = pointed(event);
  pin(i >= 0 ? i : pinned);
  $("rows").children[pinned]?.scrollIntoView({ block: "nearest" }); // there are no rows while the answer is written
};
$("score").oninput = showRows;
new ResizeObserver(redraw).observe($("frame"));

// JSON with masks of the file's own size; that is the slow part, so it waits until it is asked for.
function asJson() {
  const { picture, prompt, text, answer } = answered, { width, height } = picture;
  const segments = answer.segments.map((item) => (item.mask && (item.mask.size[0] !== height || item.mask.size[1] !== width) ? { ...item, mask: resized(item.mask, width, height) } : item));
  return JSON.stringify({ image: picture.name, prompt, text, ...answer, segments }, null, 2);
}
$("copy-json").onclick = () => withButton($("copy-json"), () => copy(asJson()));
$("copy-curl").onclick = () => withButton($("copy-curl"), () => copy(curl(answered, Boolean(server.getKey()))));
$("save").onclick = () => drawnPicture($("picture"), answered.picture, shownItems(), answered.style)
  .then((drawn) => save(drawn, answered.picture.name.replace(/\.\w+$/, "") + "-answer.png"))
  .catch((error) => showError(error.message));
$("explore").onclick = lookInside;

taskChanged();
connect();
