"""`paligemma train`: from rows to a folder that everything opens, through interruptions and bad data."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_train import COLORS, kill_in_moment, make_model, make_processor
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.data.options import open_rows
from paligemma.data.rows import Row
from paligemma.evaluate.own_rows import evaluate_rows, merge_captions, metric_of_prompt, to_example
from paligemma.tiny.scenes import write_scenes
from paligemma.train import checkpointing, run_folder, run_report
from paligemma.train.batches import MOST_SKIPPED, RowBatches
from paligemma.train.finetune import finetune
from paligemma.train.options import TrainOptions
from paligemma.train.planning import plan_of
from paligemma.train.setup import open_rows as open_both_rows
from paligemma.train.setup import prepare
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A checkpoint with random weights: 28 x 28 pixels, 4 image tokens."""
    folder = tmp_path_factory.mktemp("base")
    processor = make_processor(tmp_path_factory.mktemp("tokenizer"))
    save_pretrained(make_model(processor), folder, processor)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> str:
    """Eight rows: two pictures of each of four colours, asked for in different words."""
    folder.mkdir()
    lines = []
    for i in range(8):
        name, color = list(COLORS.items())[i % 4]
        Image.new("RGB", (28, 28), color).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "prefix": f"answer en what color is it{' now' * (i // 4)} ?", "suffix": name}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


SMALL = {"steps": 6, "batch": 4, "lr": 3e-3, "save_every": 0.0}  # a checkpoint after every step


def run(base: str, data: str, out: Path, **others) -> list[str]:
    """What was said."""
    said: list[str] = []
    finetune(TrainOptions(model=base, data=data, out=str(out), **{**SMALL, **others}), said.append)
    return said


def interrupt_in_step_4(monkeypatch) -> None:
    """Ctrl-C while its batch is made."""
    lay_out = RowBatches.lay_out

    def interrupted(self, step, loaded):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "lay_out", interrupted)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    entries = [entry for entry in log_of(out) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


# ------------------------------------------------------------------------------------------------- from rows to a model


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run to its end, with validation on the rows it learns by heart."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_data(folder / "data")
    wanted = {"steps": 60, "batch": 8, "lr": 1e-2, "validation": data, "validate_every": 20, "save_every": 100.0}
    return folder / "run", run(base, data, folder / "run", **wanted)


def test_the_task_is_learned_and_the_folder_opens(finished):
    out, _ = finished
    pg = paligemma.load(str(out))
    for name, color in COLORS.items():
        picture = np.full((28, 28, 3), color, np.uint8)
        assert pg.ask(picture, "what color is it ?").text == name


def test_it_is_said_what_will_happen_before_the_first_step(finished):
    _, said = finished
    everything = "\n".join(said)
    assert re.search(r"data .* 8 rows; a row has \d+ tokens, [\d.]+ of them the answer, the longest \d+", everything)
    assert re.search(r"learns .*vision [\d,]+, projector [\d,]+, decoder [\d,]+: ([\d,]+) of \1 parameters", everything)
    assert re.search(r"steps .* 60 steps \(60 epochs\) of 8 rows; adamw, learning rate 0.01, 5% warm-up", everything)
    assert re.search(r"computed in float32", everything)
    assert said.index(next(line for line in said if line.startswith("steps"))) < said.index(
        next(line for line in said if line.startswith("step 20:"))
    )


def test_generated_answers_are_measured_on_the_way_and_drawn(finished):
    out, _ = finished
    measured = {entry["step"]: entry["validation"]["exact"] for entry in log_of(out) if "validation" in entry}
    assert list(measured) == [20, 40, 60] and measured[60] == 1.0
    for name in ("step-00000020", "step-00000040", "final"):
        folder = out / "validation" / name
        assert len(list((folder / "examples").glob("*.png"))) == 8
        assert len((folder / "predictions.jsonl").read_text().splitlines()) == 8
    result = json.loads((out / "finished.json").read_text())
    assert result["figures"][0]["value"] == 1.0 and result["summary"]["steps"] == 60


def test_the_final_figures_are_told_in_words(finished):
    (line,) = [line for line in finished[1] if line.startswith("validation")]
    assert re.fullmatch(r"validation, 8 rows by exact: share of exact answers 1\.000 \(95%: 0\.\d+ … 1\.000\)", line)


def test_validation_measures_captions_as_evaluate_does(base, tmp_path):
    """Against all captions of a picture, also those of rows that were not drawn by lot."""
    captions = ["red", "all red", "a red square", "red as can be"]
    folder = Path(write_data(tmp_path / "data")).parent
    lines = [{"image": "0.png", "caption": caption} for caption in captions]
    lines += [{"image": "1.png", "caption": "green"}, {"image": "2.png", "prefix": "ocr", "suffix": "red"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = open_rows(folder / "captions.jsonl")
    kept = merge_captions([rows[1], rows[2], rows[5]], rows, "auto")
    assert [(row.number, row.answers) for row in kept] == [(1, tuple(captions)), (5, ())]

    run(base, str(folder / "captions.jsonl"), tmp_path / "run", steps=1, validation=str(folder / "captions.jsonl"))
    report = evaluate_rows(paligemma.load(str(tmp_path / "run")), rows, progress=False)
    for entry in json.loads((tmp_path / "run" / "finished.json").read_text())["figures"]:
        figure = report[entry["task"], entry["name"]]  # made with a larger budget of tokens, so values may differ
        assert (entry["rows"], entry["baseline"]) == (figure.rows, figure.baseline), entry["name"]


def test_rows_without_a_picture_are_trained_and_measured(base, tmp_path):
    lines = [{"image": None, "prefix": f"answer en what is {i} ?", "suffix": "red"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = str(tmp_path / "rows.jsonl")
    run(base, data, tmp_path / "run", steps=40, lr=1e-2, validation=data, save_every=100.0)
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["figures of"] == "validation" and finished["figures"][0]["value"] == 1.0


def test_validation_whose_pictures_are_gone_does_not_end_the_run(base, data, tmp_path):
    more = {"validation": write_data(tmp_path / "validation"), "validate_every": 1, "steps": 2}
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, **more})
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("numbers"):
            for picture in (tmp_path / "validation").glob("*.png"):
                picture.unlink()

    finetune(options, say)
    assert sum("none of the pictures can be read" in line for line in said) == 2, "on the way and at the end"
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["figures"] == []
    paligemma.load(str(tmp_path / "run"))


def test_the_report_is_one_page_with_curves_figures_and_examples(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and page.count('src="data:image/jpeg;base64,') == 8
    assert "answer en what color is it ?" in page and "<td>exact</td>" in page and "<code>0.01</code>" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs nothing else"


def test_tensorboard_has_the_curves(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 61))
    assert [event.step for event in events.Scalars("validation/exact")] == [20, 40]
    assert "examples/00" in events.Tags()["images"]


def test_without_tensorboard_it_is_said_once(base, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = run(base, data, tmp_path / "run", steps=2)
    assert sum("TensorBoard" in line for line in said) == 1


def test_a_finished_run_is_left_alone(finished, base):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    options = json.loads((out / "settings.json").read_text())["settings"]
    said: list[str] = []
    again = finetune(TrainOptions(**{**options, "freeze": (), "lora": ()}), said.append)
    assert "finished already" in said[0] and again["summary"]["steps"] == 60
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_frozen_parts_stay(base, data, tmp_path):
    said = run(base, data, tmp_path / "run", freeze=("vision", "embedding"), steps=2)
    assert any("learns  projector" in line for line in said)
    before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "multi_modal_projector.linear.weight" in changed and any("layers.0.mlp" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


def test_nothing_is_kept_for_the_gradient_of_a_frozen_vision_tower(base):
    model = paligemma.load(base).model.train()
    prepare(model, TrainOptions(model=base, data="d", out="o", freeze=("vision",)))
    pixels = torch.zeros(1, 3, 28, 28)
    assert model.vision_tower(pixels).grad_fn is None and model.encode_image(pixels).grad_fn is not None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_vision_tower_learns_at_its_share_of_the_rate(base, data, tmp_path, optimizer):
    def moved(name: str, **others) -> dict[str, float]:
        said = run(base, data, tmp_path / name, steps=1, warmup=0.0, optimizer=optimizer, **others)
        assert any("0.1 of it for the vision tower" in line for line in said) == bool(others)
        before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / name))
        return {key: float((after[key] - before[key]).abs().max()) for key in before}

    same, slower = moved("same"), moved("slower", vision_lr=0.1)
    for key in same:
        if "k_proj.bias" not in key:  # under softmax it has no gradient but rounding
            share = 0.1 if key.startswith("vision_tower") else 1.0
            assert slower[key] == pytest.approx(share * same[key], rel=0.02, abs=1e-7), key


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_of_eye_and_projector_alone(base, data, tmp_path, optimizer):
    for name, decay in (("none", 0.0), ("some", 0.5)):
        run(base, data, tmp_path / name, steps=1, warmup=0.0, optimizer=optimizer, weight_decay=decay)
    none, some = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("none", "some"))
    for key in none:
        kernel = key.startswith(("vision_tower", "multi_modal_projector")) and none[key].ndim > 1
        kernel &= "position_embedding" not in key
        assert torch.equal(none[key], some[key]) != kernel, key


def test_beside_muon_adamw_gets_a_third_of_the_rate(base, data, tmp_path):
    said = run(base, data, tmp_path / "run", steps=1, warmup=0.0, optimizer="muon", lr=3e-3)
    assert any("learning rate 0.003 (0.001 for embedding, norms and biases, by AdamW)" in line for line in said)
    before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / "run"))
    key = "language_model.model.embed_tokens.weight"  # the first step of Adam is the learning rate
    assert float((after[key] - before[key]).abs().max()) == pytest.approx(1e-3, rel=0.01)


