"""Ours against transformers, the release in `constraints.txt`: same random weights, same inputs, same numbers.

Every test runs for each of these shapes. They are tiny; each moves one thing that a wrong implementation gets wrong
only there.
"""

import copy

import pytest
import torch
from reference import make_inputs, make_pair, make_theirs, their_name
from transformers import DynamicCache

from paligemma.kv_cache import KVCache

SHAPES = {
    "gemma": ("gemma", {}),  # 4 query heads on 2 key heads, heads x head_dim = 64 in a model of width 32
    "gemma, one key head": ("gemma", {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3}),  # as published
    "gemma, a key head each": ("gemma", {"num_key_value_heads": 4, "head_dim": 8}),
    "gemma2": ("gemma2", {}),  # a window of 4, shorter than the prefix
    "gemma2, the 28b's query scale": (
        "gemma2",
        {"head_dim": 128, "num_attention_heads": 2, "query_pre_attn_scalar": 144},
    ),
    "gemma2, a window longer than the row": ("gemma2", {"sliding_window": 4096}),
    "gemma2, a window of 2": ("gemma2", {"sliding_window": 2, "num_hidden_layers": 3}),
    "gemma2, tight caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),  # fused attention
    "3 x 3 patches": ("gemma2", {"image_size": 42, "vision_hidden_size": 24, "vision_num_attention_heads": 3}),
    "<image> beyond the vocabulary": ("gemma", {"image_token_index": 320}),
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """(ours, theirs), as built by `reference.make_pair`."""
    kind, overrides = SHAPES[request.param]
    return make_pair(kind, **overrides)


@pytest.fixture(params=["fused", "explicit"])
def attention(request, pair):
    """Our two ways to attend, one after the other; soft-capped layers are explicit in both."""
    pair[0].set_explicit_attention(request.param == "explicit")
    yield request.param
    pair[0].set_explicit_attention(False)


def assert_equal_logits(ours, theirs, valid):
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------- one pass


@torch.no_grad()
def test_vision_and_projector(pair, attention):
    ours, theirs = pair
    pixels = make_inputs(ours.config, prefix=[1, 1])["pixel_values"]
    seen = theirs.get_image_features(pixels)
    torch.testing.assert_close(ours.vision_tower(pixels), seen.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_image(pixels), seen.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_ragged_batch(pair, attention, side):
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[7, 2, 4], suffix=[1, 4, 0], side=side)
    assert_equal_logits(ours(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"].bool())


@torch.no_grad()
def test_logits_with_two_images_per_prompt(pair):
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[2, 3], images=2)
    assert_equal_logits(ours(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"].bool())


@torch.no_grad()
def test_logits_without_an_image(pair):
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[2, 3], images=0)
    del inputs["pixel_values"]
    assert_equal_logits(ours(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"].bool())


@torch.no_grad()
def test_hidden_states(pair):
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[2, 4])
    mine = ours(**inputs, output_hidden_states=True).hidden_states
    reference = theirs(**inputs, output_hidden_states=True).hidden_states
    assert len(mine) == len(reference) == ours.config.text_config.num_hidden_layers + 1
    for here, there in zip(mine, reference):
        assert_equal_logits(here, there, inputs["attention_mask"].bool())


# ---------------------------------------------------------------------------------------------- token by token


@torch.no_grad()
def test_every_cached_step(pair, attention):
    """Prefill of a ragged batch, then 6 given tokens one at a time: far enough for a window of 4 to slide."""
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[6, 2])
    answer = torch.randint(3, 300, (2, 6))
    (B, S), mask = inputs["input_ids"].shape, inputs["attention_mask"]
    cache, their_cache = KVCache(ours.config.text_config, B, S + 6), DynamicCache(config=theirs.config)

    assert_equal_logits(
        ours(**inputs, cache=cache).logits,
        theirs(**inputs, past_key_values=their_cache, use_cache=True).logits,
        mask.bool(),
    )
    for step in range(answer.shape[1]):
        token = answer[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        here = ours(token, cache=cache).logits
        there = theirs(token, attention_mask=mask, token_type_ids=torch.ones_like(token), past_key_values=their_cache)
        assert_equal_logits(here, there.logits, torch.ones_like(token).bool())


# ---------------------------------------------------------------------------------------------- training


def test_loss_and_gradients(pair, attention):
    ours, theirs = pair
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[2, 4], labels=True)
    ours.zero_grad()
    theirs.zero_grad()
    here, there = ours(**inputs).loss, theirs(**inputs).loss
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)
    here.backward()
    there.backward()

    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    whole = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    for name, parameter in ours.named_parameters():
        theirs_here = reference[their_name(name)]
        allowed = 1e-4 * theirs_here.norm() + 1e-7 * whole
        assert (parameter.grad - theirs_here).norm() <= allowed, name


def test_loss_is_the_mean_over_all_tokens_of_the_batch(pair):
    """Not the mean of the rows' means: a row with a long answer weighs more."""
    ours, _ = pair
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[1, 4], labels=True)
    with torch.no_grad():
        out = ours(**inputs)
    logprobs = out.logits[:, :-1].float().log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    taken = [-logprobs[b, t, targets[b, t]] for b, t in (targets != -100).nonzero().tolist()]
    assert len(taken) == 5
    torch.testing.assert_close(out.loss, torch.stack(taken).mean())


# ---------------------------------------------------------------------------------------------- bfloat16


@torch.no_grad()
@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_bfloat16_is_no_further_from_float32_than_theirs(kind, seed, attention):
    """Three models with the same rounded weights: ours and theirs in bfloat16, theirs in float32.

    The distance is the root mean square over the logits of a batch.
    """
    ours, _ = make_pair(kind, seed=seed, num_hidden_layers=4)
    ours.bfloat16().set_explicit_attention(attention == "explicit")
    theirs, exact = make_theirs(ours), make_theirs(copy.deepcopy(ours).float())
    inputs = make_inputs(ours.config, prefix=[7, 2, 4], suffix=[1, 4, 0], seed=seed)
    rounded = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    valid = inputs["attention_mask"].bool()
    reference = exact(**inputs).logits[valid]
    here = (ours(**rounded).logits[valid].float() - reference).square().mean().sqrt()
    there = (theirs(**rounded).logits[valid].float() - reference).square().mean().sqrt()
    assert there > 1e-3  # it is bfloat16 that is measured
    assert here <= 1.5 * there
