"""The benchmark: what is timed, what the figures of a record mean, and that a failure costs one run, not the record."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import tiny_config
from rich.console import Console

import paligemma
from paligemma.bench import decoding, run, serving, shapes, tables, training, worker
from paligemma.bench.run import benchmark
from paligemma.bench.summary import spread, summarise
from paligemma.bench.tables import cells, growth_lines, markdown, table
from paligemma.bench.worker import Job
from paligemma.weights.loading import load_model
from paligemma.weights.published import published_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights in a small shape."""
    folder = tmp_path_factory.mktemp("random")
    shapes.write_random_checkpoint(tiny_config("gemma"), folder)
    return folder


# ---------------------------------------------------------------------------------------------- shapes and work


def test_random_weights_are_a_checkpoint_like_any_other(folder):
    model = load_model(folder)
    assert model.dtype == torch.bfloat16 and model.config == tiny_config("gemma")
    for name, weight in model.named_parameters():
        assert weight.isfinite().all() and weight.float().std() > 0.01, (
            name
        )  # zeros would be read and multiplied faster


def test_published_names_have_shapes():
    assert shapes.published_shape("paligemma-3b-pt-224") == published_config("paligemma-3b", 224)
    assert shapes.published_shape("google/paligemma2-10b-mix-448") == published_config("paligemma2-10b", 448)
    assert shapes.published_shape("tiny") is None and shapes.published_shape("paligemma-3b-pt-300") is None


def test_work_is_counted_from_the_shapes():
    """By hand, for the tiny shape: P = 4 patches, 2 layers each side, 10 words of text."""
    work = shapes.work_in(tiny_config("gemma"), text_tokens=10)
    head = 320 * 32
    layer = 2 * (64 * 32) + 2 * (32 * 32) + 3 * (64 * 32)  # q and o, k and v, the MLP
    assert work.decoder_weights == 2 * layer + head
    vision = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 32  # attention, MLP; the projector
    attention = 2 * (4 * 4 * 4 * 16) + 2 * (4 * 14 * 14 * 64)  # products of queries with keys, weights with values
    assert work.first_token_flops == 2 * (vision * 4 + 2 * layer * 14 + head) + attention


def test_the_official_decoder_reads_five_gigabytes_a_token():
    work = shapes.work_in(published_config("paligemma-3b", 224))
    assert work.parameters == 2_923_466_480
    assert 2 * work.decoder_weights / 1e9 == pytest.approx(5.01, abs=0.01)  # all but the vision tower, in bfloat16


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="--work"):
        shapes.write_random_checkpoint(tiny_config("gemma"), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- one worker


def test_a_worker_times_every_stage_of_a_real_answer(folder):
    facts = worker.run(Job("plain", str(folder), tokens=5, passes=2, rows=(1, 3)))
    assert [run["rows"] for run in facts["runs"]] == [1, 1, 3, 3]
    for one in facts["runs"]:
        assert len(one["decode_s"]) == 4 and min(one["decode_s"]) > 0  # the first of 5 tokens comes with the prompt
        assert one["first_token_s"] == pytest.approx(one["vision_s"] + one["prefill_s"])
    assert [run["vision_s"] > 0 for run in facts["runs"]] == [True, True, False, False]  # 3 questions, encoded before
    work = shapes.work_in(tiny_config("gemma"))
    assert facts["weight_bytes"] == 2 * work.parameters
    assert facts["token_bytes"] == 2 * (work.decoder_weights + 5 * 32)  # and the norms
    assert facts["load_s"] > 0 and facts["first_answer"]["first_token_s"] > 0
    if sys.platform.startswith("linux"):
        assert facts["peak_bytes"] >= facts["torch_bytes"] > 0


def test_the_stages_are_told_apart(folder, monkeypatch):
    """Time in the vision tower must count as vision, in reading the prompt as prefill, in a decode step as decode."""
    clock = iter(range(1000))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: float(next(clock)))
    towers = torch.nn.Module()
    towers.vision_tower, towers.multi_modal_projector = torch.nn.Identity(), torch.nn.Identity()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = towers

        def forward(self, see, ticks):
            if see:
                x = towers.vision_tower(torch.zeros(1))
                for _ in range(5):
                    next(clock)
                towers.multi_modal_projector(x)
            for _ in range(ticks):
                next(clock)

    model = Model()
    times = worker.Clock(model).run(lambda: [model(True, 3), model(False, 7), model(False, 1)])
    assert times == {"vision_s": 6, "prefill_s": 5, "first_token_s": 11, "decode_s": [8, 2]}


