"""Pages: what vision pretraining reads beside scenes, and how batches mix the two."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from paligemma.tiny.pages import PATTERN, render_page
from paligemma.tiny.recipe.batches import PromptBatches
from paligemma.tiny.recipe.codec import WIDTHS, MaskCodec
from paligemma.tiny.recipe.patch_targets import patch_targets
from paligemma.tiny.recipe.settings import SECOND
from paligemma.tiny.recipe.shards import Shard, pages_of, shard_path, training_page, write_shard
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_pretraining import NONE, SceneBatches, Vision, stored_targets, vision_loss
from paligemma.tiny.varied import render_varied
from paligemma.tiny.world import CHARACTERS, has_held_out

torch.set_num_threads(1)
SMALL = replace(SECOND, image_size=80, vision_width=64, vision_layers=1)
PAGES = [render_page(seed, size=160) for seed in range(25)]


def letters(scene):
    return sum(len(thing.text) for thing in scene.objects)


def test_a_page_teaches_ten_times_as_many_letters_as_a_scene():
    scenes = [render_varied(seed, size=160) for seed in range(100)]
    assert np.mean([letters(page) for page in PAGES]) > 10 * np.mean([letters(scene) for scene in scenes])
    read = {letter for page in PAGES for thing in page.objects for letter in thing.text}
    assert read <= set(CHARACTERS) and len(read) > 50


def test_a_page_of_a_seed_is_always_the_same_and_no_other_s():
    again = render_page(3, size=160)
    assert np.array_equal(again.image, PAGES[3].image) and [t.box for t in again.objects] == [
        t.box for t in PAGES[3].objects
    ]
    assert not np.array_equal(PAGES[2].image, PAGES[3].image)


def test_everything_on_a_page_lies_apart_with_exact_boxes_and_letters_on_their_boards():
    for page in PAGES:
        covered = np.zeros((160, 160), int)
        for thing in page.objects:
            covered += thing.mask
            ys, xs = np.nonzero(thing.mask)
            assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert bool(thing.text) == (thing.label == "sign") and len(thing.char_boxes) == len(thing.text)
            for x0, y0, x1, y1 in thing.char_boxes:
                assert thing.box[0] <= (x0 + x1) / 2 <= thing.box[2] and thing.box[1] <= (y0 + y1) / 2 <= thing.box[3]
        assert covered.max() == 1 and page.pattern == PATTERN
        assert [t.box[0] for t in page.objects] == sorted(t.box[0] for t in page.objects)


def test_pages_show_nothing_that_is_held_out():
    assert not any(has_held_out([(t.label, t.tint) for t in page.objects]) for page in PAGES)
    assert sum(t.label != "sign" for page in PAGES for t in page.objects) > 50


def test_nearly_all_letters_of_a_page_are_targets_of_a_patch():
    """A patch has room for two. At 192 pixels and patches of 16 few have three."""
    pages = [render_page(seed, size=192) for seed in range(10)]
    kept = sum(int((patch_targets(page, 12)["characters"] > 0).sum()) for page in pages)
    assert kept > 0.97 * sum(letters(page) for page in pages)


# --- batches ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(small_shards, tmp_path_factory):
    """Four shards of 16 scenes and two of 16 pages."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        write_shard(folder, number, recipe=SMALL)
    pages_of(folder).mkdir()
    for number in range(2):
        write_shard(pages_of(folder), number, recipe=SMALL)
    return folder


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return MaskCodec(**WIDTHS).eval()


def test_a_folder_called_pages_holds_pages_whose_objects_have_no_rank_and_no_number(folder):
    shard = Shard.load(shard_path(pages_of(folder), 1))
    page = training_page(16 + 5, recipe=SMALL)
    assert [thing["box"] for thing in shard.facts["objects"][5]] == [list(thing.box) for thing in page.objects]
    _, targets = stored_targets(shard, np.array([5]), np.zeros(1, bool))
    shown = targets["class"][0] > 0
    assert (targets["order"] == NONE).all() and (targets["same"][0][shown] == NONE).all()
    assert (targets["total"] == NONE).all() == (len(page.objects) > 6)
    assert (targets["class"][0] == patch_targets(page, SMALL.grid)["class"].ravel()).all()


def test_half_of_the_pictures_of_vision_pretraining_are_pages(folder, codec):
    batch = SceneBatches(folder, 8, codec=codec, pages=True)(0, 0, 1)
    is_page = (batch["order"] == NONE).all(1)
    assert is_page.tolist() == [False] * 4 + [True] * 4
    loss, pictures, figures = vision_loss(Vision(SMALL.vision_config()), batch)
    assert torch.isfinite(loss) and 0 <= figures["order"] / pictures <= 1
    assert not (SceneBatches(folder, 8, codec=codec)(0, 0, 1)["order"] == NONE).all(1).any()


def test_nobody_is_asked_about_a_page_in_joint_training(folder, codec):
    """Pages are among the pictures without prompts, which come after those with prompts."""
    batches = PromptBatches(folder, build_tokenizer(2), codec, 4, num_patches=SMALL.num_patches, pages=True)
    batch = batches(0, 0, 1)
    is_page = (batch["order"] == NONE).all(1)
    assert batch["counts"][0] == 4 and len(is_page) == 12
    assert is_page.tolist() == [False] * 8 + [True] * 4


def test_too_few_shards_of_pages_are_an_error_that_names_their_folder(folder, codec):
    with pytest.raises(FileNotFoundError, match=r"too few shards in .*pages"):
        SceneBatches(folder, 12, mixed=6, codec=codec, pages=True)(0, 0, 1)


@pytest.mark.parametrize("shards", [1, 3, -1])
def test_a_recipe_with_pages_has_enough_for_a_step(shards):
    with pytest.raises(ValueError, match=f"page_shards must be 0 or at least 4, got {shards}"):
        replace(SMALL, page_shards=shards)
