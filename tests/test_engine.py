"""The engine: rows that come and go answer as they would alone, whatever runs beside them, ends, or fails.

Most models here are tiny with random weights, vocabulary 320, <image> = 300. Their requests are as mixed as can be:
pictures, budgets, seeds, constraints and watched ranges of their own.
"""

import copy
import functools
import math
import random
import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import means_and_spreads, randomize, tiny_config
from torch.testing import assert_close

import paligemma
from paligemma.answers.grammar import ChoiceGrammar, DetectionGrammar
from paligemma.answers.parsing import NUM_LOC
from paligemma.engine import Engine, Request, generate
from paligemma.generation import Generated, Options, generate_greedily
from paligemma.kv_cache import KVCache, bytes_per_token
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

NO_EOS = 301  # an id that is never produced: answers then use their whole budget


@functools.cache
def model_of(kind="gemma"):
    """A random model whose answers vary: Gemma 2 with sliding windows shorter than a prompt, and soft-caps."""
    model = PaliGemmaForConditionalGeneration(tiny_config(kind)).eval()
    randomize(model)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight *= 0.2
        model.language_model.model.norm.weight += 3
    return model


# ---------------------------------------------------------------------------------------------- mixed requests


def few_and_forced(generated, remaining):
    """A choice of 12, one of 2, two that are forced, and so on; after nine, eos, which is forced too."""
    place = len(generated) % 4
    if len(generated) == 9:
        return torch.tensor([1])
    if place < 2:
        return torch.arange(40, 52) if place == 0 else torch.tensor([7, 200])
    return torch.tensor([100 + place])


def in_pairs(generated, remaining):
    """Tokens in twos, the second one is 7, and eos may follow each two: it closes within the budget."""
    if len(generated) % 2:
        return torch.tensor([7])
    return torch.tensor([1, *range(20, 40)]) if remaining >= 3 else torch.tensor([1])


def spelled(generated, remaining):
    """No choice at all: seven tokens and eos, without asking the model once."""
    return torch.tensor([[60, 61, 62, 63, 64, 65, 66, 1][len(generated)]])


CONSTRAINTS = [None, None, few_and_forced, in_pairs, spelled]


def mixed_request(model, seed, **changes) -> Request:
    """A row of 0 to 2 pictures and 2 to 9 words, with options that no two rows share."""
    draw = random.Random(seed)
    pictures = draw.choice([0, 1, 1, 2])
    words = [2, *(draw.randrange(3, 300) for _ in range(draw.randrange(1, 9)))]
    size = model.config.vision_config.image_size
    features = None
    if pictures:
        pixels = torch.rand(pictures, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        with torch.inference_mode():
            features = model.encode_image(pixels)
    sampling = {
        "do_sample": True,
        "seed": seed,
        "temperature": draw.choice([0.7, 2.0]),
        "top_k": draw.choice([None, 9]),
    }
    options = {
        "max_new_tokens": draw.choice([1, 3, 8, 12, 25]),
        "watch": draw.choice([None, (40, 100)]),
        "suppress_tokens": draw.choice([None, [50, 51]]),
        **(sampling if draw.random() < 0.4 else {}),
    }
    constraint = changes.pop("constraint", draw.choice(CONSTRAINTS))
    ids = torch.tensor([model.config.image_token_index] * 4 * pictures + words)
    return Request(ids, features, Options(**{**options, **changes}), constraint)


@functools.cache
def answer_alone(kind, seed) -> Generated:
    request = mixed_request(model_of(kind), seed)
    inputs = {"input_ids": request.prompt[None], "image_features": request.image_features}
    fields = {**vars(request.options), "constraint": request.constraint}
    return generate(model_of(kind), inputs, **fields)[0]


def same(answer: Generated, expected: Generated) -> None:
    assert answer.token_ids == expected.token_ids and answer.finished == expected.finished
    # float32: rows of another number are summed in another order, on each CPU in its own. (AVX2: up to 1.1e-5.)
    assert_close(answer.token_logprobs, expected.token_logprobs, atol=2e-5, rtol=0)
    assert (answer.eos_logprob is None) == (expected.eos_logprob is None)
    assert_close(answer.eos_logprob or 0.0, expected.eos_logprob or 0.0, atol=2e-5, rtol=0)
    assert_close(means_and_spreads(answer), means_and_spreads(expected), atol=1e-2, rtol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------- as alone


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("settings", [{}, {"prefill_every": 1, "max_rows": 5}, {"prefill_every": None}], ids=str)
def test_rows_that_join_at_any_moment_answer_as_alone(kind, settings):
    engine, moments = Engine(model_of(kind), **settings), random.Random(3)
    tickets = []
    for seed in range(64):
        tickets.append(engine.admit(mixed_request(model_of(kind), seed)))
        for _ in range(moments.choice([0, 0, 1, 2, 5])):
            engine.step()
    while engine.step():
        pass
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), answer_alone(kind, seed))
    assert engine.rows_running == engine.rows_waiting == engine.bytes_held == 0


