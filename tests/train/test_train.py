"""The training loop: the reference's loss, batches that add up, runs that survive."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_tokenizer import build_tokenizer
from reference import make_theirs, tiny_config

from paligemma.engine import generate
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.train import checkpointing, optimizer
from paligemma.train.batches import RowBatches, runs_of_pictures
from paligemma.train.loop import TrainConfig, train
from paligemma.train.loss import suffix_loss
from paligemma.train.optimizer import decayed_apart, muon_and_adamw
from paligemma.train.schedule import learning_rate_factor

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220), "black": (10, 10, 10)}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> PaliGemmaProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


def make_processor(folder) -> PaliGemmaProcessor:
    return PaliGemmaProcessor(load_tokenizer(build_tokenizer(folder)), num_image_tokens=4, image_size=28)


def make_rows() -> list[dict]:
    """A question whose answer is in the picture; the answers differ in length."""
    rows = []
    for i, (name, color) in enumerate(COLORS.items()):
        image = np.full((28, 28, 3), color, np.uint8)
        rows.append({"image": image, "prefix": "answer en what color is it ?", "suffix": " ".join([name] * (i + 1))})
    return rows


def make_model(processor: PaliGemmaProcessor, seed: int = 0) -> PaliGemmaForConditionalGeneration:
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    vocabulary = 64 * math.ceil(len(tokenizer) / 64)
    config = tiny_config("gemma", vocab_size=vocabulary, image_token_index=tokenizer.image_token_id)
    model = PaliGemmaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


SMALL = {"steps": 6, "lr": 3e-3, "autocast": None, "log_every": 1}


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_transformers_on_the_same_batch(processor):
    model = make_model(processor)
    batch = RowBatches(make_rows(), processor, batch_size=4, shuffle=False)(0)
    total, tokens, _ = suffix_loss()(model, batch)
    theirs = make_theirs(model)(**batch).loss
    torch.testing.assert_close(total / tokens, theirs, rtol=1e-5, atol=1e-6)


def test_the_last_layer_computes_no_more_than_the_answers_need(processor):
    model = make_model(processor)
    batch = RowBatches(make_rows(), processor, batch_size=4, shuffle=False)(0)
    widths = []
    for layer in model.language_model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    suffix_loss()(model, batch)
    before = (batch["labels"] != -100).any(0).nonzero()[0].item() - 1  # what predicts the first of the answers
    whole = batch["input_ids"].shape[1]
    assert widths == [whole] * (len(widths) - 1) + [whole - before]


def test_suffix_and_eos_are_learned_and_nothing_else(processor):
    batch = RowBatches(make_rows(), processor, batch_size=4, shuffle=False)(0)
    tokenizer = processor.tokenizer
    for labels, row in zip(batch["labels"], make_rows()):
        learned = labels[labels != -100].tolist()
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == row["suffix"]


def test_label_smoothing_shares_among_the_other_tokens(processor):
    model = make_model(processor)
    batch = RowBatches(make_rows(), processor, batch_size=4, shuffle=False)(0)
    total, tokens, _ = suffix_loss(label_smoothing=0.3)(model, batch)
    logits = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], batch["token_type_ids"]).logits
    targets = batch["labels"][:, 1:]
    logp = logits[:, :-1][targets != -100].log_softmax(-1)
    true = torch.nn.functional.one_hot(targets[targets != -100], logp.shape[-1]).bool()
    by_hand = -(0.7 * logp[true].sum() + 0.3 / (logp.shape[-1] - 1) * logp[~true].sum())
    torch.testing.assert_close(total, by_hand, rtol=1e-5, atol=1e-4)
    assert tokens == (targets != -100).sum()


# -------------------------------------------------------------------------------------------- schedule and optimizer


@pytest.mark.parametrize("schedule, late", [("cosine", 0.1464466), ("linear", 0.25), ("constant", 1.0)])
def test_the_schedule_warms_up_and_decays(schedule, late):
    config = TrainConfig(steps=100, warmup=0.2, schedule=schedule)
    assert [learning_rate_factor(p, config) for p in (0, 0.1, 0.2, 0.8)] == pytest.approx([0, 0.5, 1, late])


@pytest.mark.parametrize("steps, first", [(1, 1.0), (19, 1.0), (20, 0.0)])
def test_a_warm_up_shorter_than_a_step_is_none(steps, first):
    """Small data make a run of one step, which has to learn something."""
    assert learning_rate_factor(0.0, TrainConfig(steps=steps)) == first


def test_the_schedule_can_stay_up_first():
    config = TrainConfig(steps=100, warmup=0.0, schedule="linear", decay_from=0.6)
    assert [learning_rate_factor(p, config) for p in (0, 0.59, 0.6, 0.8, 1)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_a_run_ends_with_its_minutes_and_the_schedule_with_it(processor, tmp_path, monkeypatch):
    """By a clock of our own: on a machine with other work a real one may pass all of them within a step."""
    clock = itertools.count(0.0, 0.01)
    monkeypatch.setattr("paligemma.train.loop.time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    batches = RowBatches(make_rows(), processor, batch_size=4)
    config = TrainConfig(**{**SMALL, "steps": 10**6}, schedule="linear", warmup=0.0, minutes=0.01)
    train(make_model(processor), batches, config, tmp_path)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == sorted(rates, reverse=True) and 10 < len(rates) < 60 and rates[-1] < 0.2
    assert checkpointing.load_last(tmp_path / "checkpoints")["step"] == len(rates)


def test_weight_decay_falls_on_the_kernels_of_tower_and_projector_alone(processor):
    model = make_model(processor)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = decayed_apart(model, 0.1)
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert "multi_modal_projector.linear.weight" in decayed_names
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in decayed_names
    assert not any(
        "language_model" in name or "bias" in name or "norm" in name or "position" in name for name in decayed_names
    )
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    assert rest["weight_decay"] == 0


def test_the_vision_tower_may_learn_more_slowly(processor, tmp_path, monkeypatch):
    """The first step of Adam is the learning rate, whatever the gradient."""
    model = make_model(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = RowBatches(make_rows(), processor, batch_size=4)
    settings = {**SMALL, "steps": 1, "warmup": 0.0, "schedule": "constant"}
    train(model, batches, TrainConfig(**settings, vision_lr=0.1), tmp_path)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    lr = SMALL["lr"]
    for name, step in moved.items():
        assert step <= (0.1 if name.startswith("vision_tower") else 1.0) * lr * 1.001, name
    assert moved["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(0.1 * lr, rel=1e-2)
    assert moved["multi_modal_projector.linear.weight"] == pytest.approx(lr, rel=1e-2)


@pytest.mark.parametrize("vision_lr", [1.0, 0.1])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_is_the_references_whatever_the_share_of_the_vision_tower(processor, tmp_path, kind, vision_lr):
    """Where a step has no gradient, all that moves is what decays: the kernels of vision tower and projector, by the
    learning rate times the decay, of which the tower's share of the learning rate takes nothing."""
    model = make_model(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lr, decay = SMALL["lr"], 0.5
    settings = {**SMALL, "steps": 1, "warmup": 0.0, "schedule": "constant"}
    config = TrainConfig(**settings, weight_decay=decay, vision_lr=vision_lr)
    optimizers = None
    if kind == "muon":
        slower = ("vision_tower", vision_lr)
        optimizers = muon_and_adamw(model, lr, lr, decay, slower=slower, decay_as_reference=True)

    def flat(model, batch):
        return 0 * model.multi_modal_projector.linear.weight.sum(), 1.0, {}

    train(model, RowBatches(make_rows(), processor, 4), config, tmp_path, loss=flat, optimizers=optimizers)
    for name, parameter in model.named_parameters():
        kernel = name.startswith(("vision_tower", "multi_modal_projector")) and parameter.ndim > 1
        kernel &= "position_embedding" not in name
        left = (1 - lr * decay if kernel else 1.0) * before[name]
        torch.testing.assert_close(parameter.detach(), left, rtol=1e-6, atol=1e-8, msg=name)


def test_a_model_made_from_nothing_decays_in_every_parameter(processor):
    """... by its own learning rate, as the recipe of the embedded model has it."""
    model = make_model(processor)
    for each in muon_and_adamw(model, 0.02, 0.01, weight_decay=0.1, slower=("vision_tower", 0.1)):
        assert {group["weight_decay"] for group in each.param_groups} == {0.1}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(processor):
    model = make_model(processor)
    muon, adamw = muon_and_adamw(model, lr=0.02, adamw_lr=0.01, slower=("vision_tower", 0.1))
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert {group["lr"] for group in muon.param_groups} == {0.02, 0.002}
    embedding = model.language_model.model.embed_tokens.weight
    assert any(p is embedding for group in adamw.param_groups for p in group["params"])
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_a_step_of_muon_is_that_of_pytorch(shape, monkeypatch):
    """To the bit in bfloat16, which is all that PyTorch has. In float32, for some CPUs, up to bfloat16's rounding."""
    begin, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    pytorchs = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")

    def after_three_steps(kind, fast):
        monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: fast)
        parameter = torch.nn.Parameter(begin.clone())
        muon = kind([parameter], lr=0.05, weight_decay=0.1)
        for parameter.grad in gradients:
            muon.step()
        return parameter.detach(), muon.state_dict()

    expected, state = after_three_steps(pytorchs, True)
    moved, own_state = after_three_steps(optimizer.SharedMuon, True)
    assert torch.equal(moved, expected) and not torch.equal(moved, begin)
    assert torch.equal(own_state["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"])
    moved, _ = after_three_steps(optimizer.SharedMuon, False)
    assert 0 < (moved - expected).norm() / (expected - begin).norm() < 0.02


