"""Generation: equal to transformers, to itself without a cache, to itself in a batch, to itself as a stream; and the
two masks on the logits, the random numbers, and every error.

Models are tiny with random weights, vocabulary 320, <image> = 300, so ids 300 to 319 are the ones never produced.
"""

import copy
import functools
import inspect
import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import transformers
from make_tokenizer import build_tokenizer
from reference import make_inputs, make_theirs, means_and_spreads, randomize, tiny_config
from torch.testing import assert_close

from paligemma.answers.constraints import NO_END, allowed_next, masked_logits, never_produced
from paligemma.engine import generate, stream
from paligemma.generation import (
    Generated,
    Options,
    choose,
    decode_one_token,
    generate_greedily,
    prefill,
    prepare,
    warp,
)
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tokenizer import load_tokenizer, start_of_last_character

UNTRAINED = list(range(300, 320))
NO_EOS = 301  # an id that is never produced: answers then always use their whole budget

SHAPES = {
    "multi-query": ("gemma", {"num_key_value_heads": 1}),
    "grouped-query": ("gemma", {"num_key_value_heads": 2}),
    "heads of 128": ("gemma", {"head_dim": 128, "num_attention_heads": 2}),
    "gemma2, window below prefix": ("gemma2", {"sliding_window": 4}),
    "gemma2, other scale": ("gemma2", {"head_dim": 128, "query_pre_attn_scalar": 40, "num_hidden_layers": 3}),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
both_families = pytest.mark.parametrize("shape", ["grouped-query", "gemma2, window below prefix"])


@functools.cache
def make_ours(shape="grouped-query", seed=0, sharpness=3, **overrides):
    """A random model whose answers vary. (With a tied head, large embeddings make a model repeat its last token.)"""
    kind, settings = SHAPES[shape]
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **{**settings, **overrides})).eval()
    randomize(model, seed)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight *= 0.2
        model.language_model.model.norm.weight += sharpness
    return model


def test_the_loop_of_ten_lines_is_what_generate_does():
    for shape in SHAPES:
        model = copy.deepcopy(make_ours(shape))
        with torch.no_grad():
            model.language_model.model.embed_tokens.weight[300:] = (
                0  # untrained ids: their logits are never the largest
            )
        for row in rows_of(ragged(model)):
            model.config = replace(model.config, eos_token_id=generate(model, row, 9)[0].token_ids[5])
            (answer,) = generate(model, row, 9)
            assert answer.finished and generate_greedily(model, row, 9) == answer.token_ids
            assert generate_greedily(model, row, 2) == answer.token_ids[:2]


def test_the_parameters_of_generate_are_the_fields_of_options():
    parameters = inspect.signature(generate).parameters
    assert [*parameters][:3] == ["model", "inputs", "max_new_tokens"]
    assert {name: p.default for name, p in [*parameters.items()][2:]} == {f.name: f.default for f in fields(Options)}


@functools.cache
def theirs_of(shape):
    return make_theirs(make_ours(shape))


def ragged(model, side="left", **settings):
    return make_inputs(model.config, prefix=[5, 3, 7, 4], side=side, **settings)


def rows_of(inputs):
    """Each row alone, without its padding."""
    for row in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "token_type_ids")}
        yield {**alone, "pixel_values": inputs["pixel_values"][row : row + 1]}


def an_eos(model, inputs, **options):
    """A token that ends some rows of the batch early, and others not."""
    free = [a.token_ids for a in generate(model, inputs, max_new_tokens=10, eos_token_id=NO_EOS, **options)]
    for token in free[0][2:] + free[1][2:]:
        if not all(token in ids for ids in free):
            return token
    raise AssertionError("every row produces the same tokens: a poor model for this test")


def their_answers(theirs, inputs, eos, **options):
    out = theirs.generate(
        **inputs, suppress_tokens=UNTRAINED, eos_token_id=eos, pad_token_id=319, do_sample=False, **options
    )
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(eos)] if eos in ids else [i for i in ids if i != 319] for ids in answers]


# -- equal to transformers --


@every_shape
@pytest.mark.parametrize("images", [1, 2])
def test_greedy_equals_transformers(shape, images):
    ours, theirs = make_ours(shape), theirs_of(shape)
    inputs = ragged(ours, images=images)
    eos = an_eos(ours, inputs)

    answers = generate(ours, inputs, max_new_tokens=10, eos_token_id=eos)

    assert [a.token_ids for a in answers] == their_answers(theirs, inputs, eos, max_new_tokens=10)
    assert {a.finished for a in answers} == {True, False}  # both ways to end were seen
    assert all(a.finished or len(a.token_ids) == 10 for a in answers)