def test_the_engine_is_the_loop_of_ten_lines():
    """Where ids that were never trained are not the likeliest: `generate_greedily` knows of none."""
    model = copy.deepcopy(model_of("gemma2"))
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[300:] = 0
    plain = [replace(mixed_request(model, seed, constraint=None), options=Options(12)) for seed in range(20)]
    engine = Engine(model, max_rows=4, prefill_every=1)
    for request, ticket in [(request, engine.admit(request)) for request in plain]:
        inputs = {"input_ids": request.prompt[None], "image_features": request.image_features}
        assert ticket.result().token_ids == generate_greedily(model, inputs, 12)


def embedded_requests(pg, count):
    """caption, ask, choices, detect and segment in turn, a third of the captions sampled, over random pictures."""
    tokenizer, draw = pg.processor.tokenizer, random.Random(5)
    side = pg.processor.image_size
    pictures = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        features = pg.model.encode_image(pictures)
    detect = DetectionGrammar(tokenizer, ["book", "dog"])
    segment = DetectionGrammar(tokenizer, ["book"], segments=True)
    tasks = [
        ("caption en", None, 40),
        ("answer en how many dogs are there?", None, 12),
        ("answer en is there a dog?", ChoiceGrammar(tokenizer, ["yes", "no", "not sure"]), 12),
        ("detect book ; dog", detect, 60),
        ("segment book", segment, 50),
    ]
    for n in range(count):
        prompt, constraint, budget = tasks[n % len(tasks)]
        sampling = {"do_sample": True, "seed": n, "temperature": 0.8} if n % 3 == 0 and constraint is None else {}
        if not isinstance(constraint, ChoiceGrammar):  # a choice needs its whole budget
            budget = draw.randrange(1, budget)
        watch = tokenizer.first_loc_id, NUM_LOC
        options = Options(budget, watch=watch, num_tokens=len(tokenizer), **sampling)
        ids = pg.processor.lay_out([prompt], [1])["input_ids"][0]
        yield Request(ids, features[n % 6][None], options, constraint)


@pytest.mark.parametrize("count", [10, pytest.param(64, marks=pytest.mark.slow)])
def test_the_embedded_model_answers_mixed_requests_as_alone(count):
    pg = paligemma.load("tiny", dtype="float32", device="cpu")
    engine, moments = Engine(pg.model, pg.processor.tokenizer), random.Random(8)
    tickets = []
    for request in embedded_requests(pg, count):
        tickets.append((engine.admit(request), request))
        for _ in range(moments.choice([0, 1, 6])):
            engine.step()
    for ticket, request in tickets:
        (alone,) = generate(
            pg.model,
            {"input_ids": request.prompt[None], "image_features": request.image_features},
            **{**vars(request.options), "constraint": request.constraint},
        )
        same(ticket.result(), alone)
        assert "".join(ticket.pieces()) == pg.processor.tokenizer.decode(alone.token_ids)


# ---------------------------------------------------------------------------------------------- anything may happen


def raising(after):
    def constraint(generated, remaining):
        if len(generated) == after:
            raise LookupError("a fault of this row")
        return None

    return constraint


def dead_end(after):
    return lambda generated, remaining: torch.tensor([], dtype=torch.int64) if len(generated) == after else None


def with_fault(model, seed, fault) -> Request:
    """A request that will fail by itself, soon or late."""
    if fault == "nan":
        request = mixed_request(model, 1, constraint=None)
        assert request.image_features is not None
        return replace(request, image_features=request.image_features * math.nan)
    constraint = (raising if fault == "raises" else dead_end)(seed % 4)
    return mixed_request(model, seed, constraint=constraint, max_new_tokens=12)


FAULTS = {"raises": LookupError, "dead end": ValueError, "nan": FloatingPointError}

events = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 63)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.sampled_from([*FAULTS]), st.integers(0, 9)),
)


