"""Ten pictures as people have them, for a look at how the model that ships fares outside of its scenes.

    python examples/hand_made.py                  # writes examples/hand_made/
    python examples/hand_made.py --model tiny     # and what a model answers, as a table in Markdown

No part of the scenes' renderer is used: layouts, backgrounds, text and degradations are made here. The pictograms are
those of the collections in `paligemma/tiny/ARTWORK.md`, which also names their licences; the drawing by a child and the
road sign are lines of this file. The letters are DejaVu Sans and Aileron (the font inside Pillow), both free licences.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import paligemma
from paligemma.tiny.artwork import SPRITES, sprite

FOLDER = Path(__file__).with_suffix("")
BOLD = str(SPRITES / "fonts" / "DejaVuSans-Bold.ttf")
ARTISTS = ("noto", "noto-v1", "openmoji", "twemoji", "fluent", "fluent-flat")


def pictogram(style, label, side, angle=0, tint=None):
    """RGBA, its longer side `side` pixels."""
    image = sprite(style, label, tint)
    image = image.resize([max(1, round(n * side / max(image.size))) for n in image.size], Image.Resampling.LANCZOS)
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def put(canvas, image, x, y):
    canvas.paste(image, (x, y), image)


def write(draw, x, y, text, size, fill="black", bold=False):
    font = ImageFont.truetype(BOLD, size) if bold else ImageFont.load_default(size)
    draw.text((x, y), text, font=font, fill=fill)


def slide():
    """A slide of a talk."""
    canvas = Image.new("RGB", (640, 360), "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, 640, 64), fill=(32, 58, 112))
    write(draw, 24, 16, "What we sold this year", 28, "white", bold=True)
    for row, text in enumerate(("more fruit than ever", "fewer cars")):
        draw.ellipse((36, 112 + 48 * row, 44, 120 + 48 * row), fill=(32, 58, 112))
        write(draw, 60, 102 + 48 * row, text, 22, (60, 60, 60))
    put(canvas, pictogram("fluent-flat", "apple", 120), 330, 190)
    put(canvas, pictogram("fluent-flat", "banana", 120), 480, 190)
    put(canvas, pictogram("fluent-flat", "car", 110, tint="red"), 420, 84)
    return canvas


def picker(side, columns, labels):
    """The part of a keyboard from which one chooses a pictogram: a row for each of some artists."""
    gap = side // 4
    canvas = Image.new("RGB", (columns * (side + gap) + gap, len(labels) * (side + gap) + gap), (242, 243, 245))
    draw = ImageDraw.Draw(canvas)
    for row in range(len(labels)):
        for column in range(columns):
            style = ARTISTS[(2 * row + column) % 6]
            image = pictogram(style, labels[row], side)
            x, y = gap + column * (side + gap), gap + row * (side + gap)
            draw.rounded_rectangle((x - 4, y - 4, x + side + 4, y + side + 4), 8, fill="white")
            put(canvas, image, x + (side - image.width) // 2, y + (side - image.height) // 2)
    return canvas


def scan():
    """A gray print, scanned a little askew: dots of the print, paper that is not quite white."""
    page = Image.new("L", (420, 420), 246)
    for style, label, x, y in (("noto", "house", 60, 150), ("noto", "tree", 240, 130)):
        image = pictogram(style, label, 130)
        page.paste(image.convert("L"), (x, y), image.getchannel("A"))
    draw = ImageDraw.Draw(page)
    write(draw, 120, 320, "page 12", 34, 40)
    dots = np.indices((420, 420)).sum(0) % 4 * 14 - 20
    shades = np.asarray(page, float)
    shades = np.where(shades < 235, shades + dots, shades) + np.random.default_rng(1).normal(0, 5, shades.shape)
    page = Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
    return (
        page.rotate(1.7, Image.Resampling.BICUBIC, fillcolor=225).filter(ImageFilter.GaussianBlur(0.7)).convert("RGB")
    )


def squeezed():
    """Two animals on a meadow; saved as a JPEG of quality 20."""
    canvas = Image.new("RGB", (320, 320), (112, 178, 226))
    ImageDraw.Draw(canvas).rectangle((0, 200, 320, 320), fill=(104, 160, 84))
    put(canvas, pictogram("noto", "cow", 130), 24, 150)
    put(canvas, pictogram("noto", "horse", 130), 172, 140)
    return canvas


def dark():
    """A photograph at dusk: little light, darker corners, grain, not quite sharp."""
    y, x = np.indices((360, 480)) / 360
    ground = (
        np.stack([70 + 40 * y, 60 + 30 * y, 80 - 10 * y], -1) * (1.1 - 0.5 * np.hypot(x - 0.66, y - 0.5))[..., None]
    )
    canvas = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    for label, side, x0, y0 in (("cat", 150, 60, 150), ("cup", 90, 300, 210)):
        image = pictogram("noto-v1", label, side)
        put(
            canvas,
            Image.merge("RGBA", [*(c.point(lambda v: v * 0.45) for c in image.split()[:3]), image.getchannel("A")]),
            x0,
            y0,
        )
    pixels = np.asarray(canvas.filter(ImageFilter.GaussianBlur(1.2)), float)
    pixels += np.random.default_rng(2).normal(0, 9, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def child():
    """As a child draws with felt pens: a house, a tree and a flower under a cloud."""
    canvas = Image.new("RGB", (400, 320), (253, 252, 246))
    draw, rng = ImageDraw.Draw(canvas), np.random.default_rng(3)

    def line(points, fill, width=6):
        shaky = []
        for (x0, y0), (x1, y1) in pairwise(points):
            for t in np.linspace(0, 1, 8):
                shaky.append((x0 + t * (x1 - x0) + rng.normal(0, 1.3), y0 + t * (y1 - y0) + rng.normal(0, 1.3)))
        draw.line(shaky, fill=fill, width=width, joint="curve")

    def scribble(x0, y0, x1, y1, fill):
        line([(x0 + (x1 - x0) * (n % 2), y0 + (y1 - y0) * n / 12) for n in range(13)], fill, 7)

    scribble(70, 160, 180, 262, (232, 120, 90))
    line([(62, 268), (62, 155), (188, 155), (188, 268), (62, 268)], (180, 40, 40))
    line([(52, 158), (125, 84), (198, 158)], (120, 50, 30), 8)
    line([(108, 268), (108, 214), (142, 214), (142, 268)], (60, 40, 30))
    line([(80, 180), (102, 180), (102, 200), (80, 200), (80, 180)], (40, 90, 200))
    scribble(262, 110, 336, 190, (70, 170, 80))
    line([(299 + 52 * math.cos(a), 148 + 48 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 14)], (30, 120, 50))
    line([(292, 196), (290, 268)], (110, 70, 40), 14)
    line([(10, 270), (390, 272)], (60, 160, 60), 8)
    for a in np.linspace(0, 2 * math.pi, 7)[:-1]:
        cx, cy = 226 + 12 * math.cos(a), 226 + 12 * math.sin(a)
        draw.ellipse((cx - 8, cy - 8, cx + 8, cy + 8), outline=(220, 60, 140), width=4)
    line([(226, 238), (226, 268)], (40, 140, 60))
    for x, y, r in ((84, 44, 20), (110, 34, 26), (138, 46, 20)):
        draw.arc((x - r, y - r, x + r, y + r), 150, 390, fill=(80, 140, 220), width=6)
    return canvas


def shop():
    """A web page that sells things."""
    canvas = Image.new("RGB", (720, 480), (250, 250, 250))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, 720, 44), fill=(20, 20, 22))
    write(draw, 20, 8, "little shop", 24, "white", bold=True)
    draw.rounded_rectangle((420, 8, 640, 36), 14, fill=(60, 60, 64))
    write(draw, 436, 12, "search", 16, (180, 180, 180))
    for n, (label, price) in enumerate((("umbrella", "12.50"), ("shirt", "19.00"), ("guitar", "149.00"))):
        x = 24 + 232 * n
        draw.rounded_rectangle((x, 70, x + 208, 450), 10, fill="white", outline=(210, 210, 214))
        image = pictogram("twemoji", label, 150)
        put(canvas, image, x + (208 - image.width) // 2, 100)
        write(draw, x + 16, 290, label, 22, (40, 40, 40))
        write(draw, x + 16, 326, price, 26, (190, 40, 40), bold=True)
        draw.rounded_rectangle((x + 16, 386, x + 192, 430), 8, fill=(36, 104, 228))
        write(draw, x + 70, 396, "buy", 20, "white")
    return canvas


def road():
    """A sign beside a road, photographed: out of true, soft, against the light."""
    y = np.linspace(0, 1, 320)[:, None, None]
    sky = np.clip(np.array([[[190, 205, 220]]]) + 45 * (1 - y) * np.ones((320, 320, 3)), 0, 255)
    canvas = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([(0, 250), (320, 230), (320, 320), (0, 320)], fill=(92, 110, 80))
    draw.rectangle((156, 150, 166, 300), fill=(110, 110, 112))
    board = Image.new("RGBA", (190, 84), (0, 0, 0, 0))
    face = ImageDraw.Draw(board)
    face.rounded_rectangle((0, 0, 189, 83), 8, fill=(20, 92, 60), outline="white", width=4)
    write(face, 22, 18, "EXIT 7", 40, "white", bold=True)
    put(canvas, board.rotate(4, Image.Resampling.BICUBIC, expand=True), 64, 80)
    return canvas.filter(ImageFilter.GaussianBlur(0.8))


def chat():
    """Two messages on a phone, with a pictogram of an artist that no model was trained on."""
    canvas = Image.new("RGB", (360, 480), (229, 221, 213))
    draw = ImageDraw.Draw(canvas)
    draw.rounded_rectangle((16, 40, 250, 92), 14, fill="white")
    write(draw, 32, 52, "look who is here", 22, (30, 30, 30))
    draw.rounded_rectangle((250, 400, 344, 450), 14, fill=(220, 248, 198))
    write(draw, 272, 410, "oh!", 24, (30, 30, 30))
    put(canvas, pictogram("emojione", "rabbit", 190), 28, 130)
    return canvas


PICTURES = {  # file: how it is made, and what is asked about it
    "slide.png": (slide, "detect apple ; banana ; car", "answer en what color is the car ?"),
    "picker_small.png": (
        lambda: picker(44, 4, ("dog", "pizza", "rocket")),
        "detect pizza",
        "answer en is there a dog ?",
    ),
    "picker_large.png": (
        lambda: picker(120, 2, ("owl", "cake", "key")),
        "detect cake",
        "answer en how many owls are there ?",
    ),
    "scan.jpg": (scan, "caption en", "ocr"),
    "quality_20.jpg": (squeezed, "caption en", "answer en is the cow to the left or right of the horse ?"),
    "dark.jpg": (dark, "caption en", "segment cat"),
    "child.png": (child, "caption en", "detect house ; tree"),
    "shop.png": (shop, "detect umbrella ; shirt ; guitar", "answer en what is to the left of the guitar ?"),
    "road.jpg": (road, "ocr", "answer en is there a sign ?"),
    "chat.png": (chat, "answer en what is this ?", "detect rabbit"),
}


def write_pictures(folder=FOLDER):
    folder.mkdir(exist_ok=True)
    for name, (make, *_) in PICTURES.items():
        image = make()
        if name.endswith(".jpg"):
            image.save(folder / name, quality=20 if name == "quality_20.jpg" else 85)
        else:
            image.quantize(192, dither=Image.Dither.NONE).save(folder / name, optimize=True)


def print_answers(model, folder=FOLDER):
    """A row for each question: the answer as it is, boxes and masks with their scores."""
    pg = paligemma.load(model, dtype="float32")
    print("| picture | prompt | answer |\n|---|---|---|")
    for name, (_, *prompts) in PICTURES.items():
        for prompt in prompts:
            answer = pg.generate(folder / name, prompt, 512, constrained=True)
            items = [f"{item.label} {item.score:.2f}" for item in (*answer.detections, *answer.segments)]
            print(f"| {name} | `{prompt}` | {', '.join(items) or answer.text or '(nothing)'} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="also print the answers of this model")
    model = parser.parse_args().model
    write_pictures()
    if model:
        print_answers(model)
