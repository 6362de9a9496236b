"""World 2: more of everything that does not matter for the answers, and the same truth."""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from paligemma.cli.main import app
from paligemma.tiny import extract_fonts, redrawing
from paligemma.tiny.artwork import sprite
from paligemma.tiny.degradations import DEGRADATIONS, degrade
from paligemma.tiny.recipe.patch_targets import patch_targets
from paligemma.tiny.renderer import render
from paligemma.tiny.rows import READING, TASKS, asker, caption, rows, sample_row
from paligemma.tiny.scenes import write_scenes
from paligemma.tiny.signs import BOARD_COLORS, VARIED_FONTS
from paligemma.tiny.varied import MOST, render_in_world, render_varied
from paligemma.tiny.world import BACKGROUNDS, TINTABLE, TINTS, VARIED_STYLES, has_held_out, held_out


@cache
def scenes(split="train", count=150, **options):
    return [render_varied(seed, split, 128, **options) for seed in range(count)]


def facts(scene):
    things = [(o.label, o.tint, o.color, o.box, o.text, o.char_boxes, round(o.visible, 6)) for o in scene.objects]
    return scene.background, scene.pattern, scene.style, things


# --- the same everywhere ----------------------------------------------------------------------------


def test_a_seed_gives_the_same_scene_again():
    for seed in range(20):
        first, second = render_varied(seed, size=96), render_varied(seed, size=96)
        assert np.array_equal(first.image, second.image) and facts(first) == facts(second)
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, second.objects, strict=True))


CHECKSUMS = {
    "train": "15860fa47ffde4be",
    "test": "a016020a21e5d35f",
    "heldout": "50d8514070a0e8e8",
    "emojione": "f2bbfb868300688b",
}


def checksum_of_facts(split):
    """Everything about scenes that no processor's rounding can change; see test_world.py."""
    kept = hashlib.sha256()
    for seed in range(40):
        scene = render_varied(seed, split)
        words = [str(scene.background), scene.pattern, scene.style, str([name for name, _ in scene.degradations])]
        words += [f"{thing.name} {thing.color} {thing.text}" for thing in scene.objects]
        for row in rows(scene, asker(scene), encode_mask=lambda asked: [[0] * 16] * len(asked)):
            words += [row.task, row.prefix, re.sub(r"<loc\d+>", "<loc>", row.suffix)]
        kept.update("\n".join(words).encode())
    return kept.hexdigest()[:16]


@pytest.mark.parametrize("split", CHECKSUMS)
def test_the_splits_stay_as_they_were(split):
    assert checksum_of_facts(split) == CHECKSUMS[split]


# seed, mean shades of the four quarters of the clean picture
SHADES = [
    (0, [106.6, 53.3, 56.5, 118.2, 52.6, 55.9, 85.7, 60.9, 51.9, 95.1, 60.6, 50.4]),
    (2, [157.8, 114.4, 80.4, 127.3, 81.7, 46.4, 135.4, 88.9, 52.8, 128.9, 82.9, 47.1]),
    (29, [208.6, 212.3, 201.9, 226.2, 226.6, 222.0, 237.9, 235.9, 233.8, 207.6, 224.3, 212.3]),
]  # fmt: skip


def test_the_pictures_of_some_seeds_are_these():
    for seed, shades in SHADES:
        image = render_varied(seed, degradations=()).image
        assert np.abs(image.reshape(2, 128, 2, 128, 3).mean((1, 3)).ravel() - shades).max() < 1


def test_drawings_are_changed_for_training_alone_and_keep_their_names():
    """Other outlines and other shades of the same things. A drawing of another outline may find another place."""
    changed = 0
    for seed in range(40):
        plain, other = (render_varied(seed, size=128, degradations=(), redraw=share) for share in (0.0, 1.0))
        assert Counter(thing.label for thing in plain.objects) == Counter(thing.label for thing in other.objects)
        changed += not np.array_equal(plain.image, other.image)
    assert changed > 30  # the others have a sign only


