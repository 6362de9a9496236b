"""The codec learns to draw from the codes that the model writes (`tiny/recipe/mask_decoder.py`)."""

import itertools
import shutil
import sys

import numpy as np
import pytest
import torch

import paligemma
from paligemma.answers.mask_codec import crop
from paligemma.answers.scores import CALIBRATION_FILE
from paligemma.tiny.recipe import mask_decoder
from paligemma.tiny.recipe.codec import in_bytes
from paligemma.tiny.recipe.mask_decoder import FIRST_SEED, questions, train_decoder, written
from paligemma.tiny.recipe.settings import RECIPES
from paligemma.tiny.recipe.shards import SHARD, SIGNS, training_scene
from paligemma.tiny.world import SHIPPED
from paligemma.weights.finding import TINY

RECIPE = RECIPES[SHIPPED]


@pytest.fixture(scope="module")
def pg():
    return paligemma.load("tiny", device="cpu", dtype="float32")


def test_a_question_asks_for_one_thing_and_knows_where_it_is():
    for image, label, things in itertools.islice(questions(RECIPE, first=7), 6):
        assert image.ndim == 3 and things
        assert {thing.label for thing in things} == {label}
        assert all(thing.mask.any() for thing in things)


def test_what_the_model_writes_stands_beside_the_true_masks_in_its_boxes(pg):
    (codes, seen), (own, true) = written(pg, RECIPE, 12, log=lambda text: None)
    assert len(codes) >= 12 and codes.shape == own.shape == (len(codes), 16)
    assert seen.shape == true.shape == (len(codes), 64, 64) and seen.dtype == true.dtype == torch.uint8
    image, label, things = next(iter(questions(RECIPE)))
    found = [item for item in pg.segment(image, label) if item.codes == codes[0].tolist()]
    cropped = [in_bytes(torch.from_numpy(crop(thing.mask, found[0].box))) for thing in things]
    assert any(torch.equal(seen[0], mask) for mask in cropped)
    assert torch.equal(own[:4], pg.codec.encode(true[:4].float() / 255)), "the codec's own codes of the true masks"


def test_only_the_decoder_learns_and_it_learns_to_read_wrong_codes():
    codec = paligemma.load("tiny", device="cpu", dtype="float32").codec  # one that may be changed
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    scenes = [training_scene(seed, recipe=RECIPE) for seed in range(60)]
    cut = [crop(thing.mask, thing.box) for scene in scenes for thing in scene.objects]
    masks = torch.from_numpy(np.stack(cut))
    with torch.no_grad():
        own = codec.encode(masks)
    wrong = (own + 1) % codec.num_codes  # always wrong in the same way: this can be learned
    said: list[str] = []
    pairs = (wrong, in_bytes(masks)), (own, in_bytes(masks))
    train_decoder(codec, *pairs, steps=40, unseen=30, log=said.append)
    first, last = (float(line.split("IoU ")[1][:5]) for line in (said[0], said[-1]))
    assert last > first + 0.1, said
    for name, value in codec.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("decoder."), name


def test_too_few_masks_are_refused(pg):
    pairs = torch.zeros(100, 16, dtype=torch.int64), torch.zeros(100, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="100 masks are too few: 60 are for validation, and a step takes 64"):
        train_decoder(pg.codec, pairs, pairs, unseen=60)


def test_a_calibration_that_was_fitted_to_the_masks_of_before_is_deleted(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "model")
    monkeypatch.setattr(mask_decoder, "written", lambda *_: ((), ()))
    monkeypatch.setattr(mask_decoder, "train_decoder", lambda codec, *_: codec.requires_grad_(False))
    monkeypatch.setattr(sys, "argv", ["mask_decoder", "--model", str(tmp_path / "model")])
    mask_decoder.main()
    assert not (tmp_path / "model" / CALIBRATION_FILE).exists()
    assert paligemma.load(tmp_path / "model").loaded_codec is not None


def test_its_scenes_are_in_no_shard_and_not_mostly_signs():
    assert RECIPE.shards * SHARD < FIRST_SEED < SIGNS * SHARD
