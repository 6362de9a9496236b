"""How a recipe runs: its settings, world 2 in files, batches made ahead, pieces of a long training, any device."""

import json
import time
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import paligemma
from paligemma.answers.mask_codec import MaskCodec
from paligemma.tiny.recipe import pieces
from paligemma.tiny.recipe.ahead import Ahead
from paligemma.tiny.recipe.batches import joint_loss
from paligemma.tiny.recipe.codec import WIDTHS, mask_codes
from paligemma.tiny.recipe.joint_training import JointModel, prompt_batches
from paligemma.tiny.recipe.pieces import PieceOver, until
from paligemma.tiny.recipe.settings import FIRST, RECIPES, SECOND, Recipe, for_device, remember
from paligemma.tiny.recipe.shards import (
    Shard,
    make_room,
    picture,
    rendering_beside,
    shard_path,
    shard_paths,
    training_scene,
    write_shard,
)
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.train import _Run, codec_steps, train
from paligemma.tiny.recipe.vision_pretraining import SceneBatches, Vision, validate_vision, vision_loss
from paligemma.tiny.rows import READING
from paligemma.tiny.varied import render_varied
from paligemma.tiny.world import SHIPPED
from paligemma.train import distributed, loop
from paligemma.train.interruption import stop_signals
from paligemma.train.loop import TrainConfig
from paligemma.train.loop import train as train_loop

torch.set_num_threads(1)
SMALL = replace(SECOND, image_size=80, vision_width=64, vision_layers=1, text_width=64, text_layers=1,
                codec_steps=2, shards=6, vision_batch=8, joint_batch=4)  # fmt: skip


