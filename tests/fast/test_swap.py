"""Whole models with rounded or faster layers."""

import copy
import math
import sys

import pytest
import torch
from reference import make_inputs, tiny_config
from ways import (
    kl,
    make_model,
    needs_avx512,
    needs_kernel,
    relative,
)

import paligemma
from paligemma import devices
from paligemma.fast import fast_layers, library, products, rounded_layers, swap
from paligemma.fast import kernels as linear_kernels
from paligemma.fast.fast_layers import FastLinear
from paligemma.fast.rounded_layers import Int4Linear, Int8Linear
from paligemma.fast.swap import quantize
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tiny.renderer import render
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize(("mode", "most"), [("int8", 0.01), ("int4", 0.3)])
def test_a_rounded_model_predicts_nearly_the_same(way, kind, mode, most):
    """Random weights: nothing in them is as robust as in a trained model."""
    model = make_model(kind)
    inputs = make_inputs(model.config, prefix=[6, 9], suffix=[8, 3])
    before = model(**inputs).logits
    assert quantize(model, mode) is model
    after = model(**inputs).logits
    assert after.dtype == before.dtype and after.shape == before.shape
    assert 0 < kl(after, before) < most
    if mode == "int8":
        assert (after.argmax(-1) == before.argmax(-1)).float().mean() > 0.9


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_rounded_model_that_was_cast_names_the_scale_and_the_way_out(mode):
    model = quantize(make_model(), mode).to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"a scale torch.bfloat16, expected torch.float32: choose .* not by .to\(dtype\)"
    ):
        model(**make_inputs(model.config, prefix=[6]))


def test_what_is_rounded_and_what_is_not():
    model = quantize(make_model(dtype=torch.bfloat16), "int4")
    of = {name: type(module) for name, module in model.named_modules()}
    assert of["language_model.model.layers.0.self_attn.q_proj"] is Int4Linear
    assert of["language_model.model.layers.1.mlp.down_proj"] is Int4Linear
    assert of["vision_tower.vision_model.encoder.layers.0.mlp.fc1"] is Int8Linear
    assert of["multi_modal_projector.linear"] is Int8Linear
    assert not any(
        isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in model.language_model.modules()
    )
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert "language_model.model.norm.weight" in kept
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in kept
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_whose_inputs_do_not_divide_by_128_keeps_8_bits():
    model = quantize(make_model(intermediate_size=192), "int4")
    assert isinstance(model.language_model.model.layers[0].mlp.down_proj, Int8Linear)
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj, Int4Linear)


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_the_head_of_some_rows_only(way, mode):
    model = quantize(make_model(dtype=torch.bfloat16), mode)
    hidden, ids = torch.randn(1, 1, 128).bfloat16(), torch.tensor([0, 5, 7, 300])
    head = model.language_model.model.embed_tokens
    torch.testing.assert_close(head.logits(hidden, ids), head.logits(hidden)[..., ids])


def test_the_fast_rows_of_bfloat16_are_the_same_arithmetic(way):
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[6])
    plain = [answer.token_ids for answer in paligemma.generate(model, inputs, max_new_tokens=12)]
    logits = model(**inputs).logits
    names = set(model.state_dict())
    quantize(model, "bf16")
    assert set(model.state_dict()) == names
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj, FastLinear)
    fast = model(**inputs).logits
    assert kl(fast, logits) < 1e-3
    assert [answer.token_ids for answer in paligemma.generate(model, inputs, max_new_tokens=12)] == plain


def test_a_model_with_fast_rows_can_be_trained_and_saved(tmp_path):
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    inputs = make_inputs(model.config, prefix=[3], suffix=[2], labels=True)
    with torch.enable_grad():
        model(**inputs).loss.backward()
    assert model.language_model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.language_model.model.embed_tokens.weight.grad.abs().sum() > 0
    save_pretrained(model, tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").dtype == torch.bfloat16


@needs_avx512
@pytest.mark.parametrize("best_for_many", [False, True])
def test_which_products_go_through_the_kernel(best_for_many, monkeypatch):
    called = []
    real = linear_kernels.linear_bf16
    monkeypatch.setattr(linear_kernels, "linear_bf16", lambda x, *rest: called.append(x.shape) or real(x, *rest))
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: best_for_many)
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    layer = model.language_model.model.layers[0].mlp.up_proj
    layer(torch.randn(1, 1, 128).bfloat16()), layer(torch.randn(1, 200, 128).bfloat16())
    assert called == ([(1, 1, 128), (1, 200, 128)] if best_for_many else [(1, 1, 128)])
    called.clear()
    with torch.enable_grad():
        layer(torch.randn(1, 1, 128).bfloat16())
    assert called == []  # the kernel knows no gradients


