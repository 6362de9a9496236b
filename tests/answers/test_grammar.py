"""Answers -> boxes and masks, the way back, and the grammar that generation follows."""

import math
import re
from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_tokenizer import build_tokenizer
from reference import randomize, tiny_config
from work_count import lines_run

from paligemma.answers.grammar import ChoiceGrammar, DetectionGrammar
from paligemma.answers.mask_codec import MaskCodec, crop, paste
from paligemma.answers.parsing import _token_starts, parse, parse_tokens
from paligemma.answers.results import Detection, Segment
from paligemma.answers.scores import Distribution
from paligemma.answers.writing import canonical_order, format_detections, format_segments
from paligemma.engine import generate
from paligemma.generation import NOT_WATCHED
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer

LABELS = [
    "dog",
    "cat",
    "red car",
    "red car door",
    "the penguin on the left",
    "7up",
    "кошка",
    "猫",
    'dog\'s "ball" & co.',
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return MaskCodec(128, 16, (4, 4, 8, 8), (8, 8, 8, 4, 4)).eval()


def loc(*values):
    return "".join(f"<loc{value:04d}>" for value in values)


def seg(*values):
    return "".join(f"<seg{value:03d}>" for value in values)


BOX = loc(256, 128, 768, 512)  # y0 x0 y1 x1
CODES = list(range(16))
SIZE = (640, 480)


# ------------------------------------------------------------------------------------- reading: what is understood


def test_a_box_in_both_scales():
    """The fact sheet's example: 480 high, 640 wide."""
    (found,) = parse(BOX + " cat", SIZE).detections
    assert found == Detection("cat", (80.0, 120.0, 320.0, 360.0))
    (found,) = parse(BOX + " cat", SIZE, loc_scale=1023).detections
    assert found.box == pytest.approx((80.0782, 120.1173, 320.3128, 360.3519), abs=1e-4)
    (found,) = parse(loc(0, 0, 1023, 1023), SIZE).detections
    assert found == Detection("", (0.0, 0.0, 639.375, 479.53125))
    assert parse(loc(0, 0, 1023, 1023), SIZE, loc_scale=1023).detections[0].box == (0.0, 0.0, 640.0, 480.0)


def test_several_classes_and_instances():
    parsed = parse(f"{BOX} cat ; {loc(0, 0, 512, 512)} dog ; {BOX} cat", SIZE)
    assert [item.label for item in parsed.detections] == ["cat", "dog", "cat"]
    assert parsed.detections[1].box == (0, 0, 320, 240)
    assert not parsed.segments and not parsed.invalid


def test_segments_are_not_repeated_in_detections():
    parsed = parse(f"{BOX}{seg(*CODES)} cat ; {BOX} dog", SIZE)
    assert parsed.segments == [Segment("cat", (80.0, 120.0, 320.0, 360.0), codes=CODES)]
    assert parsed.segments[0].mask is None  # without a codec
    assert [item.label for item in parsed.detections] == ["dog"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (BOX, [""]),  # RefCOCO
        (f"{BOX} ; {BOX}", ["", ""]),
        (BOX + BOX, ["", ""]),
        (f"{BOX} {BOX} dog", ["", "dog"]),
        (f"{BOX}dog", ["dog"]),
        (f"  {BOX}   two  words \t;", ["two  words"]),
        (f"{loc(256, 128)} {loc(768)}\n{loc(512)} spaced", ["spaced"]),
        (f"a photo of {BOX} a cat next to {BOX} a dog", ["a cat next to", "a dog"]),  # grounded caption
        (f"{BOX} dog\nThere is a dog.", ["dog"]),
        (f"{BOX} dog ; and that is all ; {BOX} cat ; thanks", ["dog", "cat"]),
        (f"{BOX} <b>dog</b> & <seg999> <loc1024> <loc12>", ["<b>dog</b> & <seg999> <loc1024> <loc12>"]),
        (f"{BOX} кошка, 猫 🐶", ["кошка, 猫 🐶"]),
        ("no boxes here ; at all", []),
        ("", []),
    ],
)
def test_labels(text, labels):
    parsed = parse(text, SIZE)
    assert [item.label for item in parsed.detections] == labels
    assert all(item.box == (80.0, 120.0, 320.0, 360.0) for item in parsed.detections)
    assert not parsed.segments and not parsed.invalid


@pytest.mark.parametrize(
    ("text", "span", "reason"),
    [
        (loc(768, 128, 256, 512) + " cat", None, "order: y1 = 256 lies before y0 = 768"),
        (loc(256, 512, 768, 128) + " cat", None, "order: x1 = 128 lies before x0 = 512"),
        (loc(256, 128, 256, 512) + " cat", None, "degenerate box: y0 = y1 = 256"),
        (loc(256, 128, 768, 128) + " cat", None, "degenerate box: x0 = x1 = 128"),
        (loc(1, 2, 3) + " cat", None, "3 loc tokens in a row, a box has 4"),
        (loc(1, 2, 3, 4, 5) + " cat", None, "5 loc tokens in a row, a box has 4"),
        (loc(1), None, "1 loc tokens in a row, a box has 4"),
        (BOX + seg(*CODES[:15]) + " cat", None, "15 seg tokens, a mask has 16"),
        (BOX + seg(*CODES, 3) + " cat", None, "17 seg tokens, a mask has 16"),
        (loc(1, 2, 3) + seg(*CODES) + " cat", None, "3 loc tokens in a row, a box has 4"),
        (seg(*CODES) + " cat", None, "seg tokens without a box"),
        (f"a {loc(1)} b", (2, 13), "1 loc tokens in a row, a box has 4"),
        (f"{loc(1, 2, 3)}<loc1024> cat", None, "3 loc tokens in a row, a box has 4"),
    ],
)
def test_what_cannot_be_read_is_listed_with_its_place_and_the_reason(text, span, reason):
    parsed = parse(text, SIZE)
    assert parsed.invalid == [(span or (0, len(text)), reason)]
    assert not parsed.detections and not parsed.segments