@pytest.fixture(scope="module")
def folder(small_shards, tmp_path_factory):
    """Four shards of 16 scenes of world 2."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        write_shard(folder, number, recipe=SMALL)
    return folder


@pytest.fixture(scope="module")
def codec(folder):
    torch.manual_seed(0)
    codec = MaskCodec(**WIDTHS).eval()
    for number in range(4):
        mask_codes(shard_path(folder, number), codec)
    return codec


# --- settings ---------------------------------------------------------------------------------------


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """Five processes ended with a division by zero, after the whole of stage 1."""
    monkeypatch.setattr(distributed, "start", lambda: (0, 5))
    with pytest.raises(ValueError, match="vision_batch is 128, expected a multiple of 4 for each of 5 processes"):
        train(1, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(distributed, "start", lambda: (0, 8))  # a GPU gets larger batches
    assert _Run(tmp_path, 1, SECOND, torch.device("cuda"), None).recipe.joint_batch == 128


def test_the_model_that_ships_is_of_the_recipe_of_its_world():
    shipped = paligemma.load("tiny", device="cpu").model.config
    config = RECIPES[SHIPPED].model_config(build_tokenizer(SHIPPED))
    assert config.vision_config == shipped.vision_config
    assert config.text_config == shipped.text_config


def test_the_second_model_fits_into_30_megabytes():
    with torch.device("meta"):
        model = JointModel(SECOND.model_config(build_tokenizer(2))).model
    codec = sum(value.numel() for value in MaskCodec(**WIDTHS).parameters())
    assert 2 * sum(value.numel() for value in model.parameters()) + 4 * codec < 30e6


def test_a_folder_keeps_to_the_recipe_it_was_begun_with(tmp_path):
    remember(SECOND, tmp_path / "run")
    remember(for_device(SECOND, torch.device("cuda")), tmp_path / "run")  # other batches are no other recipe
    with pytest.raises(
        ValueError, match=r"another recipe \(image_size 192; now image_size 160\): choose another folder"
    ):
        remember(replace(SECOND, image_size=160), tmp_path / "run")


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    """Else the next call, with the right model, would be told that the folder was begun with another recipe."""
    with pytest.raises(FileNotFoundError):
        train(1, tmp_path / "run", recipe=SECOND, start=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


# --- world 2 in files -------------------------------------------------------------------------------


def test_a_shard_of_world_2_gives_back_its_scenes(folder):
    shard = Shard.load(shard_path(folder, 1))
    for i in range(16):
        drawn, kept = training_scene(16 + i, recipe=SMALL), shard.scene(i)
        assert np.array_equal(shard.arrays["image"][i], picture(drawn, 80)) and kept.world == 2
        assert (kept.size, kept.background) == (drawn.size, drawn.background)
        for a, b in zip(drawn.objects, kept.objects, strict=True):
            assert (a.label, a.tint, a.color, a.box, a.text) == (b.label, b.tint, b.color, b.box, b.text)
            assert np.array_equal(a.mask, b.mask)


def test_world_2_is_drawn_at_the_recipe_s_size_and_twice_that_with_more_signs():
    scenes = [training_scene(seed, recipe=SMALL) for seed in range(120)]
    assert {scene.size for scene in scenes} == {80, 160} and all(scene.world == 2 for scene in scenes)
    usual = np.mean([render_varied(seed, size=80).sign is not None for seed in range(120)])
    assert np.mean([scene.sign is not None for scene in scenes]) > usual + 0.05


def test_words_of_world_2_are_one_token_and_world_1_keeps_its_tokenizer():
    tokenizer = build_tokenizer(2)
    for prompt in READING:
        words = prompt.replace("?", " ?").split()
        assert len(tokenizer.encode(prompt)) == len(words)
    assert len(build_tokenizer(1)) == 2088 < len(tokenizer)


# --- batches ----------------------------------------------------------------------------------------


def counted_batches(start):
    """Batches for another process; what it is told arrives there."""

    def batch(step, part, parts):
        image = (torch.arange(48).view(1, 3, 4, 4) * step % 256) / 127.5 - 1
        return {"pixel_values": image, "step": torch.tensor([start + step, part, parts])}

    return batch


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_made_ahead_are_the_same(processes):
    here = counted_batches(100)
    with Ahead(processes, counted_batches, start=100) as ahead:
        for step in (0, 1, 2, 5):
            made, expected = ahead(step, 0, 1), here(step, 0, 1)
            assert torch.equal(made["step"], expected["step"])
            torch.testing.assert_close(made["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)


def test_the_step_between_locations_is_that_of_the_recipe(folder, codec):
    tokenizer = build_tokenizer(2)
    arguments = {"world": 2, "folder": folder, "codec": codec, "size": 4, "num_patches": SMALL.num_patches}
    bins = {}
    for step in (8, 4):
        labels = prompt_batches(**arguments, bin_step=step)(0, 0, 1)["labels"]
        found = labels[(labels >= tokenizer.first_loc_id) & (labels < tokenizer.first_loc_id + 1024)]
        bins[step] = {int(token - tokenizer.first_loc_id) for token in found}
        assert all(number % step == 0 for number in bins[step])
    assert any(number % 8 for number in bins[4])


def test_losses_make_no_tensor_on_a_device_of_their_own(folder, codec):
    """Whatever is created without naming a device would be on the meta device here, and mixing devices is an error."""
    tokenizer = build_tokenizer(2)
    vision, joint = Vision(SMALL.vision_config()), JointModel(SMALL.model_config(tokenizer))
    scenes = SceneBatches(folder, 8, codec=codec)(0, 0, 1)
    arguments = {"world": 2, "folder": folder, "codec": codec, "size": 4, "num_patches": SMALL.num_patches}
    prompts = prompt_batches(**arguments)(0, 0, 1)
    assert SMALL.num_patches == 25 and (prompts["row"][0] == 0).sum() == 25
    loss = joint_loss(tokenizer.first_loc_id)
    with torch.device("meta"):
        losses = [vision_loss(vision, scenes)[0], loss(joint, prompts)[0]]
    for value in losses:
        assert value.device.type == "cpu" and torch.isfinite(value)
        value.backward()


@pytest.mark.slow
def test_new_scenes_are_rendered_beside_the_training_and_the_oldest_make_room(tmp_path):
    write_shard(tmp_path, 5, recipe=SMALL)
    with rendering_beside(tmp_path, replace(SMALL, shards=2, page_shards=0), share=1.0):
        for _ in range(600):
            time.sleep(0.1)
            if len(shard_paths(tmp_path)) == 2:
                break
    assert [path.name for path in shard_paths(tmp_path)] == ["00005.npz", "00006.npz"]
    shard_path(tmp_path, 5).with_suffix(".codes.npy").touch()
    make_room(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["00006.npz"]


def test_vision_is_validated_on_scenes_of_another_split_as_they_are_drawn(folder, codec, monkeypatch):
    monkeypatch.setattr("paligemma.tiny.recipe.vision_pretraining.VALIDATION", 16)
    validate = validate_vision(folder, SMALL, codec)
    vision = Vision(SMALL.vision_config())
    with torch.no_grad():
        figures, again = validate(vision, 0), validate(vision, 1)
    assert figures["class"] == again["class"] < 0.5
    kept = Shard.load(folder / "validation.npz")
    assert np.array_equal(kept.arrays["image"][3], picture(training_scene(3, "val", SMALL, redraw=0.0), 80))
    assert shard_path(folder, 0) in shard_paths(folder) and folder / "validation.npz" not in shard_paths(folder)


# --- pieces -----------------------------------------------------------------------------------------


class Clock:
    """The clock of the loop and of the pieces: a batch waits for ten milliseconds and computes for one of them."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        own = SimpleNamespace(monotonic=lambda: self.now, process_time=lambda: self.now / 10, time=time.time)
        monkeypatch.setattr(loop, "time", own)
        monkeypatch.setattr(pieces, "time", own)

    def batches(self, step, part, parts):
        self.now += 0.01
        return {"x": torch.full((1,), float(step))}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def toy_loss(model, batch):
    return model(batch["x"]).square().sum(), 1.0, {}


