"""A whole decoder layer in one call: equal to the bit, and not taken where it would bypass something."""

import pytest
import torch
from reference import make_inputs
from ways import elsewhere, make_model, relative

from paligemma.fast import decoder_layers, fast_layers
from paligemma.fast import kernels as linear_kernels
from paligemma.fast.fast_layers import FastGemmaMLP, FastRMSNorm
from paligemma.fast.rounding import round_groups, round_rows
from paligemma.fast.swap import quantize
from paligemma.generation import decode_one_token
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import rotary_tables
from paligemma.static_kv_cache import StaticKVCache

pytestmark = pytest.mark.usefixtures("without_gradients")


def cached_passes(model, rows=(20, 13)):
    """Logits of the prefix, of three tokens more, and of one more: two rows, one of them padded."""
    inputs = make_inputs(model.config, prefix=list(rows))
    cache = KVCache(model.config.text_config, len(rows), 40, model.dtype)
    logits = [model(**inputs, cache=cache).logits]
    for tokens in (torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11], [12]])):
        logits.append(model(tokens, cache=cache).logits)
    return logits, cache


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("beats", [True, False])
def test_next_tokens_in_one_call_of_a_layer_are_equal_to_the_bit(kernels, mode, kind, beats, monkeypatch):
    """Where a CPU with AVX-512 leaves attention to PyTorch, there is no such call."""
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: beats)
    called, real = [], linear_kernels.decoder_layer
    monkeypatch.setattr(linear_kernels, "decoder_layer", lambda x, *rest: called.append(x.shape[1]) or real(x, *rest))
    model = quantize(make_model(kind, torch.bfloat16), mode)
    logits, cache = cached_passes(model)
    expected_calls = [3] * len(cache.keys) + [1] * len(cache.keys)  # the prefix has too many rows for it
    assert called == (expected_calls if beats or kernels == "AVX2" else [])
    monkeypatch.setattr(decoder_layers, "in_one_call", lambda *_: None)
    expected, expected_cache = cached_passes(model)
    for y, step_by_step in zip(logits, expected):
        assert torch.equal(y, step_by_step)
    for kept, step_by_step in zip([*cache.keys, *cache.values], [*expected_cache.keys, *expected_cache.values]):
        assert torch.equal(kept, step_by_step)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_rows_that_joined_and_left_are_computed_in_one_call_as_well(kernels, mode, kind, monkeypatch):
    """A trimmed cache is a view that does not begin where its memory does: equal to the bit to a copy of it."""
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    called, real = [], linear_kernels.decoder_layer
    monkeypatch.setattr(linear_kernels, "decoder_layer", lambda x, *rest: called.append(x.shape[1]) or real(x, *rest))
    model = quantize(make_model(kind, torch.bfloat16), mode)
    logits = []
    for copied in (False, True):
        _, cache = cached_passes(model)
        _, other = cached_passes(model, rows=(9, 7))
        cache.join(other)
        cache.select(torch.tensor([3, 1]))  # the longest row leaves
        cache.trim()
        assert not cache.keys[0].is_contiguous() and cache.keys[0].storage_offset() > 0
        if copied:
            cache.grow(cache.max_length + 5)
        called.clear()
        logits.append(model(torch.tensor([[5, 6], [7, 8]]), cache=cache).logits)
        assert called == [2] * len(cache.keys)
    assert torch.equal(*logits)


@pytest.mark.parametrize("words", [3, 20])
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_a_cache_of_fixed_shapes_gives_the_logits_of_the_growing_one(kernels, mode, words, monkeypatch):
    """The loop of your own in `docs/compiling.md`. It reads other columns too, under a mask, so sums differ in order.

    A prompt of few tokens, and one of many.
    """
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    model = quantize(make_model(dtype=torch.bfloat16), mode)
    inputs = make_inputs(model.config, prefix=[words])
    text, length = model.config.text_config, inputs["input_ids"].shape[1] + 4
    static, growing = StaticKVCache(text, 1, length, model.dtype), KVCache(text, 1, length, model.dtype)
    assert torch.equal(model(**inputs, cache=static).logits, model(**inputs, cache=growing).logits)
    for token in (5, 6, 7):
        y, expected = (decode_one_token(model, torch.tensor([token]), cache) for cache in (static, growing))
        assert relative(y - expected, expected) < 0.01