@every_shape
def test_logits_of_every_step_equal_transformers(shape):
    ours, theirs = make_ours(shape), theirs_of(shape)
    inputs = ragged(ours)
    S, steps = inputs["input_ids"].shape[1], 8
    expected = theirs.generate(
        **inputs,
        max_new_tokens=steps,
        eos_token_id=NO_EOS,
        suppress_tokens=UNTRAINED,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.inference_mode():
        logits, cache = prefill(ours, prepare(ours, inputs), steps)
        for step in range(steps):
            assert_close(logits, expected.logits[step], atol=1e-4, rtol=0)
            if step < steps - 1:
                logits = decode_one_token(ours, expected.sequences[:, S + step], cache)


@both_families
@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
def test_beams_equal_transformers(shape, num_beams, length_penalty):
    ours, theirs = make_ours(shape), theirs_of(shape)
    inputs = ragged(ours)
    settings = {"num_beams": num_beams, "length_penalty": length_penalty}
    eos = an_eos(ours, inputs, **settings)
    for budget in (1, 4, 10):
        answers = generate(ours, inputs, max_new_tokens=budget, eos_token_id=eos, **settings)
        expected = their_answers(theirs, inputs, eos, max_new_tokens=budget, early_stopping=False, **settings)
        assert [a.token_ids for a in answers] == expected


def test_when_beams_stop_equals_transformers():
    """A small vocabulary reaches eos often, and a confident model shows when a row stops: an unlikely beginning that
    goes on with certainty would win in the end, if it were still followed."""
    ended = 0
    for seed in (1, 10):
        ours = make_ours(seed=seed, sharpness=15, vocab_size=40, image_token_index=30)
        theirs = make_theirs(ours)
        inputs = ragged(ours, seed=seed)
        for eos, num_beams, length_penalty in itertools.product((5, 26), (2, 3), (1.0, 2.0)):
            settings = {"num_beams": num_beams, "length_penalty": length_penalty, "max_new_tokens": 12}
            answers = generate(ours, inputs, eos_token_id=eos, **settings)
            out = theirs.generate(
                **inputs, suppress_tokens=list(range(30, 40)), eos_token_id=eos, pad_token_id=39, **settings
            )
            for answer, ids in zip(answers, out[:, inputs["input_ids"].shape[1] :].tolist()):
                assert answer.token_ids + [eos] * answer.finished == [i for i in ids if i != 39]
                ended += answer.finished
    assert ended >= 10


@pytest.mark.parametrize("num_beams", [1, 3])
def test_constraint_equals_transformers(num_beams):
    """The reference's hook of this kind is `prefix_allowed_tokens_fn`."""
    shape = "gemma2, window below prefix"
    ours, theirs = make_ours(shape), theirs_of(shape)
    inputs = ragged(ours)
    S = inputs["input_ids"].shape[1]

    def every_third(generated, remaining):  # eos = 2 comes up at each third token
        return torch.arange((len(generated) + 1) % 3, 300, 3)

    answers = generate(ours, inputs, max_new_tokens=9, num_beams=num_beams, constraint=every_third, eos_token_id=2)
    expected = their_answers(
        theirs,
        inputs,
        2,
        max_new_tokens=9,
        num_beams=num_beams,
        prefix_allowed_tokens_fn=lambda batch, ids: every_third(ids[S:].tolist(), 0).tolist(),
    )
    assert [a.token_ids for a in answers] == expected
    assert all(id % 3 == (n + 1) % 3 for a in answers for n, id in enumerate(a.token_ids))


# -- equal to itself --


@both_families
def test_cached_equals_uncached(shape):
    """Whatever the tokens are: here random ones, beside a whole pass over everything so far for each step."""
    kind, settings = SHAPES[shape]
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **settings)).eval()
    randomize(model)
    steps = 10
    for row in rows_of(ragged(model)):
        ids, types = row["input_ids"], row["token_type_ids"]
        with torch.inference_mode():
            logits, cache = prefill(model, prepare(model, row), steps)
            for token in torch.randint(3, 300, (steps - 1, 1)):
                whole = model(ids, pixel_values=row["pixel_values"], token_type_ids=types).logits[:, -1]
                assert_close(logits, whole, atol=1e-5, rtol=0)
                ids = torch.cat([ids, token[None]], 1)
                types = torch.cat([types, torch.ones(1, 1).long()], 1)
                logits = decode_one_token(model, token, cache)
            whole = model(ids, pixel_values=row["pixel_values"], token_type_ids=types).logits[:, -1]
            assert_close(logits, whole, atol=1e-5, rtol=0)


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}], ids=["greedy", "beams", "sampled"]
)
def test_batched_equals_single(shape, side, options):
    model = make_ours(shape)
    inputs = ragged(model, side)
    eos = an_eos(model, inputs, **options)
    settings = {"max_new_tokens": 10, "eos_token_id": eos, "watch": (0, 200), **options}

    together = generate(model, inputs, **settings)
    alone = [generate(model, row, **settings)[0] for row in rows_of(inputs)]

    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.finished for a in together] == [a.finished for a in alone]
    for a, b in zip(together, alone):
        assert_close(a.token_logprobs, b.token_logprobs, atol=1e-5, rtol=0)
        assert_close(means_and_spreads(a), means_and_spreads(b), atol=1e-2, rtol=0, equal_nan=True)


def test_padding_in_the_middle_and_in_every_row_changes_nothing():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    ids, types, real = row["input_ids"], row["token_type_ids"], row["attention_mask"]
    gap = torch.zeros(1, 3).long()
    padded = {
        "input_ids": torch.cat([gap, ids[:, :4], gap, ids[:, 4:], gap], 1),
        "attention_mask": torch.cat([gap, real[:, :4], gap, real[:, 4:], gap], 1),
        "token_type_ids": torch.cat([gap, types[:, :4], gap, types[:, 4:], gap], 1),
        "pixel_values": row["pixel_values"],
    }
    assert generate(model, padded, 6)[0].token_ids == generate(model, row, 6)[0].token_ids
    assert prepare(model, padded)["input_ids"].tolist() == ids.tolist()


def test_a_suffix_is_continued():
    """Tokens of type 1 are the beginning of the answer: the rest is what would have followed it anyway."""
    model = make_ours()
    row = next(rows_of(ragged(model)))
    whole = generate(model, row, max_new_tokens=8, eos_token_id=NO_EOS)[0]
    start = torch.tensor([whole.token_ids[:3]])
    begun = {
        "input_ids": torch.cat([row["input_ids"], start], 1),
        "attention_mask": torch.cat([row["attention_mask"], torch.ones_like(start)], 1),
        "token_type_ids": torch.cat([row["token_type_ids"], torch.ones_like(start)], 1),
        "pixel_values": row["pixel_values"],
    }
    assert generate(model, begun, max_new_tokens=5, eos_token_id=NO_EOS)[0].token_ids == whole.token_ids[3:]


def test_masks_and_types_have_defaults_and_other_keys_are_ignored():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    bare = {"input_ids": row["input_ids"], "pixel_values": row["pixel_values"], "labels": "not looked at"}
    assert generate(model, bare, 5) == generate(model, row, 5)


# -- work that is not done --


