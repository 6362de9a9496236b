"""The benchmark of servers: requests a second, latency, and time to the first token, at growing concurrency.

    record = benchmark_serving("tiny", concurrency=(1, 4, 16))

Each server runs in a process of its own, one after the other within a round, and the order is reversed from round to
round: `paligemma serve`, and `transformers serve` where that is installed. Clients are threads, each with a request on
its way at any time: a stream of a chat completion, whose first piece of text and whose end are timed. The clients are
few and light beside a model, but they run on the same machine: what is measured is the pair of both.

Every request to a server has a picture of its own, so that no server profits from one that it has seen. All servers get
the same pictures.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from rich.table import Table
from rich.text import Text

from paligemma.bench.records import new_record, save
from paligemma.bench.run import Say, checkpoint_of, temporary
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import Tokenizer

PALIGEMMA, TRANSFORMERS = "paligemma serve", "transformers serve"
PROMPT = "caption en"
STARTING = 600  # seconds that a server may take to answer at all
ANSWERING = 900  # seconds that one request may take
# transformers puts a conversation through a template, which PaliGemma's checkpoints lack: the text is the prompt.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def benchmark_serving(
    model: str = "tiny",
    concurrency: Sequence[int] = (1, 4, 16),
    transformers: bool | None = None,
    rounds: int = 3,
    requests: int = 8,
    tokens: int = 16,
    threads: int | None = None,
    work: Path | None = None,
    out: Path | None = None,
    command: str = "",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measures servers of a model and returns the record, saved at `out` after every run.

    model: as for `benchmark`. requests: of each client. tokens: of an answer at most. transformers: None for "if its
    command is there". Raises ValueError for numbers below 1, and what `benchmark` raises for the model.
    """
    if min(*concurrency, rounds, requests, tokens) < 1:
        raise ValueError("concurrency, rounds, requests and tokens are at least 1")
    if transformers is None:
        transformers = transformers_command() is not None
    elif transformers and transformers_command() is None:
        raise ImportError("transformers serve is not installed: pip install 'transformers[serving]', or leave it out")
    servers = [TRANSFORMERS, PALIGEMMA] if transformers else [PALIGEMMA]
    what = "seconds of single requests and requests a second; every run is in `runs`, `summary` has the medians"
    record: dict[str, Any] = {
        **new_record(what, model, command, threads),
        "prompt": PROMPT, "tokens": tokens, "requests_of_each_client": requests,
        "runs": [], "failed": [],
    }  # fmt: skip
    with checkpoint_of(model, work, say) as source, _ready_for_both(source, work) as folder:
        for number in range(rounds):
            for server in servers if number % 2 else servers[::-1]:
                say(f"round {number + 1} of {rounds}: {server}")
                try:
                    with running(server, folder, threads) as port:
                        seeds = itertools.count()
                        # The first request of all pays for what others find.
                        ask(port, 1, 1, tokens, seeds, str(folder))
                        for clients in concurrency:
                            say(f"round {number + 1} of {rounds}: {server}, {clients} at a time")
                            run = ask(port, clients, requests, tokens, seeds, str(folder))
                            record["runs"].append({"server": server, "round": number + 1, **run})
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    record["failed"].append({"what": server, "why": str(error)[:300]})
                record["summary"] = summary(record["runs"])
                save(record, out)
    return record


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each server and concurrency the medians over the rounds."""
    keys = sorted({(run["server"], run["concurrency"]) for run in runs})
    rows = []
    for server, clients in keys:
        same = [run for run in runs if (run["server"], run["concurrency"]) == (server, clients)]
        figures = [key for key in same[0] if key not in ("server", "round", "concurrency")]
        medians = {key: round(statistics.median(run[key] for run in same), 4) for key in figures}
        rows.append({"server": server, "concurrency": clients, **medians})
    return rows


def table(record: dict[str, Any]) -> Table:
    """The summary of a record, to print."""
    title = f"{record['model']}: {record['tokens']} tokens at most, medians of the rounds"
    shown = Table(title=Text(title, "table.title"))
    for name in ("server", "clients", "requests/s", "latency p50, p99 (s)", "to first token p50, p99 (s)"):
        shown.add_column(name, justify="left" if name == "server" else "right")
    for row in record["summary"]:
        shown.add_row(
            row["server"], str(row["concurrency"]), f"{row['requests_per_second']:.2f}",
            f"{row['latency_p50']:.3f}, {row['latency_p99']:.3f}",
            f"{row['first_token_p50']:.3f}, {row['first_token_p99']:.3f}",
        )  # fmt: skip
    return shown


# ------------------------------------------------------------------------------------------------ clients


def ask(port: int, clients: int, requests: int, tokens: int, seeds: Iterator[int], model: str) -> dict[str, Any]:
    """Every client sends `requests` requests, one after another. RuntimeError for any other answer than 200.

    seeds: of the pictures, one for each request.
    """
    timed: list[tuple[float, float]] = []  # to the first token, to the end
    errors: list[Exception] = []
    together = threading.Barrier(clients + 1)
    pictures = [[picture(next(seeds)) for _ in range(requests)] for _ in range(clients)]

    def client(number: int) -> None:
        together.wait()
        try:
            for image in pictures[number]:
                timed.append(one_request(port, image, tokens, model))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for worker in workers:
        worker.start()
    together.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    if errors:
        raise RuntimeError(f"a request failed: {errors[0]}") from errors[0]
    first, whole = np.array(timed).T
    return {
        "concurrency": clients,
        "requests_per_second": len(timed) / seconds,
        "latency_p50": float(np.percentile(whole, 50)), "latency_p99": float(np.percentile(whole, 99)),
        "first_token_p50": float(np.percentile(first, 50)), "first_token_p99": float(np.percentile(first, 99)),
    }  # fmt: skip


def one_request(port: int, image: str, tokens: int, model: str) -> tuple[float, float]:
    """Seconds to the first piece of text, and to the end of the stream."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": PROMPT}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": tokens}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWERING)
    first = None
    with contextlib.closing(connection):
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
        for line in response:
            if first is None and line.startswith(b"data: {") and has_text(line):
                first = time.perf_counter() - start
    end = time.perf_counter() - start
    return end if first is None else first, end


