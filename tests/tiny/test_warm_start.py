"""A training that begins with the weights of another embedded model: what is carried over, and what is new."""

import re
from dataclasses import replace

import pytest
import torch

import paligemma
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tiny.recipe.joint_training import JointModel, starting_model
from paligemma.tiny.recipe.settings import FIRST, SECOND
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_pretraining import Vision, load_weights, vision_part
from paligemma.tiny.recipe.warm_start import remember_start, remembered_start, starting_weights
from paligemma.weights.saving import save_pretrained

EMBEDDING = "model.language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the first recipe, with random weights; patches that lie beside each other have similar positions."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(FIRST.world)
    model = JointModel(FIRST.model_config(tokenizer)).model
    coarse = torch.randn(1, FIRST.vision_width, 3, 3)
    smooth = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    positions = model.vision_tower.vision_model.embeddings.position_embedding.weight
    positions.data = smooth[0].flatten(1).T.contiguous()
    folder = tmp_path_factory.mktemp("first") / "model"
    save_pretrained(model, folder, PaliGemmaProcessor(tokenizer, FIRST.num_patches, FIRST.image_size))
    return folder


@pytest.fixture(scope="module")
def first(folder):
    return paligemma.load(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def second(folder):
    return starting_weights(folder, SECOND)


def test_in_the_same_world_the_model_is_the_same(folder, first):
    weights = starting_weights(folder, FIRST)
    tokens = len(first.processor.tokenizer)
    for name, value in first.model.state_dict().items():
        rows = tokens if f"model.{name}" == EMBEDDING else len(value)  # the table is rounded up to a multiple of 64
        assert torch.equal(weights[f"model.{name}"][:rows], value[:rows]), name


def test_embeddings_go_by_token(first, second):
    before, after = first.processor.tokenizer, build_tokenizer(2)
    embedding = first.model.language_model.model.embed_tokens.weight
    for text in ("dog", " dogs", "<loc0512>", "<seg007>", "caption", "\n"):
        (old,), (new,) = before.encode(text), after.encode(text)
        assert torch.equal(second[EMBEDDING][new], embedding[old]), text
    added = set(after.backend.get_vocab()) - set(before.backend.get_vocab())
    assert added  # world 2 asks in more words
    for token in added:
        pieces = before.encode(token.replace("▁", " "))
        row = second[EMBEDDING][after.backend.get_vocab()[token]]
        assert torch.allclose(row, embedding[pieces].mean(0)), token


def test_positions_are_resized_to_the_larger_grid(first, second):
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"
    before, after = first.model.state_dict()[name].view(8, 8, -1), second[f"model.{name}"].view(12, 12, -1)
    nearest = (torch.arange(12) * 8 / 12).long()
    assert torch.cosine_similarity(after, before[nearest][:, nearest], dim=-1).mean() > 0.9


def test_stage_2_takes_the_decoder_of_one_and_the_vision_tower_of_the_other(second, tmp_path):
    torch.manual_seed(1)
    vision = Vision(SECOND.vision_config())  # what stage 1 left
    joint = starting_model(tmp_path, SECOND, build_tokenizer(2), second, vision.state_dict())
    assert torch.equal(joint.model.language_model.model.embed_tokens.weight, second[EMBEDDING])
    for name, value in vision_part(joint.state_dict()).items():
        assert torch.equal(value, vision.state_dict()[name]), name


def test_stage_1_takes_the_vision_tower(second):
    vision = Vision(SECOND.vision_config())
    load_weights(vision, vision_part(second))
    assert torch.equal(
        vision.model.vision_model.embeddings.patch_embedding.weight,
        second["model.vision_tower.vision_model.embeddings.patch_embedding.weight"],
    )


def test_the_start_is_remembered_once(folder, second, tmp_path):
    assert remembered_start(tmp_path) is None
    remember_start(folder, SECOND, tmp_path)
    remember_start(folder, SECOND, tmp_path)  # it is there already
    with pytest.raises(
        ValueError, match=re.escape(f"was begun with --from {folder}, now it is other: choose another with --out")
    ):
        remember_start("other", SECOND, tmp_path)
    there = remembered_start(tmp_path)
    assert there.keys() == second.keys() == JointModel(SECOND.model_config(build_tokenizer(2))).state_dict().keys()
    assert all(torch.equal(there[name], value) for name, value in second.items() if not name.startswith("heads."))


def test_other_widths_are_refused(folder):
    with pytest.raises(
        ValueError, match=rf"cannot start from {re.escape(str(folder))}: model.vision_tower.* is of another shape"
    ):
        starting_weights(folder, replace(SECOND, vision_width=320))


def test_a_training_that_began_with_random_weights_takes_no_others(tmp_path):
    """Stage 1 would stay as it is, and stage 2 would begin with the decoder of another model."""
    (tmp_path / "vision" / "checkpoints").mkdir(parents=True)
    (tmp_path / "vision" / "checkpoints" / "step-10.pt").touch()
    with pytest.raises(ValueError, match="began with random weights: leave --from out"):
        remember_start("tiny", SECOND, tmp_path)
    assert remembered_start(tmp_path) is None
