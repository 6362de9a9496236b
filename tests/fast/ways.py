"""What the tests of this room share: the ways to compute the same, small layers and models, and how to compare."""

import pytest
import torch
from avx512 import can_emulate, emulate
from reference import randomize, tiny_config

from paligemma.fast import library
from paligemma.fast.rounded_layers import Int4Linear, Int8Linear
from paligemma.fast.rounding import round_groups, round_rows, unpack
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

KERNEL = library.missing_for_kernel() is None  # whether this machine can have one; nothing is compiled yet
needs_kernel = pytest.mark.skipif(not KERNEL, reason="no compiler, or neither AVX-512 with VNNI nor AVX2")
AVX512 = KERNEL and library.instructions() == "AVX-512"
needs_avx512 = pytest.mark.skipif(not AVX512, reason="no compiler, or no AVX-512 with VNNI")
either_way = pytest.mark.skipif(not AVX512 and not can_emulate(), reason="neither AVX-512 nor SIMDe to emulate it")
BOTH = [pytest.param("AVX-512", marks=either_way), pytest.param("AVX2", marks=needs_kernel)]


def use(kernels: str, set_attribute=setattr) -> None:
    """The kernels of one of the two files, "AVX-512" (emulated where the CPU is another) or "AVX2", or "plain"."""
    set_attribute(library, "REQUESTED", {"AVX2": "avx2", "plain": "0"}.get(kernels, "1"))
    if kernels == "AVX-512" and not AVX512:
        emulate(set_attribute)


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    return float(error.double().norm() / of.double().norm())


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """The same shape on a device whose memory the CPU cannot read."""
    return torch.empty_like(x, device="meta")


def layers(dtype: torch.dtype = torch.float32, N: int = 48, K: int = 512):
    weight, bias = torch.randn(N, K), torch.randn(N).to(dtype)
    return weight, bias, Int8Linear(*round_rows(weight), bias), Int4Linear(*round_groups(weight), bias)


def dense(layer: Int4Linear) -> torch.Tensor:
    """The weight that a layer stands for, float64 [N, K]."""
    return unpack(layer.weight, layer.steps).double() * layer.scale.double()[:, None]


def make_model(kind: str = "gemma", dtype: torch.dtype = torch.float32, **sizes) -> PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **sizes}
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **sizes)).eval()
    randomize(model)
    return model.to(dtype)


def kl(logits: torch.Tensor, reference: torch.Tensor) -> float:
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
