"""The small world: scenes of pictograms on coloured backgrounds, with the exact truth about what is to be seen.

    scene = render(7)                       # the same picture everywhere, always
    scene.image                             # uint8 [256, 256, 3]
    scene.objects[0].label, .tint, .box, .mask

A scene is 1 to 5 pictograms and now and then a sign with short text. Pictograms are stamped one over the other; an
object's box and mask are read off its *visible* pixels, so they are exact by construction. What would make an answer
disputable (two objects that begin at the same column, a half hidden text) is not drawn.

Splits. "train", "val" and "test" have the same distribution; a seed is mixed with the name of its split (`generator`),
so the splits are disjoint streams whatever seeds are taken. 1/16 of the pairs of classes and 1/9 of the pairs of class
and tint, chosen by a hash of their names, appear in "heldout" only, where every scene has at least one of them.
"twemoji" is like "test", drawn by an artist that no other split shows.

Everything is drawn from NumPy's PCG64 and Pillow's resampling. Another processor may round a pixel's shade differently;
what is in the scene, and where, stays the same.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SPRITES = Path(__file__).with_name("sprites")

CLASSES = (
    "dog", "cat", "horse", "cow", "pig", "sheep", "elephant", "rabbit", "bird", "duck", "owl", "penguin", "fish",
    "whale", "turtle", "snake", "frog", "bee", "butterfly", "snail", "octopus", "crab", "apple", "banana", "orange",
    "pear", "lemon", "grape", "strawberry", "watermelon", "carrot", "corn", "bread", "cheese", "pizza", "hamburger",
    "cake", "donut", "car", "bus", "truck", "bicycle", "airplane", "rocket", "boat", "train", "tractor", "house",
    "tree", "flower", "tulip", "cactus", "mushroom", "star", "moon", "cloud", "heart", "ball", "balloon", "gift",
    "umbrella", "hat", "shirt", "book", "key", "clock", "guitar", "bell", "cup", "chair", "crown", "snowman",
)  # fmt: skip
LABELS = (*CLASSES, "sign")  # everything an object can be called

# Base colours of the seven tints, by which an object is called "a red car".
TINTS = {
    "red": (222, 32, 38),
    "orange": (250, 136, 12),
    "yellow": (252, 220, 30),
    "green": (46, 168, 62),
    "blue": (36, 104, 228),
    "purple": (132, 52, 186),
    "pink": (252, 128, 192),
}
# Classes with one dominant hue in every style. They are always tinted, so that their colour always has a name.
TINTABLE = (
    "bird", "fish", "butterfly", "car", "bus", "tulip", "star", "heart", "balloon", "gift", "umbrella", "shirt", "book",
    "key", "guitar", "bell", "cup", "chair",
)  # fmt: skip
# Drawings whose body is white or gray take the tint on their pale pixels instead of on their dominant hue.
PALE = {("noto", "bus"), ("twemoji", "bus"), ("noto", "cup"), ("openmoji", "cup"), ("twemoji", "cup")}
HUES = {("twemoji", "tulip"): 350, ("twemoji", "gift"): 40}  # degrees, where the leaves or the ribbon outweigh the body

# Backgrounds: the middle of a colour, and how far its shades may go from there. No orange: next to brown, yellow and
# red it could not be named with certainty.
BACKGROUNDS = {
    "white": ((244, 244, 242), (10, 10, 10)),
    "gray": ((146, 146, 148), (24, 24, 24)),
    "black": ((30, 30, 32), (16, 16, 17)),
    "brown": ((122, 78, 44), (24, 17, 11)),
    "red": ((196, 44, 44), (30, 12, 12)),
    "pink": ((245, 172, 204), (10, 22, 18)),
    "yellow": ((240, 218, 96), (14, 16, 34)),
    "green": ((100, 176, 98), (26, 26, 26)),
    "blue": ((88, 142, 222), (28, 28, 20)),
    "purple": ((142, 94, 190), (24, 24, 24)),
}
PATTERNS = ("plain", "graded", "blotched", "striped", "noisy")
STYLES = {  # split -> artwork
    "train": ("noto", "openmoji"),
    "val": ("noto", "openmoji"),
    "test": ("noto", "openmoji"),
    "heldout": ("noto", "openmoji"),
    "twemoji": ("twemoji",),
}

MIN_VISIBLE = 0.65  # share of an object's own pixels that no other object hides, if not told otherwise
MIN_EDGE_GAP = 0.025  # of the side, between the left edges of any two objects: "from left to right" is then never a tie
MIN_CONTRAST = 75.0  # distance in RGB between an object's rim and the middle of the background's colour

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class SceneObject:
    """One object as far as it can be seen."""

    label: str  # one of LABELS
    tint: str | None  # one of TINTS for the classes of TINTABLE, else None
    box: Box  # exact bounds of the mask: x1 and y1 are the first column and row beyond it
    mask: np.ndarray  # bool [H, W], the visible pixels
    visible: float  # visible share of its own pixels, at least what `render` was asked for
    text: str = ""  # what a sign says
    char_boxes: tuple[Box, ...] = ()  # one per character of `text`

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def name(self) -> str:
        """ "red car", "dog"."""
        return f"{self.tint} {self.label}" if self.tint else self.label


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 [H, W, 3]
    objects: tuple[SceneObject, ...]  # from left to right by their left edge
    background: str  # one of BACKGROUNDS
    pattern: str  # one of PATTERNS
    style: str
    seed: int
    split: str

    @property
    def size(self) -> int:
        return int(self.image.shape[0])

    @property
    def sign(self) -> SceneObject | None:
        return next((thing for thing in self.objects if thing.label == "sign"), None)


# --- what is held out -----------------------------------------------------------------------------


def _bucket(*names: str) -> int:
    """A number that depends on the names alone, on every machine, forever."""
    return int.from_bytes(hashlib.sha256("|".join(names).encode()).digest()[:8], "big")


@cache
def is_held_out_pair(a: str, b: str) -> bool:
    """Whether the two classes never meet in training (1 pair of 16). A class may meet itself, and a sign anyone."""
    return a != b and "sign" not in (a, b) and _bucket("pair", *sorted((a, b))) % 16 == 1


@cache
def is_held_out_tint(label: str, tint: str | None) -> bool:
    """Whether this class never has this tint in training (1 of 9)."""
    return tint is not None and _bucket("tint", label, tint) % 9 == 1


@cache
def held_out() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Every held-out pair of classes, and every held-out pair of class and tint."""
    pairs = tuple((a, b) for a, b in combinations(CLASSES, 2) if is_held_out_pair(a, b))
    tints = tuple((label, tint) for label in TINTABLE for tint in TINTS if is_held_out_tint(label, tint))
    return pairs, tints


