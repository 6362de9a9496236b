"""Answers rows with a model: each becomes a line, whatever is wrong with it, and no row harms its neighbours.

    rows -> opened ahead, in threads -> encoded -> engine: up to `batch_size` rows run together, and a row that ends
    makes place for the next one -> lines, in the order in which they end

A picture is brought to the model's square as soon as it is opened, so that no more than a few are in memory at their
full size. What fails together with others is tried again: with half as many rows where memory ran out, alone after any
other error. So an error meets the row it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.answers.constraints import Constraint, NothingAllowed
from paligemma.answers.parsing import NUM_LOC
from paligemma.batch.drawings import copy_drawing, draw_answer
from paligemma.batch.pictures import bytes_of, open_picture, places_of
from paligemma.batch.rows import InputRow, Line, RowFailure, answered, failed, name_of
from paligemma.batch.settings import Settings
from paligemma.devices import is_out_of_memory
from paligemma.engine import Engine, Request, Ticket
from paligemma.generation import Options, TooLong, check_length
from paligemma.images import preprocess
from paligemma.tasks import asks_for_items, budget_of, task_of

if TYPE_CHECKING:
    from paligemma.answers.results import Answer
    from paligemma.inference import PaliGemma

OPENERS = 2  # threads that open pictures
REMEMBERED = 1024  # answers that --dedupe keeps: an answer with masks is large, and memory stays flat


def load_answer(settings: Settings, device: str | None = None, draw: Path | None = None) -> AnswerRows:
    """Loads the model of a run. device: in place of the settings' own. draw: see `AnswerRows`."""
    from paligemma.inference import load

    pg = load(
        settings.model, device=device or settings.device, dtype=settings.dtype, quantize=settings.quantize,
        revision=settings.revision, image_size=settings.image_size, loc_scale=settings.loc_scale,
        device_map=settings.device_map,
    )  # fmt: skip
    return AnswerRows(pg, settings, draw)


@dataclass(frozen=True)
class Opened:
    """A row whose pictures are open. pixels: float32 [3, side, side] of each. size: (W, H) of the first. failure: why
    one of them cannot be opened. digest: equal for rows with equal bytes and prompts, with --dedupe."""

    row: InputRow
    pixels: tuple[torch.Tensor, ...] = ()
    size: tuple[int, int] | None = None
    failure: RowFailure | None = None
    digest: str | None = None


Outcome = tuple[Opened, Line]