def count_calls(monkeypatch, model, name):
    calls = []
    original = getattr(model, name)
    monkeypatch.setattr(model, name, lambda x, *more: (calls.append(tuple(x.shape)), original(x, *more))[1])
    return calls


def test_an_image_is_encoded_once_for_many_prompts(monkeypatch):
    model = make_ours()
    inputs = ragged(model)
    one_image = inputs["pixel_values"][:1]
    separate = [generate(model, {**row, "pixel_values": one_image}, 6)[0] for row in rows_of(inputs)]
    with torch.inference_mode():
        features = model.encode_image(one_image)

    encoded = count_calls(monkeypatch, model, "encode_image")
    shared = generate(model, {**inputs, "pixel_values": None, "image_features": features.expand(4, -1, -1)}, 6)
    assert encoded == []
    assert [a.token_ids for a in shared] == [a.token_ids for a in separate]

    generate(model, {**inputs, "pixel_values": one_image.expand(4, -1, -1, -1)}, 6, num_beams=3)
    assert encoded == [(4, 3, 28, 28)]  # once, not per token or beam


def test_the_head_reads_one_position_and_ended_rows_leave(monkeypatch):
    model = make_ours()
    inputs = ragged(model, "right")
    eos = an_eos(model, inputs)
    heads = count_calls(monkeypatch, model.language_model, "logits")

    answers = generate(model, inputs, max_new_tokens=10, eos_token_id=eos)

    steps = [len(a.token_ids) + a.finished for a in answers]  # in how many passes a row took part
    running = [sum(taken > step for taken in steps) for step in range(10)]
    assert heads == [(n, 1, 32) for n in running if n]
    assert running[0] == 4 and running[-1] < 4


def test_the_last_token_needs_no_pass(monkeypatch):
    model = make_ours()
    heads = count_calls(monkeypatch, model.language_model, "logits")
    generate(model, ragged(model), max_new_tokens=1)
    assert len(heads) == 1


# -- doing less --


def plain_steps(monkeypatch):
    """Generation without its two short cuts: every token has a pass of its own, and the whole head is read."""
    monkeypatch.setattr("paligemma.engine.forced_ids", lambda allowed: None)
    monkeypatch.setattr("paligemma.engine.few_ids", lambda allowed, vocab_size: None)


def same_answers(answers, expected):
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert [a.finished for a in answers] == [a.finished for a in expected]
    for answer, other in zip(answers, expected):
        found = torch.tensor([*answer.token_logprobs, answer.eos_logprob or 0.0])
        torch.testing.assert_close(found, torch.tensor([*other.token_logprobs, other.eos_logprob or 0.0]))
        assert_close(means_and_spreads(answer), means_and_spreads(other), equal_nan=True)


def few_and_forced(generated, remaining):
    """Of 320 ids: a choice of 12, one of 2, two that are forced, and so on; after nine eos, which is forced too."""
    place = len(generated) % 4
    if len(generated) == 9:
        return torch.tensor([1])
    if place < 2:
        return torch.arange(40, 52) if place == 0 else torch.tensor([7, 200])
    return torch.tensor([100 + place])


@both_families  # in Gemma 2 the logits of few ids are capped, too
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "temperature": 2.0}])
def test_few_ids_and_forced_tokens_change_no_answer(monkeypatch, shape, sampling):
    model = make_ours(shape)
    options = {"constraint": few_and_forced, "watch": (40, 12), **sampling}
    answers = generate(model, ragged(model), 11, **options)
    assert all(len(a.token_ids) == 9 and a.finished for a in answers)
    plain_steps(monkeypatch)
    same_answers(answers, generate(model, ragged(model), 11, **options))


def test_rows_that_differ_in_what_they_allow_change_no_answer(monkeypatch):
    """One row free, one with few ids, one at another place of the pattern: nothing can be left out for all of them."""
    model = make_ours()
    shifted = lambda generated, remaining: few_and_forced([0, *generated], remaining)  # noqa: E731
    for constraints in ([few_and_forced, shifted, shifted, few_and_forced], [few_and_forced, None, shifted, None]):
        answers = generate(model, ragged(model), 9, constraint=constraints)
        with monkeypatch.context() as patch:
            plain_steps(patch)
            same_answers(answers, generate(model, ragged(model), 9, constraint=constraints))


def test_forced_tokens_have_no_pass_of_their_own_and_few_ids_few_rows_of_the_head(monkeypatch):
    model = make_ours()
    inputs = next(rows_of(ragged(model)))
    passes, heads = [], []
    run, logits = model.language_model.model.forward, model.language_model.logits

    def count_pass(x, *more):
        passes.append(x.shape[1])
        return run(x, *more)

    def count_head(x, ids=None):
        heads.append(None if ids is None else ids.tolist())
        return logits(x, ids)

    monkeypatch.setattr(model.language_model.model, "forward", count_pass)
    monkeypatch.setattr(model.language_model, "logits", count_head)
    (answer,) = generate(model, inputs, 10, constraint=few_and_forced)
    assert len(answer.token_ids) == 9 and answer.finished
    # The prompt; then the second token; the fifth, with two forced ones and what led to them in one pass of three; ...
    assert passes[1:] == [1, 3, 1, 3]
    assert heads == [None, [7, 200], [*range(40, 52)], [7, 200], [*range(40, 52)]]


# -- which tokens may come --


def test_untrained_ids_are_never_produced():
    """Whatever the logits say: here the image token and the rows beyond the tokenizer are the likeliest by far."""
    eager = make_ours(seed=7)  # a model of its own, changed here
    with torch.no_grad():
        eager.language_model.model.embed_tokens.weight[300:] *= 40
    inputs = ragged(eager)
    assert int(eager(**inputs, logits_to_keep=1).logits[0, -1].argmax()) >= 300  # the temptation is real
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "seed": 1}):
        ids = [i for a in generate(eager, inputs, max_new_tokens=8, **options) for i in a.token_ids]
        assert ids and max(ids) < 300
    # `num_tokens` moves the border and keeps <image> out.
    ids = [i for a in generate(eager, inputs, max_new_tokens=8, num_tokens=310) for i in a.token_ids]
    assert max(ids) > 300 and max(ids) < 310 and 300 not in ids


