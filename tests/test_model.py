"""The model against itself: cached or not, alone or in a batch, in pieces or whole, the same numbers come out."""

import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma.attention_mask import prefix_lm_mask, windowed
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import (
    PaliGemmaForConditionalGeneration,
    attention_in_chunks,
    explicit_attention,
    fused_attention,
)

MODELS = {
    "gemma": ("gemma", {}),
    "gemma, one key head": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {}),  # a window of 4
    "gemma2, fused": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma2, a window of 1": ("gemma2", {"sliding_window": 1, "num_hidden_layers": 3}),
}


def build(kind, **overrides):
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **overrides)).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    kind, overrides = MODELS[request.param]
    return build(kind, **overrides)


# ---------------------------------------------------------------------------------------------- the same, another way


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pieces", [[1] * 8, [3, 5], [8], [2, 1, 4, 1]])
def test_cached_is_uncached(model, side, pieces):
    """Prompts of different length, then 8 tokens in pieces. Right padding leaves a gap in the cache, and may."""
    prompt = make_inputs(model.config, prefix=[6, 2], side=side)
    answer = torch.randint(3, 300, (2, 8))
    ones = torch.ones_like(answer)
    whole = {
        "input_ids": torch.cat([prompt["input_ids"], answer], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], ones], 1),
        "token_type_ids": torch.cat([prompt["token_type_ids"], ones], 1),
    }
    expected = model(**whole, pixel_values=prompt["pixel_values"]).logits
    cache = KVCache(model.config.text_config, batch=2, max_length=whole["input_ids"].shape[1])
    logits = [model(**prompt, cache=cache).logits]
    logits += [model(piece, cache=cache).logits for piece in answer.split(pieces, dim=1)]
    valid = whole["attention_mask"].bool()
    assert_close(torch.cat(logits, 1)[valid], expected[valid], atol=2e-5, rtol=0)
    assert cache.lengths.tolist() == valid.sum(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_is_single(model, side):
    batch = make_inputs(model.config, prefix=[7, 2, 4], suffix=[1, 4, 0], side=side)
    logits = model(**batch).logits
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = {name: batch[name][row : row + 1, real] for name in ("input_ids", "token_type_ids")}
        single = model(**alone, pixel_values=batch["pixel_values"][row : row + 1]).logits
        assert_close(logits[row, real], single[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen(model):
    """What beams do: go on with row 1 twice, row 0 is gone."""
    prompt = make_inputs(model.config, prefix=[6, 2])
    S, token = prompt["input_ids"].shape[1], torch.tensor([[8], [8]])
    caches = [KVCache(model.config.text_config, 2, S + 1) for _ in range(2)]
    for cache in caches:
        model(**prompt, cache=cache)
    caches[1].select(torch.tensor([1, 1]))
    expected = model(token, cache=caches[0]).logits[1]
    for chosen in model(token, cache=caches[1]).logits:
        assert_close(chosen, expected, atol=2e-5, rtol=0)
    assert caches[1].lengths.tolist() == [S - 3, S - 3]


def test_rows_of_a_cache_can_be_chosen_where_gradients_are_on():
    """And the gradients go through: those of the row that is kept are those of the row alone."""
    model, ids, token = build("gemma"), torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11]])
    gradients = []
    for rows, kept in ((ids, [1]), (ids[1:], [0])):
        x = model.embed(rows).detach().requires_grad_()
        cache = KVCache(model.config.text_config, len(rows), 4)
        model.read(inputs_embeds=x, cache=cache)
        cache.select(torch.tensor(kept))
        model.read(token, cache=cache).square().sum().backward()
        gradients.append(x.grad[-1])
    assert gradients[0].abs().max() > 1e-3
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("S", [1, 5])
def test_no_rows_give_no_logits(model, explicit, S):
    model.set_explicit_attention(explicit)
    try:
        assert model(torch.zeros(0, S, dtype=torch.int64)).logits.shape == (0, S, 320)
    finally:
        model.set_explicit_attention(False)