def test_dtype_and_mask_codec_are_those_of_the_base(data, tmp_path):
    said = run("tiny", data, tmp_path / "run", steps=1, batch=1)
    assert any("what learns is kept in float32 and saved in bfloat16" in line for line in said)
    pg, tiny = paligemma.load(str(tmp_path / "run")), paligemma.load("tiny")
    assert pg.model.dtype == torch.bfloat16
    codes = torch.arange(16)[None]
    assert torch.equal(pg.codec.decode(codes), tiny.codec.decode(codes))


def test_lora_leaves_an_adapter_that_opens_like_a_model(base, data, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    wanted = {"lora": ("decoder",), "rank": 4, "lora_dropout": 0.1, "lr": 3e-2, "steps": 30, "batch": 8}
    said = run(base, data, out, validation=data, **wanted)
    learns = next(line for line in said if line.startswith("learns"))
    assert learns.startswith("learns  LoRA of rank 4 in decoder ") and "vision" not in learns
    assert not list(out.glob("model*")) and "the adapter is in" in said[-1]
    before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("language_model.model.layers") for name in changed)
    state = checkpointing.load_last(out / "checkpoints")
    assert all("lora_" in name for name in state["model"]), "the base is not in the checkpoints"
    exact = json.loads((out / "finished.json").read_text())["figures"][0]["value"]
    pg = paligemma.load(str(out))
    colors = [(np.full((28, 28, 3), color, np.uint8), name) for name, color in COLORS.items()]
    assert exact == 1.0 and all(pg.ask(picture, "what color is it ?").text == name for picture, name in colors)


@pytest.mark.parametrize("lora", [(), ("decoder",)], ids=["full", "LoRA"])
def test_a_cpu_that_is_slow_at_bfloat16_computes_in_float32(base, data, tmp_path, monkeypatch, lora):
    """Losses are those of float32, and what is saved is in the checkpoint's dtype. Unless bfloat16 is asked for."""
    model = paligemma.load(base, dtype="bfloat16")
    save_pretrained(model.model, tmp_path / "half", model.processor)
    half = str(tmp_path / "half")

    def losses_of(name, slow, **options):
        monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: not slow)
        said = run(half, data, tmp_path / name, lora=lora, steps=3, **options)
        return losses(tmp_path / name), next(line for line in said if line.startswith("numbers"))

    whole, _ = losses_of("float32", False, dtype="float32")
    slow, told = losses_of("slow", True)
    assert slow == whole and "computed in float32 (this CPU has no fast products of bfloat16)" in told
    assert told.endswith(f"saved in {'float32' if lora else 'bfloat16'}; on cpu")
    assert lora or open_checkpoint(tmp_path / "slow").dtype == torch.bfloat16
    fast, told = losses_of("fast", False)
    assert fast != whole and "computed in bfloat16, " in told
    assert losses_of("asked", True, dtype="bfloat16") == (fast, told)


def test_muon_trains_lora_too(base, data, tmp_path):
    """Its first step moves the second matrix of every layer away from zero, by the same step in all directions."""
    pytest.importorskip("peft")
    lr, rank = 1e-2, 4
    run(base, data, tmp_path / "run", lora=("decoder",), rank=rank, optimizer="muon", lr=lr, steps=1, warmup=0.0)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    grown = {name: value for name, value in tensors.items() if "lora_B" in name}
    assert grown
    for name, B in grown.items():
        strengths = torch.linalg.svdvals(B.float())
        assert strengths.max() < 1.3 * 0.2 * max(B.shape) ** 0.5 * lr and strengths.min() > 0.3 * strengths.max(), name