def test_never_produced_of_the_official_vocabulary():
    config = tiny_config("gemma", vocab_size=257216, image_token_index=257152)
    assert never_produced(config, None, None).nonzero()[:, 0].tolist() == list(range(257152, 257216))
    assert torch.equal(never_produced(config, 257153, None), never_produced(config, None, None))
    without_image_row = tiny_config("gemma", vocab_size=257152, image_token_index=257152)
    assert not never_produced(without_image_row, 257153, None).any()
    image_in_the_middle = tiny_config("gemma", image_token_index=17)
    assert never_produced(image_in_the_middle, 318, [5]).nonzero()[:, 0].tolist() == [5, 17, 318, 319]


def test_suppressed_tokens_are_not_produced_and_not_counted():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    first = generate(model, row, 1, eos_token_id=NO_EOS)[0]
    other = generate(model, row, 1, eos_token_id=NO_EOS, suppress_tokens=first.token_ids)[0]
    logits = model(**row, logits_to_keep=1).logits[0, -1, :300]
    second_best = logits.topk(2)
    assert other.token_ids == [int(second_best.indices[1])]
    without_first = logits.index_fill(0, torch.tensor(first.token_ids), -math.inf)
    assert other.token_logprobs[0] == pytest.approx(without_first.log_softmax(-1).max().item(), abs=1e-5)


def test_logprobs_are_among_the_allowed_tokens_before_temperature():
    """Checked against whole passes without a cache, for each way of choosing."""
    model = make_ours()
    row = next(rows_of(ragged(model)))
    P = row["input_ids"].shape[1]
    evens = torch.arange(0, 300, 2)
    ways = ({}, {"do_sample": True, "temperature": 3.0, "top_k": 50, "seed": 3}, {"num_beams": 3})
    for options, constraint in itertools.product(ways, (None, lambda generated, remaining: evens)):
        answer = generate(model, row, 6, eos_token_id=4, suppress_tokens=[4], constraint=constraint, **options)[0]
        tokens = torch.tensor([answer.token_ids])
        assert tokens.shape[1] == 6
        logits = model(
            torch.cat([row["input_ids"], tokens], 1),
            pixel_values=row["pixel_values"],
            token_type_ids=torch.cat([row["token_type_ids"], torch.ones_like(tokens)], 1),
        ).logits[0, P - 1 : -1]
        logits[:, [4, *UNTRAINED]] = -math.inf
        if constraint:
            logits[:, 1::2] = -math.inf
        expected = logits.log_softmax(-1).gather(1, tokens.T)[:, 0]
        assert_close(torch.tensor(answer.token_logprobs), expected, atol=1e-5, rtol=0)


def test_eos_has_a_logprob_and_is_no_token():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    first = generate(model, row, 1, eos_token_id=NO_EOS)[0]
    silent = generate(model, row, 1, eos_token_id=first.token_ids[0])[0]
    assert silent == Generated([], [], finished=True, eos_logprob=first.token_logprobs[0])
    assert first.eos_logprob is None and not first.finished


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_a_constraint_is_told(num_beams):
    """What the row has generated, and what is left of the budget; where it may end, also a budget without end. Where
    one token is allowed, it is certain."""
    model = make_ours()
    inputs = ragged(model)
    calls = []

    def spell(generated, remaining):
        calls.append((tuple(generated), remaining))
        return torch.tensor([[10], [20], [30], [1]][len(generated)])

    answers = generate(model, inputs, max_new_tokens=6, constraint=spell, num_beams=num_beams)
    sure = Generated([10, 20, 30], [0.0, 0.0, 0.0], True, 0.0, [])
    assert answers == [sure] * 4
    told = [((10, 20, 30)[:n], 6 - n) for n in range(4) for _ in range(4)]
    assert sorted(calls) == sorted(told + [((10, 20, 30), NO_END)] * 4)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_constraint_per_row(num_beams):
    model = make_ours()
    inputs = ragged(model)
    free = generate(model, inputs, 5, num_beams=num_beams)
    mixed = generate(model, inputs, 5, num_beams=num_beams, constraint=[None, lambda g, r: torch.tensor([1, 9])] * 2)
    assert [mixed[0], mixed[2]] == [free[0], free[2]]
    assert {i for a in (mixed[1], mixed[3]) for i in a.token_ids} <= {9}
    undecided = generate(model, inputs, 5, num_beams=num_beams, constraint=lambda g, r: None)
    assert undecided == free


def in_pairs(generated, remaining):
    """Tokens in twos, the second one is 7, and eos may follow each two."""
    if len(generated) % 2:
        return torch.tensor([7])
    return torch.tensor([1, *range(20, 40)]) if remaining >= 3 else torch.tensor([1])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_constraint_can_close_within_the_budget(num_beams):
    """Where there is no room for two more the answer ends. It is finished only if the model would have ended it."""
    model = make_ours()
    whole = generate(model, ragged(model), 9, constraint=in_pairs, num_beams=num_beams)
    for budget in (6, 7):
        answers = generate(model, ragged(model), budget, constraint=in_pairs, num_beams=num_beams)
        assert [len(a.token_ids) for a in answers] == [6 if budget == 7 else 4] * 4
        assert not any(a.finished or a.eos_logprob is not None for a in answers)
        assert [a.token_ids for a in answers] == [w.token_ids[: len(a.token_ids)] for w, a in zip(whole, answers)]


