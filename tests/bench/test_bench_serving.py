"""The benchmark of servers: what is sent, what is timed, and its record."""

import contextlib
import json
import shutil
import subprocess

import pytest

from paligemma.bench import serving
from paligemma.bench.serving import PALIGEMMA, benchmark_serving, stand_in_tokenizer, summary, table
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import check_tokenizer
from paligemma.weights.finding import resolve
from paligemma.weights.published import published_config


def test_medians_of_the_rounds():
    runs = [
        {"server": "a", "round": n, "concurrency": 4, "requests_per_second": value, "latency_p50": 1.0}
        for n, value in enumerate([3.0, 1.0, 2.0])
    ]
    (row,) = summary(runs)
    assert row == {"server": "a", "concurrency": 4, "requests_per_second": 2.0, "latency_p50": 1.0}


def test_no_two_requests_have_the_same_picture():
    assert len({serving.picture(seed) for seed in range(20)}) == 20


def test_the_tokenizer_for_random_weights_has_the_official_places():
    config = published_config("paligemma-3b", 224)
    tokenizer = stand_in_tokenizer(config)
    check_tokenizer(tokenizer, config)
    assert (tokenizer.first_loc_id, tokenizer.first_seg_id) == (256_000, 257_024)
    ids = PaliGemmaProcessor(tokenizer, 256, 224).lay_out(["caption en"], [1])["input_ids"][0]
    assert ids[:256].eq(257_152).all() and ids[256] == 2 and ids[-1] == 108
    assert tokenizer.decode([7_000, 7_001]) == " 7000 7001"


@pytest.fixture
def asked(monkeypatch):
    """Servers that cost nothing: of each that was started, the pictures that it was asked about."""
    asked = []

    @contextlib.contextmanager
    def running(server, folder, threads):
        asked.append([])
        yield 0

    monkeypatch.setattr(serving, "running", running)
    monkeypatch.setattr(serving, "picture", lambda seed: f"picture {seed}")
    monkeypatch.setattr(serving, "one_request", lambda port, image, *_: asked[-1].append(image) or (0.1, 0.2))
    monkeypatch.setattr(serving, "transformers_command", lambda: "transformers")
    return asked


@pytest.mark.parametrize("requests", [1, 8, 150])
def test_every_request_to_a_server_is_about_a_picture_of_its_own(asked, requests):
    benchmark_serving("tiny", concurrency=(1, 2, 16), transformers=True, rounds=2, requests=requests)
    assert len(asked) == 4  # two servers, twice
    for pictures in asked:
        assert len(set(pictures)) == len(pictures) == 1 + (1 + 2 + 16) * requests
        assert set(pictures) == set(asked[0])  # the same for all


def test_the_record_has_the_threads_of_the_servers(asked, tmp_path):
    """And the folder for what lies there meanwhile is made, also for a model that has its weights."""
    record = benchmark_serving(
        "tiny", concurrency=(1,), transformers=False, rounds=1, requests=1, threads=7, work=tmp_path / "new"
    )
    assert record["threads"] == 7 and not record["failed"] and list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("server", [PALIGEMMA, serving.TRANSFORMERS])
def test_servers_run_on_the_cpu(server, tmp_path, monkeypatch):
    started = []

    def start(command, env, **_):
        started.append((command, env))
        raise OSError("is not started here")

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="not started"), serving.running(server, tmp_path, 2):
        pass
    ((command, environment),) = started
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["OMP_NUM_THREADS"] == "2"
    assert command[command.index("--device") + 1] == "cpu"


@pytest.mark.slow
def test_a_short_benchmark(tmp_path):
    """The embedded model: its server starts, is asked by one and by two clients, and is ended."""
    out = tmp_path / "record.json"
    record = benchmark_serving(
        "tiny", concurrency=(1, 2), transformers=False, rounds=1, requests=2, tokens=4, work=tmp_path, out=out
    )
    assert json.loads(out.read_text()) == record and not record["failed"]
    assert [(row["server"], row["concurrency"]) for row in record["summary"]] == [(PALIGEMMA, 1), (PALIGEMMA, 2)]
    for row in record["summary"]:
        assert row["requests_per_second"] > 0 and row["first_token_p50"] <= row["latency_p50"] <= row["latency_p99"]
    assert table(record).row_count == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]


@pytest.mark.slow
def test_a_server_that_does_not_start_is_noted(tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(resolve("tiny"), folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    record = benchmark_serving(str(folder), concurrency=(1,), transformers=False, rounds=1, work=tmp_path)
    assert record["failed"][0]["what"] == PALIGEMMA and "error:" in record["failed"][0]["why"]