@pytest.mark.filterwarnings("ignore")  # bitsandbytes without a GPU has a lot to say
@pytest.mark.parametrize("mode", ["nf4", "bnb-int8"])
def test_lora_learns_beside_rounded_weights(base, data, tmp_path, monkeypatch, mode):
    """QLoRA, on a CPU: four bits stay four bits, the adapter learns and goes on after an interruption."""
    pytest.importorskip("bitsandbytes", reason="it rounds the weights")
    pytest.importorskip("peft")
    out = tmp_path / "run"
    wanted = {"lora": ("decoder",), "quantize": mode, "rank": 4, "lr": 3e-2, "steps": 30, "batch": 8}
    said = run(base, data, out, validation=data, **wanted)
    (learns,) = [line for line in said if line.startswith("learns")]
    everything = sum(parameter.numel() for parameter in paligemma.load(base).model.parameters())
    learned, total = (
        int(number.replace(",", "")) for number in re.search(r"([\d,]+) of ([\d,]+) par", learns).groups()
    )
    assert total == everything + learned and learns.endswith(f"rounded to {mode}")
    assert json.loads((out / "finished.json").read_text())["figures"][0]["value"] == 1.0
    assert f"rounded to {mode}" in (out / "report.html").read_text()
    state = checkpointing.load_last(out / "checkpoints")["model"]
    assert all("lora_" in name for name in state), "neither the base nor how it is rounded is in the checkpoints"
    assert not list(out.glob("model*")) and paligemma.load(str(out)).ask(Image.new("RGB", (28, 28)), "what ?").text

    interrupt_in_step_4(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "cut", validation=data, **wanted)
    monkeypatch.undo()
    run(base, data, tmp_path / "cut", validation=data, **wanted)
    assert losses(tmp_path / "cut") == losses(out)