# ------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("count", [3, 4, 5])  # 8 rows do not divide by 3 and 5: the first parts have one more
def test_parts_of_a_step_are_the_step(processor, count):
    rows = [{"prefix": f"caption en {i}", "suffix": "x", "image": np.zeros((28, 28, 3), np.uint8)} for i in range(10)]
    batches = RowBatches(rows, processor, batch_size=8, seed=3)

    def prompts(step, part, parts):
        return [processor.tokenizer.decode(ids) for ids in batches(step, part, parts)["input_ids"]]

    for step in range(5):
        whole = prompts(step, 0, 1)
        parts = [prompts(step, part, count) for part in range(count)]
        assert sorted(whole) == sorted(prompt for part in parts for prompt in part)
    five_steps = [prompt for step in range(5) for prompt in prompts(step, 0, 1)]
    assert all(five_steps.count(prompt) == 4 for prompt in five_steps), "40 places, 10 rows: every epoch has every row"
    assert len(set(five_steps[:10])) == 10 and five_steps[:10] != five_steps[10:20], "and an order of its own"


def questions(pictures: int, each: int) -> list[dict]:
    """So many rows about each picture, one after the other."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(pictures)]
    return [
        {"prefix": f"caption en {i}", "suffix": "blue" if j % 2 else "red", "image": image}
        for i, image in enumerate(images)
        for j in range(each)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_picture_that_several_rows_see_is_encoded_once(processor, monkeypatch, parts):
    """... and loss and gradients are those of encoding it for every row."""
    model = make_model(processor)
    rows = questions(3, 4)
    rows[5]["image"] = (rows[5]["image"], rows[0]["image"])  # a row that sees two
    batches = RowBatches(rows, processor, batch_size=12, shuffle=False)
    plain = RowBatches([{**row, "image": copied(row["image"])} for row in rows], processor, 12, shuffle=False)

    def looked_at(batches):
        model.zero_grad(set_to_none=True)
        losses, seen = [], []
        handle = model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        for part in range(parts):
            total, weight, _ = suffix_loss()(model, batches(0, part, parts))
            total.backward()
            losses.append((float(total.detach()), weight))
        handle.remove()
        return losses, {name: p.grad.clone() for name, p in model.named_parameters()}, seen

    once, every = looked_at(batches), looked_at(plain)
    assert sum(every[2]) == 13 and once[2] == {1: [3], 2: [2, 2], 3: [1, 2, 1]}[parts]
    assert np.allclose(once[0], every[0], rtol=1e-6)
    for name, gradient in every[1].items():
        assert (once[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


def copied(image):
    return tuple(map(copied, image)) if isinstance(image, tuple) else image.copy()


def test_rows_of_a_picture_stay_together_when_shuffled(processor):
    rows = questions(5, 3) + [{"prefix": f"none {i}", "suffix": "x", "image": None} for i in range(3)]
    assert runs_of_pictures(rows).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7]
    batches = RowBatches(rows, processor, batch_size=18, seed=1, keep_together=True)
    orders = [[batches._row(18 * epoch + place) for place in range(18)] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(18)), "every row once an epoch"
        for picture in range(5):
            first = order.index(3 * picture)
            assert order[first : first + 3] == [3 * picture, 3 * picture + 1, 3 * picture + 2]
    assert orders[0] != orders[1] != orders[2]
    again = RowBatches(rows, processor, batch_size=18, seed=1, keep_together=True)
    assert [again._row(36 + place) for place in range(18)] == orders[2], "a function of the place alone"


def test_more_parts_than_rows(processor):
    batches = RowBatches(make_rows(), processor, batch_size=2)
    assert batches(0, 1, 3) is not None and batches(0, 2, 3) is None


def test_the_gradient_is_that_of_the_mean_over_all_answer_tokens(processor, tmp_path):
    """An optimizer that ignores the gradient's size would hide a wrong divisor; clipping would not."""
    model = make_model(processor)
    batches = RowBatches(make_rows(), processor, batch_size=4)
    model(**batches(0)).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    train(model, batches, TrainConfig(**{**SMALL, "steps": 1}, accumulate=2), tmp_path)
    logged = json.loads((tmp_path / "log.jsonl").read_text())
    assert logged["gradient"] == pytest.approx(float(norm), rel=1e-4)