def test_another_resolution_and_no_warm_answer(folder):
    facts = worker.run(Job("plain", str(folder), tokens=2, passes=1, image_size=42, warm=False))
    assert "first_answer" not in facts and len(facts["runs"]) == 1


def test_a_stored_int8_checkpoint_is_loaded_as_it_is(folder, tmp_path, monkeypatch):
    from paligemma.fast import library
    from paligemma.weights.quantized import quantize_checkpoint

    quantize_checkpoint(folder, tmp_path / "int8", "int8", dtype="bfloat16")
    monkeypatch.setattr(library, "REQUESTED", "0")
    facts = worker.run(Job("int8", str(tmp_path / "int8"), tokens=2, passes=1))
    assert facts["weight_bytes"] < 1.5 * shapes.work_in(tiny_config("gemma")).parameters  # not 2 bytes each


def test_a_stored_checkpoint_is_not_timed_in_another_precision(folder, tmp_path, fake):
    """One model would stand in the record under three names."""
    from paligemma.weights.quantized import quantize_checkpoint

    quantize_checkpoint(folder, tmp_path / "int8", "int8", dtype="bfloat16")
    wrong = r"int8 holds int8 weights, which cannot be timed as transformers, bf16, int4: ask for --precisions int8 .*"
    with pytest.raises(ValueError, match=wrong + "--no-transformers"):
        benchmark(str(tmp_path / "int8"), ["bf16", "int8", "int4"])
    assert not fake[0]  # nothing was measured
    benchmark(str(tmp_path / "int8"), ["int8", "int8-torch"], transformers=False, rounds=1)
    assert fake[0] == ["int8", "int8-torch"]
    with pytest.raises(ValueError, match="holds int8 weights, not int4"):
        worker.load_ours(Job("int4", str(tmp_path / "int8")))


@pytest.mark.slow
def test_transformers_runs_against_the_same_clock(folder):
    pytest.importorskip("transformers")
    facts = worker.run(Job("transformers", str(folder), tokens=5, passes=1))
    (one,) = facts["runs"]
    assert facts["weight_bytes"] == 2 * shapes.work_in(tiny_config("gemma")).parameters  # the tied head counts once
    assert len(one["decode_s"]) == 4 and one["vision_s"] > 0 and one["prefill_s"] > 0


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="'int3', expected one of transformers, plain, bf16"):
        benchmark("tiny", ["int3"])
    with pytest.raises(ValueError, match="no precision"):
        benchmark("tiny", [])


# ---------------------------------------------------------------------------------------------- rounds


def fake_facts(spec, first=2.0, decode=0.5):
    """What a process would print. transformers is half as fast as everybody else."""
    slow = 2 if spec.name == "transformers" else 1
    one = {"rows": 1, "vision_s": 0.5 * slow, "prefill_s": (first - 0.5) * slow, "first_token_s": first * slow}
    runs = [{**one, "rows": rows, "decode_s": [decode * slow] * (spec.tokens - 1)} for rows in spec.rows]
    facts = {"spec": dataclasses.asdict(spec), "load_s": 1.0, "runs": runs * spec.passes}
    facts |= {"weight_bytes": 4 * 10**9, "token_bytes": 2 * 10**9}
    return {**facts, "first_answer": runs[0], "peak_bytes": 3 * 10**9, "torch_bytes": 10**9}


@pytest.fixture
def fake(monkeypatch):
    """Contestants that cost nothing: (names in the order of their starts, names that fail)."""
    started, failing = [], set()

    def start(spec, timeout):
        started.append(spec.name)
        if spec.name in failing:
            raise RuntimeError("ImportError: no such thing")
        return fake_facts(spec)

    limits = {"read_gb_s": 10.0, "bf16_gflop_s": 100.0, "int8_gop_s": None}
    monkeypatch.setattr(run, "in_a_process", start)
    monkeypatch.setattr(run, "measure_limits", lambda quick: limits)
    monkeypatch.setattr(run, "installed", lambda: True)
    return started, failing


