"""The memory of a training step, planned and measured: in tensors, and in what the system says of a process.

pytest tests/train/test_plan.py -m official -s      # the 3b size: 8 GB or, in float32, 16 GB; minutes
"""

import io
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from reference import tiny_config
from test_sharding import end_with_parent, in_processes

from paligemma.allocator import give_back_freed_memory
from paligemma.devices import multiplies_bfloat16, on_meta_device
from paligemma.fast.swap import quantize
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.train import parts, sharding
from paligemma.train.loop import TrainConfig, train
from paligemma.train.memory import Memory
from paligemma.train.optimizer import muon_and_adamw
from paligemma.train.plan import UNSEEN, Plan, estimate
from paligemma.weights.published import published_config

WORDS, ANSWER = 40, 8  # of a row: text tokens, and how many of them are learned
LORA = {"lora": ("decoder",), "stored": torch.bfloat16, "compute": torch.bfloat16}
# As `paligemma train` computes on this CPU; in bfloat16 some would need minutes.
FAST = {} if multiplies_bfloat16() else {"stored": torch.float32, "compute": torch.float32}


# 56 million parameters, and activations of a megabyte or more.
MID_SIZE = PaliGemmaConfig(
    GemmaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256,
    ),
    SiglipVisionConfig(384, 1536, 4, 6),
    image_token_index=8000,
)  # fmt: skip


def planned(config: PaliGemmaConfig, options: dict[str, Any]) -> Plan:
    given: dict[str, Any] = {"compute": torch.float32, **options}
    if (words := given.pop("words_of_first", None)) is not None:
        given["shortest_prefix"] = config.vision_config.num_patches + words
    return estimate(config, length=config.vision_config.num_patches + WORDS, answer=ANSWER, **given)


def train_as_planned(config: PaliGemmaConfig, options: dict[str, Any], out: Path, steps: int = 2) -> None:
    """A real run with the options of `estimate`, on rows of random numbers. From the second step on the optimizer has
    its state."""
    given: dict[str, Any] = {"compute": torch.float32, "stored": torch.float32, **options}
    with on_meta_device():
        model = PaliGemmaForConditionalGeneration(config).to(given["stored"])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    if given.get("quantize"):
        quantize(model, given["quantize"])
    if "lora" in given:
        parts.add_lora(model, given["lora"], given.get("rank", 8))
    elif "freeze" in given:
        parts.freeze(model, given["freeze"])
    if given.get("dropout"):
        parts.set_dropout(model, given["dropout"])
    if given.get("checkpoint_gradients"):
        parts.checkpoint_gradients(model)
    parts.suit_cpu(model)

    patches, side = config.vision_config.num_patches, config.vision_config.image_size

    def batches(step: int, part: int, count: int) -> dict[str, torch.Tensor]:
        rows = given["batch"] // count
        ids = torch.randint(3, 300, (rows, patches + WORDS))
        ids[:, :patches] = config.image_token_index
        types, real = torch.zeros_like(ids), torch.ones_like(ids)
        types[:, -ANSWER:] = 1
        if (words := given.get("words_of_first")) is not None:  # a short prompt, and padding behind its answer
            begin, end = patches + words, patches + words + ANSWER
            types[0, begin:], real[0, end:] = 0, 0
            types[0, begin:end] = 1
        return {
            "input_ids": ids,
            "attention_mask": real,
            "token_type_ids": types,
            "labels": ids.masked_fill(types == 0, -100),
            "pixel_values": torch.rand(rows, 3, side, side),
        }

    settings = TrainConfig(
        steps=steps,
        autocast=None if given["compute"] == torch.float32 else given["compute"],
        accumulate=given.get("accumulate", 1),
        ema=0.9 if given.get("ema") else 0.0,
        shard=given.get("shard", False),
        save_every=10**9,
    )
    optimizers = muon_and_adamw(model, 1e-3, 1e-3) if given.get("optimizer") == "muon" else None
    train(model, batches, settings, out, optimizers=optimizers)


# ----------------------------------------------------------------------------------------------------- bytes of tensors

RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, in bfloat16": {"compute": torch.bfloat16},
    "averaged, in pieces": {"ema": True, "accumulate": 2},
    "recomputed layers": {"checkpoint_gradients": True},
    "the eye as it is, dropout": {"freeze": ("vision",), "dropout": 0.1},
    "muon": {"optimizer": "muon"},
    "prompts of mixed length": {"words_of_first": 2},
    "LoRA": LORA,
    "LoRA in eye and decoder, recomputed layers": {**LORA, "lora": ("vision", "decoder"), "checkpoint_gradients": True},
    "LoRA beside four bits": {**LORA, "quantize": "nf4"},
    "LoRA beside four bits, recomputed layers": {**LORA, "quantize": "nf4", "checkpoint_gradients": True},
}


BOTH_KINDS = [("gemma", run) for run in RUNS] + [("gemma2", "full"), ("gemma2", "LoRA")]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes without a GPU has a lot to say
@pytest.mark.parametrize("kind, run", BOTH_KINDS)
def test_the_rehearsal_needs_what_the_run_needs(tmp_path, kind, run):
    """The bytes of real tensors, counted in a real run. Its ids, masks and counters are of other types than the plan's,
    which shows where all else is as small as here."""
    config = tiny_config(kind, vocab_size=2048, hidden_size=64, intermediate_size=512, vision_hidden_size=64)
    options = {"batch": 4, **RUNS[run]}
    if "quantize" in options:
        pytest.importorskip("bitsandbytes", reason="it rounds the weights")
    memory = Memory({})
    with memory:
        train_as_planned(config, options, tmp_path)
    plan = planned(config, options)
    assert plan.total - plan.components[UNSEEN] == pytest.approx(sum(memory.fullest.values()), rel=0.03)


@pytest.mark.slow  # three rehearsals of a middle size
def test_the_parts_of_a_plan():
    config = MID_SIZE
    with on_meta_device():
        weights = 4 * sum(p.numel() for p in PaliGemmaForConditionalGeneration(config).parameters())
    plan = planned(config, {"batch": 8, "accumulate": 2, "ema": True})
    for name, copies in {"weights": 1, "gradients": 1, "running average": 1, "optimizer": 2}.items():
        assert plan.components[name] == pytest.approx(copies * weights, rel=0.01), name
    assert plan.total == sum(plan.components.values())
    # Shared out among four; what is whole for a moment is less than the rest of it.
    quarter = planned(config, {"batch": 32, "accumulate": 2, "ema": True, "processes": 4, "shard": True})
    assert quarter.components["optimizer"] == pytest.approx(weights / 2, rel=0.01)
    assert quarter.total < plan.total - weights
    # Rows cost activations, and nothing else.
    double = planned(config, {"batch": 16, "accumulate": 2, "ema": True})
    for name in ("activations of the vision tower", "activations of the decoder"):
        assert double.components[name] == pytest.approx(2 * plan.components[name], rel=0.01), name
    assert double.components["weights"] == plan.components["weights"]


def test_a_plan_is_a_table():
    plan = planned(MID_SIZE, {"batch": 2, **LORA})
    written = io.StringIO()
    rich.console.Console(file=written, width=100).print(plan.table())
    assert "activations of the decoder" in written.getvalue()
    assert f"{plan.total / 1e6:.2f}" in written.getvalue() and "MB" in written.getvalue()
    rich.console.Console(file=written, width=100).print(Plan({"weights": 5_854_000_000}, "a step").table())
    assert "5.85" in written.getvalue() and "GB" in written.getvalue()


def test_four_bits_need_a_quarter():
    """... of what the linear layers need in bfloat16, and a scale. The embedding stays as it is."""
    whole, rounded = (planned(MID_SIZE, {"batch": 2, **LORA, "quantize": mode}) for mode in (None, "nf4"))
    with on_meta_device():
        model = PaliGemmaForConditionalGeneration(MID_SIZE)
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    saved = whole.components["weights"] - rounded.components["weights"]
    assert saved == pytest.approx(linear * (2 - 1 / 2 - 1 / 64), rel=1e-3)
    assert whole.total - rounded.total == pytest.approx(saved, rel=0.3)


def test_other_roundings_are_not_planned():
    with pytest.raises(ValueError, match="knows what nf4 needs, and not bnb-int8: leave out --quantize"):
        planned(MID_SIZE, {"batch": 2, **LORA, "quantize": "bnb-int8"})


def test_a_row_without_room_is_refused():
    with pytest.raises(ValueError, match="no room for 256 of pictures and 8"):
        estimate(MID_SIZE, batch=1, length=260, answer=8)


