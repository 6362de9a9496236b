"""The benchmark of training: who takes which steps, what is timed, and its record."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from reference import tiny_config
from typer.testing import CliRunner

from paligemma.bench import shapes, training
from paligemma.bench.training import Clock, TrainingJob, benchmark_training, make_batch, run, summary, table
from paligemma.cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights in a small shape."""
    folder = tmp_path_factory.mktemp("random")
    shapes.write_random_checkpoint(tiny_config("gemma"), folder)
    return folder


def job(name, folder, lora, **others):
    return TrainingJob(name, str(folder), lora, **{"batch": 2, "steps": 2, **others})


def test_only_answers_have_labels():
    batch = make_batch(tiny_config("gemma"), 3)
    rows, length = batch["input_ids"].shape
    assert (rows, length) == (3, 4 + shapes.TEXT_TOKENS + training.ANSWER_TOKENS)
    labelled = batch["labels"] != -100
    assert labelled.sum(1).tolist() == [training.ANSWER_TOKENS] * 3 and labelled[:, -training.ANSWER_TOKENS :].all()
    assert torch.equal(labelled, batch["token_type_ids"] == 1)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)


@pytest.mark.parametrize("lora", [False, True])
def test_the_loop_and_the_bare_loop_take_the_same_steps(folder, lora):
    """The first loss is equal to the last digit, and as many steps are timed."""
    ours, bare = (run(job(name, folder, lora)) for name in (training.PALIGEMMA, training.BARE))
    assert ours["losses"][0] == bare["losses"][0]
    for measured in (ours, bare):
        assert len(measured["step_s"]) == len(measured["step_cpu_s"]) == 2 and min(measured["step_s"]) > 0
        assert measured["job"]["folder"] == folder.name  # and not where it lies
        assert measured["tokens"] == 2 * (4 + shapes.TEXT_TOKENS + training.ANSWER_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_transformers_takes_the_same_steps(folder, lora):
    """Its products are rounded to bfloat16 in another order, where this CPU has products of bfloat16."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    theirs, ours = (run(job(name, folder, lora)) for name in (training.TRANSFORMERS, training.PALIGEMMA))
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=5e-3)
    assert len(theirs["step_s"]) == 2


def test_the_first_step_is_not_counted(monkeypatch):
    ticks = iter([0.0, 10.0, 11.0, 13.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    clock = Clock("cpu")
    for _ in range(4):
        clock.tick()
    assert clock.steps()["step_s"] == [1.0, 2.0]


# ---------------------------------------------------------------------------------------------- rounds and figures


@pytest.fixture
def fake(monkeypatch):
    """Contestants that cost nothing: (what was started, in this order; the names of those that fail)."""
    started, failing = [], set()

    def start(job, timeout):
        started.append((job.name, job.lora))
        if job.name in failing:
            raise RuntimeError("MemoryError: no room")
        seconds = {training.TRANSFORMERS: 3.0, training.BARE: 2.0, training.PALIGEMMA: 2.5}[job.name]
        steps = [seconds] * job.steps
        figures = {"step_s": steps, "step_cpu_s": [2 * second for second in steps], "losses": [4.0], "tokens": 100}
        return {"job": asdict(job), **figures, "peak_bytes": int(1e9 * seconds)}

    monkeypatch.setattr(training, "in_a_process", start)
    monkeypatch.setattr("paligemma.bench.transformers_model.installed", lambda: True)
    return started, failing


def test_contestants_take_turns_there_and_back(fake, folder, tmp_path):
    record = benchmark_training(str(folder), rounds=2, steps=3, threads=7, out=tmp_path / "record.json")
    names = [training.TRANSFORMERS, training.BARE, training.PALIGEMMA]
    expected = [(name, lora) for order in (names, names[::-1]) for lora in (True, False) for name in order]
    assert fake[0] == expected
    assert json.loads((tmp_path / "record.json").read_text())["summary"] == record["summary"]
    assert record["batch"] == 16 and record["runs"][0]["job"]["batch"] == 16
    assert record["threads"] == record["runs"][0]["job"]["threads"] == 7


def test_all_weights_learn_only_where_memory_allows(fake, folder, monkeypatch):
    monkeypatch.setattr("paligemma.devices.free_memory", lambda device: 1e5)
    benchmark_training(str(folder), rounds=1)
    assert {lora for _, lora in fake[0]} == {True}


def test_what_fails_is_noted_and_the_others_go_on(fake, folder):
    fake[1].add(training.TRANSFORMERS)
    record = benchmark_training(str(folder), rounds=1)
    assert record["failed"][0] == {"what": "round 1 of 1: transformers, LoRA", "why": "MemoryError: no room"}
    assert {one["name"] for one in record["summary"]} == {training.BARE, training.PALIGEMMA}
    assert "times_transformers" not in record["summary"][0]


def test_a_first_loss_that_others_do_not_have_is_a_failure(fake, folder, monkeypatch):
    """Without it a contestant that computes something else would win."""
    start = training.in_a_process
    losses = {training.TRANSFORMERS: 4.0, training.BARE: 4.01, training.PALIGEMMA: 5.0}
    monkeypatch.setattr(training, "in_a_process", lambda job, _: start(job, _) | {"losses": [losses[job.name]]})
    (one, other) = benchmark_training(str(folder), rounds=1)["failed"]
    assert one["what"] == "round 1 of 1: paligemma, LoRA" and other["what"].endswith("all weights")
    assert one["why"].startswith("first losses differ: 4.0100 (bare loop) and 5.0000 (paligemma)")


def test_figures_follow_from_the_runs(fake, folder):
    record = benchmark_training(str(folder), rounds=1)
    theirs, bare, ours = (one for one in record["summary"] if one["lora"])
    assert (ours["step_s"], ours["step_cpu_s"], ours["tokens_s"]) == (2.5, 5.0, 40.0)
    assert ours["times_bare"] == 1.25 and ours["times_transformers"] == 1.2
    assert ours["memory_of_transformers"] == pytest.approx(2.5 / 3) and theirs["times_transformers"] == 1
    assert bare["times_bare"] == 1 and table(record).row_count == 6
    assert summary([]) == []


def test_what_cannot_be_measured_is_refused(folder):
    with pytest.raises(ValueError, match="at least 1"):
        benchmark_training(str(folder), rounds=0)
    refused = CliRunner().invoke(app, ["bench", "--serve", "--train"])
    assert refused.exit_code == 2


@pytest.mark.slow
def test_the_command_measures_and_writes_its_record(folder, tmp_path):
    """All of it, once, with processes of its own: the table on stdout, the record."""
    command = ["bench", "--train", "-m", str(folder), "--quick", "--no-transformers", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "bare loop" in done.stdout and "all weights" in done.stdout
    (path,) = tmp_path.glob("training-*.json")
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 4 and not record["failed"]
    if sys.platform.startswith("linux"):
        weights = (folder / "model.safetensors").stat().st_size
        assert all(run["peak_bytes"] > weights for run in record["runs"])