def test_a_piece_ends_saved_and_the_next_goes_on_with_the_schedule_of_the_whole(tmp_path, clock):
    """120 steps in all: 30 in the first piece, at a rate that falls from 1 to 0."""

    def piece(seconds):
        model = torch.nn.Linear(1, 1)
        config = TrainConfig(steps=10**9, minutes=0.02, warmup=0.0, schedule="linear", log_every=1, autocast=None)
        with until(clock.now + seconds) as limited:
            train_loop(model, limited(clock.batches), config, tmp_path, loss=toy_loss)

    with pytest.raises(PieceOver):
        piece(0.285)
    first = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(first) == 30 and first[-1]["lr"] == pytest.approx(0.75, abs=0.02)
    piece(60)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 121)) and log[-1]["lr"] < 0.02


@pytest.mark.parametrize("over_there", [True, False])
def test_the_first_process_decides_when_a_piece_is_over(monkeypatch, over_there):
    """The clock of this process says the opposite. Were it asked, one of the processes would not end as the other."""
    monkeypatch.setattr(distributed, "broadcast", lambda own: float(over_there))
    stopped, end = (PieceOver, inf) if over_there else (KeyboardInterrupt, 0.0)
    with stop_signals() as stop_requested, pytest.raises(stopped), until(end) as limited:
        limited(lambda *_: None)(0, 0, 1)
        assert stop_requested() == over_there
        raise KeyboardInterrupt  # as the training loop stops


@pytest.mark.parametrize("minutes, steps", [(0.4, 200), (10, 200), (60, 1200), (600, 2000)])
def test_a_short_first_run_trains_a_codec_of_use(minutes, steps):
    """Every later run keeps it."""
    assert codec_steps(FIRST, minutes) == steps
    assert codec_steps(SECOND, minutes) == (steps if minutes < 100 else 4000)


@pytest.mark.parametrize("processor_time, steps", [(False, 30), (True, 60)])
def test_minutes_of_the_processor_do_not_count_waiting(tmp_path, clock, processor_time, steps):
    """In 0.3 seconds by the clock there is time for 30 steps, in 0.3 seconds of the processor for all of them."""
    config = TrainConfig(
        steps=60, minutes=0.005, processor_time=processor_time, schedule="linear", log_every=1, autocast=None
    )
    train_loop(torch.nn.Linear(1, 1), clock.batches, config, tmp_path, loss=toy_loss)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == steps


def test_ctrl_c_is_not_taken_for_the_end_of_a_piece():
    with pytest.raises(KeyboardInterrupt), until(time.monotonic() + 60):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_the_second_recipe_in_pieces(tmp_path, monkeypatch):
    """Pieces of a quarter of a minute in all, then a package that opens; another recipe is refused.

    What counts are minutes of the processor, so on a busy machine there are more than the usual three.
    """
    for module in ("shards", "batches", "vision_pretraining"):
        monkeypatch.setattr(f"paligemma.tiny.recipe.{module}.SHARD", 64)
    logs = []
    package = tmp_path / "package"
    while not package.exists() and len(logs) < 30:
        assert train(0.12, tmp_path, recipe=SMALL, in_all=0.3) == package
        logs.append(sorted(path.name for path in tmp_path.iterdir() if path.is_dir()))
    assert len(logs) > 1 and "joint-01" in logs[-1] and "joint-02" not in logs[-1]
    pg = paligemma.load(str(package), device="cpu")
    assert pg.processor.image_size == 80
    assert isinstance(pg.caption(render_varied(0).image).text, str)
    with pytest.raises(ValueError, match="another recipe"):
        train(0.01, tmp_path, recipe=Recipe())
