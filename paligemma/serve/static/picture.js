// A picture, and the bytes of it that are sent.
//
// Server and page must mean the same pixels. JPEG and PNG files go as they are: both sides turn a JPEG upright by its EXIF
// orientation and put transparent pixels on white. Anything else is drawn on a canvas first, as this browser sees it:
// browsers do not agree on the orientation of PNG and WebP files, and of an animation only the first frame is meant.
//
// A telephone's photo has 12 to 200 million pixels, while the model looks at 896 x 896 at most. Above LONGEST the page
// sends a smaller copy: less to upload, and below the server's limits. Everything the page tells is then converted back
// to the pixels of the file.

const LONGEST = 2048; // pixels of the longer side
const MOST_BYTES = 8e6;

const goesAsItIs = async (file) => file.size <= MOST_BYTES &&
  (file.type === "image/jpeg" || (file.type === "image/png" && !(await file.text()).includes("eXIf")));

// {name, width, height: of the file, upright; sentWidth, sentHeight; shown: URL for an <img>; data: the data: URL to send}
export async function openPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name || "This"} is not a picture that this browser can show, or too large for it. JPEG, PNG and WebP always work.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const sentWidth = Math.max(1, Math.round(width * scale)), sentHeight = Math.max(1, Math.round(height * scale));
  const sent = scale === 1 && (await goesAsItIs(file)) ? file : await redrawn(bitmap, sentWidth, sentHeight, file.type);
  bitmap.close();
  const name = file.name || "picture";
  return { name, width, height, sentWidth, sentHeight, shown: URL.createObjectURL(sent), data: await dataUrl(sent) };
}

async function redrawn(bitmap, width, height, type) {
  const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // as the server does; JPEG would make transparent pixels black
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  const drawn = type === "image/png" || type === "image/gif" || type === "image/bmp";
  return canvas.convertToBlob(drawn ? { type: "image/png" } : { type: "image/jpeg", quality: 0.94 });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read. Was it moved or deleted?"));
    reader.readAsDataURL(blob);
  });
}

// The first picture among what was dropped or pasted.
export function pictureIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/") || !file.type);
}
