"""Decoding, eager and compiled, measured: here on the CPU, with a small model that is not compiled."""

import json

import pytest
import torch
from reference import tiny_config
from typer.testing import CliRunner

from paligemma import compiled
from paligemma.bench import decoding, shapes
from paligemma.cli.main import app
from paligemma.generation import decode_one_token


@pytest.fixture(autouse=True)
def little_to_read(monkeypatch):
    """A gigabyte takes seconds."""
    monkeypatch.setattr(decoding, "GIGABYTE", 2**20)


def test_the_record_has_every_model_and_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: decode_one_token)
    shapes.write_random_checkpoint(tiny_config("gemma"), tmp_path / "random")
    said = []
    record = decoding.benchmark_decoding(
        tmp_path / "random",
        "mine",
        "cpu",
        transformers=False,
        rounds=2,
        tokens=5,
        out=tmp_path / "record.json",
        say=said.append,
    )
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["model"] == "mine"
    assert [run["name"] for run in record["runs"]] == ["compiled", "eager", "eager", "compiled"]  # in turns
    assert list(record["summary"]) == ["compiled", "eager"] and record["read_gb_s"] > 0
    table = decoding.table(record)
    assert table.row_count == 2 and "each token" in table.columns[2].header


def test_the_command_measures_eager_and_compiled_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: decode_one_token)
    shapes.write_random_checkpoint(tiny_config("gemma2"), tmp_path / "random")
    command = ["bench", "--compile", "-m", f"{tmp_path / 'random'}/", "--rounds", "2", "--tokens", "4"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "a token compiled takes" in done.stdout and "in 2 rounds" in done.stdout
    (path,) = tmp_path.glob("speed-random-compiled-*.json")
    assert json.loads(path.read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--compile --serve", "without --compile"),
        ("--compile --train", "without --compile"),
        ("--compile --transformers", "on a GPU only"),
        ("--compile --grow", "--precisions and --grow are for"),
        ("--serve --precisions int8", "--precisions and --grow are for"),
        ("--train --grow", "--precisions and --grow are for"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said):
    done = CliRunner().invoke(app, ["bench", *options.split()])
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())


def test_the_ratio_is_taken_round_by_round():
    runs = [
        {"name": name, "first_token_s": 1.0, "answer_s": 1.0 + seconds}
        for name, seconds in (
            ("compiled", 1),
            ("eager", 2),
            ("eager", 4),
            ("compiled", 1),
            ("compiled", 3),
            ("eager", 3),
        )
    ]
    assert decoding.ratio_line({"runs": runs}).endswith("0.50 times as long as eager (0.25 - 1.00 in 3 rounds)")


def test_figures_follow_from_the_runs():
    record = {
        "token_bytes": 2e9,
        "read_gb_s": 1000.0,
        "tokens": 11,
        "runs": [
            {"name": "eager", "first_token_s": 0.1, "answer_s": 0.1 + 10 * seconds} for seconds in (0.01, 0.02, 0.04)
        ],
    }
    figures = decoding.summary(record)["eager"]
    assert figures == {
        "first_token_ms": 100, "token_ms": 20, "token_ms_min": 10, "token_ms_max": 40, "share_of_reading": 0.1
    }  # fmt: skip


def test_the_rate_of_reading_is_that_of_a_gigabyte(monkeypatch):
    """Less would be read from the caches of a large CPU."""
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "seconds_of", lambda run, device: 0.5)
    assert decoding.read_rate("meta") == 2 * 2**30 / 1e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert isinstance(done.exception, RuntimeError) and "has no GPU that PyTorch can use" in str(done.exception)