def test_good_items_around_a_bad_one_are_read():
    text = f"{BOX} dog ; {loc(9, 9, 8, 8)} cat ; {BOX} bird"
    parsed = parse(text, SIZE)
    assert [item.label for item in parsed.detections] == ["dog", "bird"]
    ((start, end), reason) = parsed.invalid[0]
    assert text[start:end] == loc(9, 9, 8, 8) + " cat" and "order" in reason
    late = parse(f"{BOX} dog {seg(*CODES)} cat", SIZE)  # a mask behind the label is nobody's
    assert [item.label for item in late.detections] == ["dog"] and late.invalid[0][1] == "seg tokens without a box"


def test_masks_are_decoded_and_pasted(codec):
    text = f"{BOX}{seg(*CODES)} cat ; {loc(0, 0, 100, 100)}{seg(*[127] * 16)} dog"
    parsed = parse(text, SIZE, codec=codec)
    with torch.no_grad():
        expected = codec.decode(torch.tensor([CODES, [127] * 16]))
    for item, mask in zip(parsed.segments, expected):
        assert item.mask.shape == (480, 640) and item.mask.dtype == bool
        assert np.array_equal(item.mask, paste(mask, item.box, SIZE))
    (other, _) = parse(text, SIZE, codec=codec, paste_rule="big_vision").segments
    assert np.array_equal(other.mask, paste(expected[0], other.box, SIZE, "big_vision"))


def test_codes_that_the_codec_does_not_have_are_invalid():
    small = MaskCodec(64, 8, (4, 4, 4, 4), (4, 4, 4, 4, 4))
    parsed = parse(BOX + seg(*[63] * 15, 64), SIZE, codec=small)
    assert parsed.invalid == [((0, 4 * 9 + 16 * 8), "code 64 is not one of the codec's 64")]
    assert parse(BOX + seg(*[63] * 16), SIZE, codec=small).segments


def test_a_box_thinner_than_a_pixel_has_an_empty_mask(codec):
    (item,) = parse(loc(0, 500, 1000, 501) + seg(*CODES), (10, 10), codec=codec).segments
    assert not item.mask.any() and item.mask.shape == (10, 10)


def test_impossible_pictures_are_the_callers_mistake():
    for size in ((0, 10), (10, -1), (10.5, 10), (math.nan, 10)):
        with pytest.raises(ValueError, match="image_size"):
            parse("", size)
    with pytest.raises(ValueError, match="loc_scale must be 1024"):
        parse("", SIZE, loc_scale=1000)


PIECES = st.one_of(
    st.sampled_from(
        [BOX, seg(*CODES), " ; ", ";", "\n", " dog", "<loc", "<loc1024>", "<loc００１２>", "<seg128>", ">"]
    ),
    st.integers(0, 1023).map(loc),
    st.integers(0, 127).map(seg),
    st.text(max_size=5),
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)), st.sampled_from([1023, 1024]))
@settings(max_examples=300)
@example("<loc0000>" * 7 + "<seg000>" * 33, 1024)
def test_no_text_raises_and_every_token_is_accounted_for(text, loc_scale):
    parsed = parse(text, (33, 7), loc_scale)
    for item in [*parsed.detections, *parsed.segments]:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= 33 and 0 <= y0 < y1 <= 7
        assert item.label == item.label.strip() and ";" not in item.label and "\n" not in item.label
    for (start, end), reason in parsed.invalid:
        assert 0 <= start < end <= len(text) and reason
    tokens = len(re.findall(r"<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>", text))
    bad = sum(
        len(re.findall(r"<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>", text[a:b]))
        for (a, b), _ in parsed.invalid
    )
    assert tokens == 4 * len(parsed.detections) + 20 * len(parsed.segments) + bad


# ------------------------------------------------------------------------------------------ writing: the way back

sides = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 224, 1023, 1024, 3000, 8000]))
labels = st.text(st.characters(exclude_characters=";<>\n", exclude_categories=["Cs"]), max_size=20)


@st.composite
def pictures(draw):
    """A picture's size and a box in it: anywhere, at the borders, in corners, one pixel small, without area."""
    size = draw(sides), draw(sides)
    edges = []
    for side in size:
        kind = draw(st.sampled_from(["any", "pixels", "pixel", "all", "first", "last", "nothing"]))
        pixel = draw(st.integers(0, side - 1))
        if kind == "any":
            pair = sorted(draw(st.tuples(st.floats(0, side), st.floats(0, side))))
        elif kind == "pixels":
            pair = sorted((pixel, draw(st.integers(0, side))))
        elif kind == "pixel":
            pair = [pixel, pixel + 1]
        else:
            pair = {"all": [0, side], "first": [0, 1], "last": [side - 1, side], "nothing": [pixel, pixel]}[kind]
        edges.append(pair)
    (x0, x1), (y0, y1) = edges
    return size, (x0, y0, x1, y1)


