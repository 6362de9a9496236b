"""What the machine is, and what it can do at best: the measured limits of any model on it.

Each new token reads every weight of the language model once, so memory bandwidth limits the tokens per second. An image
and a prompt use every weight some hundred times, so the rate of multiplication limits the time to the first token.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from paligemma.devices import cpu_name, has_dot_products


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """Device, threads, versions: without them a figure means nothing. threads: of the processes that are measured; None
    for as many as this one has."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "paligemma"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} logical cores",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads or torch.get_num_threads(),
        "versions": versions,
    }


def measure_limits(quick: bool = False) -> dict[str, float]:
    """The machine's rates, in GB/s and GFLOP/s (for int8: billions of multiplications and additions a second).

    read: summing up a gigabyte, in the fastest of a few ways. bf16, int8: a matrix product of the size of the language
    model's. float32 counts for both, since it is faster on a CPU without instructions for bf16 or int8. quick: a tenth
    of the size, for a try.
    """
    floats = torch.ones(2**25 if quick else 2**28)
    ways: list[Callable[[Tensor], Any]] = [torch.sum, torch.amax, torch.linalg.vector_norm]
    read = floats.nbytes / min(_best(partial(way, floats)) for way in ways) / 1e9
    tokens, inside, outside = (256, 512, 2048) if quick else (1024, 2048, 16384)
    work = 2 * tokens * inside * outside / 1e9
    a, b = torch.randn(tokens, inside).bfloat16(), torch.randn(outside, inside).bfloat16()
    in_bf16 = _best(lambda: torch.nn.functional.linear(a, b))
    a, b = a.float(), b.float()
    in_float32 = _best(lambda: torch.nn.functional.linear(a, b))
    int8 = [_best(way) for way in _int8_products(tokens, inside, outside)] if has_dot_products() else []
    return {
        "read_gb_s": read,
        "bf16_gflop_s": work / min(in_bf16, in_float32),
        "int8_gop_s": work / min([*int8, in_float32]),
    }


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of five runs: other programs only make a run slower."""
    run()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _int8_products(tokens: int, inside: int, outside: int) -> list[Callable[[], Tensor]]:
    """The ways of PyTorch to multiply int8 [tokens, inside] by int8 [inside, outside] that work on this machine."""
    a = torch.randint(0, 127, (tokens, inside), dtype=torch.int8)
    b = torch.randint(-127, 127, (outside, inside), dtype=torch.int8)
    ways: list[Callable[[], Tensor]] = []
    try:
        packed = torch.ops.onednn.qlinear_prepack(b, [tokens, inside])
        unsigned, one, zero = a.to(torch.uint8), torch.ones(outside), torch.zeros(outside, dtype=torch.int64)
        ways.append(
            lambda: torch.ops.onednn.qlinear_pointwise(
                unsigned, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )
        )
        ways[-1]()
    except (RuntimeError, AttributeError):
        ways.clear()
    try:
        torch._int_mm(a, b.T)
        ways.append(lambda: torch._int_mm(a, b.T))
    except (RuntimeError, AttributeError):
        pass
    return ways
