"""Drawing: what is painted where, that labels can be read and stay inside, and that nothing makes it fail."""

import itertools
import math
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma.answers import drawing
from paligemma.answers.drawing import PALETTE, draw, label_colors, one_line
from paligemma.answers.results import Detection, Segment

GREY = (128, 128, 128)


def grey(width, height, mode="RGB"):
    return Image.new("RGB", (width, height), GREY).convert(mode)


def pixels(image):
    return np.asarray(image).astype(int)


def has_color(image, color):
    return (pixels(image) == color).all(-1)


def test_a_box_is_drawn_on_its_own_edge_pixels():
    image = draw(grey(90, 60), [Detection("", (10, 20, 50, 40))])
    color = label_colors([""])[""]
    line = has_color(image, color)
    rows, columns = np.nonzero(line)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (20, 40, 10, 50)
    assert line[20, 10:50].all() and line[39, 10:50].all() and line[20:40, 10].all() and line[20:40, 49].all()
    outside = np.ones((60, 90), bool)
    outside[20:40, 10:50] = False
    assert has_color(image, GREY)[outside].all()
    assert has_color(image, GREY)[25:35, 15:45].all()  # and nothing is filled


def test_a_mask_is_tinted_and_has_a_border():
    mask = np.zeros((60, 90), bool)
    mask[15:45, 20:70] = True
    color = np.array(label_colors([""])[""])
    image = draw(grey(90, 60), [Segment("", (0, 0, 90, 60), mask=mask)], mask_opacity=0.5)
    assert has_color(image, color)[15, 20:70].all() and has_color(image, color)[15:45, 20].all()
    inside = pixels(image)[20:40, 25:65]
    assert (abs(inside - (color + 128) / 2) <= 1).all()
    assert has_color(image, GREY)[5:14, 5:85].all()


def test_a_box_and_a_mask_of_one_thing_are_drawn_as_one():
    mask = np.zeros((60, 90), bool)
    mask[20:40, 10:50] = True
    segment, same, other = (
        Segment("dog", (10, 20, 50, 40), mask),
        Detection("dog", (11, 21, 51, 41)),
        Detection("dog", (60, 20, 80, 40)),
    )
    together = draw(grey(90, 60), [same, segment, other])
    assert np.array_equal(pixels(together), pixels(draw(grey(90, 60), [segment, other])))
    for kept in (Detection("cat", same.box), Segment("dog", same.box)):  # another thing; a mask without a codec
        alone = draw(grey(90, 60), [segment])
        assert np.array_equal(pixels(draw(grey(90, 60), [kept, segment])), pixels(alone)) == (kept.label == "dog")


def test_the_picture_given_is_left_alone():
    picture = grey(60, 40)
    draw(picture, [Detection("dog", (5, 5, 30, 30), 0.5)])
    assert has_color(picture, GREY).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (13, 9), (40, 40)])
def test_every_kind_of_picture(mode, size):
    picture = Image.new(mode, size) if mode == "I;16" else grey(*size, mode=mode)
    everywhere = Segment("a dog", (0, 0, *size), mask=np.ones(size[::-1], bool), score=0.5)
    image = draw(picture, [everywhere, Detection("cat", (-9.5, -9, size[0] + 9, 0.2)), Detection("", (0, 0, 0, 0))])
    assert image.mode == "RGB" and image.size == size


def test_arrays_are_pictures_too_and_no_items_is_no_change():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(draw(array, [])), array)


def test_a_large_picture_gets_thick_lines_and_large_letters():
    box = (1000.0, 500.0, 7000.0, 2900.0)
    image = draw(grey(8000, 3000), [Detection("dog", box, 0.5)])
    color = label_colors(["dog"])["dog"]
    row = has_color(image.crop((0, 1500, 8000, 1501)), color)[0]
    assert row[1000:1012].all() and not row[1030:6900].any()  # a line of more than 12 pixels
    tag = has_color(image.crop((1000, 0, 1050, 500)), color).any(1)
    assert tag.sum() > 100 and tag[-100:].all()  # a tag of more than 100 pixels, above the box