@given(pictures(), labels)
@settings(max_examples=300)
@example(((8000, 3000), (7999.9, 0, 8000, 0.01)), "")
@example(((1, 1), (0, 0, 1, 1)), "dog")
def test_boxes_survive_writing_and_reading(picture, label):
    size, box = picture
    for loc_scale in (1023, 1024):
        parsed = parse(format_detections([Detection(label, box)], size, loc_scale), size, loc_scale)
        (back,) = parsed.detections
        assert not parsed.invalid and back.label == label.strip()
        for axis, side in ((0, size[0]), (1, size[1])):
            bin_ = side / loc_scale
            ends = [(box[axis], back.box[axis]), (box[axis + 2], back.box[axis + 2])]
            thin = box[axis + 2] - box[axis] < bin_  # was perhaps widened to a bin
            for before, after in ends:
                at_far_border = loc_scale == 1024 and before > side - 1.5 * bin_  # there is no location 1024
                allowed = (0.5, 1, 2)[thin + at_far_border] * bin_
                assert abs(before - after) <= allowed * (1 + 1e-9), (loc_scale, axis)
            assert back.box[axis + 2] - back.box[axis] >= bin_ * (1 - 1e-9)


def test_written_boxes():
    def written(box, size=SIZE, **options):
        return format_detections([Detection("cat", box)], size, **options)

    assert written((80, 120, 320, 360)) == BOX + " cat"
    assert written((80.0782, 120.1173, 320.3128, 360.3519), loc_scale=1023) == BOX + " cat"
    assert written((0, 0, 640, 480)) == written((0, 0, 640, 480), loc_scale=1023) == loc(0, 0, 1023, 1023) + " cat"
    assert written((-50, -1, 700, 1000)) == loc(0, 0, 1023, 1023) + " cat"  # cut off at the picture
    for loc_scale in (1023, 1024):  # thinner than a bin: widened inwards at the borders
        assert written((640, 480, 640, 480), loc_scale=loc_scale) == loc(1022, 1022, 1023, 1023) + " cat"
        assert written((0, 0, 0, 0), loc_scale=loc_scale) == loc(0, 0, 1, 1) + " cat"
    # ... and elsewhere to the side on which it lies
    assert written((100.3, 0, 100.4, 480), (1024, 480)) == loc(0, 100, 1023, 101) + " cat"
    assert written((99.6, 0, 99.7, 480), (1024, 480)) == loc(0, 99, 1023, 100) + " cat"


def test_items_are_joined_in_the_callers_order():
    items = [
        Detection("dog", (80, 120, 320, 360)),
        Detection("", (80, 120, 320, 360)),
        Detection(" cat ", (0, 0, 64, 48)),
    ]
    text = format_detections(items, SIZE)
    assert text == f"{BOX} dog ; {BOX} ; {loc(0, 0, 102, 102)} cat"
    assert format_detections([], SIZE) == ""
    assert len(parse(text, SIZE).detections) == 3


