"""Every task on one picture, with the embedded model.

python examples/everything.py [picture] [drawn.png]

Boxes and masks are drawn into everything.png in the current folder, or where the second argument says.
"""

import sys
from pathlib import Path

import paligemma

here = Path(__file__).parent
picture = sys.argv[1] if len(sys.argv) > 1 else here / "scene.png"
drawn = sys.argv[2] if len(sys.argv) > 2 else "everything.png"

pg = paligemma.load("tiny")
try:
    print("caption     ", pg.caption(picture).text)
except (OSError, ValueError) as error:  # a picture that is not there, or is none
    sys.exit(f"error: {error}")

# Several prompts about one picture: it is encoded once.
questions = ["how many objects are there ?", "what color is the background ?", "what is the largest object ?"]
for question, answer in zip(questions, pg.ask(picture, questions)):
    print(f"{question:32} {answer.text:10} {answer.score:.2f}")

print("a choice    ", pg.ask(picture, "is there a house ?", choices=["yes", "no"]).text)

found = pg.detect(picture, ["book", "umbrella", "house", "ball"])
for item in found:
    print(f"{item.label:12} {[round(edge) for edge in item.box]}  score {item.score:.2f}")

masks = pg.segment(picture, "book")
for item in masks:
    print(f"{item.label:12} {int(item.mask.sum())} pixels")

pg.draw(picture, [*found, *masks], scale=2).save(drawn)
print("drawn:", drawn)
