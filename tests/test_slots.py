"""The engine with `compile=True`: rows come and go in slots of fixed size, and one graph writes all of their tokens.

The answers are held to those of the engine without it, which `test_engine.py` holds to those of each row alone.
"""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from test_engine import (
    NO_EOS,
    answer_alone,
    anything_may_happen,
    embedded_requests,
    fail_in,
    happens,
    mixed_request,
    model_of,
    plain,
    same,
)

import paligemma
from paligemma import compiled
from paligemma.engine import Engine
from paligemma.generation import Options, decode_one_token
from paligemma.kv_cache import bytes_per_token
from paligemma.slots import Slots


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is compiled; they run as they are, which takes no compiler. To compile again is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph

    step = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield found


@pytest.fixture
def not_compiled(monkeypatch):
    """The same step, as it is: for tests of everything around it."""
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: decode_one_token)


# ---------------------------------------------------------------------------------------------- one graph


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_one_graph_answers_rows_that_join_and_leave_at_any_moment(graphs, kind):
    """As without compilation, and whatever the number of running rows, prompts and lengths is."""
    engine, moments = Engine(model_of(kind), max_rows=3, prefill_every=1, compile=True), random.Random(3)
    assert len(graphs) == 1  # before the first row
    tickets, running = [], set()
    for seed in range(32):
        tickets.append(engine.admit(mixed_request(model_of(kind), seed)))
        for _ in range(moments.choice([0, 0, 1, 2, 5])):
            engine.step()
            running.add(engine.rows_running)
    while engine.step():
        pass
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), answer_alone(kind, seed))
    assert running == {1, 2, 3} and len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_another_engine_of_the_same_size_compiles_nothing(graphs):
    for _ in range(2):
        engine = Engine(model_of(), max_rows=2, compile=True)
        same(engine.admit(mixed_request(model_of(), 4)).result(), answer_alone("gemma", 4))
    assert len(graphs) == 1