def test_a_changed_drawing_keeps_a_colour_that_has_a_name(monkeypatch):
    """A car painted red stays nearer to red than to any other tint (red with a third of white would be pink)."""
    monkeypatch.setattr(redrawing, "bent", lambda image, rng: image)  # so that the painted pixels stay where they are
    tints = np.array(list(TINTS.values()), np.float32)
    tints /= tints.max(1, keepdims=True)  # how light a colour is does not count
    changed, wrong = 0, []
    for style, label, seed in product(("noto", "openmoji", "fluent"), ("car", "heart", "balloon"), range(8)):
        sprites = [sprite(style, label, tint) for tint in TINTS]
        pixels = np.stack([np.asarray(image, np.float32) for image in sprites])
        painted = (np.ptp(pixels[..., :3], axis=0).max(-1) > 90) & (pixels[0, ..., 3] > 128)
        for number, (tint, image) in enumerate(zip(TINTS, sprites)):
            drawn = np.asarray(redrawing.redrawn(image, np.random.default_rng([seed, number]), True), np.float32)
            shade = np.median(drawn[painted][:, :3], axis=0)
            changed += not np.array_equal(shade, np.median(pixels[number][painted][:, :3], axis=0))
            nearest = np.linalg.norm(tints - shade / shade.max(), axis=1).argmin()
            if nearest != number:
                wrong.append((style, label, tint, list(TINTS)[nearest], shade))
    assert changed > 300 and not wrong  # of 504