class HalfNorm(FastRMSNorm):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.usefixtures("kernels")
def test_a_layer_in_one_call_takes_masks_as_they_lie_and_no_rows(monkeypatch):
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    layer, text = model.language_model.model.layers[0], model.config.text_config
    cos, sin = rotary_tables(torch.tensor([[3]]), text.head_dim, 1e4, torch.bfloat16)
    cache = KVCache(text, 1, 4, torch.bfloat16)
    cache.extend(torch.ones(1, 4, dtype=torch.bool))
    x = torch.randn(1, 1, 128).bfloat16()
    seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    expected = layer(x, seen, cos, sin, cache)
    for mask in (torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 1, 4), torch.ones(1, 1, 1, 8)[..., ::2] > 0):
        assert torch.equal(layer(x, mask, cos, sin, cache), expected)
    nobody = model(torch.zeros(0, 1, dtype=torch.long), cache=KVCache(text, 0, 4, torch.bfloat16))
    assert nobody.logits.shape == (0, 1, text.vocab_size)


@pytest.mark.usefixtures("kernels")
def test_what_watches_or_changes_a_part_of_a_layer_is_not_passed_by(monkeypatch):
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    monkeypatch.setattr(linear_kernels, "decoder_layer", lambda *_: pytest.fail("in one call"))
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    seen = []
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("o_proj"))
    cached_passes(model)
    assert len(seen) == 3 * len(model.language_model.model.layers)
    for change in (
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.input_layernorm, "forward", layer.input_layernorm.forward),
        lambda layer: setattr(layer.self_attn, "explicit", True),
        lambda layer: setattr(layer.input_layernorm, "__class__", HalfNorm),
        lambda layer: setattr(layer, "input_layernorm", torch.nn.Sequential(layer.input_layernorm)),
        lambda layer: layer.post_attention_layernorm.float(),
        lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Sequential(layer.mlp.up_proj)),
        lambda layer: setattr(layer.self_attn.q_proj, "bias", torch.nn.Parameter(torch.ones(128).bfloat16())),
    ):
        model = quantize(make_model(dtype=torch.bfloat16), "bf16")
        for layer in model.language_model.model.layers:
            change(layer)
        cached_passes(model)
    model, seen = quantize(make_model(dtype=torch.bfloat16), "bf16"), []
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(type(part)))
    with everywhere:  # removed behind it
        cached_passes(model)
    assert seen.count(FastGemmaMLP) == 3 * len(model.language_model.model.layers)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_refusal_names_its_reason(kind, monkeypatch):
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    text = make_model(kind).config.text_config
    cos, _ = rotary_tables(torch.arange(20)[None], text.head_dim, 1e4, torch.bfloat16)
    x, mask = torch.randn(1, 20, 128).bfloat16(), torch.ones(1, 1, 20, 20, dtype=torch.bool)

    def reason(
        change=None, tokens=2, queries=2, dtype=torch.bfloat16, cache_dtype=torch.bfloat16, rows=1, kept=KVCache
    ):
        layer = quantize(make_model(kind, torch.bfloat16), "int8").language_model.model.layers[1]
        if change is not None:
            change(layer)
        given = x[:, :tokens].to(dtype).expand(rows, -1, -1), mask[:, :, :queries, :tokens], cos[:, :, :tokens]
        cache = kept(text, rows, tokens, cache_dtype) if kept is not None else None
        return decoder_layers.why_not_in_one_call(layer, *given, cache)

    assert reason() is None
    assert reason(kept=None) == "there is no cache"
    assert reason(kept=StaticKVCache) == "the cache is not a plain KVCache"
    assert reason(queries=1) == "not all positions are queries"
    assert "share one row of positions" in reason(rows=2)
    assert "no row" in reason(rows=0)
    assert reason(tokens=20, queries=20) == "there are many tokens"
    assert "not bfloat16 on a CPU" in reason(dtype=torch.float32)
    assert reason(cache_dtype=torch.float32) == "the cache is not bfloat16"
    with torch.enable_grad():
        assert "gradients are enabled" in reason()
    for change, words in (
        (lambda layer: setattr(layer.self_attn, "explicit", True), "attention is explicit"),
        (lambda layer: setattr(layer, "mlp", torch.nn.Identity()), "attention or MLP was replaced"),
        (lambda layer: layer.input_layernorm.float(), "a norm was replaced"),
        (lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Identity()), "a linear layer was replaced"),
        (lambda layer: layer.mlp.up_proj.register_forward_hook(print), "a hook watches a part"),
    ):
        assert words in reason(change), words
    with torch.nn.modules.module.register_module_forward_hook(print):
        assert reason() == "a hook watches all modules"
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: False)
    monkeypatch.setattr(fast_layers, "instructions", lambda: "AVX-512")
    assert reason() == "PyTorch's attention is the faster"


