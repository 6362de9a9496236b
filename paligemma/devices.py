"""What the processors of this machine can do. Every question about CPUs and GPUs is asked here, by one function each.

Answers about the CPU are kept, so that every layer may ask for every token. Importing this file asks nothing.
`on_meta_device` stands here too: it builds a model on no device at all.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device to run on: the given one, else CUDA, else MPS, else CPU. Raises ValueError if it is not there."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if device is None:
        return torch.device(there[0])
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}, expected one of {', '.join(there)}") from None
    if picked.type not in there:
        raise ValueError(f"device {str(device)!r} is not there; this machine has {', '.join(there)}")
    if picked.type == "cuda" and picked.index is not None and picked.index >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} is not there; this machine has {torch.cuda.device_count()} of them")
    return picked


def free_memory(device: torch.device) -> float:
    """Bytes that are free on this device; infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    kilobytes = _first_line("/proc/meminfo", "MemAvailable").split()  # what can be had without swapping
    return min(1024 * float(kilobytes[0]) if kilobytes else math.inf, _left_in_container())


CONTAINER = Path("/sys/fs/cgroup")  # what Linux counts for a container, as it sees it itself (cgroups, version 2)


def _left_in_container() -> float:
    """Bytes that are free within the limit of a container (`docker run --memory`); infinity where there is none."""
    try:
        limit = int((CONTAINER / "memory.max").read_text())  # "max" stands for none
        used = int((CONTAINER / "memory.current").read_text())
    except (OSError, ValueError):
        return math.inf
    kept = _first_line(str(CONTAINER / "memory.stat"), "inactive_file ", " ")  # pages of files, which make room
    return float(limit - used + int(kept or 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU (where PyTorch raises a plain RuntimeError) or a GPU."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


# ------------------------------------------------------------------------------------------------ arithmetic


def multiplies_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether PyTorch has fast bfloat16 matrix products on this device.

    Older CPUs, such as those with AVX2 alone, multiply bfloat16 one number at a time; float32 is many times faster.
    """
    return torch.device(device).type != "cpu" or cpu_multiplies_bfloat16()


@cache
def cpu_multiplies_bfloat16() -> bool:
    """The same for the CPU. True where PyTorch cannot tell, because it was built without oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


@cache
def has_dot_products() -> bool:
    """Whether this CPU has instructions (VNNI) that multiply and add 8-bit numbers in 32 bits.

    Without them PyTorch adds in 16 bits, which overflow silently.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


@cache
def has_bfloat16_vectors_only() -> bool:
    """Whether this CPU multiplies bfloat16 in vectors (AVX-512) but not in tiles (AMX, several times faster)."""
    flags = cpu_flags()
    return "avx512_bf16" in flags and "amx_bf16" not in flags


@cache
def vector_instructions() -> str | None:
    """The best vector instructions that our kernels are written for: "AVX-512" (with VNNI), "AVX2", or None."""
    usable, flags = torch.backends.cpu.get_cpu_capability(), cpu_flags()
    if usable == "AVX512" and "avx512_vnni" in flags:
        return "AVX-512"
    return "AVX2" if usable in ("AVX2", "AVX512") and {"avx2", "fma"} <= set(flags) else None


# ------------------------------------------------------------------------------------------------ what CPU it is


@cache
def cpu_flags() -> tuple[str, ...]:
    """What the CPU can do, in the words of Linux ("avx2", "fma", ...); empty on other systems."""
    return tuple(_cpuinfo("flags").split())


def cpu_name() -> str:
    """The name of the CPU as its maker gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_count() -> int:
    """Logical cores that this process may use: in a job of a cluster, under `taskset` or in a container
    (`docker run --cpus`) not all of the machine."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = map(int, (CONTAINER / "cpu.max").read_text().split())  # "max" stands for none
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, math.ceil(quota / period)))


def _cpuinfo(key: str) -> str:
    return _first_line("/proc/cpuinfo", key)


def _first_line(file: str, key: str, separator: str = ":") -> str:
    """What Linux says in this file under this key, the first time; "" where it says nothing."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(separator)[2].strip() for line in lines if line.startswith(key)), "")


# ------------------------------------------------------------------------------------------------ no device


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules that are built inside get parameters on the meta device: shapes without memory, for a file to fill in."""
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`. On the meta device there is nothing to initialise, but drawing random numbers there makes
    PyTorch import its compiler: 1.4 seconds, half the time of a short command then."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
