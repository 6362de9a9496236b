"""`KVCache.rewind`: a prefix that is read once and continued in different ways."""

import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from torch.testing import assert_close

from paligemma.generation import decode_one_token, prefill
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import GemmaModel, PaliGemmaForConditionalGeneration


@torch.inference_mode()
def test_what_comes_after_a_prefix_can_be_forgotten():
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma2", sliding_window=4)).eval()
    randomize(model)
    inputs = make_inputs(model.config, [5, 2])
    _, cache = prefill(model, inputs, 4)
    used, lengths = cache.used, cache.lengths.tolist()
    tokens = torch.tensor([7, 8])
    first = decode_one_token(model, tokens, cache)
    decode_one_token(model, torch.tensor([9, 10]), cache)
    cache.rewind(2)
    assert (cache.used, cache.lengths.tolist()) == (used, lengths)
    assert_close(decode_one_token(model, tokens, cache), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"columns is {used + 2}, and the cache holds {used + 1}"):
        cache.rewind(used + 2)


@torch.inference_mode()
def test_a_row_that_paused_gives_back_only_what_it_was_fed():
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma2", sliding_window=4)).eval()
    randomize(model)
    _, cache = prefill(model, make_inputs(model.config, [5, 2]), 4)
    lengths, tokens = cache.lengths.tolist(), torch.tensor([7, 8])
    first = decode_one_token(model, tokens, cache)
    model(torch.tensor([[9], [0]]), cache=cache, attention_mask=torch.tensor([[1], [0]]))  # padding in row 1
    cache.rewind(2)
    assert cache.lengths.tolist() == lengths
    assert_close(decode_one_token(model, tokens, cache), first, rtol=0, atol=0)


@torch.no_grad()
def test_a_model_without_an_embedding_reads_vectors():
    config = tiny_config("gemma").text_config
    model = GemmaModel(config, embedding=False)
    assert not any("embed" in name for name in model.state_dict())
    x = torch.randn(1, 3, 32)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    cache = KVCache(config, 1, 3)
    cache.extend(torch.ones(1, 3, dtype=torch.bool))
    assert_close(model(x, torch.arange(3)[None], {None: mask}, cache), model(x, torch.arange(3)[None], {None: mask}))
