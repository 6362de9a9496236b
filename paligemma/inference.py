"""Load PaliGemma once, then caption, ask, read text, detect, segment.

    pg = paligemma.load("tiny")
    pg.caption(image).text                          "a red car and two dogs on a blue background"
    pg.ask(image, "how many dogs are there?").text  "two"
    pg.detect(image, ["dog", "car"])                [Detection(label="dog", box=(12.0, 40.5, 97.0, 118.5), ...), ...]

Every method takes one image or a list of them, one prompt or a list of them; lists in, list out:

    one image,  one prompt   -> one answer
    one image,  N prompts    -> N answers; the image is encoded once
    N images,   one prompt   -> N answers
    N images,   N prompts    -> N answers, pair by pair
    a tuple of images counts as one image: a row that sees all of them
    None in place of an image is a row without one

As a script:

    python -m paligemma.inference --model_path DIR --prompt "caption en" --image_file_path photo.jpg
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict, TypeVar, overload

import torch
from torch import Tensor, nn

from paligemma.answers.constraints import Constraint, one_per_row
from paligemma.answers.drawing import Style, draw
from paligemma.answers.grammar import ChoiceGrammar, DetectionGrammar
from paligemma.answers.mask_codec import CODEC_FILE, MaskCodec
from paligemma.answers.parsing import NUM_LOC, parse_tokens
from paligemma.answers.results import Answer, Detection, Items, Segment
from paligemma.answers.scores import CALIBRATION_FILE, IDENTITY, Calibration
from paligemma.arguments import is_whole
from paligemma.compiled import generate_compiled
from paligemma.encoding import encode_ahead
from paligemma.engine import Engine, Ticket, requests_of, stream
from paligemma.generation import Generated, Options, beam_search, check_length
from paligemma.images import ImageInput, ImageT, Picture, load_image, looks_swapped
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tasks import BOX_BUDGET, TEXT_BUDGET, asks_for_items, split_labels, task_of
from paligemma.terminal import error_line, printable
from paligemma.utils import load_with_folders
from paligemma.weights.finding import first_with

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack

    from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from paligemma.tokenizer import Tokenizer

__all__ = ["Answer", "PaliGemma", "Sampling", "load"]

ImageOrNone: TypeAlias = ImageInput | None  # what a row of the batch sees; None: no picture
ImageOrNoneT = TypeVar("ImageOrNoneT", bound=ImageOrNone)  # of a list, as `ImageT`
Size: TypeAlias = tuple[int, int]  # (W, H) of a picture


class Sampling(TypedDict, total=False):
    """How tokens are chosen: the fields of `paligemma.Options` of these names, explained there."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    num_beams: int
    length_penalty: float
    seed: int | Sequence[int] | None
    suppress_tokens: Sequence[int] | None
    compile: bool


def load(
    model: str | os.PathLike[str] = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    loc_scale: int = 1024,
    device_map: str | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    extra: Mapping[str, nn.Module] | None = None,
) -> PaliGemma:
    """Opens a checkpoint.

    model: "tiny" (ships with the package), a hub id such as "google/paligemma2-3b-mix-224", a folder (an adapter's too)
    or a big_vision `.npz`. device: default CUDA, else MPS, else CPU. dtype: default bfloat16 for official sizes, the
    checkpoint's own for small ones (float32 on a CPU that multiplies bfloat16 slowly). quantize: "int8" or "int4"
    rounds the weights, see `load_hf_model`. revision: of a hub id. image_size: resamples the position table for another
    resolution. loc_scale: 1024 (default) or 1023, what a location token counts to. device_map: "auto" for a model
    larger than its device; max_memory: what it may use of each, see `load_hf_model`. extra: modules in the place of the
    model's own parts, or beside them, by their names: see
    `docs/changing.md`.
    Raises ValueError or OSError in a line that says what to do.
    """
    check_loc_scale(loc_scale)
    network, tokenizer, folders = load_with_folders(
        model,
        device,
        dtype,
        quantize,
        revision,
        image_size=image_size,
        device_map=device_map,
        max_memory=max_memory,
        extra=extra or {},
    )
    return PaliGemma(network, processor_for(tokenizer, network.config, folders), loc_scale=loc_scale)