def test_accumulation_equals_the_large_batch(processor, tmp_path):
    """Rows of 1 to 4 answer tokens: a mean of means would be another number."""
    for name, accumulate in (("whole", 1), ("pieces", 4)):
        model = make_model(processor)
        batches = RowBatches(make_rows(), processor, batch_size=4)
        train(model, batches, TrainConfig(**SMALL, accumulate=accumulate), tmp_path / name)
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


# ------------------------------------------------------------------------------------------- several processes, kill -9

SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = {tests!r}
torch.set_num_threads(1)
from test_train import SMALL, RowBatches, TrainConfig, make_model, make_processor, make_rows, muon_and_adamw, train
out = Path(sys.argv[1])
processor = make_processor(out / "tokenizer")
model = make_model(processor)
batches = RowBatches(make_rows(), processor, batch_size=4)
config = TrainConfig(**{{**SMALL, **eval(sys.argv[2])}})
train(model, batches, config, out, optimizers=muon_and_adamw(model, lr=3e-3, adamw_lr=3e-3))
"""


def start(out: Path, settings: dict, **environment: str) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    script = SCRIPT.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    return subprocess.Popen([sys.executable, "-c", script, str(out), repr(settings)], env={**os.environ, **environment})


def test_two_processes_give_the_losses_of_one(processor, tmp_path):
    model = make_model(processor)
    optimizers = muon_and_adamw(model, lr=3e-3, adamw_lr=3e-3)
    train(
        model,
        RowBatches(make_rows(), processor, batch_size=4),
        TrainConfig(**SMALL),
        tmp_path / "one",
        optimizers=optimizers,
    )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(tmp_path / "two", {}, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_killed_run_goes_on_with_the_same_losses(processor, tmp_path):
    settings = {"steps": 30, "save_every": 0.0, "ema": 0.9}  # a checkpoint after every step
    model = make_model(processor)
    optimizers = muon_and_adamw(model, lr=3e-3, adamw_lr=3e-3)
    batches = RowBatches(make_rows(), processor, batch_size=4)
    train(model, batches, TrainConfig(**{**SMALL, **settings}), tmp_path / "whole", optimizers=optimizers)

    killed = tmp_path / "killed"
    process = start(killed, settings)
    # The moment differs from run to run, as kills do. A step is logged before it is saved: with no checkpoint yet there
    # would be nothing to go on from.
    log, enough = killed / "log.jsonl", 9
    while process.poll() is None and not (
        log.exists()
        and len(log.read_text().splitlines()) >= enough
        and checkpointing.checkpoints(killed / "checkpoints")
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    resumed = make_model(processor, seed=1)  # other weights: everything has to come from the checkpoint
    optimizers = muon_and_adamw(resumed, lr=3e-3, adamw_lr=3e-3)
    train(resumed, batches, TrainConfig(**{**SMALL, **settings}), killed, optimizers=optimizers)
    assert losses(killed) == losses(tmp_path / "whole")
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    state = {
        "a": torch.arange(3),
        "nested": [{"b": torch.ones(2)}, 1.5, None],
        "numbers": {0: {"step": torch.tensor(3.0)}},
    }
    checkpointing.save(tmp_path, 1, state)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpointing.save(tmp_path, 2, state)
    loaded = checkpointing.load_last(tmp_path)
    assert torch.equal(loaded["a"], state["a"]) and torch.equal(loaded["nested"][0]["b"], torch.ones(2))
    assert loaded["nested"][1:] == [1.5, None] and loaded["numbers"][0]["step"] == 3


def kill_in_moment(monkeypatch, module: str, moment: int) -> None:
    """Ctrl-C instead of a removal or a rename of the module, after `moment` others; a removal is then half done."""
    left = iter(range(moment, -1, -1))

    def killed_in(act, removes):
        def acting(path, *rest, **options):
            if next(left, -1) == 0:
                if removes and (files := sorted(file for file in Path(path).rglob("*") if file.is_file())):
                    files[0].unlink()  # half removed
                raise KeyboardInterrupt
            return act(path, *rest, **options)

        return acting

    monkeypatch.setattr(f"{module}.shutil.rmtree", killed_in(shutil.rmtree, True))
    monkeypatch.setattr(f"{module}.os.replace", killed_in(os.replace, False))


@pytest.mark.parametrize("second", [1, 2], ids=["the same step again", "the next step"])
@pytest.mark.parametrize("moment", range(6))
def test_killed_while_names_change_hands(tmp_path, monkeypatch, second, moment):
    """Between any two renames and in the middle of any removal: what has a checkpoint's name can be read."""
    checkpointing.save(tmp_path, 1, {"x": torch.ones(2), "step": 1})
    kill_in_moment(monkeypatch, "paligemma.train.checkpointing", moment)
    with contextlib.suppress(KeyboardInterrupt):
        checkpointing.save(tmp_path, second, {"x": torch.full((2,), 2.0), "step": second})
    monkeypatch.undo()
    for place in checkpointing.checkpoints(tmp_path):
        assert checkpointing.load(place)["x"].tolist() in ([1.0, 1.0], [2.0, 2.0])
    assert checkpointing.load_last(tmp_path) is not None
    checkpointing.save(tmp_path, 3, {"x": torch.zeros(2), "step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    for step in (9, 10, 100):
        checkpointing.save(tmp_path, step, {"step": step})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("change", ["cut short", "removed"])
def test_a_damaged_checkpoint_is_one_error_with_a_way_out(tmp_path, name, change):
    place = checkpointing.save(tmp_path, 1, {"x": torch.ones(1000), "step": 1})
    file = place / name
    file.write_bytes(file.read_bytes()[:-10]) if change == "cut short" else file.unlink()
    with pytest.raises(ValueError, match=r"step-00000001 is no checkpoint .*, or damaged \(.*--no-resume"):
        checkpointing.load_last(tmp_path)


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_checkpoint(processor, tmp_path):
    model = make_model(processor)
    batches = RowBatches(make_rows(), processor, batch_size=4)
    train(model, batches, TrainConfig(**{**SMALL, "steps": 2}), tmp_path)

    def broken(model, batch):
        total, tokens, figures = suffix_loss()(model, batch)
        return total * float("nan"), tokens, figures

    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        train(model, batches, TrainConfig(**SMALL), tmp_path, loss=broken)
    assert checkpointing.load_last(tmp_path / "checkpoints")["step"] == 2


def test_a_gradient_that_is_no_number_stops_before_it_does_harm(processor, tmp_path):
    """The root of zero is a fine loss, and its slope is infinite."""
    model = make_model(processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def steep(model, batch):
        total, tokens, figures = suffix_loss()(model, batch)
        return total + torch.sqrt(0 * total), tokens, figures

    with pytest.raises(FloatingPointError, match="the gradient of step 1 is nan"):
        train(model, RowBatches(make_rows(), processor, batch_size=4), TrainConfig(**SMALL), tmp_path, loss=steep)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------- learning


def test_four_rows_are_learned_by_heart(processor, tmp_path):
    model = make_model(processor)
    batches = RowBatches(make_rows(), processor, batch_size=4)
    seen = []

    def validate(model, step):
        inputs = processor(text=[row["prefix"] for row in make_rows()], images=[row["image"] for row in make_rows()])
        answers = [processor.tokenizer.decode(made.token_ids) for made in generate(model, inputs, max_new_tokens=8)]
        seen.append(answers)
        return {"exact": float(np.mean([answer == row["suffix"] for answer, row in zip(answers, make_rows())]))}

    optimizers = muon_and_adamw(model, lr=2e-2, adamw_lr=2e-2)
    config = TrainConfig(steps=40, autocast=None, log_every=1, validate_every=20)
    last = train(model, batches, config, tmp_path, optimizers=optimizers, validate=validate)
    assert last["loss"] < 0.05
    assert last["exact"] == 1.0, seen


@pytest.mark.parametrize(
    "name, values",
    {
        "steps": [0],
        "accumulate": [0],
        "minutes": [0.0, math.nan],
        "schedule": ["stairs"],
        "lr": [0.0, -1.0, math.inf, math.nan],
        "vision_lr": [0.0, 1.5, math.nan],
        "ema": [-0.1, 1.0, 1.5, math.nan],
        "clip": [0.0, -1.0, math.nan],
        "log_every": [0],
    }.items(),
)
def test_settings_that_cannot_work_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            TrainConfig(**{"steps": 10, name: value})