def test_the_embedded_model_answers_mixed_requests_as_without(graphs):
    """Captions, sampled ones too, questions, choices, boxes and masks under their grammars."""
    pg = paligemma.load("tiny", dtype="float32", device="cpu")
    engines = [Engine(pg.model, pg.processor.tokenizer, max_rows=3, prefill_every=2, compile=c) for c in (True, False)]
    requests = list(embedded_requests(pg, 10))
    found, expected = ([engine.admit(request) for request in requests] for engine in engines)
    for ticket, other in zip(found, expected):
        same(ticket.result(), other.result())
        assert "".join(ticket.pieces()) == "".join(other.pieces())
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_embedded_model_in_slots_compiled_by_inductor():
    torch._dynamo.reset()
    pg = paligemma.load("tiny", dtype="float32", device="cpu")
    engine = Engine(pg.model, pg.processor.tokenizer, max_rows=3, prefill_every=2, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        tickets = [(engine.admit(request), request) for request in embedded_requests(pg, 15)]
        engine.run([ticket for ticket, _ in tickets])
    alone = Engine(pg.model, pg.processor.tokenizer)
    for ticket, request in tickets:
        same(ticket.result(), alone.admit(request).result())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_on_a_gpu_slots_replay_one_recorded_graph(kind):
    torch._dynamo.reset()
    model = copy.deepcopy(model_of(kind)).to("cuda")
    engine, alone = Engine(model, max_rows=3, prefill_every=1, compile=True), Engine(model, max_rows=1)
    requests = [mixed_request(model, seed, do_sample=False) for seed in range(12)]
    for ticket, request in [(engine.admit(request), request) for request in requests]:
        assert ticket.result().token_ids == alone.admit(request).result().token_ids


# ---------------------------------------------------------------------------------------------- anything may happen


@pytest.mark.usefixtures("not_compiled")
@anything_may_happen
def test_joins_cancellations_and_faults_leave_the_other_slots_alone(happening, kind, max_rows, prefill_every):
    engine = Engine(model_of(kind), max_rows=max_rows, prefill_every=prefill_every, compile=True)
    happens(engine, kind, max_rows, happening)


@pytest.mark.usefixtures("not_compiled")
def test_numbers_that_are_none_leave_the_slot_with_their_row():
    """As where activations overflow: neither the row beside it fails, nor the next one in its slot."""
    model = model_of()
    engine = Engine(model, max_rows=2, prefill_every=1, compile=True)
    beside, poisoned = engine.admit(plain(model, 30)), engine.admit(plain(model, 30, words=20))
    for _ in range(4):
        engine.step()
    assert engine._slots is not None
    with torch.inference_mode():
        engine._slots.cache.values[0][1] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        poisoned.result()
    for _ in range(3):
        engine.step()  # the slot goes on as padding
    after = engine.admit(plain(model, 30, words=2))  # shorter than what the slot held
    engine.run([beside, after])
    for ticket, words in ((beside, 3), (after, 2)):
        same(ticket.result(), Engine(model).admit(plain(model, 30, words)).result())


@pytest.mark.usefixtures("not_compiled")
def test_an_exception_ends_the_running_rows_and_the_next_ones_take_their_slots(monkeypatch):
    model = copy.deepcopy(model_of())
    engine = Engine(model, max_rows=3, compile=True)
    long = {"constraint": None, "max_new_tokens": 20, "eos_token_id": NO_EOS}
    running = [engine.admit(mixed_request(model, seed, **long)) for seed in range(3)]
    waiting = engine.admit(mixed_request(model, 7))
    engine.step()
    fail_in(monkeypatch, model, times=1, rows=3)
    engine.step()
    for ticket in running:
        with pytest.raises(MemoryError):
            ticket.result()
    same(waiting.result(), answer_alone("gemma", 7))


@pytest.mark.usefixtures("not_compiled")
def test_rows_end_also_where_their_slots_cannot_be_freed(monkeypatch):
    """As after an error of the GPU, after which every operation on it fails: nobody may wait for ever."""
    engine = Engine(model_of(), max_rows=2, compile=True)
    running = engine.admit(plain(model_of(), 9))
    engine.step()

    def fails(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(engine._slots, "decode", fails)
    monkeypatch.setattr(engine._slots, "keep", fails)
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.step()
    assert running.done and isinstance(running.error, RuntimeError)


@pytest.mark.usefixtures("not_compiled")
def test_a_prompt_that_could_not_be_copied_into_its_slot_leaves_the_slot_free(monkeypatch):
    model = model_of()
    engine = Engine(model, max_rows=2, prefill_every=1, compile=True)
    first = engine.admit(mixed_request(model, 3))
    engine.step()
    put, left = paligemma.StaticKVCache.put, [1]

    def fails_once(cache, *arguments):
        put(cache, *arguments)
        if left.pop() if left else 0:
            raise MemoryError("no memory left")

    monkeypatch.setattr(paligemma.StaticKVCache, "put", fails_once)
    second = engine.admit(plain(model, 5))
    while not second.done:
        engine.step()
    with pytest.raises(MemoryError):
        second.result()
    with pytest.raises(MemoryError):  # a failed join ends the rows that run, as in every engine
        first.result()
    same(engine.admit(mixed_request(model, 9)).result(), answer_alone("gemma", 9))


@pytest.mark.usefixtures("not_compiled")
def test_a_free_slot_writes_nothing_and_never_fills_up():
    """One long row beside free slots, for more steps than a slot has tokens: none of them runs over its end."""
    model = model_of()
    slots = Slots(model, 2, 200)
    assert slots.length == 255
    engine = Engine(model, max_rows=2, compile=True, slot_length=200)
    for _ in range(3):
        assert len(engine.admit(plain(model, 200)).result().token_ids) == 200


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("not_compiled")
def test_a_row_beyond_a_slot_is_refused_before_anything_is_computed(monkeypatch):
    model = copy.deepcopy(model_of())
    engine = Engine(model, max_rows=2, compile=True, slot_length=255)
    monkeypatch.setattr(model.language_model.model, "forward", lambda *_: pytest.fail("computed"))
    engine.admit(plain(model, 252))  # and three words
    with pytest.raises(ValueError, match="the row may have 256 tokens, and a slot of this engine holds 255: lower max"):
        engine.admit(plain(model, 253))
    with pytest.raises(ValueError, match="beams are not offered for rows that come and go: use generate"):
        engine.admit(replace(plain(model, 9), options=Options(9, num_beams=2)))
    assert engine.rows_waiting == 1


@pytest.mark.usefixtures("not_compiled")
def test_slots_take_their_bytes_at_once_and_not_more_than_there_may_be():
    """A slot is a multiple of 256 columns, one of them for a free slot to write to: for 256 tokens it has 512."""
    model = model_of()
    slot = 256 * bytes_per_token(model.config.text_config, torch.float32)
    assert Engine(model, max_rows=3, compile=True, slot_length=255).bytes_held == 3 * slot
    assert Engine(model, max_rows=1, cache_bytes=2 * slot, compile=True, slot_length=256).bytes_held == 2 * slot
    with pytest.raises(ValueError, match="lower max_rows or slot_length, or raise cache_bytes"):
        Engine(model, max_rows=1, cache_bytes=2 * slot - 1, compile=True, slot_length=256)
    with pytest.raises(
        ValueError, match=r"3 slots of 255 tokens take .* MB, and the cache may take .*: lower max_rows"
    ):
        Engine(model, max_rows=3, cache_bytes=2 * slot, compile=True, slot_length=255)
    for wrong in ({"slot_length": 255}, {"slot_length": 0, "compile": True}):
        with pytest.raises(ValueError, match="expected at least 1, and compile=True"):
            Engine(model, **wrong)


def test_what_cannot_be_compiled_is_told_at_once():
    model = copy.deepcopy(model_of())
    with pytest.raises(ValueError, match="give it to Engine, not to the options of a row"):
        Engine(model).admit(replace(plain(model, 9), options=Options(9, compile=True)))
    paligemma.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"has layers that cannot be compiled \(.*\): load it without `quantize`"):
        Engine(model, compile=True)