def test_an_end_that_the_model_wants_is_finished_though_nothing_else_would_fit():
    """Its probability is among all that could have followed."""
    model = make_ours()
    row = next(rows_of(ragged(model)))
    wide = lambda generated, remaining: torch.arange(1, 300)  # noqa: E731
    first = generate(model, row, 1, constraint=wide, eos_token_id=NO_EOS)[0]
    eos = first.token_ids[0]
    narrow = lambda generated, remaining: torch.arange(1, 300) if remaining > 1 else torch.tensor([eos])  # noqa: E731
    answer = generate(model, row, 1, constraint=narrow, eos_token_id=eos)[0]
    assert answer.finished and answer.eos_logprob == pytest.approx(first.token_logprobs[0])
    other = generate(model, row, 1, constraint=lambda g, r: narrow(g, r) if r > 1 else torch.tensor([1]))[0]
    assert other == Generated()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_constraint_that_allows_nothing_is_an_error(num_beams):
    model = make_ours()
    inputs = ragged(model)
    for ids in ([], [300], [300, 319], [7]):
        with pytest.raises(ValueError, match=r"allows nothing .* after \[\], with 5 left"):
            constraint = lambda g, r, ids=ids: torch.tensor(ids, dtype=torch.int64)  # noqa: E731
            generate(model, inputs, 5, constraint=constraint, num_beams=num_beams, suppress_tokens=[7])
    for ids in ([-1, 5], [5, 320]):
        with pytest.raises(ValueError, match="the model has 320"):
            generate(model, inputs, 5, constraint=lambda g, r, ids=ids: torch.tensor(ids), num_beams=num_beams)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_constraint_may_give_its_ids_in_any_order(num_beams):
    """They are sorted: whether eos is among them is found by halving, and whether all exist by the first and last."""
    model = make_ours()
    inputs = ragged(model)
    plain = generate(model, inputs, 5, constraint=lambda g, r: torch.arange(3, 60), num_beams=num_beams)
    mixed = torch.arange(3, 60)[torch.randperm(57, generator=torch.Generator().manual_seed(0))].repeat(2)
    assert generate(model, inputs, 5, constraint=lambda g, r: mixed, num_beams=num_beams) == plain
    with pytest.raises(ValueError, match="a constraint allows ids 5 to 1000000, the model has 320"):
        generate(model, inputs, 5, constraint=lambda g, r: torch.tensor([10**6, 5]), num_beams=num_beams)
    with pytest.raises(TypeError, match="a constraint returned list, expected ids as an int64 tensor, or None"):
        generate(model, inputs, 5, constraint=lambda g, r: [5, 6], num_beams=num_beams)


@pytest.mark.parametrize("ids", [[1, 9, 5], [9, 5, 1], [5, 1, 9, 1]])
def test_the_end_is_found_among_ids_in_any_order(ids):
    """Where an answer may end, a constraint is asked a second time, without a budget."""
    asked = []

    def constraint(generated, remaining):
        asked.append(remaining)
        return torch.tensor(ids)

    (allowed,), fitting = allowed_next([constraint], [[]], 3, vocab_size=10, eos=1)
    assert asked == [3, NO_END] and allowed.tolist() == [1, 5, 9] and not fitting


def test_ids_may_come_in_a_list_or_an_array():
    """`watch` and `suppress_tokens` are keys of what rows have in common, so they are kept as tuples of int."""
    model = make_ours()
    row = next(rows_of(ragged(model)))
    expected = generate(model, row, 4, watch=(100, 50), suppress_tokens=(5, 6), eos_token_id=NO_EOS)
    for watch, suppressed in (([100, 50], [5, 6]), ([np.int64(100), np.int64(50)], np.array([5, 6]))):
        given = {"watch": watch, "suppress_tokens": suppressed}
        assert generate(model, row, 4, **given, eos_token_id=NO_EOS) == expected
        options = Options(4, **given)
        assert options == Options(4, watch=(100, 50), suppress_tokens=(5, 6)) and isinstance(hash(options), int)
    assert Options().suppress_tokens is None and Options().watch is None


# -- watched ids --


@pytest.mark.parametrize("num_beams", [1, 3])
def test_watched_ids(num_beams):
    """Mean and spread of the distribution among the allowed tokens of the range, where the chosen token lies in it."""
    model = make_ours()
    row = next(rows_of(ragged(model)))
    P = row["input_ids"].shape[1]

    def alternate(generated, remaining):  # in the range [100, 150), of which 100..119 are allowed; then outside it
        return torch.arange(50, 120) if len(generated) % 2 else torch.arange(100, 120)

    answer = generate(model, row, 6, constraint=alternate, watch=(100, 50), num_beams=num_beams, eos_token_id=NO_EOS)[0]
    tokens = torch.tensor([answer.token_ids])
    logits = model(
        torch.cat([row["input_ids"], tokens], 1),
        pixel_values=row["pixel_values"],
        token_type_ids=torch.cat([row["token_type_ids"], torch.ones_like(tokens)], 1),
    ).logits[0, P - 1 : -1]
    assert len(answer.distributions) == 6
    seen = set()
    for place, (token, step, (mean, spread, share, quantiles)) in enumerate(
        zip(answer.token_ids, logits, answer.distributions)
    ):
        seen.add(token >= 100)
        if token < 100:
            assert math.isnan(mean) and math.isnan(spread)
            continue
        allowed = step[50:120] if place % 2 else step[100:120]
        assert share == pytest.approx(float((step[100:120].logsumexp(-1) - allowed.logsumexp(-1)).exp()), abs=1e-4)
        below = step[100:120].double().softmax(-1).cumsum(-1)
        for n, at in enumerate(quantiles):
            assert below[at] >= (n + 0.5) / 12 - 1e-4 and (at == 0 or below[at - 1] <= (n + 0.5) / 12 + 1e-4)
        probs = step[100:120].double().softmax(-1).tolist()
        expected = sum(p * i for i, p in enumerate(probs))
        assert mean == pytest.approx(expected, abs=1e-3)
        assert spread == pytest.approx(math.sqrt(sum(p * (i - expected) ** 2 for i, p in enumerate(probs))), abs=1e-3)
    assert seen == {True, False}
    assert generate(model, row, 6)[0].distributions == []


