"""What is asked about CPUs and GPUs, with the answers of other machines put in."""

import pytest
import torch

from paligemma import devices
from paligemma.devices import on_meta_device, pick_device


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    for device in ("cuda", "cuda:1", "mps", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"is not there; this machine has cpu$"):
            pick_device(device)
    with pytest.raises(ValueError, match="device is 'gpu', expected one of cpu"):
        pick_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:2' is not there; this machine has 2 of them"):
        pick_device("cuda:2")


def test_memory_that_a_container_leaves(monkeypatch, tmp_path):
    """/proc/meminfo is that of the machine around it."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "CONTAINER", tmp_path)
    around = devices.free_memory(cpu)
    for name, text in (("max", "5000\n"), ("current", "3000\n"), ("stat", "anon 2500\ninactive_file 400\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert devices.free_memory(cpu) == 5000 - 3000 + 400
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.free_memory(cpu) == pytest.approx(around, rel=0.5)  # others use memory, too


def test_the_meta_device_draws_no_random_numbers():
    state = torch.get_rng_state()
    with on_meta_device():
        layers = [torch.nn.Linear(3, 4), torch.nn.Embedding(3, 4), torch.nn.Conv2d(3, 4, 2), torch.nn.LayerNorm(3)]
    assert {parameter.device.type for layer in layers for parameter in layer.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.nn.Linear(3, 4).weight.device.type == "cpu"  # nothing lasts beyond the block
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def another_cpu(monkeypatch):
    """Makes this machine answer like another: its capability in PyTorch's words, its flags in those of Linux."""
    asked = devices.cpu_flags, devices.vector_instructions, devices.has_bfloat16_vectors_only

    def answer(capability, flags):
        for function in asked:
            function.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(devices, "_cpuinfo", lambda key: flags)

    yield answer
    for function in asked:
        function.cache_clear()


def test_instructions_are_those_that_pytorch_and_the_cpu_have(another_cpu):
    for capability, flags, best in (
        ("AVX512", "fma avx2 avx512f avx512_vnni", "AVX-512"),
        ("AVX512", "fma avx2 avx512f", "AVX2"),  # without 8-bit dot products
        ("AVX2", "fma avx2 avx512f avx512_vnni", "AVX2"),  # PyTorch was told to do without
        ("AVX2", "avx2", None),
        ("AVX512", "", None),
        ("DEFAULT", "fma avx2", None),
    ):
        another_cpu(capability, flags)
        assert devices.vector_instructions() == best, flags
    another_cpu("AVX512", "fma avx2 avx512_bf16")
    assert devices.has_bfloat16_vectors_only()
    another_cpu("AVX512", "fma avx2 avx512_bf16 amx_bf16")
    assert not devices.has_bfloat16_vectors_only()


def test_a_system_without_cpuinfo_is_asked_otherwise(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(devices.Path, "read_text", missing)
    assert devices._cpuinfo("flags") == "" and devices.cpu_name()
