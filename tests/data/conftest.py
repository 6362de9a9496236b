"""Fixtures for the tests of data."""

import sys

import pytest
import torch
from make_tokenizer import build_tokenizer
from PIL import Image

import paligemma
import paligemma.cli.main
import paligemma.utils


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = paligemma.load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return paligemma.PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def paligemma_command(monkeypatch, capsys):
    """Runs `paligemma ...` in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paligemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            paligemma.cli.main.main()
            sys.exit(0)
        return (stop.value.code or 0, *capsys.readouterr())

    return run