@pytest.mark.usefixtures("kernels")
def test_a_layer_in_one_call_refuses_what_it_would_misread():
    D, E, wide, KV = 128, 32, 256, 2
    shapes = [(4 * E, D), (KV * E, D), (KV * E, D), (D, 4 * E), (wide, D), (wide, D), (D, wide)]
    norm, angles = torch.ones(D).bfloat16(), torch.ones(1, 1, 1, E // 2).bfloat16()
    right: dict[str, object] = {
        "x": torch.randn(1, 1, D).bfloat16(),
        "linears": [(torch.randn(shape).bfloat16(), None, None) for shape in shapes],
        "norms": [norm, None, norm, None],
        "cos": angles,
        "sin": angles,
        "mask": torch.ones(1, 1, 1, 5, dtype=torch.bool),
        "keys": torch.randn(1, KV, 6, E).bfloat16(),
        "values": torch.randn(1, KV, 6, E).bfloat16(),
        "used": 5,
        "eps": 1e-6,
        "scale": 1.0,
        "cap": None,
    }
    assert linear_kernels.decoder_layer(**right).isfinite().all()
    in_8_bits, in_4_bits = round_rows(torch.randn(wide, D)), round_groups(torch.randn(wide, D))

    def up(*weights: torch.Tensor | None) -> list[tuple[torch.Tensor | None, ...]]:
        return [*right["linears"][:5], weights, right["linears"][6]]

    for wrong in (
        {"x": right["x"].float()},
        {"x": right["x"][..., :64]},
        {"linears": up(right["linears"][5][0].float(), None, None)},
        {"linears": up(right["linears"][5][0][:255], None, None)},
        {"linears": up(right["linears"][6][0].T, None, None)},
        {"linears": up(in_8_bits[0], None, None)},
        {"linears": up(in_8_bits[0], None, in_8_bits[1].double())},
        {"linears": up(in_8_bits[0], None, in_8_bits[1][:9])},
        {"linears": up(in_4_bits[0], in_4_bits[1], None)},
        {"linears": up(in_4_bits[0], in_4_bits[1][:, :1], in_4_bits[2])},
        {"norms": [norm, None, norm[:64], None]},
        {"norms": [norm, norm.float(), norm, None]},
        {"norms": [None, None, norm, None]},
        {"cos": angles.float()},
        {"cos": angles[..., :8]},
        {"mask": right["mask"].int()},
        {"mask": right["mask"][..., :4]},
        {"keys": right["keys"].float()},
        {"values": right["values"][:, :1]},
        {"keys": right["keys"][..., ::2], "values": right["values"][..., ::2]},
        {"used": 7, "mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)},
    ):
        with pytest.raises(ValueError, match="no kernel for x"):
            linear_kernels.decoder_layer(**{**right, **wrong})
    for name in ("x", "keys", "mask", "sin"):
        with pytest.raises(ValueError, match="on meta: they are for the CPU"):
            linear_kernels.decoder_layer(**{**right, name: elsewhere(right[name])})
