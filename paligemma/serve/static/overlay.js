// Boxes, masks and labels over the picture. Boxes are in pixels of the picture; `scale` takes them to the canvas.

import { tinted } from "./masks.js";

// Okabe and Ito (2008): eight colours that people with colour-blindness tell apart, black left out. More labels than
// colours repeat them with a dashed line. A colour never stands alone: each box bears its label.
const COLORS = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0], [240, 228, 66]];
const css = (color) => `rgb(${color.join(", ")})`;

// {label: {color, css, ink, dash}}, in the order in which the labels come
export function styles(labels) {
  const names = [...new Set(labels)];
  return Object.fromEntries(names.map((name, i) => {
    const color = COLORS[i % COLORS.length], [r, g, b] = color.map((v) => (v / 255) ** 2.2);
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18; // where black and white have the same contrast
    return [name, { color, css: css(color), ink: light ? "#000" : "#fff", dash: i >= COLORS.length }];
  }));
}

// The mask of each item as a picture, made once.
export function withMasks(items, style) {
  return items.map((item) => (item.mask ? { ...item, tint: tinted(item.mask, style[item.label].color) } : item));
}

// canvas context, items {label, box, score, tint}, chosen: number of the one that stands out, or -1
export function draw(pen, items, style, { width, height, scale, chosen = -1, unit = 1 }) {
  const line = 2 * unit, order = items.map((item, i) => i);
  if (chosen >= 0) order.push(order.splice(order.indexOf(chosen), 1)[0]); // on top
  for (const i of order) {
    const { tint } = items[i];
    if (!tint) continue;
    const [left, top, right, bottom] = tint.box;
    pen.globalAlpha = chosen < 0 || i === chosen ? 1 : 0.3;
    pen.drawImage(tint.canvas, left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
  for (const i of order) {
    pen.globalAlpha = chosen < 0 || i === chosen ? 1 : 0.6;
    drawBox(pen, rectangle(items[i].box, scale, width, height), style[items[i].label], i === chosen ? 1.8 * line : line);
  }
  const placed = [];
  for (const i of [...order].reverse()) {
    pen.globalAlpha = chosen < 0 || i === chosen ? 1 : 0.6;
    drawTag(pen, items[i], rectangle(items[i].box, scale, width, height), style[items[i].label], placed, { width, height, unit });
  }
  pen.globalAlpha = 1;
}

// [left, top, width, height] on the canvas, at least one pixel wide and high and never beyond the picture
function rectangle([x0, y0, x1, y1], scale, width, height) {
  const within = (value, most) => Math.max(0, Math.min(most, value * scale));
  const left = within(Math.min(x0, x1), width - 1), top = within(Math.min(y0, y1), height - 1);
  return [left, top, Math.max(1, within(Math.max(x0, x1), width) - left), Math.max(1, within(Math.max(y0, y1), height) - top)];
}

function drawBox(pen, [left, top, width, height], { css, dash }, line) {
  const inner = (by) => [left + by, top + by, Math.max(0, width - 2 * by), Math.max(0, height - 2 * by)];
  pen.setLineDash(dash ? [4 * line, 2 * line] : []);
  pen.lineJoin = "round";
  pen.strokeStyle = "rgba(0, 0, 0, 0.55)"; // a dark rim inside, so that the line is visible on its own colour
  pen.lineWidth = line / 2;
  pen.strokeRect(...inner(1.25 * line));
  pen.strokeStyle = css;
  pen.lineWidth = line;
  pen.strokeRect(...inner(line / 2));
  pen.setLineDash([]);
}

function drawTag(pen, item, [left, top, , boxHeight], { css, ink }, placed, { width, height, unit }) {
  const size = 13 * unit, high = 19 * unit, margin = 5 * unit;
  pen.font = `600 ${size}px system-ui, sans-serif`;
  const score = item.score === null || item.score === undefined ? "" : " " + item.score.toFixed(2);
  let name = [...item.label.slice(0, 80)];
  const text = () => name.join("") + (name.length < [...item.label].length ? "…" : "") + score;
  while (name.length && pen.measureText(text()).width + 2 * margin > width) name.pop();
  const wide = pen.measureText(text()).width + 2 * margin;
  const x = Math.max(0, Math.min(left, width - wide));
  const free = (y) => placed.every((p) => x + wide <= p.x || p.x + p.wide <= x || y + high <= p.y || p.y + high <= y);
  const places = [top - high, top, top + boxHeight, top + boxHeight - high, top + high, top + 2 * high];
  const inside = places.map((y) => Math.max(0, Math.min(y, height - high)));
  const y = inside.find(free) ?? inside[0];
  placed.push({ x, y, wide });
  pen.fillStyle = css;
  pen.beginPath();
  pen.roundRect(x, y, wide, high, 3 * unit);
  pen.fill();
  pen.fillStyle = ink;
  pen.textBaseline = "middle";
  pen.fillText(text(), x + margin, y + high / 2 + 0.5 * unit);
}

// The number of the smallest box around a point of the picture, or -1.
export function itemAt(items, x, y) {
  let found = -1, least = Infinity;
  items.forEach(({ box: [x0, y0, x1, y1] }, i) => {
    const area = (x1 - x0) * (y1 - y0);
    if (x >= x0 && x <= x1 && y >= y0 && y <= y1 && area < least) (found = i), (least = area);
  });
  return found;
}

// Boxes in a text that is still being written, for a first view of them: four <loc> tokens (top, left, bottom, right in
// 1/1,024 of the picture), maybe <seg> tokens, and the label. What counts is what the server reads in the end.
export function boxesIn(text, width, height) {
  return [...text.matchAll(/<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>(?:<seg\d{3}>)*([^<;]*)/g)].map((found) => {
    const [y0, x0, y1, x1] = found.slice(1, 5).map((number) => number / 1024);
    return { label: found[5].trim(), box: [x0 * width, y0 * height, x1 * width, y1 * height], score: null };
  });
}
