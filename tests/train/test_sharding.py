"""A model shared out among processes trains like a whole one, and its checkpoints fit any number of processes.

The processes are forked from this one, which has imported everything already, and talk over gloo.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import losses, make_model, make_processor, make_rows

from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.train import checkpointing, distributed, parts, progress, sharding
from paligemma.train.batches import RowBatches
from paligemma.train.loop import Run, TrainConfig, train
from paligemma.train.optimizer import muon_and_adamw
from paligemma.train.run_folder import append_to_log, read_log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tests fork processes")

# The gradient is clipped (its norm is above 1), weights are averaged, a checkpoint follows every step.
SETTINGS: dict[str, Any] = {
    "steps": 4, "lr": 3e-3, "warmup": 0.0, "autocast": None, "log_every": 1, "clip": 0.5, "ema": 0.5, "save_every": 0.0
}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> PaliGemmaProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


def end_with_parent() -> None:
    """A process that was forked is killed when the one that forked it is."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def in_processes(count: int, run: Callable[..., None], *given: Any, method: str = "fork") -> None:
    """`run(rank, *given)` in so many processes of one group, as torchrun starts them. All have to end well.

    method: "spawn" for processes without the past of this one; `run` is then a function of a module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    context: Any = multiprocessing.get_context(method)
    processes = [context.Process(target=one_of, args=(count, rank, port, run, given)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()


def one_of(count: int, rank: int, port: str, run: Callable[..., None], given: tuple[Any, ...]) -> None:
    end_with_parent()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.start()
    run(rank, *given)


def test_leaving_ends_the_threads_of_the_group():
    """One that lets go of a tensor while the interpreter closes down would abort the process."""
    in_processes(2, leave_after_work, method="spawn")


def leave_after_work(rank: int) -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])  # imports what may hold on to the group
    assert distributed.all_reduce_figures({"rank": rank}) == {"rank": 1}
    assert threads_called("gloo")
    distributed.leave()
    assert not threads_called("gloo")


def threads_called(name: str) -> list[str]:
    found = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [one for one in found if name in one]


class Cut(Exception):
    """What ends a run before its time."""


class Batches(RowBatches):
    """Of the rows of `make_rows`; there are none for step `end`."""

    def __init__(self, processor: PaliGemmaProcessor, rows: Any = None, size: int = 4, end: int = 10**9):
        super().__init__(rows or make_rows(), processor, size)
        self.end = end

    def __call__(self, step, part=0, parts=1):
        if step == self.end:
            raise Cut
        return super().__call__(step, part, parts)


def run_whole(batches: Batches, out: Path, prepare=lambda model: None, **more) -> dict[str, torch.Tensor]:
    """Trains, and returns the weights."""
    model = make_model(batches.processor)
    prepare(model)
    try:
        train(model, batches, TrainConfig(**{**SETTINGS, **more}), out)
    except Cut:
        return {}
    return dict(model.state_dict())


def run_sharded(count: int, batches: Batches, out: Path, prepare=lambda model: None, **more) -> dict[str, torch.Tensor]:
    """The same in `count` processes; the weights are those that the first one has in the end."""

    def run(rank: int) -> None:
        weights = run_whole(batches, out, prepare, **{"shard": True, **more})
        if rank == 0:
            checkpointing.save(out / "weights", 0, weights)

    in_processes(count, run)
    return checkpointing.load_last(out / "weights")


def logged(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, value in some.items():
        if "k_proj.bias" in name:  # its true gradient is zero, and Adam makes whole steps of what rounding leaves
            continue
        # After steps of 3e-3.
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=3e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


# ------------------------------------------------------------------------------------------------------- the same run


def pictures_here_and_there() -> list[dict[str, Any]]:
    """A row with two pictures, one with one, two without."""
    rows = make_rows()
    rows[1]["image"] = rows[2]["image"] = None
    rows[3]["image"] = (rows[3]["image"], rows[0]["image"])
    return rows


@pytest.mark.parametrize("size, accumulate", [(4, 1), (3, 2)])
def test_losses_gradients_and_averages_are_those_of_the_whole_model(processor, tmp_path, size, accumulate):
    """With 3 rows in 4 parts one process has nothing to do in its second part; others have no picture in theirs.

    The logged norm is of the whole gradient, before it is clipped; the weights at the end are averages.
    """
    batches = Batches(processor, pictures_here_and_there(), size)
    whole = run_whole(batches, tmp_path / "whole")
    sharded = run_sharded(2, batches, tmp_path / "sharded", accumulate=accumulate)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    norms = logged(tmp_path / "whole", "gradient")
    assert logged(tmp_path / "sharded", "gradient") == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 2 * SETTINGS["clip"]
    assert_same_weights(sharded, whole)


@pytest.mark.parametrize("by_place", [False, True])
def test_a_batch_without_a_picture_takes_part_in_the_vision_tower_whoever_reads_it(processor, by_place):
    """A loss of one's own may call `model(...)`. Without the black picture, other processes would wait for ever."""

    def run(rank: int) -> None:
        model = sharding.shard(make_model(processor)).train()
        seen: list[Any] = []
        model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(args))
        batch = processor(["caption en"], None, suffix=["a"])
        if by_place:
            model.read(batch["input_ids"], None, batch["attention_mask"], batch["token_type_ids"])
        else:
            model(**batch)
        assert len(seen) == 1

    in_processes(2, run)