@torch.no_grad()
def test_a_row_may_pause(model):
    """A row that has no token in a step (attention_mask 0) stays what it was; its next one follows on."""
    prompt = make_inputs(model.config, prefix=[4, 4])
    S = prompt["input_ids"].shape[1]
    straight, paused = (KVCache(model.config.text_config, 2, S + 3) for _ in range(2))
    for cache in (straight, paused):
        model(**prompt, cache=cache)
    model(torch.tensor([[7], [8]]), cache=straight)
    expected = model(torch.tensor([[9], [10]]), cache=straight).logits

    model(torch.tensor([[7], [8]]), cache=paused)
    model(torch.tensor([[9], [0]]), cache=paused, attention_mask=torch.tensor([[1], [0]]))
    logits = model(torch.tensor([[11], [10]]), cache=paused).logits
    assert_close(logits[1], expected[1], atol=2e-5, rtol=0)
    assert paused.lengths.tolist() == [S + 3, S + 2]


@torch.no_grad()
def test_features_in_place_of_pixels(model):
    """The image is encoded once, then used as often as one likes."""
    inputs = make_inputs(model.config, prefix=[4, 2], suffix=[1, 2])
    features = model.encode_image(inputs["pixel_values"])
    assert features.shape == (2, 4, model.config.text_config.hidden_size)
    expected = model(**inputs).logits
    del inputs["pixel_values"]
    assert torch.equal(model(**inputs, image_features=features).logits, expected)


@torch.no_grad()
def test_images_are_not_scaled_and_text_is(model):
    inputs = make_inputs(model.config, prefix=[3])
    features = model.encode_image(inputs["pixel_values"])
    x = model.embed(inputs["input_ids"], features)
    table = model.language_model.model.embed_tokens.weight
    assert torch.equal(x[0, :4], features[0])
    assert_close(x[0, 4:], table[inputs["input_ids"][0, 4:]] * 32**0.5)


@torch.no_grad()
def test_positions_given_are_positions_used(model):
    inputs = make_inputs(model.config, prefix=[5], suffix=[3])
    S, expected = inputs["input_ids"].shape[1], model(**inputs).logits
    assert torch.equal(model(**inputs, position_ids=torch.arange(1, S + 1)[None]).logits, expected)
    assert_close(model(**inputs, position_ids=torch.arange(41, S + 41)[None]).logits, expected, atol=1e-4, rtol=0)
    stretched = model(**inputs, position_ids=torch.arange(0, 2 * S, 2)[None]).logits
    assert (stretched - expected).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- logits asked for


@torch.no_grad()
def test_only_the_last_logits(model):
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 2])
    whole = model(**inputs).logits
    rows: list[int] = []  # that go through the MLP of each layer
    for layer in model.language_model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for n in (1, 3, whole.shape[1]):
        rows.clear()
        kept = model(**inputs, logits_to_keep=n).logits
        assert rows[-1] == n and set(rows[:-1]) == {whole.shape[1]}  # nobody reads what others become in the last
        assert kept.shape == (2, n, 320)
        assert_close(kept, whole[:, -n:], atol=1e-5, rtol=0)


def test_loss_with_and_without_logits(model):
    """The head runs on the labelled positions alone; loss and gradients are those of the logits of all positions."""
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4], labels=True)
    labels = inputs["labels"]

    def of_all_logits():
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    def of_hidden_states():
        return model.loss(model.read(**{name: value for name, value in inputs.items() if name != "labels"}), labels)

    losses, gradients = [], []
    for loss_of in (of_all_logits, of_hidden_states, lambda: model(**inputs, logits_to_keep=1).loss):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for loss, gradient in zip(losses[1:], gradients[1:]):
        assert_close(loss, losses[0], atol=1e-6, rtol=1e-6)
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@torch.no_grad()
def test_reading_and_the_head_are_forward(model):
    """`forward` is `read`, then `logits`; of some ids the head gives the same numbers."""
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    whole = model(**inputs, output_hidden_states=True)
    hidden = model.read(**inputs)
    assert torch.equal(hidden, whole.hidden_states[-1])
    assert torch.equal(model.logits(hidden), whole.logits)
    ids = torch.tensor([3, 200, 7])
    assert_close(model.logits(hidden, ids), whole.logits[..., ids], atol=1e-6, rtol=1e-6)
    states = []
    assert_close(model.read(**inputs, num_outputs=3, hidden_states=states), hidden[:, -3:], atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, states[:-1], whole.hidden_states[:-1])) and states[-1].shape[1] == 3