def test_missing_fonts_are_named_before_one_is_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["extract_fonts", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        extract_fonts.main()
    assert "lacks Lato-Regular.ttf (fonts-lato 2.0-2.1), " in capsys.readouterr().err


def test_worlds_and_splits_are_different_streams():
    pictures = [render(3, "test", 96), *(render_varied(3, split, 96) for split in VARIED_STYLES)]
    assert all(facts(a) != facts(b) for a, b in combinations(pictures, 2))
    assert facts(render_in_world(1, 3, "test", 96)) == facts(pictures[0])
    assert facts(render_in_world(2, 3, "test", 96)) == facts(render_varied(3, "test", 96))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "twemoji"}, "unknown split 'twemoji'; there is: train, val, test, heldout, emojione"),
        ({"style": "apple"}, "no artwork of style 'apple'; there is: noto, openmoji"),
        ({"style": "apple", "sign_only": 1.0}, "no artwork of style 'apple'"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"size": 63}, "size must be at least 64"),
        ({"degradations": [("rain", 0.5)]}, "unknown degradation 'rain'; there is: jpeg"),
        ({"degradations": [("blur", 2)]}, "the strength of a degradation must be from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        render_varied(**{"seed": 0, **arguments})
    with pytest.raises(ValueError, match="unknown world 3"):
        render_in_world(3, 0, "test")


# --- the truth --------------------------------------------------------------------------------------


def test_boxes_and_masks_are_those_of_the_visible_pixels():
    for scene in scenes():
        assert 1 <= len(scene.objects) <= MOST
        assert np.sum([thing.mask for thing in scene.objects], axis=0).max() == 1
        for thing in scene.objects:
            ys, xs = np.nonzero(thing.mask)
            assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 0.65 <= thing.visible <= 1
        edges = [thing.box[0] for thing in scene.objects]
        assert edges == sorted(edges) and all(b - a >= 0.02 * scene.size for a, b in pairwise(edges))


def test_masks_lie_where_the_picture_shows_the_objects():
    """In clean scenes on a plain background, what differs from it lies in a mask, beside one, or in a shadow."""
    plain = [s for s in scenes(count=400, degradations=()) if s.pattern == "plain"]
    assert len(plain) > 15
    kept, hidden = [], []
    for scene in plain:
        colors, counts = np.unique(scene.image.reshape(-1, 3), axis=0, return_counts=True)
        drawn = (scene.image != colors[counts.argmax()]).any(-1)
        seen = np.any([thing.mask for thing in scene.objects], axis=0)
        kept.append(np.count_nonzero(seen & ~drawn) / np.count_nonzero(seen))
        near = np.pad(seen, 4)
        near = np.any([np.roll(near, (y, x), (0, 1)) for y in range(-4, 5) for x in range(-4, 5)], axis=0)[4:-4, 4:-4]
        hidden.append(np.count_nonzero(drawn & ~near) / np.count_nonzero(seen))
    assert max(kept) < 0.02
    assert np.median(hidden) < 0.01  # a scene with shadows, or with a cup's steam, has more


def test_some_objects_are_partly_outside_the_frame_and_some_fill_it():
    boxes = [(thing.box, scene.size, thing.visible) for scene in scenes() for thing in scene.objects]
    cut = [
        visible
        for box, size, visible in boxes
        if (box[0] == 0 or box[1] == 0 or max(box[2:]) == size) and visible < 0.97
    ]
    sides = [max(box[2] - box[0], box[3] - box[1]) / size for box, size, _ in boxes]
    assert len(cut) > 5
    assert max(sides) > 0.8 and min(sides) < 0.2
    counts = Counter(len(scene.objects) for scene in scenes())
    assert set(counts) == {1, 2, 3, 4, 5, 6}


def test_every_variety_appears():
    many = scenes(count=400)
    assert {scene.style for scene in many} == {*VARIED_STYLES["train"], "mixed", "none"}
    assert {name for scene in many for name, _ in scene.degradations} == set(DEGRADATIONS)
    assert {scene.background for scene in many} == {*BACKGROUNDS, None}
    assert 0.3 < np.mean([not scene.degradations for scene in many]) < 0.5
    assert len({scene.pattern for scene in many}) == 13
    assert {thing.color for scene in many for thing in scene.objects if thing.label == "sign"} >= set(BOARD_COLORS) - {
        "pink"
    }
    assert len(VARIED_FONTS) == 20


def test_letters_are_where_they_are_said_to_be():
    signs = [(scene, scene.sign) for scene in scenes(degradations=()) if scene.sign]
    assert len(signs) > 20
    for scene, sign in signs:
        assert sign.visible == 1 and len(sign.text) == len(sign.char_boxes) <= 6
        for x0, y0, x1, y1 in sign.char_boxes:
            assert sign.box[0] - 1 <= x0 < x1 <= sign.box[2] + 1 and sign.box[1] - 1 <= y0 < y1 <= sign.box[3] + 1
            ink = scene.image[round(y0) : round(y1) + 1, round(x0) : round(x1) + 1].astype(float).mean(-1)
            assert np.ptp(ink) > 40, (scene.seed, sign.text)  # something stands out in each box


# --- colours ----------------------------------------------------------------------------------------


def test_colours_are_tints_natural_ones_or_none():
    seen = Counter()
    for scene in scenes(count=400):
        for thing in scene.objects:
            if any(name == "gray" for name, _ in scene.degradations):
                assert thing.tint is None and thing.color is None
                assert scene.background in (None, "white", "gray", "black")
                seen["gray"] += 1
                continue
            assert thing.tint is None or (thing.tint in TINTS and thing.label in TINTABLE)
            assert thing.tint is None or thing.color is None
            seen["tint" if thing.tint else "color" if thing.color else "none"] += 1
    assert min(seen.values()) > 20 and len(seen) == 4


def test_what_has_a_colour_can_be_asked_for_it_and_nothing_else():
    asked = Counter()
    for scene in scenes(count=300):
        row = sample_row(scene, "color", np.random.default_rng(scene.seed), canonical=True)
        if row is None:
            continue
        label = re.fullmatch(r"answer en what color is the (\w+) \?", row.prefix)[1]
        (thing,) = [thing for thing in scene.objects if thing.label == label]
        assert row.suffix == (thing.tint or thing.color)
        asked["sign" if label == "sign" else "tintable" if label in TINTABLE else "natural"] += 1
    assert min(asked.values()) > 10 and len(asked) == 3


def test_a_background_of_many_colours_is_not_named():
    for scene in scenes():
        words = caption(scene)
        if scene.background:
            assert words.endswith(f" on a {scene.background} background")
        else:
            assert "background" not in words and sample_row(scene, "background", np.random.default_rng(0)) is None
            assert (patch_targets(scene)["background"] == -100).all()  # not a target of the patch heads


# --- what is held out -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test", "emojione"])
def test_what_is_held_out_never_appears_elsewhere(split):
    tints = set(held_out()[1])
    for scene in scenes(split, 150):
        things = [(thing.label, thing.tint) for thing in scene.objects]
        assert not has_held_out(things)
        assert not tints & set(things), "natural colours count too"
        assert scene.style in (*VARIED_STYLES[split], *(("none",) if split == "emojione" else ("none", "mixed")))


def test_every_heldout_scene_has_something_that_training_never_shows():
    for scene in scenes("heldout", 80, degradations=()):
        assert has_held_out([(thing.label, thing.tint) for thing in scene.objects])


# --- questions --------------------------------------------------------------------------------------


def test_every_task_can_be_asked_and_reading_in_several_words():
    tasks, readings = Counter(), set()
    for scene in scenes():
        made = rows(scene, np.random.default_rng(scene.seed), encode_mask=lambda pairs: [[0] * 16] * len(pairs))
        tasks.update(row.task for row in made)
        readings |= {row.prefix for row in made if row.task == "ocr"}
        exact = sample_row(scene, "ocr", np.random.default_rng(0), canonical=True)
        assert exact is None or (exact.prefix, exact.suffix) == ("ocr", scene.sign.text)
    assert set(tasks) == set(TASKS) and readings == set(READING)


def test_signs_are_in_every_kind_of_question():
    asked = Counter()
    for scene in scenes(count=400):
        if scene.sign:
            made = rows(scene, np.random.default_rng(scene.seed), encode_mask=lambda pairs: [[0] * 16] * len(pairs))
            asked.update(row.task for row in made if "sign" in row.prefix or row.suffix.endswith("sign"))
    assert {"exists", "count", "color", "left_right", "left_of", "detect_one", "detect_all", "segment"} <= set(asked)


def test_a_scene_is_asked_the_same_before_and_after_it_is_degraded():
    for seed in range(20):
        clean, gray = (render_varied(seed, size=96, degradations=chosen) for chosen in ((), [("gray", 0.5)]))
        asked = [{row.task: row.prefix for row in rows(scene, asker(scene), canonical=True)} for scene in (clean, gray)]
        assert asked[1].items() <= asked[0].items() | {("background", asked[1].get("background"))}


# --- degradations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degradation_changes_pixels_more_the_stronger_it_is_and_moves_nothing(name):
    clean = render_varied(18, size=128, degradations=())
    pictures = [degrade(Image.fromarray(clean.image), name, strength, np.random.default_rng(5)) for strength in (0, 1)]
    weak, strong = (np.abs(np.asarray(p, float) - clean.image).mean() for p in pictures)
    assert weak > 0 and (weak < strong or name == "gray")
    degraded = render_varied(18, size=128, degradations=[(name, 0.5)])
    assert degraded.degradations == ((name, 0.5),)
    assert [thing.box for thing in degraded.objects] == [thing.box for thing in clean.objects]
    light = [np.asarray(Image.fromarray(scene.image).convert("L"), float).ravel() for scene in (clean, degraded)]
    assert np.corrcoef(*light)[0, 1] > 0.8


def test_a_gray_picture_has_no_colour():
    for seed in range(30):
        image = render_varied(seed, size=96, degradations=[("gray", 0.0)]).image
        assert (image == image[..., :1]).all()


# --- data sets --------------------------------------------------------------------------------------


def test_scenes_of_world_2_are_written_with_what_is_known_of_them(tmp_path):
    folder = write_scenes(6, tmp_path / "data", "emojione", 96, world=2, progress=False)
    data = json.loads((folder / "coco.json").read_text())
    assert "EmojiOne (CC BY 4.0)" in data["info"]["attribution"]
    things = iter(data["annotations"])
    for image in data["images"]:
        scene = render_varied(image["seed"], "emojione", 96)
        assert (image["world"], image["background"], image["style"]) == (2, scene.background, scene.style)
        assert [tuple(pair) for pair in image["degradations"]] == list(scene.degradations)
        with Image.open(folder / image["file_name"]) as picture:
            assert np.array_equal(np.asarray(picture), scene.image)
        for thing, written in zip(scene.objects, things):
            assert (written.get("color"), written.get("tint"), written.get("text", "")) == (
                thing.color,
                thing.tint,
                thing.text,
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "2", "--split", "twemoji"], "--split twemoji is of world 1"),
        (["--world", "1", "--split", "emojione"], "--split emojione is of world 2"),
        (["--world", "2", "--task", "count_color"], "--task count_color is of world 1"),
    ],
)
def test_what_the_other_world_has_is_wrong_usage(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["tiny", "scenes", "--out", str(tmp_path / "data"), *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "data").exists()