def test_canonical_order_is_by_class_then_from_left_to_right():
    boxes = {"a": (50, 0, 60, 9), "b": (10, 5, 20, 9), "c": (10, 2, 30, 9), "d": (0, 0, 5, 5)}
    items = [
        Detection(label, boxes[at])
        for label, at in (("cat", "a"), ("dog", "b"), ("cat", "c"), ("cat", "b"), ("ox", "d"))
    ]

    def order(*names):
        return [(item.label, item.box) for item in canonical_order(items, *names)]

    cats = [("cat", boxes["c"]), ("cat", boxes["b"]), ("cat", boxes["a"])]
    assert order() == [*cats, ("dog", boxes["b"]), ("ox", boxes["d"])]
    assert order(["dog", "cow", "cat"]) == [("dog", boxes["b"]), *cats, ("ox", boxes["d"])]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Detection("cat", (math.nan, 0, 5, 5)), r"item 1 \('cat', box \(nan, 0, 5, 5\)\).*finite"),
        (Detection("cat", (0, 0, math.inf, 5)), "finite"),
        (Detection("cat", (0, 0, 5)), "four"),
        (Detection("cat", (9, 0, 5, 5)), r"item 1 \('cat', box \(9, 0, 5, 5\)\) is inverted"),
        (Detection("cat", (0, 9, 5, 5)), "inverted"),
        (Detection("cat", (-9, 0, -1, 5)), "outside of the picture, which is 640 x 480"),
        (Detection("cat", (0, 481, 5, 490)), "outside"),
        (Detection("cat; dog", (0, 0, 5, 5)), "';'"),
        (Detection("<loc0001>", (0, 0, 5, 5)), "'<'"),
        (Detection("a > b", (0, 0, 5, 5)), "'>'"),
        (Detection("cat\ndog", (0, 0, 5, 5)), r"'\\n'"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(item, message):
    with pytest.raises(ValueError, match=message):
        format_detections([Detection("ok", (0, 0, 5, 5)), item], SIZE)


def test_masks_are_cut_out_and_encoded(codec):
    mask = np.zeros((480, 640), bool)
    mask[100:200, 50:300] = True
    box = (50, 100, 300, 200)
    items = [Segment("dog", box, mask=mask), Segment("cat", box, codes=CODES), Segment("", (0, 0, 300, 200), mask=mask)]
    text = format_segments(items, SIZE, codec=codec)
    parsed = parse(text, SIZE)
    assert [item.label for item in parsed.segments] == ["dog", "cat", ""] and not parsed.invalid
    with torch.no_grad():
        first, last = codec.encode(torch.from_numpy(np.stack([crop(mask, box), crop(mask, (0, 0, 300, 200))]))).tolist()
    assert [item.codes for item in parsed.segments] == [first, CODES, last]
    assert format_segments(parsed.segments, SIZE) == text  # codes of its own need no codec


def test_masks_that_cannot_be_encoded_are_refused_by_name(codec):
    box = (0, 0, 5, 5)
    with pytest.raises(ValueError, match=r"item 0 \('cat'.* no codes"):
        format_segments([Segment("cat", box)], SIZE, codec=codec)
    with pytest.raises(ValueError, match="no codes"):
        format_segments([Segment("cat", box, mask=np.ones((480, 640), bool))], SIZE)
    with pytest.raises(ValueError, match=r"\[640, 480\], the picture \[480, 640\]"):
        format_segments([Segment("cat", box, mask=np.ones((640, 480), bool))], SIZE, codec=codec)
    for codes in (CODES[:15], [*CODES[:15], 128], [-1, *CODES[:15]]):
        with pytest.raises(ValueError, match="16 codes in"):
            format_segments([Segment("cat", box, codes=codes)], SIZE)


@given(st.data())
@settings(max_examples=100)
def test_every_sentence_of_the_grammar_parses_to_what_made_it(data):
    size = data.draw(sides), data.draw(sides)
    coordinate = (
        st.tuples(st.integers(0, 1023), st.integers(0, 1023)).filter(lambda pair: pair[0] != pair[1]).map(sorted)
    )
    codes = st.lists(st.integers(0, 127), min_size=16, max_size=16)
    plain = labels.map(str.strip)
    expected = {"detections": [], "segments": []}
    texts = []
    for is_segment in data.draw(st.lists(st.booleans(), max_size=5)):
        (y0, y1), (x0, x1), label = data.draw(coordinate), data.draw(coordinate), data.draw(plain)
        box = (x0 / 1024 * size[0], y0 / 1024 * size[1], x1 / 1024 * size[0], y1 / 1024 * size[1])
        if is_segment:
            numbers = data.draw(codes)
            expected["segments"].append(Segment(label, box, codes=numbers))
            texts.append(format_segments(expected["segments"][-1:], size))
        else:
            expected["detections"].append(Detection(label, box))
            texts.append(format_detections(expected["detections"][-1:], size))
        assert texts[-1].startswith(loc(y0, x0, y1, x1))
    parsed = parse(" ; ".join(texts), size)
    assert not parsed.invalid
    for name in expected:
        assert [(i.label, pytest.approx(i.box)) for i in expected[name]] == [
            (i.label, i.box) for i in getattr(parsed, name)
        ]
    assert [i.codes for i in parsed.segments] == [i.codes for i in expected["segments"]]


# --------------------------------------------------------------------------------- reading tokens: scores and edges


def test_a_score_is_the_geometric_mean_over_the_items_own_tokens(tokenizer):
    ids = tokenizer.encode(f"look: {BOX} red car ; {BOX}{seg(*CODES)} dog")
    logprobs = [-0.01 * (i + 1) for i in range(len(ids))]
    parsed = parse_tokens(ids, tokenizer, SIZE, token_logprobs=logprobs)
    first = tokenizer.encode("look: ")
    car = list(range(len(first), len(first) + 4 + len(tokenizer.encode(" red car"))))
    assert parsed.detections[0].label == "red car"
    assert parsed.detections[0].score == pytest.approx(math.exp(np.mean([logprobs[i] for i in car])))
    dog = list(range(len(ids) - 20 - len(tokenizer.encode(" dog")), len(ids)))
    assert parsed.segments[0].score == pytest.approx(math.exp(np.mean([logprobs[i] for i in dog])))
    assert parse_tokens(ids, tokenizer, SIZE).detections[0].score is None
    assert parse_tokens([], tokenizer, SIZE, token_logprobs=[]) == parse("", SIZE)


def test_a_score_covers_all_bytes_of_a_label(tokenizer):
    ids = tokenizer.encode(BOX + " 猫犬 ; " + BOX + "猫")
    assert len(tokenizer.encode("猫")) == 3  # three bytes, each a token
    logprobs = [0.0] * len(ids)
    for place in range(4, 4 + 1 + 6):  # a space and six bytes
        logprobs[place] = -1.0
    first, second = parse_tokens(ids, tokenizer, SIZE, token_logprobs=logprobs).detections
    assert first.label == "猫犬" and first.score == pytest.approx(
        math.exp(-6 / 10)
    )  # the lone space is not the label's
    assert second.label == "猫" and second.score == 1.0
    logprobs = [0.0] * (len(ids) - 1) + [-7.0]
    assert parse_tokens(ids, tokenizer, SIZE, token_logprobs=logprobs).detections[1].score == pytest.approx(
        math.exp(-1)
    )


@pytest.mark.parametrize("loc_scale", [1023, 1024])
def test_edges_are_in_pixels_and_in_the_order_of_the_box(tokenizer, loc_scale):
    ids = tokenizer.encode("a " + BOX + " cat")
    edges = [(256.5, 1.0), (128.25, 2.0), (768.0, 4.0), (512.0, 8.0)]
    seen = [NOT_WATCHED, NOT_WATCHED, *(Distribution(*edge, 1.0, ()) for edge in edges), NOT_WATCHED]
    (item,) = parse_tokens(ids, tokenizer, SIZE, loc_scale, distributions=seen).detections
    expected = np.array([[128.25 * 640, 2 * 640], [256.5 * 480, 480], [512 * 640, 8 * 640], [768 * 480, 4 * 480]])
    np.testing.assert_allclose(item.edges, expected / loc_scale)
    assert item.score is None


def test_a_location_spelled_out_is_a_location_in_text_and_in_tokens(tokenizer):
    ids = []
    for token in re.findall(r"<loc\d{4}>", BOX):
        for character in token:
            ids += tokenizer.encode(character)
    ids += tokenizer.encode(" cat")
    assert len(ids) == 4 * 9 + 1
    (item,) = parse_tokens(
        ids, tokenizer, SIZE, token_logprobs=[-0.5] * len(ids), distributions=[NOT_WATCHED] * len(ids)
    ).detections
    assert item.box == (80.0, 120.0, 320.0, 360.0) and item.label == "cat"
    assert item.score == pytest.approx(math.exp(-0.5)) and item.edges is None


def test_tokens_and_what_is_said_of_them_must_match(tokenizer):
    with pytest.raises(ValueError, match="token_logprobs has 1 entries for 4 tokens"):
        parse_tokens(tokenizer.encode(BOX), tokenizer, SIZE, token_logprobs=[0.0])
    with pytest.raises(ValueError, match="distributions has 0 entries"):
        parse_tokens(tokenizer.encode(BOX), tokenizer, SIZE, distributions=[])


def draw_ids(data, tokenizer):
    """Ids of all kinds: words, locations, codes, and bytes, of which some make characters and some do not."""
    first_byte = tokenizer.token_to_id("<0x00>")
    token = st.one_of(
        st.integers(0, len(tokenizer) - 1),
        st.integers(first_byte, first_byte + 255),
        st.integers(tokenizer.first_loc_id, tokenizer.first_loc_id + 1023),
        st.integers(tokenizer.first_seg_id, tokenizer.first_seg_id + 127),
    )
    chunk = st.one_of(st.lists(token, max_size=20), st.lists(PIECES, max_size=6).map("".join).map(tokenizer.encode))
    return [i for part in data.draw(st.lists(chunk, max_size=4)) for i in part]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_where_each_token_begins(tokenizer, data):
    """By definition: as far as what the tokens before it say agrees with the text, and never further back."""
    ids = draw_ids(data, tokenizer)
    text = tokenizer.decode(ids)
    expected = [0]
    for i in range(1, len(ids)):
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(tokenizer.decode(ids[:i]), text))
        expected.append(max(expected[-1], len(list(alike))))
    assert _token_starts(ids, tokenizer, text) == expected[: len(ids)]