@needs_kernel
def test_avx2_leaves_many_rows_in_bfloat16_to_float32(monkeypatch):
    """Layers in 8 and 4 bits have a kernel for any number of rows."""
    monkeypatch.setattr(library, "REQUESTED", "avx2")
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(devices, "has_dot_products", lambda: False)
    called, in_float32 = [], products.multiply_in_float32
    for name in ("linear_bf16", "linear_int8", "linear_int4"):
        real = getattr(linear_kernels, name)
        monkeypatch.setattr(linear_kernels, name, lambda x, *rest, real=real: called.append("kernel") or real(x, *rest))
    for user in (fast_layers, rounded_layers):
        noted = lambda *given: called.append("float32") or in_float32(*given)  # noqa: E731
        monkeypatch.setattr(user, "multiply_in_float32", noted)
    for mode in ("bf16", "int8", "int4"):
        layer = quantize(make_model(dtype=torch.bfloat16), mode).language_model.model.layers[0].mlp.up_proj
        for rows in (1, 16, 17):
            layer(torch.randn(1, rows, 128).bfloat16())
    assert called == ["kernel", "kernel", "float32"] + ["kernel"] * 6

    attention = quantize(make_model(dtype=torch.bfloat16), "bf16").language_model.model.layers[0].self_attn
    called.clear()
    real = linear_kernels.attention_bf16
    monkeypatch.setattr(linear_kernels, "attention_bf16", lambda q, *rest: called.append(q.shape[2]) or real(q, *rest))
    for queries in (1, 16, 17):
        q, k = torch.randn(1, 4, queries, 32).bfloat16(), torch.randn(1, 1, 40, 32).bfloat16()
        attention.attend(q, k, k, torch.ones(1, 1, queries, 40, dtype=torch.bool))
    assert called == [1, 16]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_model_that_ships_answers_mostly_the_same(way, mode):
    whole, small = (paligemma.load("tiny", device="cpu", quantize=q) for q in (None, mode))
    images = [render(seed, "test", 256).image for seed in range(40, 46)]
    prompts = ["caption en", "answer en what color is the background ?", "detect car"]
    same = total = 0
    for prompt in prompts:
        for a, b in zip(whole.generate(images, prompt, 40), small.generate(images, prompt, 40)):
            total += 1
            same += a.text.partition("<loc")[0] == b.text.partition("<loc")[0]
    assert total == 18 and same >= (17 if mode == "int8" else 14)


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_a_model_takes_them_and_answers_as_without(kernels, mode, monkeypatch):
    """Counted, and compared with the same model whose parts between the products are PyTorch's.

    Roundings differ, and may move an 8-bit number by a step; the distance to the model in float32 is the same.
    """
    called = []
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    for name in ("gelu_bf16", "rms_norm_bf16", "attention_bf16", "rotary_bf16"):
        real = getattr(linear_kernels, name)
        monkeypatch.setattr(
            linear_kernels, name, lambda *given, name=name, real=real: called.append(name) or real(*given)
        )
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[5, 3])
    exact = copy.deepcopy(model).float()(**inputs).logits
    fast = quantize(model, mode)(**inputs).logits
    text, vision = model.config.text_config, model.config.vision_config
    assert called.count("attention_bf16") == text.num_hidden_layers + vision.num_hidden_layers
    assert called.count("gelu_bf16") == text.num_hidden_layers + vision.num_hidden_layers
    assert called.count("rms_norm_bf16") == 2 * text.num_hidden_layers + 1
    assert called.count("rotary_bf16") == 2 * text.num_hidden_layers  # queries and keys
    called.clear()
    for module in model.modules():
        if type(module) in swap.FAST_CLASSES.values():
            module.__class__ = type(module).__mro__[1]
    plain = model(**inputs).logits
    assert called == []
    # A divergence goes with the square of an error.
    assert kl(fast, plain) < kl(plain, exact) and kl(fast, exact) < 1.25**2 * kl(plain, exact)


@pytest.mark.parametrize("slow", [False, True])
def test_a_model_in_bfloat16_answers_nearly_the_same_on_a_cpu_without_its_products(way, slow, monkeypatch):
    """Everything that is float32 there: products of many rows, attention, patches. Compared with float32 throughout."""
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: not slow)
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[20, 13])  # more rows than few
    plain, exact = model(**inputs).logits, copy.deepcopy(model).float()(**inputs).logits
    fast = quantize(model, "bf16")(**inputs).logits
    assert fast.dtype == torch.bfloat16 and not (slow and torch.equal(fast, plain))
    assert relative(fast - exact, exact) < 1.25 * relative(plain - exact, exact)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(mode, bad):
    model = make_model()
    model.language_model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has numbers that are not finite"):
        quantize(model, mode)


def test_another_device():
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(tiny_config("gemma"))
    with pytest.raises(ValueError, match="quantize='int8' is for the CPU, not for meta: use bnb-int8 or nf4 there"):
        quantize(model, "int8")


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for mode in ("bnb-int8", "nf4"):
        with pytest.raises(
            ImportError, match=rf"'{mode}' is for CUDA .*, and needs bitsandbytes: pip install .*\[quantize"
        ):
            quantize(make_model(), mode)


@pytest.mark.parametrize(("mode", "most"), [("bnb-int8", 0.02), ("nf4", 0.4)])
def test_bitsandbytes(mode, most):
    pytest.importorskip("bitsandbytes")
    model = make_model(dtype=torch.bfloat16, vision_hidden_size=64, vision_intermediate_size=128)
    inputs = make_inputs(model.config, prefix=[6, 9])
    before = model(**inputs).logits
    quantize(model, mode)
    assert 0 < kl(model(**inputs).logits, before) < most
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int8")