def has_held_out(things: Sequence[tuple[str, str | None]]) -> bool:
    """Whether a list of (label, tint) contains anything that training never shows."""
    labels = sorted({label for label, _ in things})
    return any(is_held_out_tint(*thing) for thing in things) or any(
        is_held_out_pair(a, b) for a, b in combinations(labels, 2)
    )


# --- artwork --------------------------------------------------------------------------------------


@cache
def _atlas(style: str) -> tuple[Image.Image, dict[str, list[int]]]:
    folder = SPRITES / style
    if not (folder / "index.json").is_file():
        known = ", ".join(sorted(p.parent.name for p in SPRITES.glob("*/index.json")))
        raise ValueError(f"no artwork of style {style!r}; there is: {known}")
    with Image.open(folder / "atlas.png") as image:
        atlas = image.convert("RGBA")
    return atlas, json.loads((folder / "index.json").read_text(encoding="utf-8"))["boxes"]


@cache
def sprite(style: str, label: str, tint: str | None = None) -> Image.Image:
    """The drawing of a class: RGBA, tight, longest side 96."""
    atlas, boxes = _atlas(style)
    image = atlas.crop(tuple(boxes[label]))  # type: ignore[arg-type]
    if tint is None:
        return image
    return _tinted(image, TINTS[tint], (style, label) in PALE, HUES.get((style, label)))