@pytest.mark.parametrize("size", [1, 3])
def test_a_process_without_rows_waits_for_the_others(processor, tmp_path, size):
    """Not sharded: of 1 row one process gets none, so it has no figures of its own; and no pictures come for a while,
    in which the eye has no gradient."""
    batches = Batches(processor, pictures_here_and_there(), size)
    whole = run_whole(batches, tmp_path / "whole")
    together = run_sharded(2, batches, tmp_path / "together", shard=False)
    for name in ("loss", "accuracy", "gradient"):
        expected = logged(tmp_path / "whole", name)
        assert logged(tmp_path / "together", name) == pytest.approx(expected, rel=1e-4), name
    assert_same_weights(together, whole)


def test_what_was_done_to_the_model_holds_for_the_sharded_one(processor, tmp_path):
    """LoRA in float32 beside weights in bfloat16, dropout at the same places, layers that are recomputed.

    Dropout draws anew for each part of a batch, so the whole model works through it in as many.
    """

    def prepare(model: Any) -> None:
        torch.manual_seed(0)
        parts.add_lora(model.bfloat16(), ["decoder"], rank=4, dropout=0.2)
        parts.set_dropout(model, 0.1)
        parts.checkpoint_gradients(model)

    whole = run_whole(Batches(processor), tmp_path / "whole", prepare, accumulate=2)
    sharded = run_sharded(2, Batches(processor), tmp_path / "sharded", prepare)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert_same_weights(sharded, whole)
    assert any("lora_A" in name for name in whole) and len(set(losses(tmp_path / "whole"))) == 4


def test_validation_sees_the_averaged_model(processor, tmp_path):
    def figures(model: Any, step: int) -> dict[str, Any]:
        return {"sum": float(sum(value.double().abs().sum() for value in model.state_dict().values()))}

    def run(rank: int) -> None:
        settings = TrainConfig(**SETTINGS, validate_every=2, shard=True)
        train(make_model(processor), Batches(processor), settings, tmp_path / "sharded", validate=figures)

    in_processes(2, run)
    settings = TrainConfig(**SETTINGS, validate_every=2)
    train(make_model(processor), Batches(processor), settings, tmp_path / "whole", validate=figures)

    def sums(folder: Path) -> dict[int, float]:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return {entry["step"]: entry["validation"]["sum"] for entry in entries if "validation" in entry}

    assert set(sums(tmp_path / "whole")) == {2, 4}
    assert sums(tmp_path / "sharded") == pytest.approx(sums(tmp_path / "whole"), rel=1e-6)


