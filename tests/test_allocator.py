"""What becomes of freed memory: counted in pages that the system had to clear again (minor page faults)."""

import platform
import resource
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
STEPS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages (PR_SET_THP_DISABLE)
import torch
from paligemma import allocator
{first}
def step():  # blocks of 8 MB, freed from the first to the last as activations of a step are
    blocks = [torch.ones(2**21) for _ in range(6)]
    blocks.clear()
for _ in range(10):  # aligned blocks leave holes at first
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 5 * 6 * 2**23 // resource.getpagesize()  # of all blocks of five steps


def pages_cleared(first: str) -> int:
    run = subprocess.run([sys.executable, "-c", STEPS.format(first=first)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not GLIBC, reason="only glibc's allocator has these two settings")
def test_memory_that_is_kept_is_used_again_and_memory_given_back_is_cleared_anew():
    assert pages_cleared("allocator.keep_freed_memory()") < PAGES / 100
    assert pages_cleared("allocator.give_back_freed_memory()") > PAGES / 2
    assert pages_cleared("allocator.keep_freed_memory(); allocator.give_back_freed_memory()") > PAGES / 2


@pytest.mark.parametrize(("small", "expected"), [(True, "keep"), (False, "give back")])
def test_training_on_a_cpu_keeps_the_memory_of_small_models_and_gives_back_that_of_large_ones(
    monkeypatch, small, expected
):
    import paligemma
    from paligemma.train import setup
    from paligemma.train.options import TrainOptions

    called = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: called.append("keep"))
    monkeypatch.setattr(setup, "give_back_freed_memory", lambda: called.append("give back"))
    monkeypatch.setattr(setup.parts, "is_small", lambda model: small)
    setup.prepare(paligemma.load("tiny", device="cpu").model, TrainOptions(model="tiny", data="", out=""))
    assert called == [expected]