class PaliGemma:
    """A model and its processor, behind the tasks that it was trained for.

    codec: draws masks; default the processor's, which is the checkpoint's own, else the official one.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        processor: PaliGemmaProcessor,
        codec: MaskCodec | None = None,
        loc_scale: int = 1024,
    ):
        check_loc_scale(loc_scale)
        self.model = model.eval()
        self.processor = processor
        self.loc_scale = loc_scale
        self._codec = codec if codec is not None else processor.mask_codec

    @property
    def calibration(self) -> Calibration:
        """Maps the model's certainty of a box or mask to its score; the identity where nobody has fitted a map."""
        return self.processor.calibration or IDENTITY

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self.processor.calibration = calibration

    @property
    def codec(self) -> MaskCodec:
        """The mask codec: the checkpoint's own, else the official one, downloaded on first use."""
        if self._codec is None:
            self._codec = MaskCodec.load()
        return self._codec

    @property
    def loaded_codec(self) -> MaskCodec | None:
        """The mask codec as far as it is loaded: the checkpoint's own, or the official one after its first use."""
        return self._codec

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        side = self.processor.image_size
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"PaliGemma({parameters:,} parameters, {side} x {side} pixels, {dtype} on {self.model.device})"

    # ------------------------------------------------------------------------------------------ tasks

    @overload
    def caption(self, image: ImageOrNone, language: str = ...) -> Answer: ...
    @overload
    def caption(self, image: list[ImageOrNoneT], language: str = ...) -> list[Answer]: ...
    def caption(self, image: ImageOrNone | list[ImageOrNoneT], language: str = "en") -> Answer | list[Answer]:
        """A sentence about the image: Answer, or a list of them for a list of images."""
        _check_text(language, "the language")
        return self.generate(image, f"caption {language}")

    @overload
    def ask(
        self, image: ImageOrNone, question: str, choices: Iterable[str] | None = ..., language: str = ...
    ) -> Answer: ...
    @overload
    def ask(
        self, image: ImageOrNone, question: list[str], choices: Iterable[str] | None = ..., language: str = ...
    ) -> list[Answer]: ...
    @overload
    def ask(
        self,
        image: list[ImageOrNoneT],
        question: str | list[str],
        choices: Iterable[str] | None = ...,
        language: str = ...,
    ) -> list[Answer]: ...
    def ask(
        self,
        image: ImageOrNone | list[ImageOrNoneT],
        question: str | list[str],
        choices: Iterable[str] | None = None,
        language: str = "en",
    ) -> Answer | list[Answer]:
        """The answer to a question. With `choices`, one of these strings and nothing else."""
        _check_text(language, "the language")
        questions = question if isinstance(question, list) else [question]
        for one in questions:
            _check_text(one, "a question")
        prompts = [f"answer {language} {one}" for one in questions]
        constraint = None
        if choices is not None:
            constraint = ChoiceGrammar(self.processor.tokenizer, choices)
            constraint.check_budget(TEXT_BUDGET)  # before the image is looked at
        if isinstance(question, list):
            return self.generate(image, prompts, constraint=constraint)
        return self.generate(image, prompts[0], constraint=constraint)

    @overload
    def ocr(self, image: ImageOrNone) -> Answer: ...
    @overload
    def ocr(self, image: list[ImageOrNoneT]) -> list[Answer]: ...
    def ocr(self, image: ImageOrNone | list[ImageOrNoneT]) -> Answer | list[Answer]:
        """The text in the image."""
        return self.generate(image, "ocr")

    @overload
    def detect(
        self,
        image: ImageInput,
        labels: str | Iterable[str],
        constrained: bool = ...,
        max_new_tokens: int = ...,
        forbid_repeats: bool = ...,
    ) -> Items[Detection]: ...
    @overload
    def detect(
        self,
        image: list[ImageT],
        labels: str | Iterable[str],
        constrained: bool = ...,
        max_new_tokens: int = ...,
        forbid_repeats: bool = ...,
    ) -> list[Items[Detection]]: ...
    def detect(
        self,
        image: ImageInput | list[ImageT],
        labels: str | Iterable[str],
        constrained: bool = True,
        max_new_tokens: int = BOX_BUDGET,
        forbid_repeats: bool = False,
    ) -> Items[Detection] | list[Items[Detection]]:
        """Boxes of everything that bears one of the labels, in pixels of the image: a list, which shows itself in a
        notebook. A list of images gives a list of lists.

        labels: of all the images. (Others for each: `generate` with a list of prompts and `constrained=True`.)
        constrained: decode under the grammar, so that the output always parses and names only what was asked for;
            False gives the reference's free decoding.
        forbid_repeats: no box may repeat an earlier one with the same label (IoU above 0.9), as young fine-tunes often
            do until their budget ends.
        """
        _check_pictures(image)
        prompt = "detect " + " ; ".join(_labels(labels))
        answers = self.generate(
            image,
            prompt,
            max_new_tokens=max_new_tokens,
            constrained=constrained,
            forbid_repeats=forbid_repeats,
        )
        if isinstance(answers, list):
            return [Items(answer.detections, answer.picture) for answer in answers]
        return Items(answers.detections, answers.picture)

    @overload
    def segment(
        self,
        image: ImageInput,
        labels: str | Iterable[str] | None = ...,
        prompt: str | None = ...,
        constrained: bool = ...,
        max_new_tokens: int = ...,
        forbid_repeats: bool = ...,
    ) -> Items[Segment]: ...
    @overload
    def segment(
        self,
        image: list[ImageT],
        labels: str | Iterable[str] | None = ...,
        prompt: str | None = ...,
        constrained: bool = ...,
        max_new_tokens: int = ...,
        forbid_repeats: bool = ...,
    ) -> list[Items[Segment]]: ...
    def segment(
        self,
        image: ImageInput | list[ImageT],
        labels: str | Iterable[str] | None = None,
        prompt: str | None = None,
        constrained: bool = True,
        max_new_tokens: int = BOX_BUDGET,
        forbid_repeats: bool = False,
    ) -> Items[Segment] | list[Items[Segment]]:
        """Masks of everything that bears one of the labels, bool [H, W] at the size of the image. Else as `detect`.

        prompt: instead of labels, the bare expression that some checkpoints want (RefCOCO: "the dog on the left").
        """
        if (labels is None) == (prompt is None):
            raise ValueError("segment wants labels, or the bare prompt of a RefCOCO checkpoint, and not both")
        _check_pictures(image)
        codec = self.codec  # before any work: without it there are no masks
        grammar: Constraint | None = None
        if labels is not None:
            text = "segment " + " ; ".join(_labels(labels))
        else:
            text = _check_text(prompt, "the prompt")
            if constrained:
                grammar = DetectionGrammar(
                    self.processor.tokenizer, labels=None, segments=True, forbid_repeats=forbid_repeats
                )
        answers = self.generate(
            image,
            text,
            max_new_tokens=max_new_tokens,
            constraint=grammar,
            constrained=constrained and grammar is None,
            forbid_repeats=forbid_repeats and grammar is None,
            codec=codec,
        )
        if isinstance(answers, list):
            return [Items(answer.segments, answer.picture) for answer in answers]
        return Items(answers.segments, answers.picture)

    def draw(
        self, image: Picture, items: Sequence[Detection | Segment] | Answer, **style: Unpack[Style]
    ) -> Image.Image:
        """The image with boxes, masks, labels and scores over it. style: see `answers/drawing.py`."""
        if isinstance(items, Answer):
            items = [*items.detections, *items.segments]
        return draw(load_image(image), items, **style)

    # ------------------------------------------------------------------------------------------ any prompt

    @overload
    def generate(
        self,
        image: ImageOrNone,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        constraint: Constraint | Sequence[Constraint | None] | None = ...,
        constrained: bool = ...,
        forbid_repeats: bool = ...,
        batch_size: int = ...,
        codec: MaskCodec | None = ...,
        **sampling: Unpack[Sampling],
    ) -> Answer: ...
    @overload
    def generate(
        self,
        image: ImageOrNone,
        prompt: list[str],
        max_new_tokens: int = ...,
        *,
        constraint: Constraint | Sequence[Constraint | None] | None = ...,
        constrained: bool = ...,
        forbid_repeats: bool = ...,
        batch_size: int = ...,
        codec: MaskCodec | None = ...,
        **sampling: Unpack[Sampling],
    ) -> list[Answer]: ...
    @overload
    def generate(
        self,
        image: list[ImageOrNoneT],
        prompt: str | list[str],
        max_new_tokens: int = ...,
        *,
        constraint: Constraint | Sequence[Constraint | None] | None = ...,
        constrained: bool = ...,
        forbid_repeats: bool = ...,
        batch_size: int = ...,
        codec: MaskCodec | None = ...,
        **sampling: Unpack[Sampling],
    ) -> list[Answer]: ...
    def generate(
        self,
        image: ImageOrNone | list[ImageOrNoneT],
        prompt: str | list[str],
        max_new_tokens: int = TEXT_BUDGET,
        *,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        constrained: bool = False,
        forbid_repeats: bool = False,
        batch_size: int = 16,
        codec: MaskCodec | None = None,
        **sampling: Unpack[Sampling],
    ) -> Answer | list[Answer]:
        """The answer to any prompt: Answer, or a list of them if image or prompt is a list.

        image: None for a row without a picture.
        constraint: what may come next in every row, see `answers/grammar.py`; a list has one (or None) for each row.
        constrained: derive it from the prompt instead, if that is a `detect` or `segment` one. forbid_repeats: as in
        `detect`.
        codec: decodes masks; default the one that is loaded already (`loaded_codec`). If none is, segments have no
        masks.
        sampling: the fields of `Sampling`, as in `paligemma.generate`. A list of seeds has one for each row.
        """
        images, prompts, is_list = _broadcast(image, prompt)
        Options(max_new_tokens, constraint=constraint, **sampling)  # a wrong one is named before a picture is opened
        if constraint is not None and constrained:
            raise ValueError("constraint and constrained=True (the grammar of the prompt) exclude each other: give one")
        if not is_whole(batch_size, least=1):
            raise ValueError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
        if forbid_repeats and not constrained:
            raise ValueError("forbid_repeats is a rule of the grammar: it needs constrained=True")
        grammars = {one: self.grammar(one, forbid_repeats) for one in set(prompts)} if constrained else {}
        constraints = [grammars.get(one) for one in prompts] if constrained else one_per_row(constraint, len(prompts))
        seeds = sampling.pop("seed", None)
        if seeds is not None and not isinstance(seeds, (int, Integral)):
            seeds = [*seeds]  # an array is no Sequence
        if isinstance(seeds, Sequence) and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} rows: give one for all, or one for each")
        answers: list[Answer] = []
        for row, size in self._generated(images, prompts, max_new_tokens, constraints, seeds, batch_size, sampling):
            answers.append(self.to_answer(row, size, images[len(answers)], codec or self._codec))
        return answers if is_list else answers[0]

    def stream(
        self, image: ImageOrNone, prompt: str, max_new_tokens: int = TEXT_BUDGET, **sampling: Unpack[Sampling]
    ) -> Generator[str, None, Answer]:
        """The answer to one prompt in pieces of text, as they come. The pieces joined are the answer's text.

        The generator returns the Answer: `answer = yield from pg.stream(...)`.
        """
        Options(max_new_tokens, **sampling)
        if isinstance(image, list) or isinstance(prompt, list):
            raise TypeError("a stream is of one image and one prompt, and one of them is a list: use generate")
        ((_, inputs, (size,)),) = self._inputs([image], [prompt], max_new_tokens, 1)
        tokenizer = self.processor.tokenizer
        row = yield from stream(
            self.model,
            inputs,
            tokenizer,
            max_new_tokens=max_new_tokens,
            watch=(tokenizer.first_loc_id, NUM_LOC),
            **sampling,
        )
        return self.to_answer(row, size, image, self._codec)

    # ------------------------------------------------------------------------------------------ beside your own loop

    def grammar(self, prompt: str, forbid_repeats: bool = False) -> Constraint | None:
        """The grammar that the answer to a `detect` or `segment` prompt follows; None for other prompts.

        It is the `constraint` of an `Options` or a `Request`. forbid_repeats: as in `detect`. ValueError for a prompt
        without labels.
        """
        if not asks_for_items(prompt):
            return None
        return DetectionGrammar(
            self.processor.tokenizer, labels=_labels(split_labels(prompt)), segments=task_of(prompt) == "segment",
            forbid_repeats=forbid_repeats,
        )  # fmt: skip

    def to_answer(
        self, generated: Generated, size: Size | None, image: ImageOrNone = None, codec: MaskCodec | None = None
    ) -> Answer:
        """What an `Engine` (or `generate` below it) wrote, as an Answer: its text, boxes, masks and scores.

        size: (W, H) of the row's first image; None where it has none. image: what the answer draws itself on in a
        notebook. codec: decodes masks, such as `pg.codec`; None: segments have no masks.
        """
        tokenizer = self.processor.tokenizer
        parsed = parse_tokens(
            generated.token_ids,
            tokenizer,
            image_size=size,
            loc_scale=self.loc_scale,
            codec=codec,
            token_logprobs=generated.token_logprobs,
            distributions=generated.distributions,
            calibration=self.calibration,
        )
        answer = Answer(
            text=tokenizer.decode(generated.token_ids),
            token_ids=generated.token_ids,
            token_logprobs=generated.token_logprobs,
            score=_score(generated),
            finished=generated.finished,
            detections=parsed.detections,
            segments=parsed.segments,
            invalid=parsed.invalid,
        )
        answer.picture = next(iter(_pictures(image)), None)
        return answer

    # ------------------------------------------------------------------------------------------ inside

    def _generated(
        self,
        images: list[ImageOrNone],
        prompts: list[str],
        max_new_tokens: int,
        constraints: list[Constraint | None],
        seeds: int | Sequence[int] | None,
        batch_size: int,
        sampling: Sampling,
    ) -> Iterable[tuple[Generated, Size | None]]:
        """What the model writes for each row, and the (W, H) of its first image."""
        tokenizer = self.processor.tokenizer
        engine = Engine(self.model, max_rows=batch_size, cache_bytes=math.inf, prefill_every=None)
        rows: list[Generated] = []
        sizes: list[Size | None] = []
        tickets: list[Ticket] = []
        running: list[Ticket] = []
        for part, inputs, found in self._inputs(images, prompts, max_new_tokens, batch_size):
            own: Sampling = {**sampling, "seed": seeds[part] if isinstance(seeds, Sequence) else seeds}
            options = Options(
                max_new_tokens,
                constraint=constraints[part] if any(constraints[part]) else None,
                watch=(tokenizer.first_loc_id, NUM_LOC),
                num_tokens=len(tokenizer),
                **own,
            )
            sizes += found
            if options.num_beams > 1 or options.compile:  # whole batches, one after the other
                with torch.inference_mode():
                    rows += (beam_search if options.num_beams > 1 else generate_compiled)(self.model, inputs, options)
                continue
            new = [engine.admit(request) for request in requests_of(self.model, inputs, options)]
            tickets += new
            running = engine.run([*running, *new], until_started=True)  # the next ones join while these run
        engine.run(running)
        return zip([*rows, *(ticket.result() for ticket in tickets)], sizes)

    def _inputs(
        self, images: list[ImageOrNone], prompts: list[str], max_new_tokens: int, batch_size: int
    ) -> Iterator[tuple[slice, dict[str, Tensor], list[Size | None]]]:
        """Model inputs for `batch_size` rows at a time: which rows these are, the inputs, and the (W, H) of each row's
        first image (None for a row without). The pictures of the next rows are opened meanwhile.
        """
        for image, prompt in zip(images, prompts):
            if looks_swapped(image, prompt):
                raise ValueError(f"the prompt, {prompt!r}, is a file: the image comes first, then the prompt")
        rows = [_pictures(image) for image in images]
        parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
        laid_out = [self.processor.lay_out(prompts[part], [len(row) for row in rows[part]]) for part in parts]
        for inputs in laid_out:  # before the first row is answered: its answer would be lost
            check_length(self.model.config, inputs["attention_mask"], max_new_tokens)
        groups = [[one for row in rows[part] for one in row] for part in parts]
        encoded = encode_ahead(self.model, self.processor.image_size, groups)
        for part, checked in zip(parts, laid_out):
            inputs = dict(checked)  # a new one: else the features of all parts would stay in memory
            found = iter(features_and_sizes := next(encoded))
            if features_and_sizes:
                inputs["image_features"] = torch.stack([features for features, _ in features_and_sizes])
            sizes = [[next(found)[1] for _ in row] for row in rows[part]]  # of all images of each row
            yield part, inputs, [of_row[0] if of_row else None for of_row in sizes]


