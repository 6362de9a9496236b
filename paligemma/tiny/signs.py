"""Signs: boards with a short text, and the place of every letter."""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma.tiny.artwork import SPRITES, Stamp, stamp_of
from paligemma.tiny.world import Box

RGB = tuple[int, int, int]

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
_UNAMBIGUOUS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which alone could be 1 and 0
BOARDS = (  # board, text and border
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
    """A word, a number or random letters, `length[0]` to `length[1]` characters. No two texts look alike."""
    shortest, longest = length
    count = int(rng.integers(shortest, longest + 1))
    kind = rng.random()
    if kind < 0.55:
        words = [word for word in WORDS if shortest <= len(word) <= longest]
        if words:
            return _in_some_case(rng, words[rng.integers(len(words))])
    if kind < 0.78:
        return str(rng.integers(1, 10)) + "".join(str(rng.integers(10)) for _ in range(count - 1))
    return "".join(_UNAMBIGUOUS[rng.integers(len(_UNAMBIGUOUS))] for _ in range(count))


def mixed_text(rng: np.random.Generator) -> str:
    """The beginning of a word and the end of another, up to 10 letters: they must be read one by one."""
    first, second = (WORDS[i] for i in rng.integers(len(WORDS), size=2))
    return _in_some_case(rng, first[: rng.integers(1, 6)] + second[-int(rng.integers(1, 6)) :])


def _in_some_case(rng: np.random.Generator, word: str) -> str:
    """Upper case, capitalised or lower case."""
    plain = set(word) <= set("cosuvwxz")  # upper and lower case of these letters differ only in size
    return (word.upper(), word.capitalize(), word if not plain else word.upper())[rng.integers(3)]


@dataclass(frozen=True)
class _Board:
    """The measures of a board with its text, in pixels of a drawing twice as large as the sign will be."""

    font: ImageFont.FreeTypeFont
    pad: float  # between text and border
    wide: float
    tall: float
    post: float  # height of the post below the board, 0 for none
    fill: RGB
    ink: RGB
    border: int  # width, 0 for none
    radius: float  # of the corners


def _plain_board(rng: np.random.Generator, text: str, size: int, char_size: tuple[float, float], colors: int) -> _Board:
    name = _FONTS[rng.integers(len(_FONTS))]
    em = 2 * size * float(rng.uniform(*char_size))
    width = _font(name, max(8, round(em))).getlength(text)
    em *= min(1.0, 2 * size * 0.48 / max(width, 1))  # a long text is shrunk until the board fits
    font = _font(name, max(8, round(em)))
    ascent, descent = font.getmetrics()
    pad = em * float(rng.uniform(0.25, 0.4))
    wide = max(font.getlength(text) + 2 * pad, 2 * size * float(rng.uniform(0.2, 0.36)))
    # The height comes from the font's metrics, not from this text's ink: it must not give the letters away.
    tall = ascent + descent + pad
    post = 2 * size * float(rng.uniform(0.04, 0.1)) if rng.random() < 0.5 else 0.0
    return _Board(font, pad, wide, tall, post, *BOARDS[colors], border=max(2, round(em * 0.07)), radius=em * 0.16)


def _draw_board(board: _Board, text: str, size: int) -> tuple[Image.Image, list[Box]]:
    """The upright sign, and the box of each letter in it."""
    fill, ink, wide, tall, font = board.fill, board.ink, board.wide, board.tall, board.font
    image = Image.new("RGBA", (math.ceil(wide) + 4, math.ceil(tall + board.post) + 4), (*fill, 0))
    draw = ImageDraw.Draw(image)
    if board.post:
        middle, half = 2 + wide / 2, max(2.0, size * 0.016)
        draw.rectangle((middle - half, tall, middle + half, 2 + tall + board.post), fill=(120, 112, 104, 255))
    edge = (*ink, 255) if board.border else None
    corners = (2, 2, 2 + wide, 2 + tall)
    radius = min(board.radius, min(wide, tall) / 2 - 2)  # Pillow fails where straight sides would be shorter than 0
    draw.rounded_rectangle(corners, radius=radius, fill=(*fill, 255), outline=edge, width=board.border)
    left, top = 2 + (wide - font.getlength(text)) / 2, 2 + board.pad / 2
    boxes = []
    for i, letter in enumerate(text):  # one letter at a time, so that each box is where its letter is drawn
        x = left + font.getlength(text[:i])
        draw.text((x, top), letter, font=font, fill=(*ink, 255))
        a, b, c, d = font.getbbox(letter)
        boxes.append((x + a, top + b, x + c, top + d))
    return image, boxes


def sign(rng: np.random.Generator, text: str, size: int, char_size: tuple[float, float], colors: int) -> Stamp:
    """A board with text, on a post half the time, turned by up to 8 degrees. Drawn twice as large, then halved.

    size: side of the picture. char_size: bounds of the font size, as shares of it. colors: index in BOARDS.
    """
    board = _plain_board(rng, text, size, char_size, colors)
    return _turned(*_draw_board(board, text, size), float(rng.uniform(-8, 8)))


def _turned(image: Image.Image, boxes: list[Box], angle: float) -> Stamp:
    """The stamp of a sign and its letters, turned by `angle` degrees and halved."""
    turned = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    half_size = ((turned.width + 1) // 2, (turned.height + 1) // 2)
    stamp = stamp_of(turned.resize(half_size, Image.Resampling.BOX))
    moved = (turned_box(box, angle, image.size, turned.size, half_size, stamp.corner) for box in boxes)
    return replace(stamp, char_boxes=tuple(moved))


def turned_box(
    box: Box,
    angle: float,
    before: tuple[int, int],
    turned: tuple[int, int],
    resized: tuple[int, int],
    corner: tuple[int, int],
) -> Box:
    """Bounds of a box of an image of size `before` after it was turned about its middle, resized and cropped.

    Pillow turns counter-clockwise in degrees, while y points down.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [(x - before[0] / 2, y - before[1] / 2) for x in box[::2] for y in box[1::2]]
    xs = [(cos * x + sin * y + turned[0] / 2) * resized[0] / turned[0] - corner[0] for x, y in corners]
    ys = [(cos * y - sin * x + turned[1] / 2) * resized[1] / turned[1] - corner[1] for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


# --- world 2: twenty more fonts, boards of any colour, with and without a border --------------------

_VARIED = SPRITES / "fonts" / "varied"
VARIED_FONTS = tuple(sorted(file.name for file in _VARIED.glob("[0-9][0-9].*")))
_OLD_STYLE_FIGURES = ("16.ttf", "18.otf")  # their 0 and 1 look like o and I
BOARD_COLORS: dict[str, RGB] = {  # what the colour of a board is called, and the middle of its shades
    "white": (248, 248, 246), "gray": (150, 150, 152), "black": (24, 24, 26), "brown": (116, 72, 40),
    "red": (206, 36, 40), "orange": (248, 138, 20), "yellow": (252, 216, 50), "green": (34, 140, 66),
    "blue": (36, 96, 206), "purple": (124, 58, 178), "pink": (250, 150, 200),
}  # fmt: skip
INKS: tuple[RGB, ...] = ((18, 18, 20), (252, 252, 250), (20, 40, 120), (150, 16, 24), (10, 80, 40), (255, 226, 70))
MIN_INK_CONTRAST = 110.0  # between board and text, in brightness from 0 to 255


@cache
def _varied_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name in _FONTS:
        return _font(name, size)
    return ImageFont.truetype(_VARIED / name, size, layout_engine=ImageFont.Layout.BASIC)


def brightness(color: tuple[float, float, float]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def varied_sign(
    rng: np.random.Generator,
    text: str,
    size: int,
    color: str,
    scale: float = 1.0,
    char_size: tuple[float, float] = (0.085, 0.25),
) -> Stamp:
    """A sign of world 2. color: the name of the board's colour, one of BOARD_COLORS. scale: 1, or less to make it fit.

    char_size: bounds of the font size, as shares of the picture's side, before long texts are shrunk. The sign is
    tilted by up to 15 degrees, or not at all.
    """
    board = _varied_board(rng, text, size, color, scale, char_size)
    angle = 0.0 if rng.random() < 0.35 else float(rng.uniform(-15, 15))
    return _turned(*_draw_board(board, text, size), angle)


def _varied_board(
    rng: np.random.Generator, text: str, size: int, color: str, scale: float, char_size: tuple[float, float]
) -> _Board:
    names = [*_FONTS, *(name for name in VARIED_FONTS if text.isalpha() or name not in _OLD_STYLE_FIGURES)]
    name = names[rng.integers(len(names))]
    em = 2 * size * scale * float(rng.uniform(*char_size))
    width = _varied_font(name, max(8, round(em))).getlength(text)
    em *= min(1.0, 2 * size * scale * float(rng.uniform(0.4, 0.62)) / max(width, 1))
    font = _varied_font(name, max(8, round(em)))
    pad = em * float(rng.uniform(0.2, 0.6))
    wide = max(font.getlength(text) + 2 * pad, 2 * size * scale * float(rng.uniform(0.12, 0.36)))
    tall = sum(font.getmetrics()) + pad
    post = 2 * size * scale * float(rng.uniform(0.04, 0.1)) if rng.random() < 0.3 else 0.0
    red, green, blue = (int(np.clip(shade + rng.uniform(-10, 10), 0, 255)) for shade in BOARD_COLORS[color])
    fill = (red, green, blue)
    inks = [ink for ink in INKS if abs(brightness(ink) - brightness(fill)) >= MIN_INK_CONTRAST]
    ink = inks[rng.integers(len(inks))]
    border = round(em * rng.uniform(0.04, 0.12)) if rng.random() < 0.5 else 0
    return _Board(font, pad, wide, tall, post, fill, ink, border, radius=tall * float(rng.choice((0, 0.1, 0.3, 0.5))))
