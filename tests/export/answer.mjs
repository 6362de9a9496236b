// Answers prompts about one picture with transformers.js, from a folder that `paligemma export` wrote.
//
//   node answer.mjs FOLDER DTYPE PICTURE PROMPT...     run where node_modules has @huggingface/transformers
//
// Prints one line of JSON: the pixels as the processor made them, and for each prompt its ids and those of the answer.
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.cwd(), "node_modules", "x.js"));
const entry = pathToFileURL(require.resolve("@huggingface/transformers"));
const { AutoProcessor, PaliGemmaForConditionalGeneration, RawImage, env } = await import(entry);

const [folder, dtype, picture, ...prompts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
const name = path.basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const model = await PaliGemmaForConditionalGeneration.from_pretrained(name, { dtype });
const image = await RawImage.read(picture);
const answers = [];
let pixels;
for (const prompt of prompts) {
  const inputs = await processor(image, "<image>" + prompt);
  pixels = inputs.pixel_values;
  const ids = await model.generate({ ...inputs, max_new_tokens: 40, do_sample: false });
  const length = inputs.input_ids.dims[1];
  const all = Array.from(ids.data, Number);
  answers.push({ prompt: all.slice(0, length), answer: all.slice(length) });
}
console.log(JSON.stringify({ shape: pixels.dims, pixels: Array.from(pixels.data), answers }));