def shown(pieces: Generator[str, None, Answer], write: Callable[[str], object]) -> Answer:
    """Writes the pieces of `PaliGemma.stream` as they come, and a line break. Returns the answer."""
    while True:
        try:
            write(next(pieces))
        except StopIteration as end:
            write("\n")
            answer: Answer = end.value
            return answer


def processor_for(tokenizer: Tokenizer, config: PaliGemmaConfig, folders: Sequence[Path]) -> PaliGemmaProcessor:
    """The processor of a model, with the mask codec and the calibration that lie beside its weights.

    folders: its own, and behind it that of an adapter's base, whose codec serves both and whose calibration is of other
    weights.
    """
    processor = PaliGemmaProcessor.for_config(tokenizer, config)
    processor.mask_codec = own_codec(folders)
    if (calibrated := folders[0] / CALIBRATION_FILE).exists():
        processor.calibration = Calibration.load(calibrated)
    return processor


def check_loc_scale(loc_scale: int) -> None:
    """ValueError for another number than the two in use."""
    if loc_scale not in (1023, 1024):
        raise ValueError(f"loc_scale is {loc_scale!r}, expected 1024 or 1023")


def own_codec(folders: Sequence[Path]) -> MaskCodec | None:
    """The mask codec that a checkpoint brings itself. (All official checkpoints share one, which `MaskCodec.load()`
    downloads.)"""
    folder = first_with(folders, CODEC_FILE)
    return MaskCodec.load(folder / CODEC_FILE) if folder is not None else None


