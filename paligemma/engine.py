"""Rows that come and go: many requests answered by one model, each with options of its own.

    engine = Engine(model, tokenizer)
    ticket = engine.admit(Request(prompt, image_features, Options(max_new_tokens=64)))
    for token in ticket: ...        # ids as they come
    ticket.result()                 # Generated, or the error of this row

    step            1  2  3  4  5  6  7  8  9
    row A           P  a     a  a  a  .
    row B           P  b     b  .                 P reads a prompt (prefill) and gives the first token;
    row C (later)         P  c  c  c  c  c  .     lower-case letters are decode steps, one for all running rows

A batch that waits for its slowest row computes with fewer and fewer rows. Here a row leaves the batch and the cache
with its last token, and another one takes its place while the others run (Orca, Yu et al., OSDI 2022, section 4.1). Its
prompt is read in a pass of its own, since the prefix looks in both directions, and the two caches are joined
(`kv_cache.py`). So an answer does not depend on what runs beside it.

`generate` and `stream` are clients: they admit their rows and step until all have ended. Only beams
(`generation.beam_search`) and answers compiled as a whole (`compiled.generate_compiled`) have loops of their own.

A row's own fault (a constraint that raises or allows nothing, logits that are NaN or infinite) ends that row alone. Any
other exception ends the rows that were in that pass: those that were about to join, or all that run. The others go on.
After three such exceptions in succession the engine has failed.

What happens to a single row stands in `running_rows.py`. With `compile=True` a decode step is one compiled graph, and
the rows have slots of fixed size in place of a cache that grows (`slots.py`).

Letters: N rows running, S prompt length, P image patches, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from paligemma.answers.constraints import one_per_row
from paligemma.arguments import check_model
from paligemma.compiled import columns_for, generate_compiled
from paligemma.devices import free_memory
from paligemma.generation import (
    Generated,
    Options,
    Rules,
    TooLong,
    beam_search,
    check_prompts,
    decode,
    few_ids,
    forced_ids,
    prepare,
    read_prompt,
    seeds_of,
)
from paligemma.kv_cache import KVCache, bytes_per_token
from paligemma.modeling_gemma import check_image_tokens
from paligemma.running_rows import RunningRow, allowed_for, batch_of, choose_tokens, unread_of
from paligemma.slots import Slots
from paligemma.tickets import Request, Ticket

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
    from paligemma.tokenizer import Tokenizer

MOST_FAILURES = 3  # in a row, after which the engine has failed
SLOT_TEXT = 767  # tokens of a slot beside those of one picture: the prompt's words and the answer

# How many multiply-adds one prefill may take while other rows wait for it: a few tenths of a second.
MOST_PREFILL_WORK = {"cpu": 2e10, "cuda": 1e13, "mps": 1e12}


class Engine:
    """Answers requests with one model. `admit` from any thread; one thread calls `step` until it returns False.

    tokenizer: for `Ticket.pieces`. max_rows: how many rows run together. cache_bytes: what their keys and values may
    take, counted with all of their budgets; None: half of the memory that is free now, math.inf: no limit.
    prefill_every: while rows run, so many decode steps at least between two prefills, so that new rows never stop the
    running ones for long. With None new prompts are read as soon as a quarter of the rows is free, which answers many
    requests in the least time and lets each wait longer.
    compile: decode with one compiled graph, for GPUs. It is compiled here, which takes about a minute. Each of the
    max_rows rows then has a slot of `slot_length` tokens, prompt and answer together; None: room for one picture and
    767 more. All slots are allocated here. Raises ValueError where they do not fit into cache_bytes, and for a model
    with kernels of our own (`quantize`), which cannot be compiled.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        tokenizer: Tokenizer | None = None,
        max_rows: int = 16,
        cache_bytes: float | None = None,
        prefill_every: int | None = 8,
        compile: bool = False,
        slot_length: int | None = None,
    ):
        if max_rows < 1 or (prefill_every is not None and prefill_every < 1):
            raise ValueError(f"max_rows is {max_rows}, prefill_every {prefill_every}, expected 1 at least")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_every = max_rows, prefill_every
        self.cache_bytes = free_memory(model.device) / 2 if cache_bytes is None else cache_bytes
        self.failure: BaseException | None = None  # what the engine has failed with
        self._token_bytes = bytes_per_token(model.config.text_config, model.dtype)
        self._waiting: deque[RunningRow] = deque()
        self._running: list[RunningRow] = []  # the rows of the cache, in its order
        self._cache: KVCache | None = None
        self._steps_since_prefill = 0
        self._failures = 0
        self._rules: dict[object, Rules] = {}
        self._admitting, self._stepping = threading.Lock(), threading.Lock()
        self._driver: threading.Thread | None = None
        if slot_length is not None and (not compile or slot_length < 1):
            raise ValueError(f"slot_length is {slot_length}, expected at least 1, and compile=True")
        self._slots = self._make_slots(slot_length) if compile else None

    def _make_slots(self, length: int | None) -> Slots:
        if length is None:
            length = self.model.config.vision_config.num_patches + SLOT_TEXT
        needed = self.max_rows * columns_for(length) * self._token_bytes
        if needed > self.cache_bytes:
            raise ValueError(
                f"{self.max_rows} slots of {length:,} tokens take {needed / 1e6:,.1f} MB, and the cache may take "
                f"{self.cache_bytes / 1e6:,.1f}: lower max_rows or slot_length, or raise cache_bytes"
            )
        return Slots(self.model, self.max_rows, length)

    # ------------------------------------------------------------------------------------------ from any thread

    def admit(self, request: Request, listener: Callable[[], object] | None = None) -> Ticket:
        """Takes a request and returns at once. Nothing is computed yet.

        listener: called without arguments after each token and at the end, in the thread that drives the engine (or
        cancels); it must return at once. For asyncio: `lambda: loop.call_soon_threadsafe(event.set)`.
        Raises ValueError for a request that can never be answered: one too long for the model's positions or the
        cache (TooLong), one whose pictures do not fit its prompt; RuntimeError if the engine has failed.
        """
        options, prompt = request.options, request.prompt
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"the prompt has shape {list(prompt.shape)}, expected [S]: one row, S at least 1")
        if options.num_beams > 1:
            raise ValueError("beams are not offered for rows that come and go: use generate")
        if options.compile and self._slots is None:
            raise ValueError(
                "compile=True is for all rows of an engine: give it to Engine, not to the options of a row"
            )
        rules = self._rules_of(options)
        check_prompts(self.model.config, batch_of([request]), options.max_new_tokens, rules.eos)
        check_image_tokens(prompt == self.model.config.image_token_index, request.image_features)
        self._check_room(len(prompt) + options.max_new_tokens)
        (constraint,) = one_per_row(options.constraint, 1) if request.constraint is None else (request.constraint,)
        generator = None
        if options.do_sample:
            generator = torch.Generator(self.model.device).manual_seed(*seeds_of(options, 1))
        row = RunningRow(request, Ticket(self, listener), rules, constraint, generator)
        with self._admitting:
            if self.failure is not None:
                raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
            self._waiting.append(row)
        return row.ticket

    def _check_room(self, tokens: int) -> None:
        """TooLong for a row that has so many tokens, prompt and answer together, and can never run."""
        needed = tokens * self._token_bytes
        if self._slots is not None and tokens > self._slots.length:
            raise TooLong(
                f"the row may have {tokens:,} tokens, and a slot of this engine holds {self._slots.length:,}: "
                "lower max_new_tokens, or raise the engine's slot_length"
            )
        if self._slots is None and needed > self.cache_bytes:
            raise TooLong(
                f"the row's keys and values take up to {needed / 1e6:,.1f} MB, and the cache may take "
                f"{self.cache_bytes / 1e6:,.1f}: lower max_new_tokens or raise cache_bytes"
            )

    def runs_elsewhere(self) -> bool:
        """Whether another thread drives this engine."""
        driver = self._driver
        return driver is not None and driver is not threading.current_thread() and driver.is_alive()

    @property
    def rows_running(self) -> int:
        return len(self._running)

    @property
    def rows_waiting(self) -> int:
        return sum(not row.ticket.done for row in list(self._waiting))

    @property
    def bytes_held(self) -> int:
        """What the keys and values of the running rows take; of all slots, where there are slots."""
        if self._slots is not None:
            return self._slots.nbytes
        cache = self._cache
        return 0 if cache is None else len(cache.lengths) * cache.max_length * self._token_bytes

    # ------------------------------------------------------------------------------------------ the loop

    def step(self) -> bool:
        """One pass through the model: the prompts of rows that join, or the next token of all running rows.

        The calling thread drives the engine from now on. Returns False when no row is running or waiting.
        """
        self._driver = threading.current_thread()
        return self.advance()

    @torch.inference_mode()
    def advance(self) -> bool:
        """`step` for whoever waits for an answer while no thread drives the engine."""
        with self._stepping:
            at_risk = self._running
            try:
                self._keep([n for n, row in enumerate(self._running) if not row.ticket.done])  # others were cancelled
                at_risk = joining = self._joining()
                if joining:
                    going_on, cache = self._prefill(joining)
                    at_risk = [*self._running, *joining]
                    self._join(going_on, cache)
                elif self._running:
                    at_risk = self._running
                    self._decode()
                self._failures = 0
            except BaseException as error:
                self._fail(at_risk, error)
                if not isinstance(error, Exception):  # Ctrl-C
                    raise
            return bool(self._running or self._waiting)

    def run(self, tickets: Sequence[Ticket], until_started: bool = False) -> list[Ticket]:
        """Takes steps until these rows have ended, or only until all of them run. Returns those that have not ended.

        The first error of any of them is raised at once.
        """
        left = [*tickets]
        while left := [ticket for ticket in left if not ticket.done or ticket.error is not None]:
            for ticket in left:
                if ticket.error is not None:
                    raise ticket.error
            if until_started and all(ticket.started is not None for ticket in left):
                break
            self.step()
        return left

    def _joining(self) -> list[RunningRow]:
        """The rows whose prompts are read now, taken from those that wait."""
        while self._waiting and self._waiting[0].ticket.done:
            self._waiting.popleft()
        free = self.max_rows - len(self._running)
        if self._running and self.prefill_every is None:
            if free < min(max(1, self.max_rows // 4), len(self._waiting)):
                return []
        elif self._running and self._steps_since_prefill < (self.prefill_every or 0):
            return []
        joining: list[RunningRow] = []
        while self._waiting and len(joining) < free and self._may_join([*joining, self._waiting[0]]):
            row = self._waiting.popleft()
            if not row.ticket.done:
                joining.append(row)
        return joining

    def _may_join(self, rows: list[RunningRow]) -> bool:
        """Whether these rows may be read together now: their keys and values fit, and it does not take too long."""
        every = [*self._running, *rows]
        if self._slots is None:
            used = max(0 if self._cache is None else self._cache.used, *(len(row.request.prompt) for row in rows))
            columns = used + max(row.columns_to_come for row in every)
            if len(every) * columns * self._token_bytes > self.cache_bytes:
                return False
        if self.prefill_every is None or len(rows) == 1:
            return True
        work = sum(len(row.request.prompt) for row in rows) * self._work_per_token
        return work <= MOST_PREFILL_WORK.get(self.model.device.type, math.inf)

    @cached_property
    def _work_per_token(self) -> int:
        """Multiply-adds of the decoder layers for one token of a prompt."""
        text = self.model.config.text_config
        heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
        return text.num_hidden_layers * text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)

    def _prefill(self, rows: list[RunningRow]) -> tuple[list[RunningRow], KVCache]:
        """Reads the prompts of these rows and chooses their first tokens: the rows that go on, and their cache."""
        self._steps_since_prefill = 0
        for row in rows:
            row.ticket.started = time.perf_counter()
        device = self.model.device
        prompt = {name: tensor.to(device) for name, tensor in batch_of([row.request for row in rows]).items()}
        allowed, fitting = allowed_for(rows, self.model.config.text_config.vocab_size)
        room = max(row.columns_to_come for row in rows) if self._slots is None else 0
        logits, cache = read_prompt(self.model, prompt, room)
        kept = choose_tokens(rows, logits, allowed, fitting, self.model.dtype)
        if len(kept) < len(rows):
            cache.select(torch.tensor(kept, dtype=torch.int64, device=device))
        return [rows[n] for n in kept], cache

    def _join(self, rows: list[RunningRow], cache: KVCache) -> None:
        """Adds rows whose prompts were read to those that run."""
        if self._slots is not None:
            self._slots.join(cache)
        elif self._cache is None:
            self._cache = cache if rows else None
        elif rows:
            self._cache.join(cache)
        self._running += rows

    def _decode(self) -> None:
        """The next token of all running rows."""
        self._steps_since_prefill += 1
        rows = self._running
        allowed, fitting = allowed_for(rows, self.model.config.text_config.vocab_size)
        if self._slots is not None:
            logits = self._slots.decode([row.unread.pop() for row in rows])
        else:
            logits = self._read_unread(rows, allowed)
        self._keep(choose_tokens(rows, logits, allowed, fitting, self.model.dtype))

    def _read_unread(self, rows: list[RunningRow], allowed: list[Tensor | None]) -> Tensor:
        """Reads what was chosen into the cache that grows: the logits of the tokens after it, [N, V]."""
        cache, V, device = self._cache, self.model.config.text_config.vocab_size, self.model.device
        assert cache is not None
        if (forced := forced_ids(allowed)) is not None:  # nothing to ask the model
            return torch.full((len(rows), V), -math.inf, device=device).scatter_(1, forced.to(device), 0.0)
        tokens, valid = unread_of(rows, device)
        cache.grow(cache.used + max(row.columns_to_come for row in rows))
        only = few_ids(allowed, V)
        logits = decode(self.model, tokens, cache, None if only is None else only.to(device), valid)
        for row in rows:
            row.unread.clear()
        return logits

    def _keep(self, kept: list[int]) -> None:
        """Only these of the running rows go on."""
        if len(kept) == len(self._running):
            return
        self._running = [self._running[n] for n in kept]
        if self._slots is not None:
            self._slots.keep(kept)
        elif not kept:
            self._cache = None
        elif self._cache is not None:
            self._cache.select(torch.tensor(kept, device=self.model.device))
            self._cache.trim()

    def _fail(self, rows: list[RunningRow], error: BaseException) -> None:
        """Ends these rows: either all that run, or only some that were about to join. What waits stays."""
        self._failures += 1
        none_runs = not self._running or self._running[0] in rows
        if self._failures >= MOST_FAILURES:  # nothing stays
            with self._admitting:
                self.failure = error
                rows = [*rows, *self._running, *self._waiting]
                none_runs = True
                self._waiting.clear()
        for row in rows:
            row.ticket.end(error)
        if none_runs:
            self._keep([])  # last of all: after an error of the GPU this fails as well

    def _rules_of(self, options: Options) -> Rules:
        """Shared by rows with the same options, because a row of bools for each of 257,216 ids is not small."""
        key = options.eos_token_id, options.num_tokens, options.suppress_tokens, options.watch
        rules = self._rules.get(key)
        if rules is None:
            if len(self._rules) >= 64:
                self._rules.clear()  # another thread may do so at any moment
            rules = self._rules[key] = Rules(self.model, options)
        return rules


# ---------------------------------------------------------------------------------------------- generate, stream

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _takes_the_fields_of(
    options: Callable[Parameters, Options],
) -> Callable[
    [Callable[..., Result]],
    Callable[Concatenate[PaliGemmaForConditionalGeneration, Mapping[str, Any], Parameters], Result],
]:
    """The parameters after the first two are the fields of `Options`, for type checkers and for `help` alike."""

    def decorate(function: Any) -> Any:
        signature = inspect.signature(function)
        first_two = list(signature.parameters.values())[:2]
        fields = inspect.signature(options).parameters.values()
        function.__signature__ = signature.replace(parameters=[*first_two, *fields])
        return function

    return decorate


@_takes_the_fields_of(Options)
@torch.inference_mode()
def generate(
    model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], *options: Any, **named: Any
) -> list[Generated]:
    """The answer to every row of a batch.

    inputs: what the processor returns, padded on either side. Instead of pixel_values it may hold image_features, from
        `model.encode_image`: [n, P, D], the images of all rows one after the other; N prompts about one image pass
        `features.expand(N, -1, -1)`. Other keys (labels) are not looked at. Tokens of type 1 are the beginning of the
        answer, which is then continued; the continuation alone is returned.
    All else: the fields of `Options`, explained there.

    Returns one `Generated` per row. In float32 a greedy answer is the same alone and in any batch (see the tests).
    Raises ValueError on options out of range, on rows whose prompt and budget exceed the model's positions (before any
    work), on rows that already end in eos, and where a constraint allows nothing.
    """
    check_model(model)
    given = Options(*options, **named)
    if given.num_beams > 1:
        return beam_search(model, inputs, given)
    if given.compile:
        return generate_compiled(model, inputs, given)
    requests = requests_of(model, inputs, given)
    engine = Engine(model, max_rows=max(1, len(requests)), cache_bytes=math.inf, prefill_every=None)
    tickets = [engine.admit(request) for request in requests]
    engine.run(tickets)
    return [ticket.result() for ticket in tickets]