def has_text(line: bytes) -> bool:
    choices = json.loads(line[6:]).get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))


def picture(seed: int) -> str:
    """A data: URL of a PNG that no other seed gives."""
    squares = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((448, 448)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# ------------------------------------------------------------------------------------------------ servers


def transformers_command() -> str | None:
    """The command of transformers, where it and FastAPI, which its server needs, are installed."""
    from importlib.util import find_spec

    beside = Path(sys.executable).with_name("transformers")
    found = str(beside) if beside.exists() else shutil.which("transformers")
    return found if found and find_spec("fastapi") else None


@contextlib.contextmanager
def running(server: str, folder: Path, threads: int | None) -> Iterator[int]:
    """The port of a server on the CPU, in a process of its own, which is ended at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if server == PALIGEMMA:
        command = [sys.executable, "-m", "paligemma", "serve", "-m", str(folder), "--name", str(folder)]
        command += ["--device", "cpu", "--port", str(port), *([] if threads is None else ["--threads", str(threads)])]
        command += ["--queue-timeout", str(ANSWERING), "--timeout", str(ANSWERING)]  # a large model takes its time
    else:
        command = [str(transformers_command()), "serve", str(folder), "--port", str(port), "--host", "127.0.0.1"]
        command += ["--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # no GPU for transformers either
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(process, port, log)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    """Until /health answers with 200. RuntimeError with the last line of the log where the process ends first."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"it ended with {process.returncode}: {lines[-1] if lines else 'no message'}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
        time.sleep(0.2)
    raise RuntimeError(f"no answer within {STARTING} seconds")


# ------------------------------------------------------------------------------------------------ checkpoints


@contextlib.contextmanager
def _ready_for_both(source: Path, work: Path | None) -> Iterator[Path]:
    """A folder of links to the checkpoint's files, with what a server needs beside them: a tokenizer where random
    weights have none, and the template that transformers asks for."""
    with temporary(work) as name:
        folder = Path(name)
        for file in source.resolve().iterdir():
            (folder / file.name).symlink_to(file)
        if not (folder / "tokenizer.json").exists():
            config = PaliGemmaConfig.from_pretrained(folder)
            PaliGemmaProcessor.for_config(stand_in_tokenizer(config), config).save_pretrained(folder)
        if not (folder / "chat_template.jinja").exists():
            (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        yield folder


def stand_in_tokenizer(config: PaliGemmaConfig) -> Tokenizer:
    """A tokenizer with the official places of all special tokens, for weights that are random anyway: each word of a
    prompt is unknown, and an answer is made of numbers."""
    image = config.image_token_index
    words = {f" {number}": number for number in range(image)}
    names = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": 108}
    names |= {f"<loc{n:04d}>": image - 1152 + n for n in range(1024)}
    names |= {f"<seg{n:03d}>": image - 128 + n for n in range(128)}
    names |= {"<image>": image}
    taken = set(names.values())
    vocabulary = {**{word: id for word, id in words.items() if id not in taken}, **names}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\d+|\n|<[^>]*>|\S"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    special = [name for name in names if name != "\n"]
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    return Tokenizer(backend)