def happens(engine, kind, max_rows, happening):
    """Rows join, are cancelled and fail; all others must be answered as if they were alone, and nothing be left."""
    model = model_of(kind)
    tickets, cancelled = [], set()
    for what, number in happening:
        if what == "admit":
            tickets.append((engine.admit(mixed_request(model, number)), number))
        elif what == "step":
            for _ in range(number):
                engine.step()
                assert engine.rows_running <= max_rows
        elif what == "cancel":
            if number < len(tickets) and not tickets[number][0].done:
                tickets[number][0].cancel()
                cancelled.add(number)
        else:
            tickets.append((engine.admit(with_fault(model, number, what)), FAULTS[what]))
    for n, (ticket, expected) in enumerate(tickets):
        if n in cancelled:
            with pytest.raises(CancelledError):
                ticket.result()
        elif isinstance(expected, int):
            same(ticket.result(), answer_alone(kind, expected))
        else:
            with pytest.raises(expected):
                ticket.result()
    while engine.step():
        pass
    assert engine.failure is None and engine.rows_running == engine.rows_waiting == 0


def anything_may_happen(test):
    """Twenty engines, and what happens to each of them."""
    found = given(
        happening=st.lists(events, min_size=5, max_size=40),
        kind=st.sampled_from(["gemma", "gemma2"]),
        max_rows=st.integers(1, 6),
        prefill_every=st.sampled_from([None, 1, 3]),
    )
    return settings(max_examples=20, deadline=None, derandomize=True)(found(test))


@anything_may_happen
def test_joins_cancellations_and_faults_leave_the_others_alone(happening, kind, max_rows, prefill_every):
    engine = Engine(model_of(kind), max_rows=max_rows, prefill_every=prefill_every)
    happens(engine, kind, max_rows, happening)
    assert engine.bytes_held == 0


def test_numbers_that_are_none_in_the_middle_of_an_answer_end_that_row_alone():
    """Token 77 has no numbers for an embedding. One row may write it at its third place; the others never may."""
    model = copy.deepcopy(model_of())
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[77] = math.nan
    engine = Engine(model)
    forbid = {"suppress_tokens": [77], "max_new_tokens": 9, "do_sample": False, "watch": None}
    requests = [mixed_request(model, seed, constraint=None, **forbid) for seed in range(3)]
    poisoned = mixed_request(
        model, 5, constraint=lambda g, r: torch.tensor([77]) if len(g) == 2 else torch.arange(3, 70), max_new_tokens=9
    )
    broken = engine.admit(poisoned)
    tickets = [engine.admit(request) for request in requests]
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.result()
    assert len(broken.written()[0]) == 2
    for request, ticket in zip(requests, tickets):
        same(ticket.result(), Engine(model).admit(request).result())


def test_cancelled_rows_are_gone_with_the_next_step(monkeypatch):
    model = copy.deepcopy(model_of())
    passes = passes_of(monkeypatch, model)
    engine = Engine(model, prefill_every=1)
    tickets = [engine.admit(plain(model, 20)) for _ in range(5)]
    for _ in range(3):
        engine.step()
    assert engine.rows_running == 5
    tickets[1].cancel()
    tickets[3].cancel()
    written = tickets[1].written()[0]
    engine.step()
    assert engine.rows_running == 3 and tickets[1].written()[0] == written and passes[-1] == (3, 1)
    tickets[1].cancel()  # a second time nothing happens
    for ticket in tickets[::2]:
        ticket.cancel()
    before = len(passes)
    assert not engine.step() and engine.bytes_held == 0 and len(passes) == before
    finished = engine.admit(mixed_request(model, 1))
    answer = finished.result()
    finished.cancel()
    assert finished.result() == answer


# ---------------------------------------------------------------------------------------------- faults of everybody


def fail_in(monkeypatch, model, times, rows):
    """The model raises so many times when it computes so many rows at once."""
    run, left = model.language_model.model.forward, [times]

    def forward(x, *more):
        if len(x) == rows and left[0]:
            left[0] -= 1
            raise MemoryError("no memory left")
        return run(x, *more)

    monkeypatch.setattr(model.language_model.model, "forward", forward)


def test_no_memory_for_the_rows_that_stay_ends_them_and_not_the_engine(monkeypatch):
    """The cache is copied when a row is cancelled."""
    engine = Engine(model_of(), prefill_every=1)
    cancelled, staying = (engine.admit(plain(model_of(), 20)) for _ in range(2))
    for _ in range(3):
        engine.step()
    cancelled.cancel()

    def no_memory(*_):
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "select", no_memory)
        engine.step()
    with pytest.raises(MemoryError):
        staying.result()
    same(engine.admit(mixed_request(model_of(), 9)).result(), answer_alone("gemma", 9))