# -- sampling --


def test_warping_equals_transformers():
    scores = torch.randn(6, 50) * 4
    scores[1, 3:] = -math.inf  # fewer left than top_k asks for
    ids = torch.zeros(6, 1).long()
    T, K, P = transformers.TemperatureLogitsWarper, transformers.TopKLogitsWarper, transformers.TopPLogitsWarper
    for temperature, top_k, top_p in itertools.product((0.3, 1.0, 2.5), (None, 1, 7, 50), (None, 0.05, 0.6, 0.95, 1.0)):
        expected = T(temperature)(ids, scores)
        expected = K(top_k)(ids, expected) if top_k else expected
        expected = P(top_p)(ids, expected) if top_p and top_p < 1 else expected
        ours = warp(scores, temperature, top_k, top_p)
        assert torch.equal(ours.isinf(), expected.isinf()), (temperature, top_k, top_p)
        assert_close(ours.softmax(-1), expected.softmax(-1))


def test_what_ties_with_the_last_token_kept_is_kept():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert warp(scores, top_k=2).isfinite().tolist() == [[True, False, True, True, True, False]]
    assert warp(scores, top_p=0.5).isfinite().tolist() == [[True, False, True, True, True, False]]
    assert warp(scores, top_p=0.3).isfinite().tolist() == [[True, False, False, False, False, False]]


def test_a_tiny_temperature_is_greedy():
    model = make_ours()
    inputs = ragged(model)
    greedy = generate(model, inputs, 6)
    for temperature in (1e-4, 1e-40, 5e-324):
        assert generate(model, inputs, 6, do_sample=True, temperature=temperature) == greedy


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    model = make_ours()
    inputs = ragged(model)
    greedy = generate(model, inputs, 6)
    assert generate(model, inputs, 6, do_sample=True, temperature=5.0, top_k=1) == greedy
    for top_p in (1e-6, 5e-324):  # the second is 0 in float32
        assert generate(model, inputs, 6, do_sample=True, temperature=5.0, top_p=top_p) == greedy


def test_a_huge_temperature_draws_all_allowed_tokens_alike():
    for temperature in (1e30, 1e308):  # the second is infinite in float32
        probs = warp(torch.tensor([[3.0, -math.inf, 1.0]]), temperature).softmax(-1)
        assert_close(probs, torch.tensor([[0.5, 0.0, 0.5]]))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    options = Options(do_sample=True)
    draws = choose(probs.log().expand(4000, -1), options, [torch.Generator().manual_seed(0)] * 4000)
    share = torch.bincount(draws, minlength=5) / 4000
    assert_close(share, probs, atol=0.025, rtol=0)  # three standard deviations of the first
    assert share[4] == 0


def test_sampling_parameters_change_nothing_without_do_sample():
    model = make_ours()
    inputs = ragged(model)
    assert generate(model, inputs, 6, temperature=3.0, top_k=9, top_p=0.5, seed=3) == generate(model, inputs, 6)


def test_a_seed_decides_everything_and_touches_nothing():
    model = make_ours()
    inputs = ragged(model)
    sample = functools.partial(generate, model, inputs, 8, do_sample=True, temperature=2.0)
    torch.manual_seed(1)
    first = sample(seed=11)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert sample(seed=11) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(seed=12) != first


def test_a_seed_holds_for_a_row_whatever_stands_beside_it():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    same = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in row.items()}
    sample = functools.partial(generate, model, max_new_tokens=8, do_sample=True, temperature=2.0)
    alone = sample(row, seed=5)[0].token_ids
    assert [a.token_ids for a in sample(same, seed=5)] == [alone] * 3
    several = [a.token_ids for a in sample(same, seed=[4, 5, 6])]
    assert several[1] == alone and len({tuple(ids) for ids in several}) == 3


def test_without_a_seed_torchs_own_decides():
    model = make_ours()
    row = next(rows_of(ragged(model)))
    same = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in row.items()}
    sample = functools.partial(generate, model, same, 8, do_sample=True, temperature=2.0)
    torch.manual_seed(3)
    first = [a.token_ids for a in sample()]
    assert len({tuple(ids) for ids in first}) == 3
    assert [a.token_ids for a in sample()] != first
    torch.manual_seed(3)
    assert [a.token_ids for a in sample()] == first


# -- beams, checked by hand --


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_wide_beams_find_the_best_of_all_answers(length_penalty):
    """With as many beams as tokens and two steps, nothing is ever dropped: compare with trying every answer."""
    model = make_ours(seed=3)
    eos, vocabulary = 9, [9, 50, 100, 150, 200]
    for row in rows_of(ragged(model)):

        def continuations(start, row=row):
            tokens = torch.tensor([start], dtype=torch.int64)
            logits = model(
                torch.cat([row["input_ids"], tokens], 1),
                pixel_values=row["pixel_values"],
                token_type_ids=torch.cat([row["token_type_ids"], torch.ones_like(tokens)], 1),
            ).logits[0, -1]
            return [(token, logits.log_softmax(-1)[token].item()) for token in vocabulary]

        scored = {}
        for first, p in continuations([]):
            if first == eos:
                scored[(eos,)] = p
                continue
            for second, q in continuations([first]):
                scored[first, second] = (p + q) / 2**length_penalty
        best = max(scored, key=scored.get)
        answer = generate(
            model,
            row,
            2,
            num_beams=5,
            length_penalty=length_penalty,
            eos_token_id=eos,
            constraint=lambda generated, remaining: torch.tensor(vocabulary),
        )[0]
        assert (*answer.token_ids, *[eos] * answer.finished) == best


def test_more_beams_than_tokens():
    model = make_ours()
    constraint = lambda generated, remaining: torch.tensor([1, 40])  # noqa: E731
    answers = generate(model, ragged(model), 4, num_beams=8, constraint=constraint)
    assert all(set(a.token_ids) <= {40} for a in answers)


