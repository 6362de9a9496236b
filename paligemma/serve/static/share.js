// What leaves the page: JSON, a curl command, the picture with what was found on it.

import { draw } from "./overlay.js";

// Clipboards need https or localhost; elsewhere the old way still works.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("This browser does not let the page copy.");
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`; // for sh

// The same request from a terminal, with the file itself. The key is left to the environment.
export function curl({ picture, prompt }, needsKey) {
  const base = document.baseURI.replace(/\/[^/]*$/, ""), lines = [];
  if (picture.isExample) lines.push(`curl -sO ${quoted(base + "/static/example.png")}`);
  const file = `image=@"${picture.name.replace(/["\\]/g, "\\$&")}"`;
  const key = needsKey ? ` -H "Authorization: Bearer $PALIGEMMA_API_KEY"` : "";
  lines.push(`curl ${quoted(base + "/v1/answer")}${key} \\\n  -F ${quoted(file)} \\\n  --form-string ${quoted("prompt=" + prompt)}`);
  return lines.join("\n");
}

// PNG of the picture as it was sent, enlarged if it is small, so that the labels have room.
export async function drawnPicture(image, picture, items, style) {
  const longer = Math.max(picture.sentWidth, picture.sentHeight), enlarged = Math.max(1, 1024 / longer);
  const width = Math.round(picture.sentWidth * enlarged), height = Math.round(picture.sentHeight * enlarged);
  const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, width, height);
  draw(pen, items, style, { width, height, scale: width / picture.width, unit: Math.max(width, height) / 800 });
  return canvas.convertToBlob({ type: "image/png" });
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