def _tinted(image: Image.Image, color: tuple[int, int, int], pale: bool, main_hue: float | None) -> Image.Image:
    """The drawing with its main hue (the dominant one if None), or its pale pixels, in `color`; the shades stay."""
    pixels = np.asarray(image).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = (high - low) / np.maximum(high, 1)
    if pale:
        weight = np.clip((0.42 - saturation) / 0.1, 0, 1) * np.clip((high - 70) / 50, 0, 1)
    else:
        hue = np.asarray(image.convert("RGB").convert("HSV"))[..., 0].astype(np.float32) * (360 / 255)
        if main_hue is None:
            strong = np.where((alpha > 128) & (high > 50), saturation**2, 0)
            histogram = np.bincount((hue / 10).astype(int).ravel() % 36, strong.ravel(), 36)
            smooth = histogram + 0.6 * (np.roll(histogram, 1) + np.roll(histogram, -1))
            main_hue = float(smooth.argmax() * 10 + 5)
        distance = np.abs((hue - main_hue + 180) % 360 - 180)
        weight = np.clip((48 - distance) / 12, 0, 1) * np.clip((saturation - 0.12) / 0.12, 0, 1)
        weight *= np.clip((high - 30) / 30, 0, 1)
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    chosen = light[(weight > 0.5) & (alpha > 128)]
    usual = float(np.median(chosen)) if chosen.size else 128.0
    shade = np.clip(light / usual, 0.45, 1)[..., None]
    shine = np.clip((light - usual) / max(255 - usual, 40), 0, 0.75)[..., None]
    target = np.array(color, np.float32)
    painted = target * shade + (255 - target) * shine
    rgb = rgb + weight[..., None] * (painted - rgb)
    result = np.concatenate([rgb, alpha[..., None]], -1)
    return Image.fromarray(np.clip(result + 0.5, 0, 255).astype(np.uint8), "RGBA")


@cache
def _rim_color(style: str, label: str, tint: str | None) -> np.ndarray:
    """Mean colour along the outline: what has to stand out from the background."""
    pixels = np.asarray(sprite(style, label, tint)).astype(np.float32)
    return _rim(pixels)


def _rim(pixels: np.ndarray) -> np.ndarray:
    solid = np.pad(pixels[..., 3] >= 128, 3)
    inner = solid.copy()
    for shift in (1, 2, 3):
        for axis in (0, 1):
            inner &= np.roll(solid, shift, axis) & np.roll(solid, -shift, axis)
    rim = (solid & ~inner)[3:-3, 3:-3]
    return pixels[rim][:, :3].mean(0)


# --- stamps: an object drawn, ready to be put down somewhere --------------------------------------


@dataclass(frozen=True)
class _Stamp:
    image: Image.Image  # RGBA with its soft edge
    corner: tuple[int, int]  # where the mask's box begins in the image
    mask: np.ndarray  # bool [h, w], tight: at least half opaque
    char_boxes: tuple[Box, ...] = ()  # relative to the mask's box


def _stamp(image: Image.Image) -> _Stamp:
    solid = np.asarray(image)[..., 3] >= 128
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return _Stamp(image, (int(x0), int(y0)), solid[y0:y1, x0:x1])


def _pictogram(rng: np.random.Generator, style: str, label: str, tint: str | None, longest: float) -> _Stamp:
    """A pictogram stretched a little, mirrored half the time, turned by up to 28 degrees."""
    image = sprite(style, label, tint)
    stretch = float(rng.uniform(0.86, 1.16))
    width, height = image.width * stretch, float(image.height)
    scale = longest / max(width, height)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize((max(4, round(width * scale)), max(4, round(height * scale))), Image.Resampling.BICUBIC)
    angle = float(rng.uniform(-28, 28))
    return _stamp(image.rotate(angle, Image.Resampling.BILINEAR, expand=True))


# --- signs ----------------------------------------------------------------------------------------