def requests_of(model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], options: Options) -> list[Request]:
    """The rows of a batch, checked, and their images encoded. Raises what `generate` raises before it begins."""
    prompt = prepare(model, inputs)
    ids, types, rows = prompt["input_ids"], prompt["token_type_ids"], len(prompt["input_ids"])
    constraints, seeds = one_per_row(options.constraint, rows), seeds_of(options, rows) if options.do_sample else None
    rules = Rules(model, options)
    if not rows:
        return []
    check_prompts(model.config, prompt, options.max_new_tokens, rules.eos)
    is_image = ids == model.config.image_token_index
    features = prompt.get("image_features")
    if (pixels := prompt.get("pixel_values")) is not None:
        features = model.encode_image(pixels)
    check_image_tokens(is_image, features)
    counts = [0] * rows if features is None else (is_image.sum(-1) // features.shape[1]).tolist()
    requests, first = [], 0
    for n, length in enumerate(prompt["attention_mask"].sum(-1).tolist()):
        own = replace(options, seed=None if seeds is None else seeds[n], constraint=None)
        pictures = features[first : first + counts[n]] if features is not None and counts[n] else None
        requests.append(Request(ids[n, -length:], pictures, own, constraints[n], types[n, -length:]))
        first += counts[n]
    return requests


def stream(
    model: PaliGemmaForConditionalGeneration,
    inputs: Mapping[str, Any],
    tokenizer: Tokenizer,
    max_new_tokens: int = 128,
    **named: Any,
) -> Generator[str, None, Generated]:
    """The answer to a single row in pieces of text, as they come.

    A piece never ends inside a character: neither between the bytes of one that the vocabulary spells in bytes, nor
    before a combining mark or in the middle of a joined emoji. The last character is therefore held back until the next
    one begins. The pieces joined are `tokenizer.decode` of the whole answer.

    named: the fields of `Options`; num_tokens is known. The generator returns the `Generated`: `answer = yield from
    stream(...)`. Raises what `generate` does, at the call, and ValueError for beams: one that was shown may lose later.
    """
    options = Options(max_new_tokens, **{"num_tokens": len(tokenizer), **named})
    if options.num_beams > 1:
        raise ValueError("streaming with beams is not offered: which beam wins is known at the end; use generate")
    if options.compile:
        raise ValueError("streaming with compile=True is not offered: use generate")
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and len(ids) != 1:
        raise ValueError(f"inputs has {len(ids)} rows, and a stream is of one: use generate")
    with torch.inference_mode():
        (request,) = requests_of(model, inputs, options)
    engine = Engine(model, tokenizer, max_rows=1, cache_bytes=math.inf, prefill_every=None)
    return engine.admit(request).pieces()