def test_an_exception_ends_the_running_rows_and_the_next_ones_start_afresh(monkeypatch):
    model = copy.deepcopy(model_of())
    long = {"constraint": None, "max_new_tokens": 20, "eos_token_id": NO_EOS}
    engine = Engine(model, max_rows=3)
    running = [engine.admit(mixed_request(model, seed, **long)) for seed in range(3)]
    waiting = engine.admit(mixed_request(model, 7))
    engine.step()
    fail_in(monkeypatch, model, times=1, rows=3)
    engine.step()
    for ticket in running:
        with pytest.raises(MemoryError):
            ticket.result()
    assert engine.bytes_held == 0 and engine.failure is None
    same(waiting.result(), answer_alone("gemma", 7))


def test_prompts_that_cannot_be_read_do_not_touch_the_rows_that_run(monkeypatch):
    model = copy.deepcopy(model_of())
    engine = Engine(model, max_rows=3, prefill_every=1)
    first = engine.admit(mixed_request(model, 3))
    engine.step()
    pair = [engine.admit(mixed_request(model, seed)) for seed in (4, 5)]
    fail_in(monkeypatch, model, times=1, rows=2)
    same(first.result(), answer_alone("gemma", 3))
    for ticket in pair:
        with pytest.raises(MemoryError):
            ticket.result()


def test_three_exceptions_in_a_row_and_the_engine_has_failed(monkeypatch):
    model = copy.deepcopy(model_of())
    engine = Engine(model, max_rows=1)
    tickets = [engine.admit(mixed_request(model, seed)) for seed in range(5)]
    fail_in(monkeypatch, model, times=3, rows=1)
    for _ in range(2):
        assert engine.step() and engine.failure is None
    assert not engine.step() and isinstance(engine.failure, MemoryError)
    for ticket in tickets:  # those that waited, too: nobody would answer them
        with pytest.raises(MemoryError):
            ticket.result()
    with pytest.raises(RuntimeError, match="the engine has failed: no memory left"):
        engine.admit(mixed_request(model, 1))


def test_ctrl_c_goes_through(monkeypatch):
    model = copy.deepcopy(model_of())
    engine = Engine(model)
    ticket = engine.admit(plain(model, 5))
    engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.language_model.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert ticket.done and engine.rows_running == 0


# ---------------------------------------------------------------------------------------------- who joins when


def test_what_can_never_be_answered_is_refused_before_anything_is_computed(monkeypatch):
    model = copy.deepcopy(model_of())
    for part in (model.language_model.model, model.vision_tower):
        monkeypatch.setattr(part, "forward", lambda *_: pytest.fail("computed"))
    engine = Engine(model, cache_bytes=40 * bytes_per_token(model.config.text_config, torch.float32))
    good = Request(torch.tensor([300] * 4 + [2, 5]), torch.zeros(1, 4, 32), Options(5))
    refused = [
        (replace(good, prompt=good.prompt[None]), r"shape \[1, 6\], expected \[S\]"),
        (replace(good, prompt=good.prompt[:0]), r"shape \[0\]"),
        (replace(good, options=Options(9000)), "the model has 8192 positions"),
        (replace(good, options=Options(35)), "the cache may take 0.0: lower max_new_tokens or raise cache_bytes"),
        (replace(good, options=Options(num_beams=2)), "beams are not offered"),
        (replace(good, options=Options(eos_token_id=999)), "eos_token_id is 999"),
        (replace(good, image_features=None), "4 <image> tokens for 0 image features"),
        (replace(good, image_features=torch.zeros(2, 4, 32)), "4 <image> tokens for 8 image features"),
        (replace(good, options=Options(5, constraint=[None, None])), "2 constraints for 1 rows"),
        (replace(good, options=Options(5, do_sample=True, seed=[1, 2])), "2 seeds for 1 rows"),
    ]
    for request, message in refused:
        with pytest.raises(ValueError, match=message):
            engine.admit(request)
    assert engine.rows_waiting == 0 and not engine.step()
    for wrong in ({"max_rows": 0}, {"prefill_every": 0}):
        with pytest.raises(ValueError, match="expected 1 at least"):
            Engine(model, **wrong)