WORDS = tuple(
    """
    able area army away baby back bag bake ball band bank bar bath beach bean bed beef best big bike bird bit blue
    boat body book boot both box boy bread bus bush busy call camp cap card care cart case cash cat cave chef child
    city clay clean club coal coat code coffee cold cook cool corn cow cream cup dairy dance dark day deal deep deli
    desk diet dish dog door down dream dress drink drive dry duck east eat egg end enter even exit face fair fall
    farm fast feel field film find fire first fish five fix flag flat floor flour fly food foot fork four free fresh
    fruit full fun game garden gas gate gift girl glad glass gold golf good grand green group guest hair half hall
    hand happy hard hat heat help here high hill hold home honey hope horse hot hotel hour house ice idea inn iron
    island jam jazz job join juice jump jungle just keep key kid kind king kite lake lamp land large last late law
    leaf left lemon lift light lime line lion list live local lock long look lost loud love lucky lunch mail main
    map market meal meat meet melon menu metal milk mill mint mix model money moon more music nail name near new
    news next nice night nine noon north note nut oak oats oil okay old olive open orange order oven over page paint
    palm paper park party pasta path peach pen pet phone piano pie pilot pin pizza place plan plant play plum pond
    pool post potato press price pub pull pump push queen quick quiet quiz race radio rain read red rent rest rice
    ride right ring river road rock roof room rose run safe sail salad sale salt sand sea seat seed sell seven ship
    shoe shop show side silk sing size skate ski sky sleep slow small smile snack snow soap soda sold song soup
    south spa spice sport spring square stage star start stay step stop store storm street sugar summer sun sweet
    swim table tall taxi tea team ten tent test three ticket tiger time tire toast today tool top tour town toy
    track train tree trip try tulip turn twelve unit up valley van video view visit walk wall warm wash watch water
    way web week west wheel white wide wild win wind window wine winter wish wolf wood word work world yard year yes
    yoga young zebra zero zone
    """.split()
)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # all that signs say
_SURE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which alone could be 1 and 0
_BOARDS = (  # board, text and border
    ((250, 250, 250), (20, 20, 20)),
    ((255, 246, 214), (60, 30, 10)),
    ((255, 214, 40), (20, 20, 20)),
    ((205, 230, 250), (10, 30, 90)),
    ((20, 100, 60), (250, 250, 250)),
    ((20, 60, 150), (250, 250, 250)),
    ((30, 30, 34), (245, 245, 235)),
    ((180, 24, 30), (255, 255, 255)),
)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "aileron":  # the font inside Pillow
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("this Pillow was built without FreeType, which drawing signs needs: pip install pillow")
        return font
    return ImageFont.truetype(SPRITES / "fonts" / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


_FONTS = ("aileron", "DejaVuSans-Bold", "DejaVuSerif-Bold")


def sign_text(rng: np.random.Generator, length: tuple[int, int] = (1, 6)) -> str:
    """A word, a number or random letters, `length[0]` to `length[1]` characters; no two texts look the same."""
    shortest, longest = length
    count = int(rng.integers(shortest, longest + 1))
    kind = rng.random()
    if kind < 0.55:
        words = [word for word in WORDS if shortest <= len(word) <= longest]
        if words:
            word = words[rng.integers(len(words))]
            # Upper and lower case of these letters differ in size alone.
            plain = set(word) <= set("cosuvwxz")
            return (word.upper(), word.capitalize(), word if not plain else word.upper())[rng.integers(3)]
    if kind < 0.78:
        return str(rng.integers(1, 10)) + "".join(str(rng.integers(10)) for _ in range(count - 1))
    return "".join(_SURE_LETTERS[rng.integers(len(_SURE_LETTERS))] for _ in range(count))


def _sign(rng: np.random.Generator, text: str, size: int, char_size: tuple[float, float], board: int) -> _Stamp:
    """A board with text, on a post half the time, turned by up to 8 degrees. Drawn twice as large, then halved."""
    name = _FONTS[rng.integers(len(_FONTS))]
    em = 2 * size * float(rng.uniform(*char_size))
    width = _font(name, max(8, round(em))).getlength(text)
    em *= min(1.0, 2 * size * 0.48 / max(width, 1))
    font = _font(name, max(8, round(em)))
    ascent, descent = font.getmetrics()
    # The board has room for what letters have room for, whatever this text uses: its height does not tell the letters.
    pad = em * float(rng.uniform(0.25, 0.4))
    wide = max(font.getlength(text) + 2 * pad, 2 * size * float(rng.uniform(0.2, 0.36)))
    tall = ascent + descent + pad
    post = 2 * size * float(rng.uniform(0.04, 0.1)) if rng.random() < 0.5 else 0.0
    fill, ink = _BOARDS[board]
    image = Image.new("RGBA", (math.ceil(wide) + 4, math.ceil(tall + post) + 4), (*fill, 0))
    draw = ImageDraw.Draw(image)
    if post:
        middle, half = 2 + wide / 2, max(2.0, size * 0.016)
        draw.rectangle((middle - half, tall, middle + half, 2 + tall + post), fill=(120, 112, 104, 255))
    border = max(2, round(em * 0.07))
    draw.rounded_rectangle(
        (2, 2, 2 + wide, 2 + tall), radius=em * 0.16, fill=(*fill, 255), outline=(*ink, 255), width=border
    )
    left, top = 2 + (wide - font.getlength(text)) / 2, 2 + pad / 2
    boxes = []
    for i, letter in enumerate(text):  # letter by letter, so that each box is where its letter is
        x = left + font.getlength(text[:i])
        draw.text((x, top), letter, font=font, fill=(*ink, 255))
        a, b, c, d = font.getbbox(letter)
        boxes.append((x + a, top + b, x + c, top + d))
    angle = float(rng.uniform(-8, 8))
    turned = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    half_size = ((turned.width + 1) // 2, (turned.height + 1) // 2)
    stamp = _stamp(turned.resize(half_size, Image.Resampling.BOX))
    # Where the letters went: turned about the middle, then halved. Pillow turns against the clock, y points down.
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def moved(box: Box) -> Box:
        corners = [(x - image.width / 2, y - image.height / 2) for x in box[::2] for y in box[1::2]]
        xs = [
            (cos * x + sin * y + turned.width / 2) * half_size[0] / turned.width - stamp.corner[0] for x, y in corners
        ]
        ys = [
            (cos * y - sin * x + turned.height / 2) * half_size[1] / turned.height - stamp.corner[1] for x, y in corners
        ]
        return min(xs), min(ys), max(xs), max(ys)

    return replace(stamp, char_boxes=tuple(moved(box) for box in boxes))


# --- backgrounds ----------------------------------------------------------------------------------


def _background(rng: np.random.Generator, color: str, pattern: str, size: int) -> Image.Image:
    """The colour in shades from -1 to 1 that never leave its name."""
    middle, reach = np.array(BACKGROUNDS[color], np.float32)
    base = middle + reach * np.float32(rng.uniform(-0.35, 0.35))
    if pattern == "plain":
        red, green, blue = (int(value) for value in np.clip(base + 0.5, 0, 255))
        return Image.new("RGB", (size, size), (red, green, blue))
    if pattern == "blotched":
        cells = int(rng.integers(3, 10))
        coarse = Image.fromarray(rng.uniform(-0.75, 0.75, (cells, cells)).astype(np.float32))
        shade = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    elif pattern == "noisy":
        shade = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(0.2, 0.45))
    else:
        angle = float(rng.uniform(0, 2 * math.pi))
        steps = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        along = np.float32(math.cos(angle)) * steps + np.float32(math.sin(angle)) * steps[:, None]
        if pattern == "graded":
            shade = along * np.float32(1.4)
        else:
            period, depth = float(rng.uniform(0.06, 0.25)), float(rng.uniform(0.25, 0.65))
            shade = np.where((along + 1) % np.float32(period) < period / 2, np.float32(depth), np.float32(-depth))
    # A table of 256 shades turns one small array into three channels: much faster than arithmetic on all three.
    table = np.clip(np.linspace(-1, 1, 256, dtype=np.float32)[:, None] * reach + (base + 0.5), 0, 255).astype(np.uint8)
    shades = Image.fromarray(np.clip(shade * 127.5 + 128, 0, 255).astype(np.uint8))
    return Image.merge("RGB", [shades.point(column.tolist()) for column in table.T])


# --- scenes ---------------------------------------------------------------------------------------


def generator(seed: int, split: str) -> np.random.Generator:
    """The stream of a scene. The split's name is part of the seed, so splits never share a scene."""
    if split not in STYLES:
        raise ValueError(f"unknown split {split!r}; there is: {', '.join(STYLES)}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([_bucket("split", split), int(seed)])))


def _things(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str | None]]:
    """(label, tint) of `count` pictograms, some of them twice or more, within what the split may show."""
    colors = tuple(TINTS)

    def tint_of(label: str) -> str | None:
        return colors[rng.integers(len(colors))] if label in TINTABLE else None

    things: list[tuple[str, str | None]] = []
    if split == "heldout":
        pairs, tints = held_out()
        if count > 1 and rng.random() < 0.6:
            for label in pairs[rng.integers(len(pairs))]:
                things.append((label, tint_of(label)))
        else:
            things.append(tints[rng.integers(len(tints))])
    repeating = rng.random() < 0.45  # a scene with repeated classes; they make counting worth asking
    while len(things) < count:
        if things and repeating and rng.random() < 0.6:
            label, tint = things[rng.integers(len(things))]
            thing = (label, tint if rng.random() < 0.6 else tint_of(label))
        else:
            # Half of the draws go to the tintable quarter of the classes: colours are learned on them alone.
            pool = TINTABLE if rng.random() < 0.3 else CLASSES
            label = pool[rng.integers(len(pool))]
            thing = (label, tint_of(label))
        if split == "heldout" or not has_held_out([*things, thing]):
            things.append(thing)
    return things


def _place(
    rng: np.random.Generator, stamp: _Stamp, label: str, placed: list["_Placed"], size: int, visible: float
) -> "_Placed | None":
    """A place where the stamp hides no one too much and starts at a column of its own; None after 24 trials."""
    height, width = stamp.mask.shape
    if height > size or width > size:
        return None
    area = int(np.count_nonzero(stamp.mask))
    for _ in range(24):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        hidden = []
        for other in placed:
            if abs(other.x - x) < MIN_EDGE_GAP * size:
                break
            a, b = max(x, other.x), min(x + width, other.x + other.mask.shape[1])
            c, d = max(y, other.y), min(y + height, other.y + other.mask.shape[0])
            if a >= b or c >= d:
                continue
            # Two of a kind may touch but not merge.
            if other.label == label and (b - a) * (d - c) > 0.08 * min(width * height, other.mask.size):
                break
            theirs = other.mask[c - other.y : d - other.y, a - other.x : b - other.x]
            lost = theirs & stamp.mask[c - y : d - y, a - x : b - x]
            if other.left - np.count_nonzero(lost) < visible * other.area:
                break
            hidden.append((theirs, lost, other))
        else:
            for theirs, lost, other in hidden:
                theirs ^= lost
                other.left -= int(np.count_nonzero(lost))
            return _Placed(label, x, y, stamp, stamp.mask.copy(), area, area)
    return None


@dataclass
class _Placed:
    label: str
    x: int
    y: int
    stamp: _Stamp
    mask: np.ndarray  # what is still visible, within the stamp's box
    area: int
    left: int  # visible pixels


def _most_that_fits(count: int, upper: float) -> float:
    """The larger the crowd, the smaller its members: about two fifths of the picture are covered at most."""
    return min(upper, (0.5, 0.5, 0.46, 0.4, 0.36, 0.33)[min(count, 6) - 1])


def render(
    seed: int,
    split: str = "train",
    size: int = 256,
    style: str | None = None,
    *,
    objects: tuple[int, int] = (1, 5),
    object_size: tuple[float, float] = (0.2, 0.5),
    sign: float = 0.25,
    sign_only: float = 0.06,
    text_length: tuple[int, int] = (1, 6),
    char_size: tuple[float, float] = (0.12, 0.2),
    things: Sequence[tuple[str, str | None]] | None = None,
    visible: float = MIN_VISIBLE,
) -> Scene:
    """The scene of a seed: the same labels, boxes and picture on every call.

    split:        "train", "val", "test", "heldout" or "twemoji"; see the top of the file.
    size:         side of the picture in pixels.
    style:        "noto", "openmoji" or "twemoji" instead of what the split draws from.
    objects:      least and most pictograms.
    object_size:  least and most length of a pictogram's longer side, before it is turned, as a share of the side.
    sign:         probability of a sign beside the pictograms; sign_only: of a sign and nothing else.
    text_length:  least and most characters on a sign.
    char_size:    font size (em) of a sign as a share of the side; long texts are shrunk until the board fits.
    things:       these pictograms, (label, tint), whatever the split may show; then `objects` does not matter.
    visible:      least share of a pictogram that others leave to be seen; 1: none hides another.

    Raises ValueError for an unknown split or style, a negative seed, or bounds that make no sense.
    """
    least, most = objects
    if not 1 <= least <= most <= 5:
        raise ValueError(f"objects must be a pair with 1 <= least <= most <= 5, got {objects}")
    if not 1 <= text_length[0] <= text_length[1] <= 6:
        raise ValueError(f"text_length must be a pair with 1 <= least <= most <= 6, got {text_length}")
    if not 0.08 <= object_size[0] <= object_size[1] <= 0.7:
        raise ValueError(f"object_size must be a pair with 0.08 <= least <= most <= 0.7, got {object_size}")
    if not 0 < visible <= 1:
        raise ValueError(f"visible must be a share above 0 and at most 1, got {visible}")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}")
    rng = generator(seed, split)
    style = style or STYLES[split][rng.integers(len(STYLES[split]))]

    chance = rng.random()
    alone = chance < sign_only and split != "heldout"
    with_sign = alone or chance < sign_only + sign
    count = 0 if alone else int(rng.integers(least, most + 1))
    if things is None:
        things = _things(rng, count, split)
    count = len(things)
    text = sign_text(rng, text_length) if with_sign else ""
    board = int(rng.integers(len(_BOARDS)))

    # A background from which every object stands out, or the best there is.
    rims = [_rim_color(style, *thing) for thing in things]
    if with_sign:
        rims.append(np.array(_BOARDS[board][0], np.float32))
    middles = np.array([middle for middle, _ in BACKGROUNDS.values()], np.float32)
    contrast = np.linalg.norm(middles[:, None] - np.stack(rims)[None], axis=-1).min(1)
    clear = np.flatnonzero(contrast >= MIN_CONTRAST)
    background = tuple(BACKGROUNDS)[clear[rng.integers(len(clear))] if len(clear) else int(contrast.argmax())]
    pattern = PATTERNS[rng.integers(len(PATTERNS))]

    placed: list[_Placed] = []
    shrink = 1.0
    while not placed:  # lay everything out; begin again, a little smaller, when something found no place
        small, large = object_size[0], _most_that_fits(count + with_sign, object_size[1])
        for label, tint in things:
            longest = size * max(small, float(rng.uniform(small, max(small, large))) * shrink)
            spot = _place(rng, _pictogram(rng, style, label, tint, longest), label, placed, size, visible)
            if spot is None:
                break
            placed.append(spot)
        else:
            if with_sign:  # last, on top: nothing hides its text
                spot = _place(rng, _sign(rng, text, size, char_size, board), "sign", placed, size, visible)
                if spot is not None:
                    placed.append(spot)
        if len(placed) < count + with_sign or not _edges_differ(placed, size):
            placed = []
            shrink *= 0.93

    canvas = _background(rng, background, pattern, size)
    found = []
    for i, spot in enumerate(placed):
        dx, dy = spot.stamp.corner
        canvas.paste(spot.stamp.image, (spot.x - dx, spot.y - dy), spot.stamp.image)
        mask = np.zeros((size, size), bool)
        mask[spot.y : spot.y + spot.mask.shape[0], spot.x : spot.x + spot.mask.shape[1]] = spot.mask
        chars = tuple((a + spot.x, b + spot.y, c + spot.x, d + spot.y) for a, b, c, d in spot.stamp.char_boxes)
        tint = things[i][1] if i < count else None
        said = text if spot.label == "sign" else ""
        found.append(SceneObject(spot.label, tint, _bounds(spot), mask, spot.left / spot.area, said, chars))
    found.sort(key=lambda thing: thing.box[0])
    return Scene(np.asarray(canvas), tuple(found), background, pattern, style, seed, split)