def test_without_the_package_that_rounds_it_is_said_before_anything_is_loaded(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma.train.checks.find_spec", lambda name: None)
    monkeypatch.setattr("paligemma.train.finetune.load", None)
    arguments = ["train", "--model", base, "--data", data, "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*arguments, "--lora", "decoder", "--quantize", "nf4"])
    assert isinstance(done.exception, ImportError)
    assert str(done.exception) == "--quantize nf4 needs bitsandbytes: pip install bitsandbytes"
    assert not (tmp_path / "run").exists()


def test_how_to_round_is_told_to_load(base, data, tmp_path, monkeypatch):
    """Also where the package that does it is not installed."""
    asked = []
    monkeypatch.setattr("paligemma.train.checks.find_spec", lambda name: name)
    monkeypatch.setattr("paligemma.train.finetune.load", lambda *given: asked.extend(given) or paligemma.load(base))
    run(base, data, tmp_path / "run", lora=("decoder",), quantize="nf4", steps=1)
    assert asked == [base, None, None, "nf4", None, None]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["quantize"] == "nf4"


def test_a_checkpoint_of_rounded_weights_is_refused_and_told_what_to_begin_with(data, tmp_path):
    """Those of the CPU: their kernels have no gradient."""
    half = tmp_path / "int8"
    assert CliRunner().invoke(app, ["quantize", "tiny", str(half), "--int8"]).exit_code == 0
    with pytest.raises(ValueError, match="has rounded weights, which cannot learn: begin with the checkpoint"):
        run(str(half), data, tmp_path / "run")
    with pytest.raises(ValueError, match="which is for answering alone"):
        run(str(half), data, tmp_path / "run", lora=("decoder",))
    assert not (tmp_path / "run").exists()


def test_lora_beside_an_adapter_is_refused_before_the_run(base, data, tmp_path):
    pytest.importorskip("peft")
    adapter, out = tmp_path / "adapter", tmp_path / "run"
    run(base, data, adapter, lora=("decoder",), steps=1)
    options = TrainOptions(model=str(adapter), data=data, out=str(out), lora=("decoder",), steps=1)
    tensors = adapter / "adapter_model.safetensors"
    tensors.rename(aside := tmp_path / "aside")  # of one on the hub only the settings are there at that time
    for refusing in (finetune, plan_of):
        with pytest.raises(ValueError, match=f"is an adapter.*paligemma merge {re.escape(str(adapter))}"):
            refusing(options)
    assert not out.exists()
    aside.rename(tensors)
    run(str(adapter), data, out, steps=1)  # whole it can be trained
    merged = tmp_path / "merged"
    assert CliRunner().invoke(app, ["merge", str(adapter), str(merged)]).exit_code == 0
    run(str(merged), data, tmp_path / "again", lora=("decoder",), steps=1)
    paligemma.load(str(tmp_path / "again"))


def test_one_step_learns(base, data, tmp_path):
    """As many rows as a batch has and nothing said of how long: a default run. Its --shard has no other process."""
    said = run(base, data, tmp_path / "run", steps=None, batch=8, shard=True)
    assert any("1 step (1 epochs)" in line and "no warm-up" in line for line in said)
    assert any("there is only one" in line for line in said)
    before, after = (paligemma.load(folder).model.state_dict() for folder in (base, str(tmp_path / "run")))
    assert not torch.equal(
        before["language_model.model.embed_tokens.weight"], after["language_model.model.embed_tokens.weight"]
    )


def test_how_long_it_trains(base, data, tmp_path):
    run(base, data, tmp_path / "epochs", steps=None, epochs=1.25, batch=4)  # 10 rows in batches of 4
    assert len(losses(tmp_path / "epochs")) == 3
    run(base, data, tmp_path / "minutes", steps=None, minutes=0.005)
    assert len(losses(tmp_path / "minutes")) >= 1
    rates = [entry["lr"] for entry in log_of(tmp_path / "minutes") if "loss" in entry]
    assert rates[-1] < 0.9


def test_the_command(base, data, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--model", base, "--data", data, "--out", str(out), "--steps", "2", "--batch", "2"]
    done = CliRunner().invoke(app, [*arguments, "--freeze", "vision, projector"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "", "stdout is for answers"
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["freeze"] == ["vision", "projector"] and settings["batch"] == 2


def test_masks_of_a_coco_file_are_learned_as_tokens_of_the_models_codec(tmp_path):
    write_scenes(2, tmp_path / "scenes", size=128, progress=False)
    data = str(tmp_path / "scenes" / "coco.json")
    said = run("tiny", data, tmp_path / "run", kind="coco-segment", steps=1, batch=2)
    assert any("2 rows" in line for line in said)
    row = open_both_rows(TrainOptions(model="tiny", data=data, out="", kind="coco-segment"))[0][0]
    assert row.prefix.startswith("segment ") and row.suffix.count("<seg") % 16 == 0 and "<seg" in row.suffix


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"batch": 0}, "batch is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"epochs": 1.0}, "steps and epochs"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"schedule": "cosinus"}, "schedule is 'cosinus', expected one of cosine, linear, constant"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": math.nan}, "weight_decay is nan, expected a number from 0 on"),
        ({"save_every": math.nan}, "save_every is nan, expected a number from 0 on"),
        ({"lr": math.inf}, "lr is inf"),
        ({"rank": 0, "lora": ("decoder",)}, "rank is 0, expected at least 1"),
        ({"alpha": -1.0, "lora": ("decoder",)}, "alpha is -1, expected a number above 0"),
        ({"weight_decay": 0.1, "lora": ("decoder",)}, "neither learns: leave out --weight-decay"),
        ({"weight_decay": 0.1, "freeze": ("vision", "projector")}, "neither learns: leave out --weight-decay"),
        ({"rank": 4}, "rank would do nothing without --lora"),
        ({"alpha": 8.0, "lora_dropout": 0.1}, "alpha and lora_dropout would do nothing without --lora"),
        ({"quantize": "nf4"}, "rounded weights cannot learn, LoRA beside them can"),
        ({"quantize": "int4", "lora": ("decoder",)}, "quantize is 'int4', expected nf4 or bnb-int8"),
        ({"quantize": "nf4", "lora": ("decoder",), "shard": True}, "leave out --shard"),
        ({"metric": "vqa"}, "metric would do nothing without --validation"),
        ({"validate_every": 5}, "validate_every would do nothing without --validation"),
        ({"validation_rows": 5}, "validation_rows would do nothing without --validation"),
        ({"vision_lr": 0.0}, "0 is --freeze vision"),
        ({"vision_lr": 1.5}, "in (0, 1]"),
        ({"vision_lr": 0.1, "freeze": ("vision",)}, "leave out --vision-lr"),
        ({"vision_lr": 0.1, "lora": ("decoder",)}, "leave out --vision-lr"),
        ({"lora": ("decoder",), "freeze": ("vision",)}, "LoRA freezes"),
        ({"lora": ("decoder",), "image_size": 56}, "keeps its resolution"),
        ({"optimizer": "muon", "shard": True}, "sharding cuts them up"),
        ({"dtype": "float16"}, "float16"),
        ({"metric": "beauty"}, "no metric 'beauty'; there are: auto, ocr, exact"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        TrainOptions(**{"model": "tiny", "data": "d", "out": "o", "steps": 3, **wrong})


@pytest.mark.parametrize(
    "fine",
    [
        {"weight_decay": 0.1, "lora": ("projector",)},
        {"weight_decay": 0.1, "freeze": ("vision",), "save_every": 0.0},
        {"vision_lr": 0.1, "lora": ("vision", "decoder"), "rank": 4, "alpha": 8.0, "lora_dropout": 0.1},
        {"validation": "v", "metric": "vqa", "validate_every": 5, "validation_rows": 5},
    ],
)
def test_and_those_that_can_are_not(fine):
    TrainOptions(**{"model": "tiny", "data": "d", "out": "o", "steps": 3, **fine})


@pytest.mark.parametrize("wrong", [{"annotations": "answers.json"}, {"every_label": True}])
def test_options_of_another_kind_of_data_are_refused(base, data, tmp_path, wrong):
    name = next(iter(wrong)).replace("_", "-")
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **wrong)
    for refusing in (finetune, plan_of):
        with pytest.raises(ValueError, match=rf"is jsonl: leave out .*--{name}"):
            refusing(options)


def test_a_run_that_could_not_begin_does_not_bar_the_folder(base, data, tmp_path):
    with pytest.raises(ValueError, match="none of them learns: choose adamw"):
        run(base, data, tmp_path / "run", optimizer="muon", freeze=("vision", "decoder"))
    run(base, data, tmp_path / "run", freeze=("vision", "decoder"), steps=1)


# ------------------------------------------------------------------------------------------------------- going on


def test_ctrl_c_saves_and_the_same_command_goes_on(base, data, tmp_path, monkeypatch):
    """Dropout is on: random numbers have to be the same too."""
    run(base, data, tmp_path / "whole", dropout=0.2, save_every=100.0)

    interrupt_in_step_4(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4, which is saved; the same command goes on"):
        run(base, data, tmp_path / "cut", dropout=0.2, save_every=100.0)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "finished.json").exists()
    said = run(base, data, tmp_path / "cut", dropout=0.2, save_every=100.0)
    assert any("going on" in line and "step-00000004" in line for line in said)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_while_the_next_batch_is_loaded(base, data, tmp_path, monkeypatch):
    """At once, as by a second Ctrl-C. A picture of the step after is missing, which is told when that comes: once."""
    options = TrainOptions(model=base, data=data, out="", **{**SMALL, "batch": 8, "dropout": 0.2})
    finetune(replace(options, out=str(tmp_path / "whole")), during((Path(data).parent / "3.png").unlink))
    shutil.copy(Path(data).parent / "7.png", Path(data).parent / "3.png")  # which is checked before the first step

    load, lay_out = RowBatches.load, RowBatches.lay_out
    loaded_step_5, threads = threading.Event(), []

    def loading(self, step, *part):
        loaded = load(self, step, *part)
        if step == 4:
            threads.append(threading.current_thread())
            loaded_step_5.set()
        return loaded

    def stopped(self, step, loaded):
        if step == 3:
            assert loaded_step_5.wait(60)
            raise KeyboardInterrupt
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "load", loading)
    monkeypatch.setattr(RowBatches, "lay_out", stopped)
    options = replace(options, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at once: the last good checkpoint is .*step-00000003"):
        finetune(options, during((Path(data).parent / "3.png").unlink))
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()
    monkeypatch.undo()
    assert finetune(options)["summary"]["rows skipped"] == 6
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_goes_on_only_with_the_same_settings_and_data(base, data, tmp_path):
    out = tmp_path / "run"
    run(base, data, out)
    with pytest.raises(ValueError, match=r"other settings: batch 4 there, 2 here; seed 0 there, 5 here.*--no-resume"):
        run(base, data, out, batch=2, seed=5)
    path = Path(data)
    path.write_text(path.read_text().replace('"red"', '"blue"', 1))
    with pytest.raises(ValueError, match="other settings: data '"):
        run(base, data, out)
    run(base, data, out, resume=False, steps=2)
    assert len(losses(out)) == 2, "begun anew"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_and_validation_have_splits_of_their_own(base, data, tmp_path):
    both = Path(data).with_name("train.jsonl")
    Path(data).rename(both)
    lines = both.read_text().splitlines(keepends=True)
    both.with_name("val.jsonl").write_text("".join(lines[:3]))
    folder = str(both.parent)
    options = TrainOptions(model=base, data=folder, split="train", out=str(tmp_path), validation=folder)
    assert [len(rows) for rows in open_both_rows(replace(options, validation_split="val"))] == [8, 3]
    assert [len(rows) for rows in open_both_rows(replace(options, validation=str(both)))] == [8, 8]
    with pytest.raises(ValueError, match=r"train.*val"):
        open_both_rows(options)


def test_data_and_validation_have_answers_of_their_own(base, data, tmp_path):
    for number, answer in enumerate(("yes", "no")):
        question = {"question_id": 1, "image_id": number, "question": "is it ?"}
        for name, content in {"questions": question, "answers": {**question, "answers": [{"answer": answer}]}}.items():
            key = "questions" if name == "questions" else "annotations"
            Path(data).with_name(f"{name}{number}.json").write_text(json.dumps({key: [content]}))
    names = [str(Path(data).with_name(f"{name}{n}.json")) for n in (0, 1) for name in ("questions", "answers")]
    options = TrainOptions(
        base, names[0], str(tmp_path), annotations=names[1], validation=names[2], validation_annotations=names[3],
        image_name="{image_id}.png",
    )  # fmt: skip
    rows, measured = open_both_rows(options)
    assert (rows[0].suffix, measured[0].suffix) == ("yes", "no")


def test_a_refused_command_leaves_the_old_run_as_it_is(base, data, tmp_path):
    """Also with --no-resume, which begins anew in its place: not before all is known to be right."""
    out = tmp_path / "run"
    run(base, data, out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(data).read_text() + '{"image": null, "prefix": "caption en"}\n')
    with pytest.raises(ValueError, match="no part 'visoin'"):
        run(base, data, out, resume=False, freeze=("visoin",))
    with pytest.raises(ValueError, match="no suffix"):
        run(base, str(broken), out, resume=False, images=str(Path(data).parent))
    with pytest.raises(ValueError, match="no suffix"):
        run(base, data, out, resume=False, images=str(Path(data).parent), validation=str(broken))
    with pytest.raises(ValueError, match="none of them learns"):
        run(base, data, out, resume=False, optimizer="muon", freeze=("vision", "decoder"))
    assert contents(out) == before
    run(base, data, out, resume=False, steps=2)
    assert len(losses(out)) == 2 and (out / "notes.txt").read_text() == "mine"


def test_a_run_is_not_put_where_its_model_lies(base, data, tmp_path):
    out = tmp_path / "run"
    run(base, data, out)
    save_pretrained(paligemma.load(base).model, out / "base", paligemma.load(base).processor)
    adapter = tmp_path / "adapter"
    run(str(out), data, adapter, lora=("decoder",), steps=1)
    before = contents(out)
    for model in (out, out / "base", tmp_path / "adapter" / ".." / "run", adapter):
        for others in ({"lora": ("decoder",)}, {}):
            if model != adapter or not others:  # an adapter is refused LoRA anyway
                with pytest.raises(ValueError, match=rf"lies in {re.escape(str(out))}, .*choose another --out"):
                    run(str(model), data, out, resume=False, **others)
    assert contents(out) == before


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_the_old_run_is_removed(base, data, tmp_path, monkeypatch, moment):
    """The same command begins anew all the same, and so does the old one."""
    out = tmp_path / "run"
    run(base, data, out, steps=2)
    (out / "notes.txt").write_text("mine")
    kill_in_moment(monkeypatch, "paligemma.train.run_folder", moment)
    with pytest.raises(KeyboardInterrupt):
        run_folder.clear(out)
    monkeypatch.undo()
    shutil.copytree(out, tmp_path / "old")
    run(base, data, tmp_path / "old", steps=2)
    run(base, data, out, resume=False, steps=3)
    assert len(losses(out)) == 3 and (out / "notes.txt").exists()
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


def test_moved_data_are_the_same_data(base, data, tmp_path):
    run(base, data, tmp_path / "run")
    Path(data).parent.rename(tmp_path / "elsewhere")
    assert "finished already" in run(base, str(tmp_path / "elsewhere" / "rows.jsonl"), tmp_path / "run")[0]


def test_a_folder_of_something_else_is_not_touched(base, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run"):
        run(base, data, tmp_path)


KILLED = """
import os, random, signal, sys, time
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_finetune import TrainOptions, SMALL, finetune
from paligemma.train import checkpointing

base, data, out = sys.argv[1:]
options = TrainOptions(model=base, data=data, out=out, **{{**SMALL, "steps": 40, "dropout": 0.1, "ema": 0.9}})
moments, kills = random.Random(7), 0
for attempt in range(200):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        finetune(options)
        os._exit(0)
    wait = moments.uniform(0.05, 1.2) if kills < 20 else float("inf")
    deadline = time.monotonic() + wait
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.002)
    if done[0]:
        assert done[1] == 0, done
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    for place in checkpointing.checkpoints(Path(out) / "checkpoints"):
        checkpointing.load(place)  # whatever the moment: what has its name is whole
print(kills)
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(base, data, tmp_path):
    """A process forks a run and kills it, again and again; in the end the losses are those of a run left alone."""
    run(base, data, tmp_path / "whole", steps=40, dropout=0.1, ema=0.9, save_every=100.0)
    script = KILLED.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, base, data, str(tmp_path / "killed")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("together", [(), ("--keep-together",)])
@pytest.mark.parametrize("shard", [(), ("--shard",)])
def test_two_processes_do_what_one_does(base, data, tmp_path, shard, together):
    """The command under torchrun, with a look at answers on the way; dropout draws the same in the same part. Also
    where two questions are about the same picture."""
    if together:
        lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
        pairs = [line | {"image": f"{i}.png"} for i in range(4) for line in (lines[i], lines[i + 4])]
        Path(data).write_text("".join(json.dumps(line) + "\n" for line in pairs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run(base, data, tmp_path / "one", dropout=0.1, accumulate=2, keep_together=bool(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "paligemma", "train", "--model", base, "--data", data, "--out", str(tmp_path / "two")]
    command += [*shard, *together]
    command += ["--validation", data, "--validate-every", "3", "--steps", "6", "--batch", "4", "--lr", "3e-3"]
    done = subprocess.run(
        [*command, "--dropout", "0.1"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [entry["step"] for entry in log_of(tmp_path / "two") if "validation" in entry] == [3, 6]
    one, two = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    for name in one:
        if "k_proj.bias" not in name:  # under softmax it has no gradient but rounding, which Adam makes large
            assert torch.allclose(one[name], two[name], atol=5e-5), name


def test_the_plan_is_told_and_nothing_done(data, tmp_path):
    pytest.importorskip("paligemma.train.plan")
    arguments = ["train", "--data", data, "--out", str(tmp_path / "run"), "--plan", "--batch", "2", "--lora", "decoder"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"activations of the decoder", done.stdout)
    total = re.search(r"in all .* (\d+\.\d\d)", done.stdout)
    rounded = CliRunner().invoke(app, [*arguments, "--quantize", "nf4"]).stdout
    assert float(re.search(r"in all .* (\d+\.\d\d)", rounded)[1]) < float(total[1])
    assert not (tmp_path / "run").exists()


def test_the_longest_of_all_rows_makes_the_plan(base, data, tmp_path, monkeypatch):
    """It stands where a sample would hardly look, has two pictures, and is no longer than it will be trained on."""
    asked: dict[str, int] = {}
    monkeypatch.setattr("paligemma.train.planning.estimate", lambda config, **options: asked.update(options))
    lines = [json.dumps({"image": "0.png", "prefix": f"answer en {i} ?", "suffix": "red"}) for i in range(1000)]
    lines[333] = json.dumps({"image": ["0.png", "1.png"], "prefix": "caption en", "suffix": "red " * 40})
    Path(data).write_text("\n".join(lines))
    encode = paligemma.load(base).processor.tokenizer.encode
    answer = len(encode("red " * 40)) + 1
    length = 2 * 4 + 1 + len(encode("caption en\n")) + answer
    for options, cut in (({}, 0), ({"max_length": length - 5}, 5)):
        plan_of(TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **options))
        assert (asked["length"], asked["answer"], asked["images"]) == (length - cut, answer - cut, 2)
        assert asked["shortest_prefix"] == 4 + 1 + len(encode("answer en 1 ?\n"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: pictures and prompt take \d+ tokens, and 6 is the most"):
        plan_of(TrainOptions(model=base, data=data, out=str(tmp_path / "run"), max_length=6))


# ------------------------------------------------------------------------------------------------------- bad data


def during(action):
    """A `say` that acts when the announcement is over, when the rows were checked and nothing was trained yet."""

    def say(line: str) -> None:
        if line.startswith("numbers"):
            action()

    return say


def test_a_picture_that_vanishes_is_skipped_and_counted(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 8, "steps": 3})
    result = finetune(options, during((Path(data).parent / "3.png").unlink))
    assert result["summary"]["rows skipped"] == 3  # once in each epoch
    skipped = [entry for entry in log_of(tmp_path / "run") if "skipped" in entry]
    assert {entry["skipped"] for entry in skipped} == {f"{data}:4"}
    assert sorted(entry["step"] for entry in skipped) == [1, 2, 3]
    assert "rows.jsonl:4" in (tmp_path / "run" / "report.html").read_text()


def test_or_it_is_an_error_with_strict(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 8}, strict=True)
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        finetune(options, during((Path(data).parent / "3.png").unlink))


def test_missing_before_the_first_step(base, data, tmp_path):
    (Path(data).parent / "3.png").unlink()
    said = run(base, data, tmp_path / "run")
    assert any("missing picture: 1 of 8 rows, they are skipped; the first is" in line for line in said)
    with pytest.raises(ValueError, match=r"missing picture: 1 row.*\n.*rows\.jsonl:4: no picture at"):
        run(base, data, tmp_path / "strict", strict=True)


def test_pictures_that_are_all_missing_are_an_error(base, data, tmp_path):
    """Which is what a mistyped --images looks like. Those of the validation rows too: better now than after hours."""
    wrong = r"none of the pictures is there: .*rows\.jsonl:1: no picture at .*or to the folder given as --images"
    with pytest.raises(ValueError, match=wrong):
        run(base, data, tmp_path / "run", images="nowhere")
    validation = write_data(tmp_path / "validation")
    for picture in Path(validation).parent.glob("*.png"):
        picture.unlink()
    with pytest.raises(ValueError, match=wrong):
        run(base, data, tmp_path / "run", validation=validation)
    assert not (tmp_path / "run").exists()


def test_a_run_that_could_read_no_picture_is_no_success(base, data, tmp_path):
    """All of them vanish after they were seen, and there are too few rows for `MOST_SKIPPED`."""
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **SMALL)

    def vanish():
        for picture in Path(data).parent.glob("*.png"):
            picture.rename(picture.with_suffix(".away"))

    for say in (during(vanish), None):  # nor when the same command is given again
        with pytest.raises(OSError, match=r"nothing was learned.* 24 rows .*no such file\. .*--no-resume"):
            finetune(options, say)
    assert not (tmp_path / "run" / "finished.json").exists() and not list((tmp_path / "run").glob("model*"))
    for picture in Path(data).parent.glob("*.away"):
        picture.rename(picture.with_suffix(".png"))
    run(base, data, tmp_path / "run", resume=False)


def test_a_disk_that_went_away_ends_the_run(base, tmp_path):
    processor = paligemma.load(base).processor
    rows = [{"image": str(tmp_path / f"{i}.png"), "prefix": "a", "suffix": "b"} for i in range(2 * MOST_SKIPPED)]
    told = []
    batches = RowBatches(rows, processor, 32, on_skip=lambda *skipped: told.append(skipped))
    with pytest.raises(OSError, match=f"pictures of {MOST_SKIPPED} rows one after the other"):
        for step in range(10):
            assert batches(step) is None
    assert len(told) == MOST_SKIPPED


def test_single_rows_may_be_missing_for_ever(base, tmp_path):
    picture = np.zeros((28, 28, 3), np.uint8)
    rows = [{"image": image, "prefix": "a", "suffix": "b"} for image in (picture, str(tmp_path / "gone.png"))]
    told = []
    batches = RowBatches(rows, paligemma.load(base).processor, 2, on_skip=lambda *skipped: told.append(skipped))
    assert all(len(batches(step)["input_ids"]) == 1 for step in range(2 * MOST_SKIPPED))
    assert len(told) == 2 * MOST_SKIPPED


def test_a_step_without_any_readable_row_is_passed_over(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 1, "steps": 8})
    finetune(options, during((Path(data).parent / "3.png").unlink))
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert len(steps) == 7 and checkpointing.load_last(tmp_path / "run" / "checkpoints")["step"] == 8


def test_a_suffix_that_is_too_long_is_named_and_cut(base, data, tmp_path, recwarn):
    """As the reference's tokens are, the end first; with strict it is an error."""
    with open(data, "a") as file:
        file.write(json.dumps({"image": "0.png", "prefix": "caption en", "suffix": "red " * 40}) + "\n")
    wanted = {"max_length": 40, "batch": 9, "steps": 2}
    said = run(base, data, tmp_path / "run", **wanted)
    (note,) = [line for line in said if "suffix too long" in line]
    assert "1 of 9 rows, the ends of their answers are cut off" in note and "rows.jsonl:9: " in note
    assert any("the longest 40" in line for line in said), "as it is trained on"
    assert not [warning for warning in recwarn if "suffixes were cut" in str(warning.message)], "which is said once"
    (first, _) = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    tokenizer = paligemma.load(base).processor.tokenizer
    prompt = 4 + 1 + len(tokenizer.encode("caption en\n"))
    others = [len(tokenizer.encode(json.loads(line)["suffix"])) + 1 for line in Path(data).read_text().splitlines()[:8]]
    assert first["weight"] == sum(others) + 40 - prompt, "answer tokens that were learned"
    with pytest.raises(ValueError, match=r"suffix too long: 1 row.*\n.*rows\.jsonl:9: \d+ tokens, max_length is 40"):
        run(base, data, tmp_path / "strict", strict=True, **wanted)


def test_without_max_length_the_limit_is_the_models(base, data, tmp_path):
    with open(data, "a") as file:
        file.write(json.dumps({"image": "0.png", "prefix": "caption en", "suffix": "red " * 9000}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:9: 9010 tokens, max_length is 8192"):
        run(base, data, tmp_path / "run", strict=True)


def test_a_prompt_that_leaves_no_room_is_an_error(base, data, tmp_path):
    with pytest.raises(ValueError, match=r"no room: 8 rows.*\n.*rows\.jsonl:1: pictures and prompt take \d+ tokens"):
        run(base, data, tmp_path / "run", max_length=6)


def test_rows_that_are_none_are_named(base, data, tmp_path):
    with open(data, "a") as file:
        file.write('{"image": "0.png", "prefix": "caption en"}\n')
    with pytest.raises(ValueError, match=r"missing key: 1 row.*\n.*rows\.jsonl:9: no suffix"):
        run(base, data, tmp_path / "run")


def test_a_loss_that_is_no_number_stops_and_names_step_and_rows(base, data, tmp_path):
    with pytest.raises(FloatingPointError) as stopped:
        run(base, data, tmp_path / "run", lr=1e30, warmup=0.0, steps=20)
    message = str(stopped.value)
    step = int(re.search(r"of step (\d+) is (nan|inf)", message)[1])
    rows = {int(number) for number in re.findall(r"rows\.jsonl:(\d+)", message)}
    batches = RowBatches(range(8), paligemma.load(base).processor, 4)
    assert rows == {1 + batches._row(place) for place in range(4 * step, 4 * step + 4)}
    assert f"step-{step:08d}" in message, "the last good checkpoint is of the step before"
    state = checkpointing.load_last(tmp_path / "run" / "checkpoints")
    assert state["step"] == step and all(value.isfinite().all() for value in state["model"].values())


def test_its_step_is_named_also_after_one_without_rows(base, data, tmp_path, monkeypatch):
    """Step 1 has nothing to log."""
    lay_out = RowBatches.lay_out
    monkeypatch.setattr(
        RowBatches, "lay_out", lambda self, step, loaded: None if step == 1 else lay_out(self, step, loaded)
    )
    with pytest.raises(FloatingPointError, match="of step 2 is") as stopped:
        run(base, data, tmp_path / "run", lr=1e30, warmup=0.0, batch=1)
    row = RowBatches(range(8), paligemma.load(base).processor, 1)._row(2)
    assert re.findall(r"rows\.jsonl:(\d+)", str(stopped.value)) == [str(row + 1)]


@pytest.mark.parametrize("where", ["tensors", "rename", "log"])
def test_a_full_disk_leaves_the_last_good_checkpoint(base, data, tmp_path, monkeypatch, where):
    out = tmp_path / "run"
    reached = []

    def full(function, error):
        def fails(*arguments, **named):
            if (out / "checkpoints" / "step-00000003").exists():
                reached.append(arguments)
                raise error
            return function(*arguments, **named)

        return fails

    no_space = OSError(28, "No space left on device")
    if where == "tensors":  # safetensors has an error of its own
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(checkpointing, "save_file", full(checkpointing.save_file, error))
    elif where == "rename":
        monkeypatch.setattr(os, "replace", full(os.replace, no_space))
    else:
        monkeypatch.setattr("paligemma.train.loop.Log.write", full(lambda *_: None, no_space))
    with pytest.raises(OSError, match=r"disk is full .* the last good checkpoint is .*step-00000003: make room"):
        run(base, data, out)
    assert reached
    monkeypatch.undo()
    assert checkpointing.checkpoints(out / "checkpoints")[-1].name == "step-00000003"
    assert not list((out / "checkpoints").glob("*.part"))
    assert checkpointing.load_last(out / "checkpoints")["step"] == 3
    run(base, data, out)
    assert checkpointing.load_last(out / "checkpoints")["step"] == 6


# ------------------------------------------------------------------------------------------------- longer, locked


def test_a_finished_run_goes_on_for_longer(base, data, tmp_path):
    """Nothing of it is lost: weights, the optimizer's state, log, figures. The schedule is that of the new length."""
    out = tmp_path / "run"
    run(base, data, out, schedule="constant", warmup=0.0, validation=data)
    with pytest.raises(ValueError, match=r"steps 6 there, 9 here\. .*add --longer to train it further"):
        run(base, data, out, schedule="constant", warmup=0.0, validation=data, steps=9)
    longer = {"schedule": "constant", "warmup": 0.0, "validation": data, "steps": 9, "longer": True}
    said = run(base, data, out, **longer)
    assert any("longer than before: from step 6 on" in line for line in said)
    run(base, data, tmp_path / "whole", schedule="constant", warmup=0.0, validation=data, steps=9)
    assert losses(out) == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(folder)).model.state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((out / "finished.json").read_text())["summary"]["steps"] == 9
    assert json.loads((out / "finished-00000006.json").read_text())["summary"]["steps"] == 6
    assert [entry["step"] for entry in log_of(out) if "validation" in entry] == [6, 9]
    before = contents(out)
    assert "finished already" in run(base, data, out, **longer)[0], "the same again is done"
    with pytest.raises(ValueError, match="has made 9 steps already, and 8 are no more"):
        run(base, data, out, **{**longer, "steps": 8})
    with pytest.raises(ValueError, match="other settings: batch 4 there, 2 here"):
        run(base, data, out, **{**longer, "steps": 12, "batch": 2})
    assert contents(out) == before


def test_longer_goes_on_where_it_was_interrupted(base, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(base, data, out, steps=2)
    longer = {"steps": 6, "longer": True, "save_every": 100.0}
    interrupt_in_step_4(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4"):
        run(base, data, out, **longer)
    monkeypatch.undo()
    run(base, data, out, steps=6)  # by now it is a run of six steps
    assert len(losses(out)) == 6


def test_two_runs_in_one_folder_are_refused(base, data, tmp_path):
    """The second one in another process, while the first has it: it says who does and changes nothing."""
    out = tmp_path / "runs" / "one"
    second = "import sys; from test_finetune import *; run(*sys.argv[1:3], Path(sys.argv[3]), resume=False)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, Path(__file__).parents[:2]), *sys.path])}

    def start() -> None:
        before = {path: path.read_bytes() for path in out.rglob("*.json*")}
        done = subprocess.run(
            [sys.executable, "-c", second, base, data, str(out)], capture_output=True, text=True, env=environment
        )
        assert re.search(r"BlockingIOError: .*paligemma train", done.stderr), done.stderr
        assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before

    finetune(TrainOptions(model=base, data=data, out=str(out), **SMALL), during(start))
    assert len(losses(out)) == 6
    run(base, data, out, resume=False, steps=1)  # free again


def test_a_refused_run_leaves_no_folder(base, data, tmp_path):
    with pytest.raises(ValueError, match="no part 'visoin'"):
        run(base, data, tmp_path / "new" / "run", freeze=("visoin",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_says_what_needs_less(base, data, tmp_path, monkeypatch, error):
    lay_out = RowBatches.lay_out

    def full(self, step, loaded):
        if step == 2:
            raise error
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "lay_out", full)
    with pytest.raises(
        MemoryError, match=r"out of memory \(.+\); the last good checkpoint is .*step-00000002\. --accum"
    ):
        run(base, data, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------- the command


def test_two_runs_side_by_side(base, data, tmp_path):
    """`paligemma train compare`: options that differ, their figures; also of a run that is not finished."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    run(base, data, one, steps=2, validation=data)
    run(base, data, two, steps=3, validation=data, lr=1e-4)
    done = CliRunner().invoke(app, ["train", "compare", str(one), str(two)])
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") == 4}
    assert lines["lr"].split("│")[2:4] != ["", ""] and "0.003" in lines["lr"] and "0.0001" in lines["lr"]
    assert {"steps", "exact", "last loss", "peak memory"} <= set(lines) and "batch" not in lines and "out" not in lines
    shutil.copytree(two, three)
    (three / "finished.json").unlink()
    unfinished = CliRunner().invoke(app, ["train", "compare", str(two), str(three)]).stdout
    assert "options, data and weights" in unfinished and "in step 3" in unfinished
    done = CliRunner().invoke(app, ["train", "compare", str(one), str(tmp_path)])
    assert isinstance(done.exception, FileNotFoundError) and "has no settings.json" in str(done.exception)


def test_help_shows_every_option_once_under_a_heading():
    page = CliRunner().invoke(app, ["train", "--help"]).stdout
    headings = re.findall(r"^(\S.*):$", page, re.MULTILINE)
    assert headings[0] == "Model, data and result" and headings[-1] == "Other" and "Options" not in headings
    for field in TrainOptions.__dataclass_fields__:
        assert len(re.findall(rf"^  (?:-m, )?--{field.replace('_', '-')}\b", page, re.MULTILINE)) >= 1, field


MEASURED = """
import re, sys
import torch
torch.set_num_threads(1)
from paligemma.train import finetune

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

load = finetune.load
def loaded(*arguments):
    pg = load(*arguments)
    print(memory("VmRSS"))
    return pg

finetune.load = loaded
base, data, out = sys.argv[1:]
finetune.finetune(finetune.TrainOptions(model=base, data=data, out=out, steps=100, batch=4))
print(memory("VmHWM"))
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_million_rows_need_little_memory(base, data, tmp_path):
    """All rows checked, 100 steps, in a process of its own."""
    with open(data, "a") as file:
        for i in range(1_000_000):
            file.write(json.dumps({"image": f"{i % 8}.png", "prefix": f"answer en {i} ?", "suffix": f"{i}"}) + "\n")
    command = [sys.executable, "-c", MEASURED, base, data, str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=1800)
    with_model, most = map(float, done.stdout.split())
    assert most - with_model < 300, "megabytes; a gigabyte is what it must never be"


# ------------------------------------------------------------------------------------------- the commonest complaints


def batch_of(processor, prefix: str, suffix: str, pictures: int = 1, max_length: int | None = None):
    picture = np.full((28, 28, 3), 200, np.uint8)
    row = {"image": (picture,) * pictures, "prefix": prefix, "suffix": suffix}
    return RowBatches([row], processor, 1, max_length=max_length)(0)


def test_labels_end_in_eos_and_hold_nothing_of_the_prompt(base):
    processor = paligemma.load(base).processor
    batch = batch_of(processor, "answer en what ?", "a red car")
    labels = batch["labels"][0]
    tokenizer = processor.tokenizer
    learned = labels[labels != -100].tolist()
    assert learned == [*tokenizer.encode("a red car"), tokenizer.eos_token_id]
    assert (labels[batch["token_type_ids"][0] == 0] == -100).all()


def test_the_mask_does_not_leak_the_answer(base):
    """Another token in the answer changes what is predicted after it, and nothing before it or in the prompt."""
    pg = paligemma.load(base)
    batch = batch_of(pg.processor, "answer en what ?", "a red car and a blue car")
    first = int((batch["labels"][0] != -100).nonzero()[0])
    changed = first + 2

    def logits(ids):
        with torch.no_grad():
            return pg.model(ids, batch["pixel_values"], batch["attention_mask"], batch["token_type_ids"]).logits[0]

    other = batch["input_ids"].clone()
    other[0, changed] = pg.processor.tokenizer.encode("green")[0]
    assert other[0, changed] != batch["input_ids"][0, changed]
    one, two = logits(batch["input_ids"]), logits(other)
    torch.testing.assert_close(one[:changed], two[:changed], rtol=0, atol=0)
    assert ((one[changed:] - two[changed:]).abs().amax(-1) > 1e-4).all()
    # And the prompt is read whole: its last token changes what stands at its first.
    prompt = batch["input_ids"].clone()
    prompt[0, first - 2] = pg.processor.tokenizer.encode("green")[0]
    assert (one[0] - logits(prompt)[0]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*suffixes were cut")
def test_image_tokens_are_never_cut(base):
    """Whatever max_length: either all of them are there, or the row is refused."""
    processor = paligemma.load(base).processor
    for pictures in (1, 2):
        whole = pictures * 4
        for max_length in range(1, 30):
            try:
                batch = batch_of(processor, "caption en", "a red car", pictures, max_length)
            except ValueError as error:
                assert "never cut" in str(error)
                continue
            assert int((batch["input_ids"] == processor.tokenizer.image_token_id).sum()) == whole


# ------------------------------------------------------------------------------------------------------- sight


@pytest.mark.parametrize(
    "prompt, measure",
    [
        ("detect dog ; cat", "detect"),
        ("segment dog", "segment"),
        ("caption en", "caption"),
        ("ocr", "reading"),
        ("answer en how many ?", "exact"),
    ],
)
def test_the_prompt_says_how_its_answers_are_measured(prompt, measure):
    assert metric_of_prompt(prompt) == measure
    assert metric_of_prompt(prompt, "anls") == "anls"


def test_boxes_of_the_suffix_are_the_truth():
    pg = paligemma.load("tiny")
    picture = Image.new("RGB", (200, 100))
    row = Row("a.png", "detect dog", "<loc0512><loc0000><loc0768><loc0512> dog", 3, "rows.jsonl:4")
    example = to_example(row, "detect", picture, pg)
    (region,) = example.regions
    assert (region.label, region.box) == ("dog", (0.0, 50.0, 100.0, 75.0)) and not example.answers
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    row = Row("a.png", "segment dog", f"<loc0512><loc0000><loc0768><loc0512>{codes} dog", 3, "rows.jsonl:4")
    assert to_example(row, "segment", picture, pg).regions[0].mask.shape == (100, 200)
    nothing = to_example(Row("a.png", "detect dog", "", 3, "rows.jsonl:4"), "detect", picture, pg)
    assert nothing.answers == ("",) and not nothing.regions


def test_what_others_wrote_cannot_break_the_page(tmp_path):
    from paligemma.evaluate import Example, Prediction

    example = Example("1", Image.new("RGB", (8, 8)), "<script>alert(1)</script>", "exact", ("<b>",))
    log = [{"step": k, "loss": 1.0 / k, "lr": 1.0} for k in range(1, 2000)]
    log += [{"step": 3, "skipped": "<i>.jsonl:3", "error": "&"}, {"step": 4, "validation": {"CIDEr-D": 1.7, "x": None}}]
    path = tmp_path / "report.html"
    run_report.write_report(path, "<title>", {}, log, [], [(example, Prediction("</p><img src=x>"))], {"a": "<u>"})
    page = path.read_text()
    assert not re.search(r"<script|<b>\W|<i>|<u>|<img src=x", page.replace("<b>prompt", "").replace("<b>truth", ""))
    assert "&lt;script&gt;" in page and "CIDEr-D" in page
    longest = max(len(points.split()) for points in re.findall(r'points="([^"]*)"', page))
    assert longest <= run_report.MOST_POINTS * 2, "a curve of a million steps is thinned"


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 7.3, [0, 2, 4, 6, 8]), (0, 1e-5, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert run_report.nice_ticks(low, high) == pytest.approx(ticks)