class AnswerRows:
    """A model that answers rows in the way that the settings say. draw: a folder for pictures with boxes over them."""

    def __init__(self, pg: PaliGemma, settings: Settings, draw: Path | None = None) -> None:
        self.pg, self.settings, self.draw = pg, settings, draw
        # Asked for once: the official codec comes with the first `segment` row, on which no other row may depend.
        self.own_codec = pg.loaded_codec
        self.limit = settings.batch_size  # rows that run together: fewer after memory ran out
        self.grammars: OrderedDict[str, Constraint | None] = OrderedDict()
        self.remembered: OrderedDict[str | None, Line] = OrderedDict()  # by digest

    def __call__(
        self, rows: Sequence[InputRow], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[InputRow, Line]]:
        """Each row with its line, in the order in which they are ready. After stop() none is begun."""
        self.limit = min(self.settings.batch_size, 2 * self.limit)
        with ThreadPoolExecutor(OPENERS) as pool:
            opened = ahead(pool, self.opened, rows, self.settings.batch_size)
            lines = self.once(opened, stop) if self.settings.dedupe else self.answered(opened, stop)
            for one, line in lines:
                yield one.row, line

    # ------------------------------------------------------------------------------------------ opening

    def opened(self, row: InputRow) -> Opened:
        """The pictures of a row as the model takes them. Called in a thread."""
        side, pixels, size = self.pg.processor.image_size, [], None
        try:
            for place in places_of(row.image):
                picture = open_picture(place, self.settings.max_pixels)
                size = size or picture.size
                pixels.append(preprocess(picture, side))
            return Opened(row, tuple(pixels), size, None, self.digest(row) if self.settings.dedupe else None)
        except Exception as error:
            return Opened(row, failure=RowFailure(kind_of(error), message_of(error)))

    def digest(self, row: InputRow) -> str:
        digest = hashlib.blake2b(json.dumps([row.prompt, dict(row.options)]).encode("utf-8", "surrogatepass"))
        for place in places_of(row.image):
            digest.update(hashlib.blake2b(bytes_of(place)).digest())
        return digest.hexdigest()

    def once(self, opened: Iterable[Opened], stop: Callable[[], bool]) -> Iterator[Outcome]:
        """As `answered`, but rows with the same digest are answered once, and the others get copies of the line."""
        copies: dict[str | None, list[Opened]] = {}  # of rows that are being answered
        ready: deque[Outcome] = deque()

        def new() -> Iterator[Opened]:
            for one in opened:
                if one.digest in self.remembered:
                    self.remembered.move_to_end(one.digest)
                    ready.append((one, self.copied(self.remembered[one.digest], one.row)))
                elif one.digest in copies:
                    copies[one.digest].append(one)
                else:
                    if one.digest is not None:
                        copies[one.digest] = []
                    yield one

        for one, line in self.answered(new(), stop):
            yield one, line
            if one.digest is not None:
                if line["error"] is None:  # another time it may go well
                    self.remembered[one.digest] = line
                yield from ((other, self.copied(line, other.row)) for other in copies.pop(one.digest))
            while ready:
                yield ready.popleft()
            while len(self.remembered) > REMEMBERED:
                self.remembered.popitem(last=False)
        yield from ready

    def copied(self, line: Line, row: InputRow) -> Line:
        """The line of another row with the same answer, whose drawing is copied as well."""
        if self.draw is not None and (line["detections"] or line["segments"]):
            copy_drawing(self.draw, line["id"], row.id)
        return {**line, "id": row.id, "image": name_of(row.image), "attempts": 1, "ms": 0}

    # ------------------------------------------------------------------------------------------ answering

    def answered(self, opened: Iterable[Opened], stop: Callable[[], bool]) -> Iterator[Outcome]:
        """The lines of opened rows, each as soon as it is there. Rows that failed in company are answered alone in the
        end."""
        alone: list[Opened] = []
        yield from self.run(iter(opened), stop, alone)
        for one in alone:
            if stop():
                return
            yield from self.run(iter([one]), stop, None)

    def run(self, opened: Iterator[Opened], stop: Callable[[], bool], alone: list[Opened] | None) -> Iterator[Outcome]:
        """Runs rows through one engine. alone: takes what failed in company and is to be tried again; None where a
        failure is final."""
        limit = self.limit if alone is not None else 1
        engine, running = self.engine(limit), dict[Ticket, Opened]()
        again: deque[Opened] = deque()  # what ran out of memory, for an engine with fewer rows
        crowded = False  # the pictures of a row did not fit beside the rows that run
        while True:
            free = limit - len(running)
            joining: list[Opened] = []
            if not stop() and not crowded and free >= max(1, limit // 4):
                joining = [again.popleft() for _ in range(min(free, len(again)))]
                joining += islice(opened, free - len(joining))
                for one, ticket_or_line in self.admitted(engine, joining):
                    if isinstance(ticket_or_line, Ticket):
                        running[ticket_or_line] = one
                    elif running and one.failure is None and needs_memory(ticket_or_line):
                        again.append(one)
                        crowded = True
                    else:
                        yield one, ticket_or_line
            if not running:
                if joining:
                    continue
                return
            company = len(running) > 1
            engine.step()
            for ticket in [ticket for ticket in running if ticket.done]:
                one = running.pop(ticket)
                try:
                    line, answer = self.line(one, ticket)
                except Exception as error:
                    kind = kind_of(error)
                    if kind == "out_of_memory" and limit > 1:
                        again.append(one)
                    elif company and alone is not None:
                        alone.append(one)
                    else:
                        yield one, failed(one.row, kind, message_of(error))
                else:
                    self.drawn(one, answer)
                    yield one, line
            if again and not running and limit > 1:
                limit = self.limit = limit // 2
                engine, crowded = self.engine(limit), False
            elif engine.failure is not None:
                engine = self.engine(limit)

    def engine(self, limit: int) -> Engine:
        return Engine(self.pg.model, max_rows=limit, cache_bytes=float("inf"), prefill_every=None)

    def wants_masks(self, row: InputRow) -> bool:
        return task_of(row.prompt) == "segment" and self.settings.masks != "none"

    def admitted(self, engine: Engine, rows: Sequence[Opened]) -> Iterator[tuple[Opened, Ticket | Line]]:
        """Rows with their tickets; with their lines where they cannot be answered or need no engine."""
        requests: list[tuple[Opened, Request]] = []
        for one in rows:
            if self.wants_masks(one.row):
                _ = self.pg.codec  # it may have to be downloaded: an error of that concerns no single row
            try:
                if one.failure is not None:
                    raise one.failure
                if self.settings.beams == 1:
                    requests.append((one, self.request(one)))
                    continue
                line, answer = self.line(one, None)
            except Exception as error:
                yield one, failed(one.row, kind_of(error), message_of(error))
            else:
                self.drawn(one, answer)
                yield one, line
        for (one, request), features in zip(requests, self.encoded([one for one, _ in requests])):
            if isinstance(features, Exception):
                yield one, failed(one.row, kind_of(features), message_of(features))
                continue
            try:
                yield one, engine.admit(replace(request, image_features=features))
            except ValueError as error:
                yield one, failed(one.row, kind_of(error), message_of(error))

    def encoded(self, rows: Sequence[Opened]) -> list[torch.Tensor | Exception | None]:
        """The features of each row's pictures [n, P, D], None for a row without, or why they cannot be had. All are
        encoded together; where that fails, in halves."""
        pixels = [one for row in rows for one in row.pixels]
        try:
            features = None
            if pixels:
                with torch.inference_mode():
                    features = self.pg.model.encode_image(torch.stack(pixels).to(self.pg.model.device))
        except Exception as error:
            if len(rows) == 1:
                return [error]
            half = len(rows) // 2
            return [*self.encoded(rows[:half]), *self.encoded(rows[half:])]
        if features is None:
            return [None] * len(rows)
        parts = features.split([len(row.pixels) for row in rows])
        return [part if len(part) else None for part in parts]

    def request(self, one: Opened) -> Request:
        """The row as the engine takes it, without its pictures. RowFailure or TooLong where it cannot be answered."""
        prompt = one.row.prompt
        options = self.options(one.row)
        try:
            inputs = self.pg.processor.lay_out([prompt], [len(one.pixels)])
        except ValueError as error:
            raise RowFailure("internal", message_of(error)) from None
        check_length(self.pg.model.config, inputs["attention_mask"], options.max_new_tokens)
        return Request(inputs["input_ids"][0], None, options, self.constraint(one.row))

    def options(self, row: InputRow) -> Options:
        """How the tokens of a row are chosen: as the settings say, but for what the row itself says."""
        settings, own, tokenizer = self.settings, row.options, self.pg.processor.tokenizer
        budget = own.get("max_new_tokens") or settings.max_new_tokens or budget_of(row.prompt)
        names = ("temperature", "top_k", "top_p")
        # A row without a temperature samples where the run does: its own top_k or top_p alone change nothing, as in
        # `paligemma serve`.
        samples = own.get("temperature", any(getattr(settings, name) is not None for name in names))
        chosen: dict[str, Any] = {}
        if samples:
            chosen = {name: own.get(name, getattr(settings, name)) for name in names}
            chosen |= {"temperature": chosen["temperature"] or 1.0, "do_sample": True}
            chosen["seed"] = own.get("seed", seed_of(settings.seed, row.id))
        watch = (tokenizer.first_loc_id, NUM_LOC)
        return Options(budget, num_beams=settings.beams, watch=watch, num_tokens=len(tokenizer), **chosen)

    def constraint(self, row: InputRow) -> Constraint | None:
        """The grammar of a detect or segment prompt. RowFailure where it cannot be made: no label, say."""
        if not asks_for_items(row.prompt) or not row.options.get("constrained", not self.settings.free):
            return None
        if row.prompt not in self.grammars:
            try:
                self.grammars[row.prompt] = self.pg.grammar(row.prompt, self.settings.forbid_repeats)
            except ValueError as error:
                raise RowFailure("constraint", message_of(error)) from None
            if len(self.grammars) > 64:
                self.grammars.popitem(last=False)
        return self.grammars[row.prompt]

    def searched(self, one: Opened) -> Any:
        """The answer of a beam search, which has no place in an engine of rows that come and go."""
        from paligemma.engine import generate

        request, (features,) = self.request(one), self.encoded([one])
        if isinstance(features, Exception):
            raise features
        inputs: dict[str, Any] = {"input_ids": request.prompt[None]}
        if features is not None:
            inputs["image_features"] = features
        options = {**vars(request.options), "constraint": request.constraint}
        return generate(self.pg.model, inputs, **options)[0]

    def line(self, one: Opened, ticket: Ticket | None) -> tuple[Line, Answer]:
        """The line of a row that has ended (without a ticket: of a beam search). Raises the row's error."""
        generated = self.searched(one) if ticket is None else ticket.result()
        codec = self.pg.codec if self.wants_masks(one.row) else self.own_codec
        answer = self.pg.to_answer(generated, one.size, codec=None if self.settings.masks == "none" else codec)
        ms = 0.0
        if ticket is not None and ticket.ended is not None and ticket.started is not None:
            ms = (ticket.ended - ticket.started) * 1000
        return answered(one.row, answer, one.size, self.settings.masks, ms), answer

    def drawn(self, one: Opened, answer: Answer) -> None:
        """Draws the answer, where that is asked for. OSError where that fails, which ends the run: a full disk, say,
        concerns no single row."""
        if self.draw is None:
            return
        try:
            draw_answer(self.draw, one.row, answer, self.settings.max_pixels)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"the answer to {one.row.id!r} cannot be drawn: {message_of(error)}") from error


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[InputRow], Opened], rows: Iterable[InputRow], count: int
) -> Iterator[Opened]:
    """function(row) of each row in order; up to `count` of them are computed before they are asked for."""
    waiting: deque[Future[Opened]] = deque()
    left = iter(rows)
    try:
        while True:
            waiting.extend(pool.submit(function, row) for row in islice(left, count - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def seed_of(seed: int | None, name: str) -> int | None:
    """The seed of one row: the same in whatever order rows are answered."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def kind_of(error: BaseException) -> str:
    """Which of `rows.KINDS` an error is that came while a row was answered."""
    if isinstance(error, RowFailure):
        return error.kind
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, TooLong):
        return "prompt_too_long"
    return "constraint" if isinstance(error, NothingAllowed) else "internal"


def needs_memory(line: Line) -> bool:
    return line["error"] is not None and line["error"]["kind"] == "out_of_memory"


def message_of(error: BaseException) -> str:
    return error.message if isinstance(error, RowFailure) else str(error) or type(error).__name__