def _bounds(spot: _Placed) -> Box:
    """Bounds of the visible pixels."""
    rows, columns = np.flatnonzero(spot.mask.any(1)), np.flatnonzero(spot.mask.any(0))
    return (
        float(spot.x + columns[0]),
        float(spot.y + rows[0]),
        float(spot.x + columns[-1] + 1),
        float(spot.y + rows[-1] + 1),
    )


def _edges_differ(placed: list[_Placed], size: int) -> bool:
    """Whether all left edges still differ clearly, now that objects hide parts of one another."""
    edges = sorted(_bounds(spot)[0] for spot in placed)
    return all(b - a >= MIN_EDGE_GAP * size for a, b in pairwise(edges))


# --- what every patch shows -----------------------------------------------------------------------


def patch_targets(scene: Scene, grid: int = 8, cells: int = 8, least: float = 0.2) -> dict[str, np.ndarray]:
    """What each of the `grid` x `grid` patches shows: what a vision model can be taught before it can talk.

    A patch belongs to the object that covers most of it, if that covers at least the share `least`; otherwise to the
    background. Returned, with G = grid, c = cells:

    class       int64   [G, G]        0 background, else 1 + index in LABELS
    tint        int64   [G, G]        0 none, else 1 + index in TINTS
    background  int64   []            index in BACKGROUNDS
    index       int64   [G, G]        -1 background, else index in scene.objects
    box         float32 [G, G, 4]     x0 y0 x1 y1 of its object, seen from the patch's middle, in sides of the picture
    mask        bool    [G, G, c, c]  its object's mask inside the patch: cells that are at least half covered
    coverage    float32 [G, G]        share of the patch that its object covers
    characters  int64   [G, G, 2]     1 + index in CHARACTERS of those with their middle in the patch, from the left

    Raises ValueError when the picture's side is not a multiple of grid x cells.
    """
    size = scene.size
    pixels = size // (grid * cells)  # per cell
    if size != pixels * grid * cells:
        raise ValueError(f"a picture of {size} pixels has no {grid} x {grid} patches of {cells} x {cells} whole cells")
    count = len(scene.objects)
    masks = np.stack([thing.mask for thing in scene.objects]).view(np.uint8)
    rows = masks.reshape(count, grid * cells, pixels, size).sum(2, dtype=np.uint16)
    columns = rows.reshape(count, grid * cells, grid * cells, pixels)
    filled = sum(columns[..., i] for i in range(pixels))  # [objects, G*c, G*c] pixels of each cell
    filled = np.asarray(filled).reshape(count, grid, cells, grid, cells).transpose(0, 1, 3, 2, 4)
    share = filled.sum((3, 4)).astype(np.float32) / (cells * pixels) ** 2  # [objects, G, G]
    index = share.argmax(0)
    coverage = share.max(0)
    empty = coverage < least

    label = np.array([1 + LABELS.index(thing.label) for thing in scene.objects])
    tint = np.array([1 + tuple(TINTS).index(thing.tint) if thing.tint else 0 for thing in scene.objects])
    boxes = np.array([thing.box for thing in scene.objects], np.float32) / size
    middle = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    middles = np.stack(np.broadcast_arrays(middle, middle[:, None]), -1)  # [G, G, 2]: x, y
    box = boxes[index] - np.concatenate([middles, middles], -1)
    mask = np.take_along_axis(filled, index[None, :, :, None, None], 0)[0] * 2 >= pixels * pixels
    box[empty] = 0
    mask[empty] = False

    characters = np.zeros((grid, grid, 2), np.int64)
    for thing in scene.objects:
        for letter, (x0, y0, x1, y1) in zip(thing.text, thing.char_boxes):
            row, column = int((y0 + y1) / 2 / size * grid), int((x0 + x1) / 2 / size * grid)
            free = np.flatnonzero(characters[row, column] == 0)
            if len(free):
                characters[row, column, free[0]] = 1 + CHARACTERS.index(letter)
    return {
        "class": np.where(empty, 0, label[index]),
        "tint": np.where(empty, 0, tint[index]),
        "background": np.array(tuple(BACKGROUNDS).index(scene.background)),
        "index": np.where(empty, -1, index),
        "box": box,
        "mask": mask,
        "coverage": np.where(empty, 0, coverage),
        "characters": characters,
    }