def test_models_run_in_turn_there_and_back(fake, tmp_path):
    benchmark("tiny", ["bf16", "int8"], rounds=2, out=tmp_path / "record.json")
    assert fake[0] == ["transformers", "bf16", "int8", "int8", "bf16", "transformers"]


def test_what_fails_is_noted_and_the_rest_goes_on(fake, tmp_path):
    fake[1].add("int8")
    benchmark("tiny", ["int8", "bf16"], rounds=2, grow=True, out=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert set(record["summary"]["contestants"]) == {"transformers", "bf16"}
    assert [one["what"] for one in record["failed"]][:2] == ["round 1 of 2: int8", "round 2 of 2: int8"]
    assert "no such thing" in record["failed"][0]["why"]
    assert {"what", "date", "device", "threads", "versions", "work", "limits"} <= {*record, *record["summary"]}


def test_an_interrupted_run_leaves_the_rounds_it_had(tmp_path, fake, monkeypatch):
    def interrupt(spec, timeout):
        raise KeyboardInterrupt

    def limits(quick):
        if fake[0]:
            monkeypatch.setattr(run, "in_a_process", interrupt)
        return {"read_gb_s": 10.0, "bf16_gflop_s": 100.0, "int8_gop_s": None}

    monkeypatch.setattr(run, "measure_limits", limits)
    with pytest.raises(KeyboardInterrupt):
        benchmark("tiny", ["bf16"], rounds=5, out=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert (
        len(record["rounds"][0]["contestants"]) == 2 and record["summary"]["contestants"]["bf16"]["decode_ratio"] == 2
    )


def test_random_weights_are_gone_at_the_end(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "published_shape", lambda name: tiny_config("gemma"))
    seen = []
    monkeypatch.setattr(run, "in_a_process", lambda spec, timeout: seen.append(spec.folder) or fake_facts(spec))
    benchmark("paligemma-3b-pt-224", ["bf16"], transformers=False, rounds=1, work=tmp_path / "work")
    assert seen and seen[0].startswith(str(tmp_path / "work")) and not list((tmp_path / "work").iterdir())


def test_growth_runs_only_what_the_positions_allow(fake):
    record = benchmark("tiny", ["plain", "int8"], transformers=False, rounds=1, grow=True)
    specs = {name: one["spec"] for name, (one,) in record["grow"].items()}
    side = paligemma.load("tiny", device="cpu").processor.image_size
    # Four times the side would need more positions than there are.
    assert set(specs) == {"length", "batch", f"{side} pixels", f"{2 * side} pixels"}
    assert {spec["name"] for spec in specs.values()} == {"plain"}  # the first that was asked for
    assert specs["length"]["tokens"] == 512 and specs["batch"]["rows"] == (1, 2, 4, 8, 16)
    assert len(growth_lines(record)) == 1 + 5 + 2


# ---------------------------------------------------------------------------------------------- figures


def test_figures_follow_from_the_runs(fake):
    record = benchmark("tiny", ["bf16", "int8"], rounds=1)
    work, figures = record["work"], record["summary"]["contestants"]
    bf16, int8, theirs = figures["bf16"], figures["int8"], figures["transformers"]
    assert bf16["decode_tokens_s"] == {"min": 2, "median": 2, "max": 2} and theirs["decode_tokens_s"]["median"] == 1
    assert (bf16["decode_ratio"], bf16["first_token_ratio"], theirs["decode_ratio"]) == (2, 2, 1)
    assert bf16["share_of_reading"] == 0.4  # 2 tokens/s x 2 GB of the 10 GB/s that this machine reads
    assert bf16["share_of_multiplying"] == round(work["first_token_flops"] / 100e9 / 2, 3)
    assert bf16["peak_of_weights"] == 0.5  # 3 GB, of them 1 for torch, for 4 GB of weights
    assert "share_of_multiplying" not in int8  # this machine has no int8 product


def test_growth_compares_the_ends_of_a_long_answer():
    one = {"rows": 1, "vision_s": 0.0, "prefill_s": 1.0, "first_token_s": 1.0}
    steps = [0.1] * 100 + [0.3] * 300 + [0.12] * 100
    batch = [{**one, "rows": rows, "decode_s": [0.1 * cost] * 4} for rows, cost in ((1, 1), (4, 2))]
    grow = {"length": [{"runs": [{**one, "decode_s": steps}]}], "batch": [{"runs": batch}]}
    figures = summarise({"rounds": [], "grow": grow, "work": {}})["grow"]
    assert figures["length"] == {"tokens": 501, "first_ms": 100.0, "last_ms": 120.0, "growth": 0.2}
    assert figures["batch"]["4"] == {"first_tokens_s": 1.0, "decode_tokens_s": 20.0, "times_one": 2.0}


def test_the_table_of_the_docs_is_made_of_a_plain_record(tmp_path):
    for kind in ("2026-11-24", "2026-12-01", "compiled-2026-12-02", "cuda-2026-12-03"):
        (tmp_path / f"speed-paligemma-3b-pt-224-{kind}.json").write_text("{}")
    names = [path.name for path in speed_table.plain_records(tmp_path)]
    assert names == ["speed-paligemma-3b-pt-224-2026-11-24.json", "speed-paligemma-3b-pt-224-2026-12-01.json"]


def test_spread_takes_what_there_is():
    assert spread([3.0, None, 1.0, 2.0]) == {"min": 1, "median": 2, "max": 3}
    assert spread([None]) is None


def test_tables_show_every_model(fake):
    record = benchmark("tiny", ["bf16", "int8"], rounds=1)
    heading, *lines = cells(record)
    assert heading == ["", "transformers", "bf16", "int8"]
    shown = {line[0].strip(): line[1:] for line in lines}
    assert shown["decode, tokens/s"] == ["1 (1 - 1)", "2 (2 - 2)", "2 (2 - 2)"]
    assert shown["of the GEMM limit"][2] == "-"
    assert len(markdown(record).splitlines()) == len(lines) + 2
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(record))
    assert all(len(line) <= 80 for line in console.export_text().splitlines())


@pytest.mark.parametrize(
    ("table", "record"),
    [
        (tables.table, {"device": "cpu", "threads": 1, "date": "2026-11-30", "rounds": []}),
        (decoding.table, {"decoding_device": "cpu", "dtype": "float32", "read_gb_s": 1.0, "token_bytes": 1}),
        (training.table, {"batch": 4}),
        (serving.table, {"tokens": 4}),
    ],
)
def test_brackets_in_the_name_of_a_model_are_no_markup(table, record):
    summary = {"contestants": {}, "limits": {}} if table is tables.table else {}
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table({**record, "model": "[/x]", "summary": summary}))
    assert "[/x]: " in console.export_text()