# -- streaming --


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model with the tokenizer's vocabulary, rounded up to a multiple of 64 as in the published files."""
    size = len(tokenizer) // 64 * 64 + 64
    return make_ours(vocab_size=size, image_token_index=tokenizer.image_token_id)


def spelling(ids, eos):
    """A constraint that leaves the model no choice but these ids."""
    return lambda generated, remaining: torch.tensor([[*ids, eos][len(generated)]])


def drain(pieces):
    """All pieces, and what the generator returned."""
    seen = []
    while True:
        try:
            seen.append(next(pieces))
        except StopIteration as end:
            return seen, end.value


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 3.0, "seed": 2}])
def test_streamed_equals_whole(speaker, tokenizer, options):
    for row in rows_of(ragged(speaker)):
        whole = generate(speaker, row, 40, num_tokens=len(tokenizer), **options)[0]
        pieces, answer = drain(stream(speaker, row, tokenizer, 40, **options))
        assert "".join(pieces) == tokenizer.decode(whole.token_ids)
        assert answer == whole
        assert len(pieces) > 5 and all(pieces)


TEXTS = {  # as lists of what a reader takes for one character
    "words": list("a red car on the street"),
    "one character": ["a"],
    "accents in the vocabulary": list("über éa"),
    "characters spelled in bytes": list("日本語 a ж日"),
    "combining marks": ["e\u0301", "a", " ", "n\u0303\u0323", "o", "e\u0301"],
    "joined emoji": ["👩‍👩‍👧", " ", "👍🏽", "🇩🇪", " ", "❤️", "o", "k", "👩‍👩‍👧"],
    "Hangul from parts": ["\u1112\u1161\u11ab", "\u1100\u1173\u11af", " ", "o", "k"],
    "boxes": list("<loc0001><loc0002><loc0003><loc0004> cat ; <loc0100><loc0200><loc0300><loc0400> dog"),
    "lines": list("one\n\ntwo\n"),
}


@pytest.mark.parametrize("characters", TEXTS.values(), ids=TEXTS)
def test_pieces_never_break_a_character(speaker, tokenizer, characters):
    row = next(rows_of(ragged(speaker)))
    text = "".join(characters)
    ids = tokenizer.encode(text)
    pieces, answer = drain(stream(speaker, row, tokenizer, constraint=spelling(ids, tokenizer.eos_token_id)))
    assert "".join(pieces) == text == tokenizer.decode(answer.token_ids)
    assert answer.token_ids == ids and answer.finished
    ends = set(itertools.accumulate(map(len, characters)))
    assert set(itertools.accumulate(map(len, pieces))) <= ends
    assert len(pieces) > 1 or len(characters) == 1
    # And the same if the tokens had been single code points.
    for length in range(len(text) + 1):
        assert start_of_last_character(text[:length]) in ends | {0}


def test_broken_bytes_and_a_spent_budget_still_join_to_the_whole(speaker, tokenizer):
    row = next(rows_of(ragged(speaker)))
    ids = tokenizer.encode("日本")
    assert len(ids) == 6  # three bytes each
    for budget in range(1, 7):
        pieces, answer = drain(
            stream(speaker, row, tokenizer, budget, constraint=spelling(ids, tokenizer.eos_token_id))
        )
        assert "".join(pieces) == tokenizer.decode(ids[:budget]) and not answer.finished


def test_an_empty_answer_streams_nothing(speaker, tokenizer):
    row = next(rows_of(ragged(speaker)))
    pieces, answer = drain(stream(speaker, row, tokenizer, constraint=spelling([], tokenizer.eos_token_id)))
    assert pieces == [] and answer.finished and answer.token_ids == []


def test_a_stream_gives_each_piece_at_once_and_leaves_no_mode_behind(speaker, tokenizer, monkeypatch):
    row = next(rows_of(ragged(speaker)))
    heads = count_calls(monkeypatch, speaker.language_model, "logits")
    plain_steps(monkeypatch)  # else what is spelled would be taken without asking the model
    ids = tokenizer.encode("a red car on the street")
    pieces = stream(speaker, row, tokenizer, constraint=spelling(ids, tokenizer.eos_token_id))
    assert next(pieces) == "a re" and len(heads) == 2  # when " red" has come; the "d" might still get an accent
    assert not torch.is_inference_mode_enabled()
    pieces.close()
    assert len(heads) == 2 and torch.is_grad_enabled()


# -- errors --


def test_a_prompt_too_long_is_an_error_before_any_work(monkeypatch, tokenizer):
    model = make_ours(max_position_embeddings=20)
    inputs = ragged(model)  # the longest row has 4 image tokens and 7 others
    encoded = count_calls(monkeypatch, model, "encode_image")
    message = r"11 tokens .* 10: 21 together, .* 20 positions. Set max_new_tokens to at most 9 \(.*--max-new-tokens"
    for side in ("left", "right"):
        with pytest.raises(ValueError, match=message):
            generate(model, ragged(model, side), max_new_tokens=10)
    with pytest.raises(ValueError, match="Shorten the prompt"):
        generate(model, make_inputs(model.config, prefix=[17]), max_new_tokens=1)
    assert encoded == []
    assert len(generate(model, inputs, max_new_tokens=9)) == 4


