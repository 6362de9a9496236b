"""A cache of fixed shapes: the same logits as the growing one, and a decoding step that is one graph."""

import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma.generation import decode_one_token, prefill
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.static_kv_cache import StaticKVCache

FAMILIES = {
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 4},
}
BATCHES = {"one row": ([5], "left"), "padded on the left": ([5, 2, 7], "left"), "on the right": ([5, 2, 7], "right")}
STEPS = 50


@pytest.fixture(params=FAMILIES)
def model(request):
    model = PaliGemmaForConditionalGeneration(tiny_config(request.param, **FAMILIES[request.param])).eval()
    randomize(model)
    return model


def static_cache(model, inputs, steps=STEPS):
    """A cache with exactly the room that the rows need."""
    longest = int(inputs["attention_mask"].sum(-1).max())
    return StaticKVCache(model.config.text_config, len(inputs["input_ids"]), longest + steps)


def last_logits(model, inputs, cache):
    """Reads the prompt: the logits of every row's last token."""
    logits = model(**inputs, cache=cache).logits
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(-1).argmax(-1)
    return logits[torch.arange(len(logits)), last]


@pytest.mark.parametrize("batch", BATCHES)
@torch.inference_mode()
def test_logits_equal_those_of_the_growing_cache(model, batch):
    prefix, side = BATCHES[batch]
    inputs = make_inputs(model.config, prefix, side=side)
    static = static_cache(model, inputs)
    growing = KVCache(model.config.text_config, len(prefix), inputs["input_ids"].shape[1] + STEPS)
    logits = last_logits(model, inputs, static)
    assert_close(logits, last_logits(model, inputs, growing), rtol=0, atol=0)
    for _ in range(STEPS):
        tokens = logits.argmax(-1)
        logits = decode_one_token(model, tokens, static)
        assert_close(logits, decode_one_token(model, tokens, growing), rtol=0, atol=1e-5)
    assert static.lengths.tolist() == growing.lengths.tolist()


@torch.inference_mode()
def test_a_row_can_take_the_place_of_another_while_the_rest_goes_on(model):
    """Fixed slots: rows come and go, and no tensor changes its shape."""
    slots = StaticKVCache(model.config.text_config, 2, 30)
    tokens = torch.zeros(2, dtype=torch.int64)
    alone = []

    def admit(slot, words):
        row = make_inputs(model.config, [words], seed=words)
        logits, cache = prefill(model, row, 20)
        slots.put(slot, cache)
        tokens[slot] = logits.argmax(-1)[0]
        alone.append((slot, cache))

    def step():
        nonlocal tokens
        logits = decode_one_token(model, tokens, slots)
        for slot, cache in alone:
            assert_close(logits[slot], decode_one_token(model, tokens[slot : slot + 1], cache)[0], rtol=0, atol=1e-5)
        tokens = logits.argmax(-1)

    admit(0, 5)
    admit(1, 2)
    step()
    step()
    alone = [one for one in alone if one[0] != 1]
    admit(1, 7)
    step()
    step()
    assert slots.lengths.tolist() == [4 + 5 + 4, 4 + 7 + 2]  # four patches, words, steps


@torch.inference_mode()
def test_a_row_that_is_padding_writes_nothing_and_stays_finite(model):
    inputs = make_inputs(model.config, [5, 2])
    cache = static_cache(model, inputs)
    last_logits(model, inputs, cache)
    keys = cache.keys[0][1, :, 1:].clone()
    for _ in range(3):
        out = model(torch.full((2, 1), 7), attention_mask=torch.tensor([[1], [0]]), cache=cache)
        assert out.logits.isfinite().all()
    assert cache.lengths.tolist() == [4 + 5 + 3, 4 + 2]
    assert_close(cache.keys[0][1, :, 1:], keys, rtol=0, atol=0)