def test_all_processes_have_the_same_average(processor, tmp_path):
    """Also of a model that they hold whole, and that each has made with other weights: those of the first one count."""

    def run(rank: int) -> None:
        model = make_model(processor, seed=rank)
        train(model, Batches(processor), TrainConfig(**SETTINGS), tmp_path / "run")
        checkpointing.save(tmp_path / f"weights-{rank}", 0, dict(model.state_dict()))

    in_processes(2, run)
    first, second = (checkpointing.load_last(tmp_path / f"weights-{rank}") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_another_process_logs_at_once_is_kept(processor, tmp_path, monkeypatch):
    """A skipped row. Meanwhile the first process takes its time to remove old entries."""
    append_to_log(tmp_path, {"step": 1, "loss": 2.0})

    def reading_slowly(out: Path) -> list[dict[str, Any]]:
        entries = read_log(out)
        time.sleep(0.5)
        return entries

    monkeypatch.setattr(progress, "read_log", reading_slowly)

    def run(rank: int) -> None:
        Run(make_model(processor), TrainConfig(**SETTINGS), tmp_path, None, None, None, True, None)
        if rank:
            append_to_log(tmp_path, {"step": 1, "skipped": "rows.jsonl:3"})

    in_processes(2, run)
    assert [entry.get("skipped") for entry in read_log(tmp_path)] == ["rows.jsonl:3"]


def test_each_process_holds_its_share_and_no_more(processor):
    def run(rank: int) -> None:
        model = make_model(processor)
        total = sum(parameter.numel() for parameter in model.parameters())
        sharded = sharding.shard(model)
        assert not any(parameter.numel() for parameter in model.parameters())
        optimizer = torch.optim.AdamW(sharded.parameters())
        sharded.train()(**Batches(processor)(0, rank, 2)).loss.backward()
        optimizer.step()
        held = {"weights": list(sharded.parameters()), "gradients": [p.grad for p in sharded.parameters()]}
        for moment in ("exp_avg", "exp_avg_sq"):
            held[moment] = [state[moment] for state in optimizer.state.values()]
        for name, tensors in held.items():
            share = sum(distributed.own_rows(tensor).numel() for tensor in tensors) / total
            assert 0.45 < share < 0.55, (name, share)
        sharding.gather(sharded, model)
        assert sum(parameter.numel() for parameter in model.parameters()) == (0 if rank else total)

    in_processes(2, run)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_in_another_number_of_processes(processor, tmp_path, before, after):
    def run(count: int, batches: Batches) -> dict[str, torch.Tensor]:
        out = tmp_path / "run"
        return run_whole(batches, out) if count == 1 else run_sharded(count, batches, out)

    whole = run_whole(Batches(processor), tmp_path / "whole")
    run(before, Batches(processor, end=2))
    assert checkpointing.load_last(tmp_path / "run" / "checkpoints")["step"] == 2
    weights = run(after, Batches(processor))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert_same_weights(weights, whole)


def test_a_sharded_checkpoint_is_whole_or_not_there_and_no_pickle(processor, tmp_path):
    """One process of two cannot write: neither goes on, both say so, and the checkpoint before it is still there."""

    def run(rank: int) -> None:
        state = {"model": sharding.shard(make_model(processor)).state_dict(), "step": 1}
        checkpointing.save(tmp_path, 1, state)
        monkeypatch = pytest.MonkeyPatch()
        if rank == 1:

            def full(*args):
                raise OSError("No space left on device")

            monkeypatch.setattr(checkpointing, "save_file", full)
        with pytest.raises(OSError, match="No space left" if rank == 1 else "1 of 2 processes failed"):
            checkpointing.save(tmp_path, 2, state)
        monkeypatch.undo()
        checkpointing.save(tmp_path, 1, state)  # the same step again

    in_processes(2, run)
    (place,) = checkpointing.checkpoints(tmp_path)
    names = {path.name for path in place.iterdir()}
    rows = {"rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors"}
    assert names == {"state.json", "tensors.safetensors"} | rows
    loaded = checkpointing.load(place)
    for name, value in make_model(processor).state_dict().items():
        assert torch.equal(loaded["model"][name], value), name

    (place / "rows-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="not complete: 1 files"):
        checkpointing.load(place)


@pytest.mark.parametrize("rows, processes", [(7, 3), (2, 3), (1, 2), (6, 2)])
def test_rows_are_shared_out_as_fsdp_does_it(tmp_path, rows, processes):
    """A tensor with fewer rows than processes leaves some of them none."""
    tensor = torch.arange(2.0 * rows).view(rows, 2)
    checkpointing.save(tmp_path, 0, {"whole": tensor, "number": torch.tensor(3.0)})

    def run(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (processes,))
        loaded = checkpointing.load_last(tmp_path, mesh)
        expected = distribute_tensor(tensor, mesh, [Shard(0)])
        assert torch.equal(loaded["whole"].to_local(), expected.to_local())
        assert torch.equal(loaded["whole"].full_tensor(), tensor) and loaded["number"] == 3
        checkpointing.save(tmp_path / "sharded", 0, loaded)

    in_processes(processes, run)
    assert torch.equal(checkpointing.load_last(tmp_path / "sharded")["whole"], tensor)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_one_process_has_nothing_to_share_with(processor):
    with pytest.raises(RuntimeError, match="torchrun"):
        sharding.shard(make_model(processor))


def test_optimizers_of_the_whole_model_are_refused(processor, tmp_path):
    def run(rank: int) -> None:
        model = make_model(processor)
        with pytest.raises(ValueError, match="optimizers of your own"):
            settings = TrainConfig(**SETTINGS, shard=True)
            train(model, Batches(processor), settings, tmp_path, optimizers=muon_and_adamw(model, 1e-3, 1e-3))

    in_processes(2, run)