BAD_OPTIONS = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
    ({"max_new_tokens": -3}, "max_new_tokens is -3"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ({"temperature": 0}, "temperature is 0, .* leave it out for greedy"),
    ({"temperature": 0.0, "do_sample": True}, "leave it out for greedy"),
    ({"temperature": -0.5}, "temperature is -0.5, expected a number above 0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"top_k": 0}, "top_k is 0"),
    ({"num_beams": 0}, "num_beams is 0"),
    ({"num_beams": 100_000}, "num_beams is 100,000, expected at most 1,000"),
    ({"num_beams": 2, "do_sample": True}, "sampling with beams is not offered"),
    ({"length_penalty": math.inf}, "length_penalty is inf"),
    ({"do_sample": True, "seed": [1, 2]}, "2 seeds for 4 rows"),
    ({"suppress_tokens": [320]}, "suppress_tokens has 320, expected ids from 0 to 319"),
    ({"suppress_tokens": [-1]}, "suppress_tokens has -1"),
    ({"suppress_tokens": range(320)}, "every token of the vocabulary is suppressed"),
    ({"num_tokens": 0}, "num_tokens is 0"),
    ({"constraint": [None]}, "1 constraints for 4 rows"),
    ({"watch": (300, 21)}, r"watch is \(300, 21\)"),
    ({"watch": (3, 0)}, r"watch is \(3, 0\)"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_options_out_of_range(options, message, monkeypatch):
    model = make_ours()
    heads = count_calls(monkeypatch, model.language_model, "logits")
    with pytest.raises(ValueError, match=message):
        generate(model, ragged(model), **options)
    assert heads == []


def test_inputs_that_do_not_fit(tokenizer, speaker):
    model = make_ours()
    inputs = ragged(model)
    features = model.encode_image(inputs["pixel_values"])
    cases = [
        ({"input_ids": [[1, 2]]}, "not a tensor"),
        ({"input_ids": inputs["input_ids"][0]}, "not a tensor"),
        (
            {"attention_mask": inputs["attention_mask"][:, 1:]},
            r"attention_mask has shape \[4, 10\], input_ids \[4, 11\]",
        ),
        ({"token_type_ids": inputs["token_type_ids"][:2]}, "token_type_ids has shape"),
        ({"attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0], [1], [1]])}, "row 1 .* all padding"),
        ({"image_features": features}, "pixel_values and image_features"),
        ({"pixel_values": inputs["pixel_values"][:2]}, "16 <image> tokens for 8 image features"),
        ({"pixel_values": None}, "16 <image> tokens for 0 image features"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(model, {**inputs, **change})


def test_rows_made_for_training_are_refused():
    model = make_ours()
    inputs = ragged(model, suffix=[2, 3, 1, 2])
    inputs["input_ids"][1, -1] = model.config.eos_token_id
    with pytest.raises(ValueError, match="row 1 already ends in eos: leave the suffix out"):
        generate(model, inputs)


def test_no_rows_no_answers():
    model = make_ours()
    empty = {name: tensor[:0] for name, tensor in ragged(model).items()}
    assert generate(model, empty) == [] == generate(model, empty, num_beams=2)


def test_streams_are_of_one_row_without_beams(speaker, tokenizer):
    inputs = ragged(speaker)
    row = next(rows_of(inputs))
    with pytest.raises(ValueError, match="4 rows, and a stream is of one"):
        stream(speaker, inputs, tokenizer)  # at the call, not at the first piece
    with pytest.raises(ValueError, match="streaming with beams is not offered"):
        stream(speaker, row, tokenizer, num_beams=2)
    with pytest.raises(ValueError, match="leave it out for greedy"):
        stream(speaker, row, tokenizer, temperature=0)
    with pytest.raises(TypeError, match="heat"):
        stream(speaker, row, tokenizer, heat=1.0)


def test_logits_that_are_no_numbers_are_an_error():
    broken = PaliGemmaForConditionalGeneration(make_ours().config)
    randomize(broken)
    with torch.no_grad():
        broken.language_model.model.norm.weight[0] = math.nan
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(FloatingPointError, match=r"not finite numbers in torch\.float32"):
            generate(broken, ragged(broken), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_cease_to_be_numbers_are_the_same_error_of_beams(value, monkeypatch):
    """After the first step, where nothing has looked at them yet."""
    model = make_ours()
    monkeypatch.setattr("paligemma.generation.decode_one_token", lambda *_: torch.full((8, 320), value))
    with pytest.raises(FloatingPointError, match=r"not finite numbers in torch\.float32"):
        generate(model, ragged(model), num_beams=2, eos_token_id=NO_EOS)


# -- small things --


def test_bfloat16_generates():
    model = make_ours(seed=9).bfloat16()
    answers = generate(model, ragged(model), 6, watch=(0, 100))
    assert all(len(a.token_ids) == len(a.token_logprobs) == len(a.distributions) <= 6 for a in answers)
    assert all(logprob <= 0 for a in answers for logprob in a.token_logprobs)


def test_selecting_rows_never_holds_a_second_cache():
    config = make_ours().config.text_config
    cache = KVCache(config, batch=3, max_length=4)
    cache.extend(torch.ones(3, 2, dtype=torch.bool))
    for layer, keys in enumerate(cache.keys):
        keys += layer + torch.arange(3.0)[:, None, None, None]
    kept = cache.keys  # the list itself is written into, layer by layer
    cache.select(torch.tensor([2, 0]))
    assert kept is cache.keys
    assert [keys[:, 0, 0, 0].tolist() for keys in cache.keys] == [[2.0, 0.0], [3.0, 1.0]]


def test_masked_logits_leaves_its_input_alone():
    logits = torch.randn(2, 10)
    before = logits.clone()
    never = torch.zeros(10, dtype=torch.bool)
    scores = masked_logits(logits, never, [torch.tensor([3]), None])
    assert torch.equal(logits, before)
    assert scores[0].isfinite().nonzero().tolist() == [[3]] and torch.equal(scores[1], logits[1])


def test_gradients_are_off_inside_and_on_outside(speaker, tokenizer):
    row = next(rows_of(ragged(speaker)))
    inside = []
    spy = speaker.language_model.model.register_forward_pre_hook(
        lambda *_: inside.append(torch.is_inference_mode_enabled())
    )
    try:
        generate(speaker, row, 2)
        generate(speaker, row, 2, num_beams=2)
        for _ in stream(speaker, row, tokenizer, 2):
            assert not torch.is_inference_mode_enabled()
    finally:
        spy.remove()
    assert inside == [True] * 6
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
