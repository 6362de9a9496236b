// Masks as run lengths (COCO's): counts of pixels outside, inside, outside, ..., column by column.

// -> Uint8Array, 1 inside, at x * height + y
export function decode({ size: [height, width], counts }) {
  const mask = new Uint8Array(width * height);
  let at = 0;
  counts.forEach((count, i) => {
    if (i % 2) mask.fill(1, at, at + count);
    at += count;
  });
  return mask;
}

export function encode(mask, height, width) {
  const counts = [];
  let run = 0, inside = 0;
  for (const pixel of mask) {
    if (pixel !== inside) {
      counts.push(run);
      run = 0;
      inside = pixel;
    }
    run++;
  }
  counts.push(run);
  return { size: [height, width], counts };
}

// The same mask at another size, each pixel taken from the nearest.
export function resized(rle, width, height) {
  const [oldHeight, oldWidth] = rle.size;
  const from = decode(rle), to = new Uint8Array(width * height);
  for (let x = 0; x < width; x++) {
    const column = Math.floor(((x + 0.5) * oldWidth) / width) * oldHeight;
    for (let y = 0; y < height; y++) to[x * height + y] = from[column + Math.floor(((y + 0.5) * oldHeight) / height)];
  }
  return encode(to, height, width);
}

// A mask as a picture of its own: a tint inside, a solid line along the border. null if it is empty.
export function tinted(rle, [red, green, blue]) {
  const [height, width] = rle.size, mask = decode(rle);
  let left = width, top = height, right = 0, bottom = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (!mask[x * height + y]) continue;
      left = Math.min(left, x), right = Math.max(right, x + 1), top = Math.min(top, y), bottom = Math.max(bottom, y + 1);
    }
  }
  if (right <= left) return null;
  const line = Math.max(1, Math.round(Math.sqrt(width * height) / 300));
  const outside = (x, y) => x < 0 || y < 0 || x >= width || y >= height || !mask[x * height + y];
  const pixels = new ImageData(right - left, bottom - top);
  for (let y = top, i = 0; y < bottom; y++) {
    for (let x = left; x < right; x++, i += 4) {
      if (!mask[x * height + y]) continue;
      const border = outside(x - line, y) || outside(x + line, y) || outside(x, y - line) || outside(x, y + line);
      pixels.data.set([red, green, blue, border ? 255 : 105], i);
    }
  }
  const canvas = new OffscreenCanvas(right - left, bottom - top);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return { canvas, box: [left / width, top / height, right / width, bottom / height] }; // shares of the picture
}