def test_scale_enlarges_the_picture_and_what_is_on_it():
    mask = np.zeros((60, 90), bool)
    mask[20:40, 30:60] = True
    item = Segment("", (30, 20, 60, 40), mask=mask)
    image = draw(grey(90, 60), [item], scale=3)
    assert image.size == (270, 180)
    rows, columns = np.nonzero(~has_color(image, GREY))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (60, 120, 90, 180)
    assert draw(grey(90, 60), [item], scale=0.001).size == (1, 1)


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf])
def test_a_scale_without_a_picture_is_refused(scale):
    with pytest.raises(ValueError, match="expected a number above 0"):
        draw(grey(40, 30), [], scale=scale)


@pytest.mark.parametrize("opacity", [-0.1, 1.5, math.nan, math.inf])
def test_an_opacity_out_of_range_is_refused(opacity):
    with pytest.raises(ValueError, match=r"mask_opacity is .*, expected a number from 0 to 1 \(solid\)"):
        draw(grey(40, 30), [], mask_opacity=opacity)


def test_what_does_not_belong_to_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"mask of 'dog' is \(5, 5\), the picture \(40, 60\)"):
        draw(grey(60, 40), [Segment("dog", (0, 0, 5, 5), mask=np.ones((5, 5), bool))])
    with pytest.raises(ValueError, match="not finite"):
        draw(grey(60, 40), [Detection("dog", (0, 0, float("nan"), 5))])


# -------------------------------------------------------------------------------------------------------------- colours


def test_a_label_has_the_same_color_in_every_picture():
    assert label_colors(["dog"])["dog"] == label_colors(["dog", "dog"])["dog"] == PALETTE[zlib.crc32(b"dog") % 16]


@given(st.sets(st.text(min_size=1), min_size=2, max_size=len(PALETTE)))
def test_labels_of_one_picture_have_different_colors(labels):
    colors = label_colors(sorted(labels))
    assert len(set(colors.values())) == len(labels)
    assert label_colors(sorted(labels, reverse=True)) == colors  # whatever the order


def test_more_labels_than_colors_still_have_one_each():
    labels = [str(i) for i in range(50)]
    assert set(label_colors(labels)) == set(labels)


