"""The compiled library: how it is kept, and that everything works without it."""

import os

import pytest
import torch
from ways import KERNEL, layers, needs_kernel, relative

import paligemma
from paligemma import devices
from paligemma.fast import library
from paligemma.fast.fast_layers import FastLinear
from paligemma.tiny.renderer import render

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet: no library is loaded, and none lies in the cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(library, "REQUESTED", "1")
    cached = library._library, devices.vector_instructions
    for function in cached:
        function.cache_clear()
    yield tmp_path / "extensions"
    for function in cached:
        function.cache_clear()


def answers_still(capfd, reason: str):
    weight, bias, eight, _ = layers()
    x = torch.randn(2, 512)
    exact = x.double() @ weight.double().T + bias.double()
    assert relative(eight(x) - exact, exact) < 0.02
    eight(x)
    noted = capfd.readouterr()
    assert noted.out == "" and noted.err.count("plain PyTorch") == 1 and reason in noted.err


@needs_kernel
def test_a_compiler_that_fails_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "false")
    answers_still(capfd, "false failed")
    assert list(fresh.rglob("*.so")) == []


@needs_kernel
def test_a_source_that_does_not_compile_is_noted_once_and_done_without(fresh, monkeypatch, capfd, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(library, "SOURCES", {"AVX-512": broken, "AVX2": broken})
    answers_still(capfd, "error")


@needs_kernel
def test_a_library_that_does_not_load_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setattr(library, "compiled", lambda source: os.open(source, os.O_RDONLY))
    answers_still(capfd, ".cpp")


def test_no_compiler_at_all(fresh, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    answers_still(capfd, "compiler" if KERNEL else "")


def test_another_cpu(fresh, monkeypatch, capfd):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    answers_still(capfd, "AVX2" if KERNEL else "")


def test_nothing_is_compiled_for_the_model_that_ships_unless_asked(monkeypatch):
    def must_not(kind):
        raise AssertionError("asked for the compiled library")

    monkeypatch.setattr(library, "_library", must_not)
    pg = paligemma.load("tiny", device="cpu")
    assert pg.caption(render(1, "test", 128).image).text
    assert not any(isinstance(module, FastLinear) for module in pg.model.modules())