# --------------------------------------------------------------------------------------------------- bytes of a process


def status(name: str) -> int:
    """Bytes. VmRSS: in memory now; VmHWM: the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measured(config: PaliGemmaConfig, options: dict[str, Any], out: Path, steps: int = 2, threads: int = 1) -> int:
    """What a real run needs at most, beyond a process that has run such a step with a tiny model before (PyTorch
    imports parts of itself late). In a fresh process: one forked from a process with a past would find room for its
    tensors in what that past has left behind."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=send_need, args=(send, config, options, out, steps, threads))
    process.start()
    try:
        send.close()  # where the process dies, its end closes too and there is nothing to wait for
        return receive.recv()
    finally:
        process.kill()


def send_need(
    send: Connection, config: PaliGemmaConfig, options: dict[str, Any], out: Path, steps: int, threads: int
) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    give_back_freed_memory()
    train_as_planned(tiny_config("gemma"), {**options, "batch": 2}, out / "tiny")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    train_as_planned(config, options, out / "run", steps)
    send.send(status("VmHWM") - before)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"batch": 2}, {"batch": 2, **LORA, **FAST}, {"batch": 4, "checkpoint_gradients": True, **LORA, **FAST}],
    ids=["full", "LoRA", "recomputed layers"],
)
def test_a_process_needs_what_is_planned(tmp_path, options):
    """No more, and not much less. What cannot be seen in a rehearsal was 28 to 45 MB when this was written."""
    plan, need = planned(MID_SIZE, options), measured(MID_SIZE, options, tmp_path)
    print(f"planned {plan.total / 1e6:.0f} MB, measured {need / 1e6:.0f} MB")
    assert plan.total - plan.components[UNSEEN] <= need <= plan.total


@linux
@pytest.mark.slow
def test_a_process_of_two_that_share_a_model_needs_what_is_planned(tmp_path):
    """From when the model is shared out until the first process puts it together again."""
    plan = planned(MID_SIZE, {"batch": 2, "shard": True, "processes": 2})
    in_processes(2, share_as_planned, tmp_path, plan.total, method="spawn")


def share_as_planned(rank: int, out: Path, total: int) -> None:
    options = {"batch": 2, "shard": True}
    shard, gather = sharding.shard, sharding.gather
    torch.set_num_threads(1)
    give_back_freed_memory()
    train_as_planned(tiny_config("gemma"), options, out / "tiny")
    before = status("VmRSS")

    def shared_out(model: Any) -> Any:
        sharded = shard(model)
        Path("/proc/self/clear_refs").write_text("5")
        return sharded

    def put_together(*given: Any) -> None:
        need = status("VmHWM") - before
        print(f"planned {total / 1e6:.0f} MB, measured {need / 1e6:.0f} MB")
        assert 0.85 * total <= need <= total
        gather(*given)

    sharding.shard, sharding.gather = shared_out, put_together
    train_as_planned(MID_SIZE, options, out / "run")


@linux
def test_freed_memory_is_given_back():
    """Two blocks of three lie between others. (After one of 30 MB was freed glibc would keep such small ones.)"""
    process = multiprocessing.get_context("spawn").Process(target=free_some_memory)
    process.start()
    process.join()
    assert process.exitcode == 0


def free_some_memory() -> None:
    give_back_freed_memory()
    del [torch.ones(30 * 2**18)][:]
    blocks = [torch.ones(2**20) for _ in range(60)]  # 4 MB each
    before = status("VmRSS")
    del blocks[::3], blocks[::2]
    assert before - status("VmRSS") > 0.95 * 4 * 2**20 * (60 - len(blocks))


@linux
@pytest.mark.official
def test_lora_on_the_3b_size(tmp_path):
    """Three steps, rank 8 in the decoder, random weights, 2 rows of 296 tokens, in bfloat16; or in float32 where that
    is what `paligemma train` computes in (in bfloat16 such a CPU would need an hour)."""
    config, options = published_config("paligemma-3b", 224), {"batch": 2, **LORA, **FAST}
    plan = planned(config, options)
    rich.print(plan.table())
    need = measured(config, options, tmp_path, steps=3, threads=2)
    print(f"planned {plan.total / 1e9:.2f} GB, measured {need / 1e9:.2f} GB")
    assert 0.85 * plan.total <= need <= plan.total
