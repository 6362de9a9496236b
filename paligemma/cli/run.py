"""`paligemma run`: answer a prompt about pictures."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from paligemma.cli.labels import FORMATS, LabelFiles, labels_into
from paligemma.cli.options import (
    DEFAULT_MAX_PIXELS,
    Beams,
    Device,
    DeviceMap,
    Dtype,
    ForbidRepeats,
    Free,
    ImageSize,
    LocScale,
    MaxNewTokens,
    MaxPixels,
    Model,
    Quantize,
    Revision,
    Temperature,
    TopK,
    TopP,
    check_labels,
    check_order,
    one_of,
    picture_named,
    pixels,
)
from paligemma.cli.output import (
    check_writable,
    drawing_paths,
    echo_json,
    is_drawing,
    note,
    notes,
    print_error,
    save_picture,
    say,
    short_name,
)
from paligemma.files import is_junk, picture_names
from paligemma.tasks import asks_for_items, budget_of, split_labels, task_of

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.answers.results import Detection, Segment
    from paligemma.inference import Answer

BATCH = 16  # pictures answered at a time
# The first words of the prompts that official checkpoints are trained on, and the prompts of the embedded model.
TASKS = ("caption", "cap", "describe", "answer", "question", "ocr", "detect", "segment")
TINY_PROMPTS = ("caption en", "answer en QUESTION", "ocr", "detect THIS ; THAT", "segment THIS ; THAT")


def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="'caption en', 'answer en what is this ?', 'detect dog ; cat', ...")],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders of pictures, or patterns such as '*.jpg'; '-' reads one from stdin.",
            metavar="IMAGE",
        ),
    ],
    model: Model = "tiny",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    beams: Beams = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Decode with one compiled graph: faster on a GPU, after a minute.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    image_size: ImageSize = None,
    loc_scale: LocScale = 1024,
    free: Free = False,
    forbid_repeats: ForbidRepeats = False,
    save: Annotated[
        Path | None, typer.Option(help="Draw boxes and masks over the picture; a folder for several.")
    ] = None,
    save_labels: Annotated[
        Path | None, typer.Option(help="Write boxes and masks as label files into this folder.")
    ] = None,
    label_format: Annotated[
        str | None,
        typer.Option(help="Format of the label files: yolo (the default), coco or voc.", callback=one_of(*FORMATS)),
    ] = None,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture.")] = False,
) -> None:
    """Answer PROMPT about one or more pictures.

    Prints a line for a sentence, or one for each box or mask; of several pictures, each line begins with its picture.
    A folder stands for the pictures in it.
    A picture that cannot be read is named on stderr; the others are answered all the same, and the exit code is 1.
    """
    sampling = sampling_options(temperature, top_k, top_p, beams, seed)
    if compile and (beams > 1 or quantize):
        raise typer.BadParameter("--compile goes neither with --beams nor with --quantize")
    if compile:
        sampling["compile"] = True
    task, boxes = task_of(prompt), asks_for_items(prompt)
    check_usage(prompt, images, boxes, free, forbid_repeats)
    several = len(images) > 1 or os.path.isdir(images[0])
    images = expanded(images, drawn=save)
    several |= len(images) > 1
    drawings = drawing_paths(save, images) if save is not None else []
    if drawings:
        check_writable(drawings[0], "--save")
    labels = label_files(context, save_labels, label_format, images, prompt, boxes)
    note_unusual_prompt(prompt, model)

    from paligemma.inference import load, shown

    budget = max_new_tokens or budget_of(prompt)
    pg = None
    answered = 0
    for numbers, pictures in opened(images, pixels(max_pixels)):
        if pg is None:  # only now, so that a mistyped name of a picture is told at once
            note_embedded_model(model)
            with notes.status(Text(f"loading {model}")):
                pg = load(
                    model, device=device, dtype=dtype, quantize=quantize, revision=revision, image_size=image_size,
                    loc_scale=loc_scale, device_map=device_map,
                )  # fmt: skip
        terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
        if terminal and not as_json and save is None and not boxes and not several and beams == 1 and not compile:
            pieces = pg.stream(pictures[0], prompt, max_new_tokens=budget, **sampling)
            note_spent_budget(short_name(images[0]), shown(pieces, lambda piece: say(piece, newline=False)), budget)
            return
        codec = pg.codec if task == "segment" else None
        answers = pg.generate(
            pictures, prompt, max_new_tokens=budget, constrained=not free, forbid_repeats=forbid_repeats, codec=codec,
            **sampling,
        )  # fmt: skip
        for number, picture, answer in zip(numbers, pictures, answers):
            name = short_name(images[number])
            if as_json:
                echo_json(answer_as_json(images[number], prompt, answer))
            else:
                say_answer(answer, name, boxes, several)
            note_spent_budget(name, answer, budget)
            if save is not None:
                draw(pg, picture, answer, name, drawings[number], boxes)
            if labels is not None:
                labels.add(images[number], picture.size, [*answer.detections, *answer.segments])
        answered += len(numbers)
    if labels is not None and labels.unwritten:
        labels.finish()
        note(f"labels: {save_labels}")
    if answered < len(images):
        note(f"note: {len(images) - answered} of {len(images)} pictures could not be read")
        raise typer.Exit(1)


def check_usage(prompt: str, images: list[str], boxes: bool, free: bool, forbid_repeats: bool) -> None:
    """An error of usage for pictures and options that do not go with the prompt. boxes: it asks for them."""
    if free and not boxes:
        raise typer.BadParameter("--free is for detect and segment: other answers follow no grammar")
    if forbid_repeats and (free or not boxes):
        raise typer.BadParameter("--forbid-repeats is for detect and segment, without --free: a rule of their grammar")
    check_order(prompt, images, "run")
    check_labels(prompt, free)
    if images.count("-") > 1:
        raise typer.BadParameter("'-' is there twice, and stdin holds one picture")


def label_files(
    context: typer.Context, folder: Path | None, format: str | None, images: list[str], prompt: str, boxes: bool
) -> LabelFiles | None:
    """Where the labels go, until the command ends; None without --save-labels. An error of usage where the answer has
    none."""
    if folder is None:
        if format is not None:
            raise typer.BadParameter("--label-format is for --save-labels FOLDER: add that, or leave it out")
        return None
    if not boxes:
        raise typer.BadParameter("--save-labels is for detect and segment: other answers have no boxes")
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"--save-labels {folder} is a file, expected a folder")
    from paligemma.data.prompts import labels_of

    labels = labels_into(folder, format or FORMATS[0], images, labels_of(prompt))
    return context.with_resource(labels)


def sampling_options(
    temperature: float | None, top_k: int | None, top_p: float | None, beams: int, seed: int | None
) -> dict[str, Any]:
    """Options of generation, or an error of usage where some of them exclude each other."""
    if temperature is not None and not 0 < temperature < float("inf"):
        raise typer.BadParameter(f"--temperature is {temperature:g}, expected more than 0; leave it out for greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p is {top_p:g}, expected a number in (0, 1]")
    if temperature is None and top_k is None and top_p is None:
        if seed is not None:
            raise typer.BadParameter("--seed is for sampling: add --temperature, --top-k or --top-p, or leave it out")
        return {"num_beams": beams}
    if beams > 1:
        raise typer.BadParameter("--beams searches, --temperature, --top-k and --top-p sample: choose one")
    return {"do_sample": True, "temperature": temperature or 1.0, "top_k": top_k, "top_p": top_p, "seed": seed}


def note_unusual_prompt(prompt: str, model: str) -> None:
    """A hint where the prompt differs from those that the model was trained on. It is answered all the same."""
    task, boxes = task_of(prompt), asks_for_items(prompt)
    single = re.sub(" +", " ", prompt.strip(" "))
    labels = split_labels(single)
    if boxes and any("," in label for label in labels):
        separated = f"{task} {' ; '.join(part.strip() for part in ','.join(labels).split(',') if part.strip())}"
        note(
            "note: a comma does not separate labels, this asks for one thing of that name: "
            f"{quoted(separated)} asks for each"
        )
    elif boxes and len(labels) > 1 and all(labels) and single != f"{task} {' ; '.join(labels)}":
        spaced = f"{task} {' ; '.join(dict.fromkeys(labels))}"
        note(f"note: the model learned labels with spaces around the semicolon: {quoted(spaced)} may find more")
    elif prompt != single:
        note(
            f"note: the model learned prompts with single spaces, and none at the ends: {quoted(single)} may do better"
        )
    if model == "tiny" and task not in [task_of(known) for known in TINY_PROMPTS]:
        note(
            f"note: {quoted(prompt)} is no prompt that the embedded model learned: {', '.join(map(repr, TINY_PROMPTS))}"
        )
    elif task not in TASKS:
        note(
            f"note: {quoted(prompt)} begins with no known task ({', '.join(TASKS)}): right for mix checkpoints and "
            "those tuned on such prompts"
        )


def quoted(prompt: str) -> str:
    """A prompt as notes quote it: its beginning, where it is a long one."""
    return repr(prompt if len(prompt) <= 100 else f"{prompt[:100]}...")


def note_embedded_model(model: str) -> None:
    if model == "tiny":
        note(
            "note: this is the embedded model; it knows only its small world of pictograms. "
            "For photographs use official weights: --model google/paligemma2-3b-mix-224"
        )


def expanded(images: list[str], drawn: Path | None = None) -> list[str]:
    """Every picture that is named: a folder stands for the pictures in it, a pattern for the files that match. drawn: a
    folder for drawings; earlier ones in it are no pictures of a folder."""
    paths: list[str] = []
    for name in images:
        if os.path.isdir(name):
            known = picture_names()
            found = [
                os.path.join(name, file)
                for file in os.listdir(name)
                if Path(file).suffix.lower() in known and not is_junk(file)
            ]
            if drawn is not None and drawn.is_dir() and os.path.samefile(name, drawn):
                found = [file for file in found if not is_drawing(Path(file))]
            if not found:
                raise ValueError(f"{name}: there is no picture in this folder")
        elif glob.has_magic(name) and not os.path.exists(name):
            found = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            if not found:
                raise ValueError(f"{name}: no file matches this pattern")
        else:
            found = [name]
        paths += sorted(found)
    return paths


def opened(images: list[str], max_pixels: int) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """(positions in `images`, pictures), a batch at a time: no more are in memory than are answered together.

    One that cannot be read is named on stderr and left out; if it is the only one, its error is raised.
    """
    for start in range(0, len(images), BATCH):
        numbers, pictures = [], []
        for number, name in enumerate(images[start : start + BATCH], start):
            try:
                pictures.append(picture_named(name, max_pixels))
                numbers.append(number)
            except (ValueError, OSError) as error:
                if len(images) == 1:
                    raise
                print_error(error)
        if numbers:
            yield numbers, pictures


def say_answer(answer: Answer, name: str, boxes: bool, several: bool) -> None:
    """The answer on stdout, in lines for a person to read. several: each line begins with the name of the picture."""
    for line in describe(answer, boxes):
        say(f"{name}: {line}" if several else line)
    if boxes and answer.finished and not answer.text:
        note(f"note: {name}: nothing found")


def draw(pg: Any, picture: Image.Image, answer: Answer, name: str, path: Path, boxes: bool) -> None:
    """The picture with the boxes and masks of the answer, as a file. boxes: they were asked for."""
    if not (boxes or answer.detections or answer.segments):
        note(f"note: {name}: not drawn, the answer has no boxes")
        return
    # On a small picture the labels would hide what they name: it is enlarged to 512 pixels or more.
    save_picture(pg.draw(picture, answer, scale=max(1, -(-512 // max(picture.size)))), path)
    note(f"drawn: {path}")


def note_spent_budget(name: str, answer: Answer, budget: int) -> None:
    if answer.finished:
        return
    from paligemma.answers.repeats import count_repeats

    if repeated := count_repeats([*answer.detections, *answer.segments]):
        boxes = len(answer.detections) + len(answer.segments)
        note(
            f"note: {name}: stopped after {budget} tokens; {repeated} of {boxes} boxes repeat an earlier one, which "
            "--forbid-repeats prevents"
        )
    else:
        note(f"note: {name}: stopped after {budget} tokens; --max-new-tokens allows more")


def describe(answer: Answer, boxes: bool = False) -> list[str]:
    """The lines for a person to read: a sentence as it is; for each box its label, corners and score.

    boxes: they were asked for, so an empty answer has no line. (An empty sentence is an empty line.)
    """
    items: list[Detection | Segment] = [*answer.detections, *answer.segments]
    if not items:
        return [] if boxes and not answer.text else answer.text.split("\n")
    lines = []
    for item in items:
        x0, y0, x1, y1 = item.box
        score = "" if item.score is None else f"  {item.score:.2f}"
        lines.append(f"{item.label or '(no label)'}  [{x0:.0f} {y0:.0f} {x1:.0f} {y1:.0f}]{score}")
    return lines


def answer_as_json(image: str, prompt: str, answer: Answer) -> dict[str, Any]:
    """The object that `--json` prints, one per picture. Masks are uncompressed COCO RLE."""
    from paligemma.answers.formats import to_dicts

    return {
        "image": image,
        "prompt": prompt,
        "text": answer.text,
        "score": answer.score,
        "finished": answer.finished,
        "detections": to_dicts(answer.detections),
        "segments": to_dicts(answer.segments),
        "invalid": [{"span": list(span), "reason": reason} for span, reason in answer.invalid],
    }