def _check_text(value: object, name: str) -> str:
    """The value. Anything can be put into a prompt, None too, and the model would answer it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, expected a string")
    return value


def _labels(labels: str | Iterable[str]) -> list[str]:
    if not isinstance(labels, Iterable):
        raise TypeError(f"labels is {labels!r}, expected a string or a list of strings")
    labels = [_check_text(label, "a label").strip() for label in ([labels] if isinstance(labels, str) else labels)]
    if not labels or not all(labels):
        raise ValueError("name at least one thing to look for, and no empty ones")
    for label in labels:
        if ";" in label:
            raise ValueError(f"the label {label!r} contains ';', which separates labels: pass a list instead")
    return list(dict.fromkeys(labels))


def _pictures(image: ImageOrNone) -> tuple[Picture, ...]:
    """The images that a row sees: those of a tuple, the one, or none."""
    if image is None:
        return ()
    if not isinstance(image, tuple):
        return (image,)
    if not image:
        raise ValueError("an empty tuple of images: a row needs at least one (None is a row without a picture)")
    return image


def _check_pictures(image: object) -> None:
    """For boxes and masks, which are somewhere in a picture."""
    if any(one is None for one in (image if isinstance(image, list) else [image])):
        raise ValueError("there is no picture to look in: the image is None")


def _broadcast(
    image: ImageOrNone | list[ImageOrNoneT], prompt: str | list[str]
) -> tuple[list[ImageOrNone], list[str], bool]:
    """Pairs images and prompts as the head of this file says."""
    images: list[ImageOrNone] = [*image] if isinstance(image, list) else [image]
    prompts = prompt if isinstance(prompt, list) else [prompt]
    is_list = isinstance(image, list) or isinstance(prompt, list)
    for text in prompts:
        _check_text(text, "a prompt")
    if not isinstance(image, list):
        images = images * len(prompts)
    elif not isinstance(prompt, list):
        prompts = prompts * len(images)
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts: give equal numbers, or one of either "
            "(not a list) for all of the others"
        )
    return images, prompts, is_list


def _score(row: Generated) -> float:
    """exp of the mean log-probability of what was chosen; for an empty answer, the probability of its eos."""
    logprobs = row.token_logprobs or ([row.eos_logprob] if row.eos_logprob is not None else [])
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


# ---------------------------------------------------------------------------------------------- the script


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m paligemma.inference`: one image, one prompt, the answer on stdout as it comes."""

    def true_or_false(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r}, expected True or False")
        return text.lower() == "true"

    parser = argparse.ArgumentParser(prog="python -m paligemma.inference", description=main.__doc__)
    parser.add_argument("--model_path", default="tiny", help="'tiny', a hub id, a folder, or a big_vision .npz")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image_file_path", required=True)
    parser.add_argument("--max_tokens_to_generate", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument(
        "--do_sample", type=true_or_false, default=False, help="False: greedy, the two above are unused"
    )
    parser.add_argument("--only_cpu", type=true_or_false, default=False)
    options = parser.parse_args(arguments)
    if looks_swapped(options.image_file_path, options.prompt):
        parser.error(f"--prompt is a file, {options.prompt!r}: it has changed places with --image_file_path")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter still shows the rest
    sampling: Sampling = {}
    if options.do_sample:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    try:
        # Mistakes in these are told before gigabytes are read.
        Options(options.max_tokens_to_generate, **sampling)
        picture = load_image(options.image_file_path)
        pg = load(options.model_path, device="cpu" if options.only_cpu else None)
        pieces = pg.stream(picture, options.prompt, options.max_tokens_to_generate, **sampling)
        plain = printable if sys.stdout is not None and sys.stdout.isatty() else str  # None: it is closed
        answer = shown(pieces, lambda piece: print(plain(piece), end="", flush=True))
        if not answer.finished:
            note = f"stopped after {options.max_tokens_to_generate} tokens; --max_tokens_to_generate allows more"
            print(f"note: {note}", file=sys.stderr)
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its exit
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError, ArithmeticError) as error:
        print(f"error: {error_line(error, doing='python -m paligemma.inference')}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