def passes_of(monkeypatch, model):
    """[(rows, tokens)] of every pass through the decoder."""
    passes, run = [], model.language_model.model.forward
    monkeypatch.setattr(
        model.language_model.model, "forward", lambda x, *m: passes.append(tuple(x.shape[:2])) or run(x, *m)
    )
    return passes


def plain(model, budget, words=3):
    return Request(torch.tensor([2] * words), None, Options(budget, eos_token_id=NO_EOS))


def test_running_rows_take_some_steps_before_the_next_prompt_is_read(monkeypatch):
    model = copy.deepcopy(model_of())
    passes = passes_of(monkeypatch, model)
    engine = Engine(model, prefill_every=4)
    engine.admit(plain(model, 11))
    for _ in range(2):
        engine.step()
    engine.admit(plain(model, 2))
    engine.admit(plain(model, 2))
    while engine.step():
        pass
    # A prompt of three tokens; four decode steps; the two prompts that came meanwhile, read together; and so on.
    assert passes == [(1, 3)] + [(1, 1)] * 4 + [(2, 3), (3, 1)] + [(1, 1)] * 5


def test_without_haste_prompts_wait_until_a_quarter_of_the_rows_is_free(monkeypatch):
    model = copy.deepcopy(model_of())
    passes = passes_of(monkeypatch, model)
    engine = Engine(model, max_rows=8, prefill_every=None)
    for budget in (2, 3, 9, 9, 9, 9, 9, 9, 2, 2, 2):
        engine.admit(plain(model, budget))
    while engine.step():
        pass
    assert passes[:5] == [(8, 3), (8, 1), (7, 1), (2, 3), (8, 1)]
    assert passes[5] == (1, 3)  # all that waits


def test_large_prompts_are_read_one_at_a_time(monkeypatch):
    model = copy.deepcopy(model_of())
    passes = passes_of(monkeypatch, model)
    monkeypatch.setattr("paligemma.engine.MOST_PREFILL_WORK", {"cpu": 1000})
    engine = Engine(model, prefill_every=1)
    for _ in range(3):
        engine.admit(plain(model, 4))
    while engine.step():
        pass
    assert passes == [(1, 3), (1, 1), (1, 3), (2, 1), (1, 3), (3, 1), (2, 1), (1, 1)]


def test_the_cache_stays_within_its_bytes():
    model = model_of()
    room = 60 * bytes_per_token(model.config.text_config, torch.float32)
    engine = Engine(model, cache_bytes=room, prefill_every=1)
    tickets = [engine.admit(plain(model, 10, words=5)) for _ in range(9)]
    most = 0
    while engine.step():
        assert engine.bytes_held <= room
        most = max(most, engine.rows_running)
    assert most == 4  # of 15 columns each
    assert len({tuple(ticket.result().token_ids) for ticket in tickets}) == 1


# ---------------------------------------------------------------------------------------------- tickets and threads


