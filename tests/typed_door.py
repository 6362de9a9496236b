"""What a type checker sees of the public face. Checked by mypy (see pyproject.toml), never run."""

from collections.abc import Generator
from pathlib import Path
from typing import assert_type

import numpy as np
from PIL import Image

import paligemma
from paligemma import Answer, Detection, Items, Segment

pg = paligemma.load("tiny", device="cpu", dtype="float32")
assert_type(pg, paligemma.PaliGemma)
array = np.zeros((48, 64, 3), dtype=np.uint8)

# One image in any form, a row that sees several, a row without: one answer.
for image in ("photo.png", Path("photo.png"), b"...", array, Image.new("RGB", (64, 48)), ("a.png", "b.png"), None):
    assert_type(pg.generate(image, "caption en"), Answer)
assert_type(pg.caption("photo.png"), Answer)
assert_type(pg.ocr(array), Answer)
assert_type(pg.ask("photo.png", "how many ?", choices=["one", "two"]), Answer)
assert_type(pg.ask(None, "how many legs has a dog ?"), Answer)
assert_type(pg.detect("photo.png", ["dog", "cat"]), Items[Detection])
assert_type(pg.segment(array, "dog"), Items[Segment])
assert_type(pg.segment(array, prompt="the dog on the left"), Items[Segment])
assert_type(pg.detect("photo.png", {"dog": 1}.keys()), Items[Detection])

# A list of images, or of prompts: a list.
paths: list[str] = ["a.png", "b.png"]
assert_type(pg.caption(paths), list[Answer])
assert_type(pg.ocr([array, array]), list[Answer])
assert_type(pg.ask("photo.png", ["how many ?", "which ?"]), list[Answer])
assert_type(pg.ask(paths, "how many ?"), list[Answer])
assert_type(pg.generate(array, ["caption en", "ocr"], max_new_tokens=8), list[Answer])
assert_type(pg.generate(paths, ["caption en", "ocr"], seed=[1, 2], do_sample=True, top_p=0.9), list[Answer])
assert_type(pg.generate([("a.png", "b.png")], "ocr"), list[Answer])
assert_type(pg.generate([None, None], ["ocr", "ocr"]), list[Answer])
assert_type(pg.detect(paths, "dog"), list[Items[Detection]])
assert_type(pg.segment([array], "dog"), list[Items[Segment]])

# What comes out.
found = pg.detect("photo.png", "dog")
assert_type(found[0], Detection)
assert_type(found[:2], Items[Detection])
assert_type(found[0].box, tuple[float, float, float, float])
assert_type(pg.stream("photo.png", "caption en", temperature=0.5), Generator[str, None, Answer])
assert_type(pg.draw("photo.png", found, scale=2), Image.Image)
assert_type(paligemma.load_image("photo.png"), Image.Image)

# Slips that a checker finds before they run. (An unused `ignore` is an error, so each of these is one.)
pg.generate("photo.png", 3)  # type: ignore[call-overload]
pg.generate(3.5, "caption en")  # type: ignore[call-overload]
pg.generate("photo.png", "caption en", temprature=0.5)  # type: ignore[call-overload]
pg.detect("photo.png")  # type: ignore[call-overload]
pg.detect(None, "dog")  # type: ignore[call-overload]
pg.draw("photo.png", found, opacity=1)  # type: ignore[call-arg]
