"""Answers whose decoding steps are one compiled graph: `generate(..., compile=True)`, and the step for `slots.py`.

    prompt --model, eager--> logits, StaticKVCache
    token  --one graph-----> logits of the next token       compiled once, then replayed
    ...

A token takes 966 operations in PaliGemma 1 3b and 2,089 in PaliGemma 2 3b. On a large GPU, launching them one by one
takes several times as long as reading the weights, which is all that decoding has to do. So the step is compiled, as a
CUDA graph where there is CUDA. (After gpt-fast, github.com/pytorch-labs/gpt-fast.) On a CPU there is little to win:
compiling takes a minute, and the kernels of quantised models are faster.

What that asks for: no tensor changes its shape, so rows that have ended are computed on with the others, and their
output is not used. And the host reads from the device once in a step: token and log-probability together. A grammar
costs a copy to the device for each step, which tells what may come next; `watch` costs reads of its own.

Letters: B rows, S prompt length, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paligemma.answers.constraints import allowed_next, contains, masked_logits, one_per_row
from paligemma.generation import (
    Generated,
    Options,
    Rules,
    check_prompts,
    choose,
    decode_one_token,
    prepare,
    seeds_of,
    watched_distributions,
    why_no_token,
)
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.static_kv_cache import StaticKVCache

COLUMNS = 256  # caches are a multiple of this long, so that few lengths are compiled
MOST_GRAPHS = 64  # of different numbers of rows, lengths and models, in one process

_caches: WeakKeyDictionary[Any, StaticKVCache] = WeakKeyDictionary()  # the last one of each model


def generate_compiled(
    model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], options: Options
) -> list[Generated]:
    """As `generate`, with the same answers. Raises what it raises, and ValueError where kernels are in the model."""
    check_can_be_compiled(model)
    prompt = prepare(model, inputs)
    rows, S = prompt["input_ids"].shape
    rules, constraints = Rules(model, options), one_per_row(options.constraint, rows)
    if not rows:
        return []
    check_prompts(model.config, prompt, options.max_new_tokens, rules.eos)
    generators = []
    if options.do_sample:
        generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds_of(options, rows)]
    answers = [Generated() for _ in range(rows)]
    running = set(range(rows))
    cache = _cache_for(model, rows, S + options.max_new_tokens)
    logits = model(**prompt, cache=cache, logits_to_keep=1).logits[:, -1]  # [B, V]
    with room_for_graphs():
        for remaining in range(options.max_new_tokens, 0, -1):
            # Who has ended is asked about as if there were no grammar; their tokens are not used.
            asked = [constraint if n in running else None for n, constraint in enumerate(constraints)]
            ids = [answer.token_ids for answer in answers]
            allowed, fitting = allowed_next(asked, ids, remaining, len(rules.never), rules.eos)
            scores = masked_logits(logits, rules.never, allowed)
            totals = scores.logsumexp(-1)
            # Sampling from NaN or from nothing is an error, on CUDA one that ends the process's use of the device.
            # Such a row gets a token all the same; its log-probability is no finite number, which is seen below.
            sound = scores.masked_fill(~totals.isfinite()[:, None], 0.0) if options.do_sample else scores
            tokens = choose(sound, options, generators)
            logprobs = scores.gather(-1, tokens[:, None])[:, 0] - totals
            watched = watched_distributions(scores, options.watch)
            # The one time that the host waits. (float32 holds ids below 2**24; not every device has float64.)
            read = torch.stack([tokens.float(), logprobs]).tolist()
            for n, (token, logprob) in enumerate(zip(map(int, read[0]), read[1])):
                if n not in running:
                    continue
                if not math.isfinite(logprob):
                    raise why_no_token(scores[n], allowed[n] is not None, ids[n], remaining, model.dtype)
                if n in fitting and not contains(fitting[n], token):
                    running.discard(n)  # what it chose does not fit into the budget
                    continue
                rules.record(answers[n], token, logprob, watched[n])
                if answers[n].finished:
                    running.discard(n)
            if not running or remaining == 1:
                break
            logits = decode_compiled(model, tokens, cache)
    _caches[model] = cache
    return answers


def decode_compiled(model: PaliGemmaForConditionalGeneration, tokens: Tensor, cache: StaticKVCache) -> Tensor:
    """`decode_one_token` by its graph. It may overwrite the logits that it returned before."""
    if model.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    return compiled_step(model.device.type)(model, tokens, cache)


def room_for_graphs() -> AbstractContextManager[object]:
    """Around steps that may have to be compiled: PyTorch's own limit is 8 shapes."""
    return torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)


@functools.cache
def compiled_step(device_type: str) -> Callable[[Any, Tensor, StaticKVCache], Tensor]:
    """`decode_one_token` as one graph; on CUDA it is recorded, and replayed with one launch."""
    mode = "reduce-overhead" if device_type == "cuda" else None
    return torch.compile(decode_one_token, fullgraph=True, dynamic=False, mode=mode)


def check_can_be_compiled(model: torch.nn.Module) -> None:
    """ValueError for what a compiler can't look into: kernels of our own, and a model that another program runs."""
    if not isinstance(model, PaliGemmaForConditionalGeneration):
        raise ValueError(
            f"compile=True is for PaliGemmaForConditionalGeneration, this model is {type(model).__name__}: leave it out"
        )
    for module in model.modules():
        if type(module).__module__.startswith("paligemma.fast."):
            raise ValueError(
                f"compile=True is for the model as it is, and this one has layers that cannot be compiled "
                f"({type(module).__name__}): load it without `quantize` (on a CPU the published sizes get such "
                "layers in bfloat16 without it: choose dtype float32), or leave `compile` out"
            )


def _cache_for(model: PaliGemmaForConditionalGeneration, rows: int, length: int) -> StaticKVCache:
    """An empty cache; that of the last call where it fits, since a CUDA graph is bound to its addresses.

    While it is in use no other call can have it.
    """
    cache = _caches.pop(model, None)
    wanted = (rows, columns_for(length)), model.dtype, model.device
    if cache is not None and (cache.keys[0].shape[::2], cache.keys[0].dtype, cache.keys[0].device) == wanted:
        cache.reset()
        return cache
    return empty_cache(model, rows, length)


def empty_cache(model: PaliGemmaForConditionalGeneration, rows: int, length: int) -> StaticKVCache:
    """A cache for rows of `length` tokens, or a few more, whose tensors a graph may write into."""
    cache = StaticKVCache(model.config.text_config, rows, columns_for(length) - 1, model.dtype, model.device)
    for tensor in (*cache.keys, *cache.values, cache.lengths, cache.columns, cache.active):
        torch._dynamo.mark_static_address(tensor, guard=False)  # guard: another cache is no reason to compile anew
    return cache


def columns_for(length: int) -> int:
    """Columns of a cache for rows of this many tokens."""
    return -(-(length + 1) // COLUMNS) * COLUMNS