def test_one_thread_steps_and_others_admit_and_wait():
    model = model_of("gemma2")
    engine, results, over = Engine(model, max_rows=4, prefill_every=1), {}, threading.Event()
    engine.step()  # from now on this thread drives

    def client(first):
        for seed in range(first, 24, 3):
            ticket = engine.admit(mixed_request(model, seed))
            ids = list(ticket)
            results[seed] = ticket.result()
            assert ids == results[seed].token_ids

    threads = [threading.Thread(target=client, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if not engine.step():
            over.wait(0.001)
    assert len(results) == 24
    for seed, answer in results.items():
        same(answer, answer_alone("gemma2", seed))


def test_where_nobody_steps_whoever_waits_does():
    """One thread after the other, and several at once."""
    model = model_of()
    engine, results = Engine(model, max_rows=3), {}

    def wait(seed):
        results[seed] = engine.admit(mixed_request(model, seed)).result()

    threads = [threading.Thread(target=wait, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(9)
    for seed, answer in results.items():
        same(answer, answer_alone("gemma", seed))


def test_a_driver_that_has_ended_keeps_nobody_waiting():
    engine = Engine(model_of())
    thread = threading.Thread(target=engine.step)
    thread.start()
    thread.join()
    same(engine.admit(mixed_request(model_of(), 4)).result(), answer_alone("gemma", 4))


def test_a_ticket_gives_ids_as_they_come_from_the_first_one_each_time():
    model = model_of()
    engine = Engine(model)
    ticket = engine.admit(plain(model, 6))
    ids = iter(ticket)
    first = next(ids)
    assert ticket.written() == ([first], ticket.written()[1]) and not ticket.done
    assert [first, *ids] == list(ticket) == ticket.result().token_ids and ticket.done
    assert ticket.written(4)[0] == ticket.result().token_ids[4:]
    assert ticket.admitted <= ticket.started <= ticket.first_token <= ticket.ended
    with pytest.raises(ValueError, match="the engine has no tokenizer"):
        next(ticket.pieces())


def test_a_listener_is_told_of_each_token_and_of_the_end():
    model = model_of()
    engine, told = Engine(model), []
    ticket = engine.admit(plain(model, 3), listener=lambda: told.append((len(ticket.written()[0]), ticket.done)))
    ticket.result()
    assert told == [(1, False), (2, False), (3, True)]


def test_a_listener_that_raises_ends_its_row_alone():
    model = model_of()
    engine = Engine(model)
    deaf = engine.admit(plain(model, 3), listener=lambda: [][0])
    other = engine.admit(mixed_request(model, 3))
    with pytest.raises(IndexError):
        deaf.result()
    same(other.result(), answer_alone("gemma", 3))


# ---------------------------------------------------------------------------------------------- the cache


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    first=lengths, second=lengths, steps=st.integers(0, 3), data=st.data(), kind=st.sampled_from(["gemma", "gemma2"])
)
def test_a_cache_that_was_joined_and_trimmed_is_one_that_was_filled_at_once(first, second, steps, data, kind):
    """Rows are read in two groups, one of which runs for some steps; some leave. The others then hold the same keys,
    values, validity and positions as rows read alone, and go on with the same logits."""
    model, config = model_of(kind), model_of(kind).config.text_config
    words = torch.randint(3, 300, (6, 9), generator=torch.Generator().manual_seed(sum(first)))

    def read(lengths, offset):
        cache = KVCache(config, len(lengths), max(lengths) + data.draw(st.integers(0, 4)))
        ids = torch.stack(
            [torch.cat([torch.zeros(max(lengths) - n).long(), words[offset + i, :n]]) for i, n in enumerate(lengths)]
        )
        model(ids, attention_mask=(ids > 0), cache=cache)
        return cache

    with torch.inference_mode():
        cache = read(first, 0)
        tokens = [words[i, :n].tolist() for i, n in enumerate(first)]
        for step in range(steps):
            cache.grow(cache.used + 1)
            model(torch.full((len(first), 1), 7 + step), cache=cache)
            tokens = [[*row, 7 + step] for row in tokens]
        cache.join(read(second, 3))
        tokens += [words[3 + i, :n].tolist() for i, n in enumerate(second)]
        kept = data.draw(st.lists(st.sampled_from(range(len(tokens))), min_size=1, unique=True))
        cache.select(torch.tensor(kept))
        cache.trim()
        tokens = [tokens[n] for n in kept]
        cache.grow(cache.used + 2)
        assert cache.used == max(map(len, tokens)) and cache.lengths.tolist() == [*map(len, tokens)]
        logits = model(torch.full((len(kept), 1), 9), cache=cache).logits
        for n, row in enumerate(tokens):
            prefix = len(row) - (steps if kept[n] < len(first) else 0)
            alone = KVCache(config, 1, len(row) + 1)
            model(torch.tensor([row[:prefix]]), cache=alone)
            for token in [*row[prefix:], 9]:
                expected = model(torch.tensor([[token]]), cache=alone).logits
            assert_close(logits[n], expected[0], atol=1e-4, rtol=0)
            held = cache.valid[n, : cache.used]
            assert held.tolist() == [False] * (cache.used - len(row) - 1) + [True] * (len(row) + 1)
            assert cache.positions[n, : cache.used][held].tolist() == [*range(len(row) + 1)]
            for ours, theirs in zip((*cache.keys, *cache.values), (*alone.keys, *alone.values)):
                assert_close(ours[n, :, : cache.used][:, held], theirs[0], atol=1e-5, rtol=0)
                assert ours[n, :, : cache.used].isfinite().all()


def test_caches_of_another_kind_do_not_join():
    config = model_of().config.text_config
    with pytest.raises(
        ValueError, match=r"a cache of torch\.float32 \[1, 2, 4, 16\] cannot take rows of torch\.bfloat16"
    ):
        KVCache(config, 1, 4).join(KVCache(config, 1, 4, torch.bfloat16))


def test_an_empty_cache_has_nothing_to_trim():
    cache = KVCache(model_of().config.text_config, 2, 4)
    cache.trim()
    cache.grow(3)
    assert (cache.used, cache.max_length) == (0, 4)