@torch.no_grad()
def test_embeddings_in_place_of_ids_and_images(model):
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    x = model.embed(ids, model.encode_image(pixels))
    expected = model(ids, pixels, **inputs).logits
    assert torch.equal(model(inputs_embeds=x, **inputs).logits, expected)
    for neither_nor_both in ({}, {"input_ids": ids, "inputs_embeds": x}):
        with pytest.raises(ValueError, match="pass input_ids or inputs_embeds, one of them"):
            model(**neither_nor_both)


@torch.no_grad()
def test_a_mask_of_the_caller_s_own(model):
    """The prefix rule written as a mask gives the same logits; a causal one does not; windows still apply."""
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    valid, types = inputs["attention_mask"].bool(), inputs["token_type_ids"]
    S, real = types.shape[1], valid[..., None]
    mask = prefix_lm_mask(types, valid)
    expected = model(**inputs).logits
    slides = any(model.config.text_config.window(layer) for layer in range(2))
    own = model(**inputs, mask=mask).logits
    if slides:  # the prefix rule lets the prefix ignore the window; a mask of the caller's own knows no prefix
        assert (own - expected).abs().max() > 0.1
    else:
        assert_close(own * real, expected * real, atol=1e-5, rtol=1e-5)
    causal = mask & torch.ones(S, S, dtype=torch.bool).tril()
    assert (model(**inputs, mask=causal).logits - own).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"mask is torch.float32 .* expected torch.bool \[2, 1, "):
        model(**inputs, mask=mask.float())


def test_a_window_cuts_a_mask_of_the_caller_s_own():
    everything, place = torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.arange(4)[None]
    assert torch.equal(windowed(everything, place, place, None), everything)
    # A key may come later than the query: only what lies too far back is cut.
    assert windowed(everything, place, place, 2)[0, 0].int().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]


def test_a_query_that_is_left_without_a_key_sees_itself():
    """In row 1 the caller's mask allows nothing, in row 3 nothing that the window leaves. Two columns are cached."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    place = torch.arange(6)[None]
    assert windowed(mask[None, None], place[:, 2:], place, 3)[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_query_without_a_key_is_no_way_around_the_mask(kind):
    """Everyone may look at token 0 alone, tokens 1 and 3 at nothing. So no token's change reaches the others, except
    for token 0's: in Gemma 2 only where the window of 2 does not hide it. And all ways of computing it agree."""
    model = build(kind, num_hidden_layers=1, **({"sliding_window": 2} if kind == "gemma2" else {}))
    ids = torch.arange(10, 16)[None]
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 0] = True
    mask[:, :, [1, 3]] = False
    logits = model(ids, mask=mask).logits
    for column in range(6):
        moved = (model(ids.index_fill(1, torch.tensor(column), 20), mask=mask).logits != logits).any(-1)[0]
        reached = [0, 2, 4, 5] if column == 0 and kind == "gemma" else [column]
        assert moved.nonzero()[:, 0].tolist() == reached

    model.set_explicit_attention()
    assert_close(model(ids, mask=mask).logits, logits, atol=2e-5, rtol=0)
    cache = KVCache(model.config.text_config, batch=1, max_length=6)
    pieces = [model(ids[:, part], mask=mask[:, :, part, : part.stop], cache=cache) for part in (slice(4), slice(4, 6))]
    assert_close(torch.cat([piece.logits for piece in pieces], 1), logits, atol=2e-5, rtol=0)


def test_loss_is_float32_in_a_bfloat16_model():
    model = build("gemma").bfloat16()
    out = model(**make_inputs(model.config, prefix=[5], suffix=[3], labels=True))
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32


def test_the_head_is_the_embedding(model):
    assert not [name for name in model.state_dict() if "lm_head" in name]
    hidden = torch.randn(1, 32)
    logits = model.language_model.logits(hidden)
    raw = hidden @ model.language_model.model.embed_tokens.weight.T  # unscaled
    assert_close(logits, 30 * torch.tanh(raw / 30) if model.config.text_config.model_type == "gemma2" else raw)