def test_the_picture_is_drawn(fake, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from paligemma.bench.plot import draw

    draw(benchmark("tiny", ["bf16"], rounds=1), tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({"summary": {"contestants": {}, "limits": {}}, "work": {}}, tmp_path / "none.png")


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_measures_the_embedded_model(tmp_path):
    """All of it, once: limits, a process, the table on stdout, the record."""
    command = [sys.executable, "-m", "paligemma", "bench", "--model", "tiny", "--quick", "--no-transformers"]
    command += ["--precisions", "plain", "--out", str(tmp_path), "--tokens", "3", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "decode, tokens/s" in done.stdout and "plain" in done.stdout
    (path,) = tmp_path.glob("speed-tiny-*.json")
    record = json.loads(path.read_text())
    assert record["threads"] == 1 and not record["failed"]
    assert record["command"].startswith("paligemma bench --model tiny")
    limits, figures = record["summary"]["limits"], record["summary"]["contestants"]["plain"]
    assert limits["read_gb_s"]["median"] > 0.1 and limits["bf16_gflop_s"]["median"] > 0.1
    assert figures["share_of_reading"] > 0 and math.isfinite(figures["decode_tokens_s"]["median"])


# ---------------------------------------------------------------------------------------------- cold start


def test_a_short_command_does_not_import_the_compiler():
    """`torch._dynamo` takes longer than everything else that a short command does beyond importing torch."""
    code = """
import sys
from pathlib import Path
from paligemma.inference import load
load("tiny").generate(sys.argv[1], "caption en", max_new_tokens=2)
assert not {"torch._dynamo", "sympy", "pandas", "matplotlib", "transformers"} & set(sys.modules)
"""
    picture = Path(__file__).parents[2] / "examples" / "scene.png"
    done = subprocess.run([sys.executable, "-c", code, str(picture)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
