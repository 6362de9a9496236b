"""Every command that writes, ended while it writes: by SIGTERM, by kill -9, by a full disk, by a second starter.

Each runs in a process forked from this one. A hook looks at every file that it opens for writing; at the k-th, the
process is ended. What must hold afterwards, whatever k is: a file has its old content or is whole, the exit code is
right, a message names the file, the same command then does its work, and nothing hidden is left.
"""

import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_tokenizer import build_tokenizer
from PIL import Image
from reference import randomize, tiny_config

from paligemma.__main__ import main
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.train.parts import add_lora
from paligemma.weights.adapters import save_adapter
from paligemma.weights.saving import save_pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files"),
]

MODEL = ["--model", "model"]
# (arguments, what it writes)
COMMANDS = {
    "run --save": (["run", "detect dog", "a.png", *MODEL, "--save", "new.png", "--max-new-tokens", "6"], "new.png"),
    "run --save-labels": (
        ["run", "detect dog", "a.png", *MODEL, "--save-labels", "new", "--max-new-tokens", "6"],
        "new/data.yaml",
    ),
    "explore --out": (["explore", "caption en", "a.png", *MODEL, "--out", "new.html"], "new.html"),
    "data show": (["data", "show", "rows.jsonl", *MODEL, "--out", "new"], "new/row-000000.png"),
    "evaluate": (["evaluate", *MODEL, "--data", "rows.jsonl", "--out", "new"], "new/results.json"),
    "train": (
        ["train", *MODEL, "--data", "rows.jsonl", "--out", "new", "--steps", "2", "--batch", "2", "--save-every", "0"],
        "new/finished.json",
    ),
    "convert": (["convert", "model", "new"], "new/model.safetensors"),
    "convert to npz": (["convert", "model", "new/new.npz"], "new/new.npz"),
    "merge": (["merge", "adapter", "new"], "new/model.safetensors"),
    "quantize": (["quantize", "model", "new", "--int8"], "new/model.safetensors"),
    "tiny scenes": (["tiny", "scenes", "--out", "new", "--count", "2"], "new/coco.json"),
    "tiny scenes --task": (
        ["tiny", "scenes", "--out", "new", "--count", "2", "--task", "count_color"],
        "new/rows.jsonl",
    ),
    "tiny evaluate": (
        ["tiny", "evaluate", "--count", "1", "--part", "clean", "--out", "new", "--batch-size", "64"],
        "new/table.json",
    ),
    "bench": (
        [
            "bench",
            "-m",
            "tiny",
            "--quick",
            "--no-transformers",
            "--precisions",
            "plain",
            "--tokens",
            "2",
            "--out",
            "new",
        ],
        "new/speed-tiny-*.png",  # behind the record; a second record of the day has a number, and so has its picture
    ),
}
# A second starter is refused; with others, the last wins.
LOCKS = ["convert", "merge", "quantize", "evaluate", "train", "tiny evaluate", "run --save-labels"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    tokenizer = load_tokenizer(build_tokenizer(folder / "tokenizer"))
    rows = (len(tokenizer) + 63) // 64 * 64
    model = PaliGemmaForConditionalGeneration(
        tiny_config("gemma", vocab_size=rows, image_token_index=tokenizer.image_token_id)
    )
    randomize(model)
    save_pretrained(model, folder / "model", processor=PaliGemmaProcessor(tokenizer, 4, 28))
    add_lora(model, ("decoder",), rank=2)
    save_adapter(model, folder / "adapter", folder / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "a.png")
    lines = [{"image": "a.png", "prefix": "caption en", "suffix": word} for word in ("a dog", "a cat", "two dogs")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def work(valid, tmp_path):
    for path in valid.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def start(folder: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> tuple[int, Path]:
    """The process of a command, and the file with what it writes to stderr."""
    messages = folder.parent / f"{folder.name}-stderr"
    process = os.fork()
    if process:
        return process, messages
    code = 99  # a traceback
    try:
        with messages.open("w", buffering=1) as err:
            os.dup2(err.fileno(), 2)
            sys.argv, sys.stdout, sys.stderr, sys.stdin = ["paligemma", *arguments], io.StringIO(), err, None
            os.chdir(folder)
            prepare()
            main()
            code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        with messages.open("a") as err:
            traceback.print_exc(file=err)
    finally:
        os._exit(code)


def run(folder: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    process, messages = start(folder, arguments, prepare)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), messages.read_text()


def at_write(k: int, act: Callable[[], None]) -> Callable[[], None]:
    """Makes the process act when it opens, renames or makes its k-th file or folder below "new"."""
    seen = [0]

    def hook(event: str, values: tuple) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.truncate") or (
            event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and "new" in str(values[0]):
            seen[0] += 1
            if seen[0] == k:
                act()

    return lambda: sys.addaudithook(hook)


def hidden(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.name.startswith(".")]
    return [str(path.relative_to(folder)) for path in found if not path.is_relative_to(folder / "model")]


def result(folder: Path, written: str) -> Path:
    """The file that a command has written, or the one that it has not."""
    return next(folder.glob(written), folder / written)


def check_finished(folder: Path, arguments: list[str], written: str) -> None:
    code, err = run(folder, arguments)
    assert code == 0, err
    assert result(folder, written).stat().st_size > 0
    assert hidden(folder) == []


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal(work, command, name, k):
    arguments, written = COMMANDS[command]
    number = getattr(signal, name)
    code, err = run(work, arguments, at_write(k, lambda: os.kill(os.getpid(), number)))
    assert "Traceback" not in err
    if code == 0:
        assert result(work, written).exists()  # it wrote less than k files
        return
    assert code == {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}[name], err
    if number != signal.SIGKILL:
        assert hidden(work) == []
    if command.startswith("tiny scenes") and result(work, written).exists():
        return  # ended behind the last rename
    check_finished(work, arguments, written)


@pytest.mark.parametrize("size", [0, 50, 3000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(work, command, size):
    """The kernel refuses to let any file grow further: what a full disk does, without filling one."""
    arguments, written = COMMANDS[command]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if size < 3000:
            sys.stderr = open_pipe()

    reading, writing = os.pipe()

    def open_pipe():  # stderr must not be a file: it could not be written to either
        os.dup2(writing, 2)
        return os.fdopen(os.dup(writing), "w", buffering=1)

    code, err = run(work, arguments, limit)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        err += pipe.read()
    if code == 0:
        assert size == 3000 and result(work, written).stat().st_size < 3000
        return
    assert code == 1 and "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "new" in last and ("too large" in last or "is full" in last), err
    assert hidden(work) == [] and not result(work, written).exists()
    check_finished(work, arguments, written)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_starters(work, command):
    """The first stops in the middle of writing; the second either waits for nobody and is right, or is refused."""
    arguments, written = COMMANDS[command]
    first, messages = start(work, arguments, at_write(5, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    _, status = os.waitpid(first, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        pytest.skip("it writes one file, in one go")
    try:
        code, err = run(work, arguments)
        if command.split(" to ")[0] in LOCKS:
            assert code == 1 and "is being written by another process (" in err, err
        else:
            assert code == 0, err
    finally:
        os.kill(first, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    err = messages.read_text()
    assert code == 0 or (command.startswith("tiny scenes") and code == 1 and "new" in err), err
    assert "Traceback" not in err and result(work, written).stat().st_size > 0
    assert hidden(work) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_training_of_an_embedded_model_goes_on(work, name):
    """Half a minute for a whole run of the recipe, so it is ended at two moments only."""
    arguments = ["tiny", "train", "--world", "1", "--minutes", "0.1", "--out", "new"]
    number = getattr(signal, name)
    code, err = run(work, arguments, at_write(40, lambda: os.kill(os.getpid(), number)))
    assert code == {"SIGTERM": 143, "SIGKILL": -9}[name] and "Traceback" not in err, err
    assert not (work / "new/package/model.safetensors").exists()
    check_finished(work, arguments, "new/package/model.safetensors")