# ---------------------------------------------------------------------------------------------- attention


def random_attention(B=2, H=4, K=2, S=7, T=9, E=8):
    """q, k, v, and the mask of S queries that are the last of T keys; the first two keys of row 1 are padding."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :2] = False
    types = torch.zeros(B, T, dtype=torch.int64)
    types[:, 5:] = 1
    mask = prefix_lm_mask(types, valid, window=5)[:, :, T - S :]
    q, k, v = (torch.randn(B, heads, length, E) for heads, length in ((H, S), (K, T), (K, T)))
    return q * 3, k, v, mask


def written_out(q, k, v, mask, scale, softcap):
    """Softmax attention, one number at a time, in float64."""
    (B, H, S, _), K = q.shape, k.shape[1]
    out = torch.empty(B, H, S, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // (H // K)].double(), v[b, h // (H // K)].double()
            for s in range(S):
                scores = keys @ q[b, h, s].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                seen = mask[b, 0, s]
                weights = scores[seen].exp() / scores[seen].exp().sum()
                out[b, h, s] = weights @ values[seen]
    return out.float()


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_explicit_attention(K, softcap):
    q, k, v, mask = random_attention(K=K)
    expected = written_out(q, k, v, mask, 0.4, softcap)
    assert_close(explicit_attention(q, k, v, mask, 0.4, softcap), expected)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("S", [1, 7])
def test_fused_attention(K, S):
    """One query takes a way of its own."""
    q, k, v, mask = random_attention(K=K, S=S)
    assert_close(fused_attention(q, k, v, mask, 0.4), written_out(q, k, v, mask, 0.4, None))


@pytest.mark.parametrize("max_scores", [1, 72, 150, 503, 504])  # all scores are 2 x 4 x 7 x 9 = 504, a row of them 72
def test_chunks_change_nothing(max_scores):
    q, k, v, mask = random_attention()
    q.requires_grad_()
    whole = explicit_attention(q, k, v, mask, 0.4, 5.0)
    chunked = attention_in_chunks(q, k, v, mask, 0.4, 5.0, max_scores=max_scores)
    assert_close(chunked, whole, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(attended.square().sum(), q)[0] for attended in (whole, chunked)]
    assert_close(*gradients, atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (16, 8), (32, 16)])
@pytest.mark.parametrize("batch, queries", [(1, 4352), (4, 4352), (8, 1)])
def test_scores_stay_small_at_896_pixels(heads, kv_heads, batch, queries):
    """4096 image tokens and 256 of text: whole, the scores would be 0.6 GB for the 3b, 2.4 GB for the 28b, per row.

    On the meta device shapes are worked out and nothing is computed.
    """
    length = 4352
    with torch.device("meta"):
        q = torch.empty(batch, heads, queries, 128, dtype=torch.bfloat16)
        k = torch.empty(batch, kv_heads, length, 128, dtype=torch.bfloat16)
        mask = torch.empty(batch, 1, queries, length, dtype=torch.bool)
    with Largest() as largest:
        attended = attention_in_chunks(q, k, k, mask, 1.0, 50.0)
    assert attended.shape == q.shape
    goes_in, chunk = max(q.nbytes, k.nbytes, mask.nbytes), 2**24 * 4  # bytes; scores are float32
    assert largest.bytes <= max(goes_in, chunk)


# ---------------------------------------------------------------------------------------------- bad input


def refused(message, model, inputs, **changes):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes})


def test_shapes_that_do_not_fit_together():
    model = build("gemma")
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4], labels=True)
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    for field in ("attention_mask", "token_type_ids", "labels"):
        refused(rf"{field} has shape \[2, 10\], input_ids \[2, 11\]", model, inputs, **{field: inputs[field][:, 1:]})
    refused(r"8 <image> tokens for 4 image features", model, inputs, pixel_values=pixels[:1])
    refused(r"8 <image> tokens for 0 image features: pass pixel_values", model, inputs, pixel_values=None)
    refused(r"0 <image> tokens for 8 image features", model, inputs, input_ids=ids.masked_fill(ids == 300, 5))
    refused(r"shape \[2, 3, 27, 28\], expected \[images, 3, 28, 28\]", model, inputs, pixel_values=pixels[:, :, 1:])
    refused(r"shape \[3, 28, 28\], expected", model, inputs, pixel_values=pixels[0])
    refused(r"not both", model, inputs, image_features=model.encode_image(pixels))
    refused(r"nothing to learn \(all -100\)", model, inputs, labels=torch.full_like(ids, -100))


@torch.no_grad()
def test_positions_are_of_every_row_or_of_one_for_all():
    model = build("gemma")
    inputs = make_inputs(model.config, prefix=[5, 5, 5])
    S = inputs["input_ids"].shape[1]
    for_all = torch.arange(1, S + 1)[None]
    assert torch.equal(model(**inputs, position_ids=for_all).logits, model(**inputs).logits)
    cache = KVCache(model.config.text_config, 3, S)
    message = rf"position_ids has shape \[2, {S}\], expected \[3, {S}\], or one row for all"
    refused(message, model, inputs, position_ids=for_all.expand(2, S), cache=cache)
    assert cache.used == 0


@torch.no_grad()
def test_a_shape_that_does_not_fit_is_compared_with_what_was_given():
    model = build("gemma")
    embeds = torch.zeros(1, 5, model.config.text_config.hidden_size)
    for field in ("attention_mask", "token_type_ids", "labels"):
        message = rf"{field} has shape \[1, 4\], inputs_embeds \[1, 5\]"
        refused(message, model, {"inputs_embeds": embeds}, **{field: torch.ones(1, 4, dtype=torch.int64)})


@torch.no_grad()
def test_a_cache_of_another_dtype_is_refused():
    model = build("gemma").bfloat16()
    inputs = make_inputs(model.config, prefix=[3])
    with pytest.raises(ValueError, match=r"the cache holds torch\.float32, the model computes in torch\.bfloat16"):
        model(**inputs, cache=KVCache(model.config.text_config, 1, 20))


@torch.no_grad()
def test_a_cache_used_wrongly():
    model = build("gemma")
    inputs = make_inputs(model.config, prefix=[5, 3])
    token = torch.tensor([[7], [8]])
    cache = KVCache(model.config.text_config, batch=2, max_length=inputs["input_ids"].shape[1])
    model(**inputs, cache=cache)
    with pytest.raises(ValueError, match="already holds a prefix"):
        model(token, token_type_ids=torch.zeros_like(token), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 9 tokens; 9 are used and 1 more do not fit"):
        model(token, cache=cache)


@torch.no_grad()
def test_what_does_not_fit_together_is_refused_before_the_cache_is_touched():
    model = build("gemma")
    inputs = make_inputs(model.config, prefix=[5, 3])

    def cache_of(rows):
        return KVCache(model.config.text_config, rows, 40)

    cache = cache_of(2)
    model(**inputs, cache=cache)
    token = torch.full((2, 1), 7)
    refused(r"the cache holds 2 rows, and 1 are to be read", model, {"input_ids": token[:1]}, cache=cache)
    refused(r"must come in one piece: no image can follow", model, inputs, cache=cache)
    refused(r"position_ids has shape \[1\], expected \[2, 1\]", model, {"input_ids": token}, position_ids=token[0])
    refused(r"logits_to_keep is -1, expected 0", model, inputs, logits_to_keep=-1)
    embeds = model.embed(inputs["input_ids"], model.encode_image(inputs["pixel_values"]))
    given = {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]}
    refused(r"inputs_embeds stand in place of input_ids and images", model, given)
    with pytest.raises(ValueError, match="num_outputs is 0, expected at least 1"):
        model.read(**inputs, num_outputs=0)
    # What follows a cached prefix is suffix, also with labels that begin later and without types.
    used, ids = cache.used, torch.tensor([[7, 8], [9, 7]])
    expected = model(ids, cache=cache).logits
    again = cache_of(2)
    model(**inputs, cache=again)
    assert torch.equal(model(ids, cache=again, labels=torch.tensor([[-100, 8], [-100, 7]])).logits, expected)
    assert cache.used == used + 2
