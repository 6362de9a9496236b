"""The options of `paligemma train`: LoRA, rounded bases, lengths, what is refused, and the plan."""

import itertools
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import load_file
from test_train import COLORS
from training_runs import interrupt_in_step_4, log_of, losses, run
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.tiny.scenes import write_scenes
from paligemma.train import checkpointing, loop
from paligemma.train.finetune import finetune
from paligemma.train.options import TrainOptions
from paligemma.train.parts import add_lora
from paligemma.train.planning import plan_of
from paligemma.train.setup import open_rows as open_both_rows
from paligemma.train.validation import Validation
from paligemma.weights.adapters import save_adapter
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained


def test_dtype_and_mask_codec_are_those_of_the_base(data, tmp_path):
    said = run("tiny", data, tmp_path / "run", steps=1, batch=1)
    assert any("what learns is kept in float32 and saved in bfloat16" in line for line in said)
    assert open_checkpoint(tmp_path / "run").dtype == torch.bfloat16
    pg, tiny = paligemma.load(str(tmp_path / "run")), paligemma.load("tiny")
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
    """Losses are those of float32, and what is saved is in the checkpoint's dtype; it is measured in the dtype in which
    it was computed. Unless bfloat16 is asked for."""
    measured, measure = [], Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda v, name: measured.append(v.pg.model.dtype) or measure(v, name))
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
    assert measured == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


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
    said = "--quantize nf4 is for CUDA, and needs bitsandbytes: pip install 'paligemma[quantize]'"
    assert str(done.exception) == said
    assert not (tmp_path / "run").exists()


def test_how_to_round_is_told_to_load(base, data, tmp_path, monkeypatch):
    """Also where the package that does it is not installed."""
    asked = []
    monkeypatch.setattr("paligemma.train.checks.find_spec", lambda name: name)
    monkeypatch.setattr("paligemma.train.finetune.load", lambda *given: asked.extend(given) or paligemma.load(base))
    run(base, data, tmp_path / "run", lora=("decoder",), quantize="nf4", steps=1)
    stored = torch.float32  # in which the result is saved
    assert asked == [base, None, stored, "nf4", None, None]
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


def test_how_long_it_trains(base, data, tmp_path, monkeypatch):
    run(base, data, tmp_path / "epochs", steps=None, epochs=1.25, batch=4)  # 10 rows in batches of 4
    assert len(losses(tmp_path / "epochs")) == 3
    clock = itertools.count(0, 0.01)  # a hundredth of a second each time that the loop asks
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    run(base, data, tmp_path / "minutes", steps=None, minutes=0.005)
    rates = [entry["lr"] for entry in log_of(tmp_path / "minutes") if "loss" in entry]
    assert len(rates) > 3 and rates[-1] < 0.1


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
        ({"seed": 10**14}, "seed is 100,000,000,000,000, expected a whole number from -10^12 to 10^12"),
        ({"seed": -(10**14)}, "seed is -100,000,000,000,000"),
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
        {"seed": -1},
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


def test_the_lines_of_a_plan_are_whole_in_a_pipe(data, tmp_path, monkeypatch):
    """A program that reads them has no terminal whose width would break them."""
    table = Table("what", "MB")
    table.add_row("activations " * 10, "1.00")
    monkeypatch.setattr("paligemma.train.planning.plan_of", lambda options: SimpleNamespace(table=lambda: table))
    arguments = ["train", "--data", data, "--out", str(tmp_path / "run"), "--plan"]
    assert ("activations " * 10).strip() in CliRunner().invoke(app, arguments).stdout


def test_a_plan_is_for_the_device_of_the_run(base, data, tmp_path, monkeypatch):
    """Also on a machine with a GPU that is not used."""
    asked: dict = {}
    monkeypatch.setattr("paligemma.train.planning.estimate", lambda config, **options: asked.update(options))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for device, cpu in (("cpu", True), ("cuda", False)):
        plan_of(TrainOptions(model=base, data=data, out=str(tmp_path / "run"), device=device))
        assert asked["cpu"] == cpu


def test_the_plan_of_an_adapter_is_that_of_its_base(base, data, tmp_path, monkeypatch):
    """`train` folds it in and trains all weights. A tokenizer need not lie beside it."""
    pytest.importorskip("peft")
    model, adapter = paligemma.load(base).model, tmp_path / "adapter"
    add_lora(model, ("decoder",))
    save_adapter(model, adapter, base)
    asked: list = []
    monkeypatch.setattr("paligemma.train.planning.estimate", lambda *config, **options: asked.append((config, options)))
    for name in (base, str(adapter)):
        plan_of(TrainOptions(model=name, data=data, out=str(tmp_path / "run")))
    assert asked[0] == asked[1]


def test_the_plan_refuses_a_resolution_that_training_refuses(base, data, tmp_path):
    """Both before a picture of such a size is made: 91 x 91 patches of 14 pixels."""
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), image_size=91 * 14)
    for refusing in (finetune, plan_of):
        with pytest.raises(ValueError, match="image_size 1,274 makes 8,281 image tokens, and the model has 8,192"):
            refusing(options)


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
