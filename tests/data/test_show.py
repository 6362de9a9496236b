"""Rows drawn as the model gets them."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from samples import BOX, good, write_lines

import paligemma
import paligemma.cli.main
import paligemma.utils
from paligemma.data.options import open_rows
from paligemma.data.show import COLORS, _chips, show, show_rows


def count(image, color):
    return int((np.asarray(image) == color).all(-1).sum())


def test_a_row_as_the_model_sees_it(folder, processor):
    """Types of tokens have their colours; the picture is squashed, enlarged, and has the box of the suffix on it."""
    row = open_rows(write_lines(folder, good(prefix="detect dog", suffix=f"{BOX.replace('0040', '0900')} dog")))[0]
    image = show(row, processor)
    assert image.width == 1000
    for kind in ("image", "prefix", "suffix", "eos"):
        assert count(image, COLORS[kind]) > 200, kind
    side = 320 // 28 * 28
    picture = np.asarray(image)[12 : 12 + side, 12 : 12 + side]
    red = (picture == (254, 0, 0)).all(-1) | (picture == (255, 0, 0)).all(-1)
    assert 0.8 < red.mean() < 1, "a red picture, but for the box and its label"
    assert red[side // 2 :].all(), "below the box"


@pytest.mark.parametrize("answers, words", [
    (["a dog", "a dog", "a cat"], "(one of 2 answers, which are learned in turn)"),
    (["a dog", "a dog"], None),
])  # fmt: skip
def test_the_answers_that_are_learned_in_turn_are_counted_once_each(folder, processor, monkeypatch, answers, words):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, at, text, **how: written.append(text))
    show(open_rows(write_lines(folder, {"image": "a.png", "question": "what ?", "answers": answers}))[0], processor)
    (head,) = [text for text in written if text.startswith("row 0")]
    assert head.endswith(words) if words else "in turn" not in head


def test_a_token_that_cannot_be_seen_is_spelled_out(folder, processor):
    row = open_rows(write_lines(folder, good(suffix="a\tdog\u200d\n")))[0]
    inputs = processor.lay_out([row.prefix], [1], [row.suffix])
    ids, types, valid, labels = (
        inputs[name][0].tolist() for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
    )
    text = "".join(chip.text for chip in _chips(ids, types, valid, labels, processor) if chip.kind == "suffix")
    assert text == r"a\tdog<0xE2><0x80><0x8D>\n"


def test_the_picture_is_that_of_training(folder, processor):
    """Pixel by pixel what the processor makes of it, each eleven times as large."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    row = open_rows(write_lines(folder, good(image="noise.png")))[0]
    times = 320 // 28
    drawn = np.asarray(show(row, processor))[12 : 12 + 28 * times : times, 12 : 12 + 28 * times : times]
    trained_on = processor([row.prefix], [row.image])["pixel_values"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(drawn, np.rint((trained_on * 0.5 + 0.5) * 255))


def test_padding_shows_where_rows_differ_in_length(folder, processor):
    rows = open_rows(write_lines(folder, good(), good(suffix="a dog and a cat on the house"), good(image=None)))
    one, both = show(rows[0], processor), show_rows(rows[:2], processor)
    legend = 12 * 12
    assert count(one, COLORS["padding"]) < legend + 2 * one.width
    assert count(both, COLORS["padding"]) > count(one, COLORS["padding"]) + legend
    assert count(show(rows[2], processor), COLORS["image"]) <= legend, "a row without a picture has no image tokens"
    with pytest.raises(ValueError, match="no rows to show"):
        show_rows([], processor)


def test_the_mask_is_that_of_training(folder, processor):
    """Prefix: a full block. Suffix: a triangle. Drawn from the mask that the model gets, so its area can be counted."""
    from paligemma.data.show import IMAGE_ROWS, _mask_picture

    inputs = processor.lay_out(["caption en"], [1], ["a cat"])
    row = [inputs[name][0].tolist() for name in ("input_ids", "token_type_ids", "attention_mask", "labels")]
    chips = list(_chips(*row, processor))
    assert [chip.kind for chip in chips] == ["image", *["prefix"] * 4, *["suffix"] * 2, "eos"]
    assert chips[0].text == "<image> x 4" and chips[4].text == "\\n" and chips[6].text == "·cat"
    assert [chip.label for chip in chips] == ["-"] * 5 + [str(i) for i in row[0][-3:]]
    allowed = paligemma.attention_mask.prefix_lm_mask(inputs["token_type_ids"], inputs["attention_mask"].bool())
    picture = np.asarray(_mask_picture(chips, allowed[0, 0].numpy()))[1:-1, 1:-1]
    cells = picture[:: 150 // 11, :: 150 // 11]
    seen = (cells < 255).any(-1)
    block = IMAGE_ROWS + 4
    assert seen.shape == (11, 11) and seen[:block, :block].all() and not seen[:block, block:].any()
    assert np.array_equal(seen[block:, block:], np.tril(np.ones((3, 3), bool)))
    # and in the whole drawing: of two suffix tokens the first is seen by three, the second by two
    whole = show(open_rows(write_lines(folder, good(prefix="caption en", suffix="a cat")))[0], processor)
    assert count(whole, tuple(int(0.8 * value) for value in COLORS["suffix"])) == 5 * (150 // 11) ** 2


def test_a_long_row_is_cut_short_and_says_so(folder, processor):
    row = open_rows(write_lines(folder, good(suffix="1 2 3 " * 700)))[0]
    assert show(row, processor).height < 40 * 502
