// One picture, one prompt, one answer; boxes are drawn over the picture.
import { AutoProcessor, PaliGemmaForConditionalGeneration, RawImage, env } from "./vendor/transformers.web.min.js";

const $ = (id) => document.getElementById(id);
const here = (name) => new URL(name, import.meta.url).href;
env.allowRemoteModels = false; // the model lies beside the page
env.allowLocalModels = true;
env.localModelPath = "./";
env.backends.onnx.wasm.wasmPaths = {
  mjs: here("vendor/ort-wasm-simd-threaded.mjs"),
  wasm: here("vendor/ort-wasm-simd-threaded.wasm"),
};

let picture; // an ImageBitmap

async function open(blob) {
  picture = await createImageBitmap(blob);
  draw([]);
}

function draw(boxes) {
  const canvas = $("canvas"), context = canvas.getContext("2d");
  const scale = Math.max(1, Math.ceil(400 / picture.width)); // a small picture would have thick lines
  canvas.width = picture.width * scale;
  canvas.height = picture.height * scale;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.lineWidth = 3;
  context.font = "16px system-ui";
  for (const { box: [x0, y0, x1, y1], label } of boxes) {
    const left = x0 * canvas.width, top = y0 * canvas.height;
    context.strokeStyle = "#d00";
    context.strokeRect(left, top, (x1 - x0) * canvas.width, (y1 - y0) * canvas.height);
    context.fillStyle = "#d00";
    context.fillRect(left, top, context.measureText(label).width + 8, 20);
    context.fillStyle = "#fff";
    context.fillText(label, left + 4, top + 15);
  }
}

// "<loc0123><loc0456><loc0789><loc1000> book ; ..." -> boxes in shares of the picture. The order is y0 x0 y1 x1.
function boxesIn(text) {
  return [...text.matchAll(/<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>([^;<]*)/g)].map((found) => {
    const [y0, x0, y1, x1] = found.slice(1, 5).map((bin) => Number(bin) / 1024);
    return { box: [x0, y0, x1, y1], label: found[5].trim() };
  });
}

async function answer(processor, model, prompt) {
  const canvas = new OffscreenCanvas(picture.width, picture.height), context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, picture.width, picture.height).data;
  const image = new RawImage(pixels, picture.width, picture.height, 4).rgb();
  const inputs = await processor(image, "<image>" + prompt);
  const ids = await model.generate({ ...inputs, max_new_tokens: 128, do_sample: false });
  const own = ids.slice(null, [inputs.input_ids.dims[1], null]);
  return processor.batch_decode(own, { skip_special_tokens: false })[0].replace("<eos>", "").trim();
}

async function main() {
  await open(await (await fetch("scene.png")).blob());
  const processor = await AutoProcessor.from_pretrained("tiny");
  const model = await PaliGemmaForConditionalGeneration.from_pretrained("tiny", { dtype: "q8", device: "wasm" });
  $("file").onchange = (event) => open(event.target.files[0]);
  $("form").onsubmit = async (event) => {
    event.preventDefault();
    $("run").disabled = true;
    $("answer").textContent = "...";
    const text = await answer(processor, model, $("prompt").value.trim());
    const boxes = boxesIn(text);
    draw(boxes);
    $("answer").textContent = boxes.length ? `${boxes.length} found: ${boxes.map((b) => b.label).join(", ")}` : text;
    document.documentElement.dataset.answer = text;
    $("run").disabled = false;
  };
  $("answer").textContent = "";
  $("run").disabled = false;
  document.documentElement.dataset.ready = "1";
}

main().catch((error) => { $("answer").textContent = `It does not run here: ${error.message}`; });