@torch.inference_mode()
def test_several_tokens_in_one_step(model):
    """As where a grammar forces the next tokens and they are read together."""
    inputs = make_inputs(model.config, [5, 2])
    together, one_by_one = static_cache(model, inputs), static_cache(model, inputs)
    last_logits(model, inputs, together)
    last_logits(model, inputs, one_by_one)
    tokens = torch.tensor([[7, 8, 9], [10, 11, 12]])
    for column in tokens.T:
        expected = decode_one_token(model, column, one_by_one)
    assert_close(model(tokens, cache=together, logits_to_keep=1).logits[:, -1], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_nothing_of_the_last_rows_is_left_after_a_reset(model):
    """Not even what is no number: behind a mask, 0 times NaN would be NaN."""
    inputs = make_inputs(model.config, [5, 2])
    cache, fresh = static_cache(model, inputs), static_cache(model, inputs)
    last_logits(model, inputs, cache)
    for stored in (*cache.keys, *cache.values):
        stored.fill_(torch.nan)
    cache.reset()
    tokens = last_logits(model, inputs, cache).argmax(-1)
    last_logits(model, inputs, fresh)
    assert_close(decode_one_token(model, tokens, cache), decode_one_token(model, tokens, fresh), rtol=0, atol=0)


@torch.inference_mode()
def test_what_does_not_fit_is_an_error(model):
    inputs = make_inputs(model.config, [5])
    cache = StaticKVCache(model.config.text_config, 1, 4 + 5 + 1)
    logits = last_logits(model, inputs, cache)
    decode_one_token(model, logits.argmax(-1), cache)
    with pytest.raises(RuntimeError, match="out of bounds"):
        decode_one_token(model, logits.argmax(-1), cache)
    with pytest.raises(ValueError, match="the cache holds 1 rows, and 2 are to be read"):
        decode_one_token(model, torch.tensor([7, 8]), cache)
    with pytest.raises(ValueError, match="a StaticKVCache keeps its rows and its length"):
        cache.select(torch.tensor([0]))
    full = prefill(model, make_inputs(model.config, [12]), 1)[1]
    with pytest.raises(ValueError, match="the cache holds 10 tokens a row, and the prompt has 16"):
        cache.put(0, full)


# ---------------------------------------------------------------------------------------------- one graph


class HostReads(TorchDispatchMode):
    """Counts how often the host waits for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            HostReads.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()  # inside inference_mode an `item` does not come by
def test_the_host_reads_nothing_inside_a_step(model):
    inputs = make_inputs(model.config, [5, 2, 7])
    cache = static_cache(model, inputs)
    tokens = last_logits(model, inputs, cache).argmax(-1)
    HostReads.count = 0
    with HostReads():
        for _ in range(3):
            tokens = decode_one_token(model, tokens, cache).argmax(-1)
    assert HostReads.count == 0
    with HostReads():
        tokens[0].item()  # the count counts
    assert HostReads.count == 1


@pytest.mark.parametrize("prefix", [[5], [5, 2, 7]], ids=["one row", "three rows"])
@torch.inference_mode()
def test_fifty_steps_are_one_graph(model, prefix):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend=backend)
    inputs = make_inputs(model.config, prefix)
    compiled, eager = static_cache(model, inputs), static_cache(model, inputs)
    logits = last_logits(model, inputs, compiled)
    last_logits(model, inputs, eager)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(STEPS):
            tokens = logits.argmax(-1)
            logits = step(model, tokens, compiled)
            assert_close(logits, decode_one_token(model, tokens, eager), rtol=0, atol=1e-5)
    assert len(graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]


@torch.inference_mode()
def test_a_growing_cache_would_be_compiled_again(model):
    """What the counts above are worth: the same step over `KVCache` is another graph for every length."""
    torch._dynamo.reset()
    step = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend="eager")
    inputs = make_inputs(model.config, [5])
    logits, cache = prefill(model, inputs, STEPS)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        for _ in range(3):
            logits = step(model, logits.argmax(-1), cache)