def test_letters_stand_out_from_their_ground():
    """Contrast as of WCAG 2: 3 is the least for large letters, 4.5 for small ones."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in PALETTE:
        image = grey(200, 40)
        tag = drawing._Tag.fit("HHHH", "", 20, image.size)
        tag.draw(drawing.ImageDraw.Draw(image), (0, 0), color)
        letters = {tuple(pixel) for pixel in pixels(image)[: tag.height, : tag.width].reshape(-1, 3)} - {color}
        ink = (0, 0, 0) if (0, 0, 0) in letters else (255, 255, 255)
        assert ink in letters
        bright, dark = sorted((luminance(ink), luminance(color)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 4, color


def test_neighbours_in_the_palette_stay_apart():
    for a, b in itertools.combinations(PALETTE, 2):
        assert np.abs(np.subtract(a, b)).max() >= 60, (a, b)


# --------------------------------------------------------------------------------------------------------------- labels


def tags(monkeypatch):
    """Records what is written, and the rectangle it is written on."""
    seen = []
    write = drawing._Tag.draw

    def record(tag, canvas, at, color):
        seen.append((tag.text, (*at, at[0] + tag.width, at[1] + tag.height)))
        write(tag, canvas, at, color)

    monkeypatch.setattr(drawing._Tag, "draw", record)
    return seen


def test_label_and_score_stand_above_the_box(monkeypatch):
    seen = tags(monkeypatch)
    draw(grey(300, 200), [Detection("dog", (50, 60, 200, 150), 0.876), Detection("", (5, 150, 40, 190), 0.5)])
    assert [text for text, _ in seen] == ["dog 0.88", "0.50"]
    left, _, _, bottom = seen[0][1]
    assert (left, bottom) == (50, 60)
    draw(grey(300, 200), [Detection("dog", (50, 60, 200, 150), 0.876), Detection("", (0, 0, 9, 9), 1)], scores=False)
    assert [text for text, _ in seen[2:]] == ["dog"]


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.tuples(st.text(max_size=60), *[st.floats(-50, 450)] * 4), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_labels_never_run_off_the_edge_whatever_they_say(width, height, rows):
    with pytest.MonkeyPatch.context() as patch:
        seen = tags(patch)
        image = draw(grey(width, height), [Detection(label, box, 0.5) for label, *box in rows])
    assert image.size == (width, height)
    for _, (left, top, right, bottom) in seen:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_a_long_label_is_shortened_and_keeps_its_score(monkeypatch):
    seen = tags(monkeypatch)
    draw(grey(200, 100), [Detection("a cow that stands at the right edge of the picture", (180, 40, 200, 90), 0.5)])
    text, (_, _, right, _) = seen[0]
    assert text.startswith("a cow that") and text.endswith("… 0.50") and right <= 200


def test_labels_of_boxes_in_one_place_do_not_cover_each_other(monkeypatch):
    seen = tags(monkeypatch)
    draw(grey(400, 400), [Detection(label, (100, 100, 300, 300), 0.5) for label in "abcdefgh"])
    assert len(seen) == 8
    for (_, a), (_, b) in itertools.combinations(seen, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


NASTY = ["line\nbreak", "\x00\x07tab\t", "\ud800", "‮right to left", "🐶", "𒀀", "e" + "\u0301" * 300, "x" * 100_000]


@pytest.mark.parametrize("label", ["кошка на траве", "猫と犬", "قطة", "שלום", "हिन्दी", *NASTY])
@pytest.mark.parametrize("system_fonts", [drawing._SYSTEM_FONTS, ()], ids=["system fonts", "none"])
def test_any_label_is_drawn(monkeypatch, label, system_fonts):
    drawing.font_for.cache_clear()
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", system_fonts)
    image = draw(grey(200, 100), [Detection(label, (20, 40, 150, 80))])
    drawing.font_for.cache_clear()
    assert has_color(image, label_colors([label])[label]).sum() > 400  # a tag, not just the box


def test_a_line_is_one_paragraph_and_keeps_what_joins_letters():
    """Pillow's raqm stops with an error at a character of bidirectional class B, if letters of other scripts follow."""
    breaks = [c for c in map(chr, range(0x11000)) if unicodedata.bidirectional(c) == "B"]
    assert len(breaks) == 7
    for c in breaks:
        assert one_line(f"{c}a {c}\t{c}b{c}") == "a b"
    persian, family = "می\u200cخواهم", "👨\u200d👩\u200d👧"
    assert one_line(persian) == persian and one_line(family) == family
    assert one_line("a\ud800") == "a?"


def test_letters_that_the_own_font_lacks_come_from_another():
    installed = drawing._open_font("DejaVuSans.ttf", 20)
    if installed is None:
        pytest.skip("DejaVu is not installed")
    own = drawing._open_font(None, 20)
    assert drawing._missing("кошка", own) == 4 and drawing._missing("кошка", installed) == 0
    assert drawing.font_for("кошка", 20).getname()[0] == "DejaVu Sans"
    assert drawing.font_for("dog", 20).getname() == own.getname()


def test_without_a_font_for_them_letters_are_still_counted_as_missing(monkeypatch):
    drawing.font_for.cache_clear()
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", ("no-such-font.ttf",))
    assert drawing.font_for("кошка", 20).getname() == drawing._open_font(None, 20).getname()
    drawing.font_for.cache_clear()