def test_a_long_answer_takes_time_in_proportion_to_its_length(tokenizer):
    decoded = []

    class Counting:
        first_loc_id, first_seg_id = tokenizer.first_loc_id, tokenizer.first_seg_id

        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode(ids)

        def decode_stable(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode_stable(ids)

    for text in ("a red car and a 猫, " * 200, BOX + " a red car and a 猫," * 200):
        ids = tokenizer.encode(text)
        decoded.clear()
        parse_tokens(ids, Counting(), SIZE, token_logprobs=[-1.0] * len(ids))
        assert sum(decoded) < 8 * len(ids)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_tokens_and_text_are_read_alike(tokenizer, data):
    ids = draw_ids(data, tokenizer)
    expected = parse(tokenizer.decode(ids), SIZE)
    assert parse_tokens(ids, tokenizer, SIZE) == expected
    scored = parse_tokens(ids, tokenizer, SIZE, token_logprobs=[-1.0] * len(ids))
    assert scored.invalid == expected.invalid
    for name in ("detections", "segments"):
        items, plain = getattr(scored, name), getattr(expected, name)
        assert [(i.label, i.box) for i in items] == [(i.label, i.box) for i in plain]
        assert all(i.score == pytest.approx(math.exp(-1)) for i in items)


# ------------------------------------------------------------------------------------------------- the state machine


def walk(grammar, budget, choose, eos):
    """Lets `choose(allowed)` write an answer; checks what must hold at every step."""
    written = []
    while True:
        remaining = budget - len(written)
        assert remaining >= 1, "the budget ran out before the answer was closed"
        allowed = grammar(written, remaining)
        assert allowed.dtype == torch.int64 and len(allowed) and bool((allowed.diff() > 0).all())
        token = choose(allowed)
        if token == eos:
            return written
        written.append(token)


KINDS = {"listed": LABELS, "any": None, "none": [""], "optional": ["", "dog"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [False, True])
def test_whatever_is_written_parses_and_ends_in_time(tokenizer, kind, segments):
    grammar = DetectionGrammar(tokenizer, KINDS[kind], segments)
    generator = torch.Generator().manual_seed(0)
    eos, spend = tokenizer.eos_token_id, [0.0]

    def choose(allowed):
        others = allowed[allowed != eos]
        if len(others) and torch.rand((), generator=generator) > spend[0]:
            allowed = others  # go on rather than end
        return int(allowed[torch.randint(len(allowed), (), generator=generator)])

    seen = set()
    for budget in [*range(1, 60), *[100, 200] * 5]:
        for spend[0] in (0.0, 0.5):
            ids = walk(grammar, budget, choose, eos)
            text = tokenizer.decode(ids)
            parsed = parse(text, SIZE)
            items, others = (parsed.detections, parsed.segments)[:: -1 if segments else 1]
            assert not parsed.invalid and not others, text
            assert len(items) == text.count("<loc") / 4
            if KINDS[kind] is not None:
                assert {item.label for item in items} <= set(KINDS[kind])
                # exactly the tokens that training has: encoding the text gives them back
                assert tokenizer.encode(text) == ids
                seen |= {item.label for item in items}
            else:
                seen.add(bool(items) and items[0].label != "")
    assert seen == set(KINDS[kind] or [True, False])  # each label was within reach


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [False, True])
def test_every_training_answer_is_of_the_grammar(tokenizer, kind, segments):
    """Token by token what `format_detections` writes and the tokenizer encodes is allowed, to the last."""
    grammar = DetectionGrammar(tokenizer, KINDS[kind], segments)
    names = KINDS[kind] or [*LABELS, "", "5 o'clock", "a  wide   gap"]
    if segments:
        text = format_segments([Segment(name, (1, 1, 90, 90), codes=CODES) for name in names], SIZE)
    else:
        text = format_detections([Detection(name, (1, 1, 90, 90)) for name in names], SIZE)
    ids = tokenizer.encode(text)
    budget = len(ids) + 1  # not one to spare
    for i, token in enumerate([*ids, tokenizer.eos_token_id]):
        assert token in grammar(ids[:i], budget - i), (i, tokenizer.decode(ids[:i]))


def test_boxes_have_an_order_and_room(tokenizer):
    grammar, first = DetectionGrammar(tokenizer, ["dog"]), tokenizer.first_loc_id

    def allowed(*box):
        return (grammar([first + value for value in box], 100) - first).tolist()

    assert allowed(5) == list(range(1023))  # x0: not the last, or no x1 would be greater
    assert allowed(5, 7) == list(range(6, 1024))
    assert allowed(5, 7, 9) == list(range(8, 1024))
    assert allowed(1022, 1022) == [1023]
    start = grammar([], 100).tolist()
    assert start == sorted([tokenizer.eos_token_id, *range(first, first + 1023)])
    assert grammar(tokenizer.encode(BOX + " dog ; "), 100).tolist() == start[1:]  # no ending after a separator


def test_an_item_is_only_begun_if_it_can_be_finished(tokenizer):
    eos = tokenizer.eos_token_id
    for segments, size in ((False, 4 + 2 + 1), (True, 4 + 16 + 2 + 1)):  # with the longest label, "red car", and eos
        grammar = DetectionGrammar(tokenizer, ["dog", "red car"], segments)
        assert grammar([], size - 1).tolist() == [eos]
        assert len(grammar([], size)) == 1024
        box = tokenizer.encode(BOX + (seg(*CODES) if segments else ""))
        dog, red = tokenizer.encode(" dog") + tokenizer.encode(" red")
        assert grammar(box, 2).tolist() == [dog]  # "red car" would not fit
        assert grammar(box, 3).tolist() == sorted([dog, red])
        separator = tokenizer.encode(" ; <loc0000>")[0]
        assert grammar([*box, dog], 2 + size - 1).tolist() == [eos]
        assert grammar([*box, dog], 2 + size).tolist() == sorted([eos, separator])
    grammar = DetectionGrammar(tokenizer)
    written = tokenizer.encode(BOX + " a dog")
    assert grammar(written, 1).tolist() == [eos]  # cut short in time
    least = 2 + 4 + 1  # " ;", " ", a box without a label, eos
    assert separator in grammar(written, least) and separator not in grammar(written, least - 1)


class Stub:
    """A tokenizer of a few whole pieces, longest first, with ids of one's choice; decoding is joining."""

    def __init__(self, pieces, loc=1000, seg=2024, size=2152):
        self.pieces = (
            pieces | {f"<loc{i:04d}>": loc + i for i in range(1024)} | {f"<seg{i:03d}>": seg + i for i in range(128)}
        )
        self.texts = {i: piece for piece, i in self.pieces.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.image_token_id = 2, 1, 0, size
        self.first_loc_id, self.first_seg_id, self.size = loc, seg, size
        self.pattern = re.compile(
            "|".join(re.escape(p) for p in sorted(self.pieces, key=len, reverse=True)) + "|.", re.S
        )

    def encode(self, text):
        return [self.pieces.get(piece, 3) for piece in self.pattern.findall(text)]

    def decode(self, ids):
        return "".join(self.texts.get(i, "") for i in ids)

    def __len__(self):
        return self.size + 1


def test_the_official_tokens():
    """The fact sheet: "... cat ; <loc0100>" is 4401 2161 235248 256100, with the space a token of its own."""
    official = Stub({" cat": 4401, " dog": 5929, " ;": 2161, " ": 235248}, loc=256000, seg=257024, size=257152)
    ids = official.encode(f"{BOX} cat ; {loc(100, 200, 300, 400)} dog")
    assert ids == [256256, 256128, 256768, 256512, 4401, 2161, 235248, 256100, 256200, 256300, 256400, 5929]
    listed, free = DetectionGrammar(official, ["cat", "dog"]), DetectionGrammar(official)
    assert listed(ids[:4], 100).tolist() == [4401, 5929]
    assert listed(ids[:5], 100).tolist() == [1, 2161]
    assert listed(ids[:6], 100).tolist() == free(ids[:6], 100).tolist() == [235248]
    assert listed(ids[:7], 100).tolist() == free(ids[:7], 100).tolist() == list(range(256000, 257023))
    assert free(ids[:4], 100).tolist() == [1, 2161, 4401, 5929, 235248]
    assert listed(ids, 100).tolist() == [1, 2161]


def test_labels_are_cut_into_tokens_as_they_are_in_their_place():
    """A tokenizer whose pieces reach over the borders of labels: "x" and the separator are one token, "z" ends in one
    way before a separator and in another before the end."""
    odd = Stub(
        {" a": 10, " b": 11, " ax ; ": 12, "x": 13, " ; ": 14, " b z": 15, " z ;": 16, " z": 17, " ": 18, " b z ; ": 19}
    )
    grammar = DetectionGrammar(odd, ["a", "ax", "b z"])
    box = odd.encode(BOX)
    assert odd.encode(" ax") == [10, 13] and odd.encode(" ax ; ") == [12]
    assert grammar(box, 100).tolist() == [10, 12, 15, 19]
    assert grammar([*box, 10], 100).tolist() == [1, 13, 14]
    assert grammar([*box, 10, 13], 100).tolist() == [1]  # the end; before another box "ax" is written as 12
    assert grammar([*box, 12], 100).tolist() == list(range(1000, 2023))
    assert grammar([*box, 15], 100).tolist() == [1] and grammar([*box, 19], 100).tolist() == list(range(1000, 2023))


def test_a_separator_that_begins_with_a_space_of_its_own():
    spaced = Stub({" dog": 10, " ": 18, ";": 20})
    assert spaced.encode(" ; ") == [18, 20, 18]
    for grammar in (DetectionGrammar(spaced, ["dog"]), DetectionGrammar(spaced)):
        ids = spaced.encode(f"{BOX} dog ; {BOX} dog")
        for i, token in enumerate([*ids, 1]):
            assert token in grammar(ids[:i], 100)
        assert grammar(ids[:8], 100).tolist() == list(range(1000, 2023))


def test_free_labels_leave_out_what_would_end_them(tokenizer):
    grammar = DetectionGrammar(tokenizer)
    box = tokenizer.encode(BOX)
    begin, later = (set(grammar(ids, 100).tolist()) for ids in (box, box + tokenizer.encode(" dog")))
    separator = tokenizer.encode(" ;")[0]
    assert begin < later
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        if i in later and i not in (separator, tokenizer.eos_token_id):
            assert text and not re.search(r"[;<>\n\t]", text)
    assert all(tokenizer.decode([i]).startswith(" ") for i in begin - {tokenizer.eos_token_id})
    for text in ("<loc0001>", "<seg001>", "\n", "\n\n", ";", "<", ">"):
        assert not set(tokenizer.encode(text)) & later
    assert {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.image_token_id}.isdisjoint(later)
    assert set(tokenizer.encode("猫")) <= later  # bytes of other letters


def test_what_is_not_of_the_grammar_can_only_end(tokenizer):
    for grammar in (DetectionGrammar(tokenizer, ["dog"]), DetectionGrammar(tokenizer, ["dog"], segments=True)):
        for text in ("dog", loc(1, 2) + " dog", loc(1, 2, 3, 4, 5), BOX + "; ;", BOX + seg(1) + " dog", BOX + " cat"):
            assert grammar(tokenizer.encode(text), 100).tolist() == [tokenizer.eos_token_id]


def test_labels_that_cannot_be_written_are_refused(tokenizer):
    for label in ("a ; b", "<loc0001>", "two\nlines"):
        with pytest.raises(ValueError, match="cannot"):
            DetectionGrammar(tokenizer, ["dog", label])
    with pytest.raises(ValueError, match="cannot write the label 'under▁score'"):
        DetectionGrammar(tokenizer, ["under▁score"])  # comes back as a space
    for labels in ([], "dog", [3]):
        with pytest.raises(ValueError, match="labels must be a list"):
            DetectionGrammar(tokenizer, labels)
    long = DetectionGrammar(tokenizer, ["dog " * 2000])
    assert long([], 1000).tolist() == [tokenizer.eos_token_id]
    spaces = DetectionGrammar(tokenizer, [" dog ", "dog"])
    assert spaces(tokenizer.encode(BOX), 100).tolist() == tokenizer.encode(" dog")


def test_choices_are_written_word_for_word(tokenizer):
    choices = ["red", "red car", "a dog", "猫", "yes ; no"]
    grammar = ChoiceGrammar(tokenizer, choices)
    eos, seen = tokenizer.eos_token_id, set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = walk(grammar, 10, lambda allowed: int(allowed[torch.randint(len(allowed), (), generator=generator)]), eos)
        seen.add(tokenizer.decode(ids))
    assert seen == set(choices)
    red, car = tokenizer.encode("red")[0], tokenizer.encode(" car")[0]
    assert grammar([red], 10).tolist() == sorted([eos, car])
    assert grammar([red], 1).tolist() == [eos]
    assert grammar([car], 10).tolist() == [eos]  # not a choice


def test_choices_that_do_not_fit_or_cannot_be_written_are_refused(tokenizer):
    grammar = ChoiceGrammar(tokenizer, ["yes", "a red car"])
    assert tokenizer.encode("yes")[0] in grammar([], 4)
    with pytest.raises(ValueError, match=r"'a red car' takes 4 tokens .* only 3 .*max_new_tokens"):
        grammar([], 3)
    with pytest.raises(ValueError, match="cannot write the choice"):
        ChoiceGrammar(tokenizer, ["under▁score"])
    for choices in ([], "yes"):
        with pytest.raises(ValueError, match="choices must be a list"):
            ChoiceGrammar(tokenizer, choices)
    ChoiceGrammar(tokenizer, ["word " * 3000])  # any length; whether it fits is known when decoding begins


def test_a_step_costs_little_at_the_official_size():
    """A few lines of Python for each token written, and none for each word of the vocabulary. (Measured: 20 us in a
    label of hundreds of tokens, 3 us among listed labels.)"""
    official = Stub({f" w{i}": i for i in range(10, 50)} | {" ;": 255001, " ": 255002}, 256000, 257024, 257152)
    official.texts |= {i: f" w{i}" for i in range(50, 255000)}
    box = [256000, 256000, 256001, 256001]
    for grammar, label in (
        (DetectionGrammar(official), list(range(10, 480))),
        (DetectionGrammar(official, [f"w{i} w{j}" for i in range(10, 45) for j in range(10, 45)]), [10, 11]),
    ):
        states = [[], box[:2], box, box + label, (box + label + [255001, 255002]) * 2]
        for state in states:
            grammar(state, 2000)  # tensors are made when they are first needed
        for state in states:
            assert lines_run(lambda: grammar(state, 2000)) < 100 + 5 * len(state)  # noqa: B023


# -------------------------------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights: it has no idea of the grammar."""
    config = tiny_config("gemma", vocab_size=len(tokenizer) + 7, image_token_index=tokenizer.image_token_id)
    model = PaliGemmaForConditionalGeneration(config).eval()
    randomize(model)
    return model


def test_a_thousand_prompts_on_a_model_that_knows_nothing(model, tokenizer, codec):
    """Under the grammar every answer parses, ends, and names only what was asked for; without it none that says
    anything does."""
    rng = np.random.default_rng(0)
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)
    picture = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    count = {"rows": 0, "items": 0, "free": 0}
    for batch in range(10):
        tasks = [("segment" if rng.random() < 0.3 else "detect", list(rng.permutation(LABELS)[: rng.integers(1, 5)]))
                 for _ in range(100)]  # fmt: skip
        prompts = [f"{task} {' ; '.join(names)}" for task, names in tasks]
        inputs = processor(text=prompts, images=[picture] * len(prompts))
        grammars = [DetectionGrammar(tokenizer, names, task == "segment") for task, names in tasks]
        options = {
            "max_new_tokens": int(rng.integers(1, 60)),
            "do_sample": batch % 2 == 1,
            "temperature": 2.0,
            "seed": batch,
        }
        for (task, names), answer in zip(tasks, generate(model, inputs, constraint=grammars, **options)):
            assert len(answer.token_ids) < options["max_new_tokens"]
            parsed = parse_tokens(answer.token_ids, tokenizer, SIZE, codec=codec, token_logprobs=answer.token_logprobs)
            items = parsed.segments if task == "segment" else parsed.detections
            assert not parsed.invalid and 4 * len(items) == tokenizer.decode(answer.token_ids).count("<loc")
            assert {item.label for item in items} <= set(names)
            assert all(0 < item.score <= 1 for item in items)
            count["rows"] += 1
            count["items"] += len(items)
        if batch < 2:
            for (_, names), answer in zip(tasks, generate(model, inputs, **options)):
                parsed = parse_tokens(answer.token_ids, tokenizer, SIZE)
                found = [*parsed.detections, *parsed.segments]
                count["free"] += bool(found) and not parsed.invalid and {item.label for item in found} <= set(names)
    assert count["rows"] == 1000 and count["items"] > 500
    assert count["free"] == 0


@pytest.mark.parametrize("labels", [["dog", "red car"], ["red", "red car"], None])
def test_a_smaller_budget_gives_a_beginning_of_the_answer_and_says_so(model, tokenizer, labels):
    """What does not fit is neither left out in silence nor replaced by something else that does."""
    inputs = PaliGemmaProcessor(tokenizer, 4, 28)(text=["detect"] * 16, images=[np.zeros((28, 28, 3), np.uint8)] * 16)
    # A random model makes one box or many; sampled from it, answers are of all lengths. A seed gives the same ones.
    options = {"constraint": DetectionGrammar(tokenizer, labels), "do_sample": True, "temperature": 4.0}
    options["seed"] = list(range(16))
    wholes = generate(model, inputs, 40, **options)
    for budget in range(1, 40):
        for part, whole in zip(generate(model, inputs, budget, **options), wholes):
            assert part.token_ids == whole.token_ids[: len(part.token_ids)], budget
            assert part.finished == (whole.finished and part.token_ids == whole.token_ids), budget
            assert (part.eos_logprob is not None) == part.finished
            assert part.token_ids != whole.token_ids or budget >= len(whole.token_ids)
    if labels:
        assert any(whole.finished and ";" in tokenizer.decode(whole.token_ids) for whole in wholes)


def test_beams_follow_the_grammar_too(model, tokenizer):
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)
    inputs = processor(text=["detect dog ; cat"], images=[np.zeros((28, 28, 3), np.uint8)])
    (answer,) = generate(
        model, inputs, 20, num_beams=3, length_penalty=4.0, constraint=DetectionGrammar(tokenizer, ["dog", "cat"])
    )
    parsed = parse_tokens(answer.token_ids, tokenizer, SIZE)
    assert not parsed.invalid and parsed.detections
    (choice,) = generate(model, inputs, 20, num_beams=3, constraint=ChoiceGrammar(tokenizer, ["red", "red car"]))
    assert choice.finished and tokenizer.decode(choice.token_ids) in ("red", "red car")
