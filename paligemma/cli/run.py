"""`paligemma run`: answer a prompt about pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from paligemma.cli.options import Device, Dtype, Model, Revision, one_of
from paligemma.cli.output import complain, drawing_paths, echo_json, note, notes, save_picture

BATCH = 16  # pictures answered at a time
# The first words of the prompts that official checkpoints are trained on, and the prompts of the embedded model.
TASKS = ("caption", "cap", "describe", "answer", "question", "ocr", "detect", "segment")
TINY_PROMPTS = ("caption en", "answer en QUESTION", "ocr", "detect THIS ; THAT", "segment THIS ; THAT")


def run(
    prompt: Annotated[str, typer.Argument(help="'caption en', 'answer en what is this ?', 'detect dog ; cat', ...")],
    images: Annotated[list[str], typer.Argument(help="Pictures; '-' reads one from stdin.", metavar="IMAGE")],
    model: Model = "tiny",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default 128; 512 for detect and segment.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample, with this temperature. Default: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that sum up to p.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam search of this width.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Round the weights at load: int8, int4; CUDA: bnb-int8, nf4. bf16: as they are, read faster.",
            callback=one_of("int8", "int4", "bnb-int8", "nf4", "bf16"),
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="'auto': layers that do not fit on the device wait in memory (accelerate).", callback=one_of("auto")
        ),
    ] = None,
    revision: Revision = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Run at another resolution than the checkpoint's.")
    ] = None,
    loc_scale: Annotated[int, typer.Option(help="What a location token counts to: 1024 or 1023.")] = 1024,
    free: Annotated[bool, typer.Option("--free", help="Decode detect and segment without the grammar.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Draw boxes and masks over the picture; a folder for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture.")] = False,
) -> None:
    """Answer PROMPT about one or more pictures.

    A line on stdout for a sentence, one for each box or mask; of several pictures, each line begins with its picture.
    A picture that cannot be read is named on stderr; the others are answered all the same, and the exit code is 1.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise typer.BadParameter(f"--temperature is {temperature:g}, expected more than 0; leave it out for greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p is {top_p:g}, expected a number in (0, 1]")
    if loc_scale not in (1023, 1024):
        raise typer.BadParameter(f"--loc-scale is {loc_scale}, expected 1024 or 1023")
    samples = any(option is not None for option in (temperature, top_k, top_p))
    if samples and beams > 1:
        raise typer.BadParameter("--beams searches, --temperature, --top-k and --top-p sample: choose one")
    if seed is not None and not samples:
        raise typer.BadParameter("--seed is for sampling: add --temperature, --top-k or --top-p, or leave it out")
    if images.count("-") > 1:
        raise typer.BadParameter("'-' is there twice, and stdin holds one picture")
    drawings = drawing_paths(save, images) if save is not None else []

    task = prompt.strip().partition(" ")[0]
    boxes = task in ("detect", "segment")
    if free and not boxes:
        raise typer.BadParameter("--free is for detect and segment: other answers follow no grammar")
    labels = [label.strip() for label in prompt.strip().removeprefix(task).split(";")]
    if boxes and len(labels) > 1 and all(labels) and prompt.strip() != (spaced := f"{task} {' ; '.join(labels)}"):
        note(f"note: the model learned labels with spaces around the semicolon: {spaced!r} may find more")
    if model == "tiny" and task not in [known.partition(" ")[0] for known in TINY_PROMPTS]:
        note(f"note: {prompt!r} is no prompt that the embedded model learned: {', '.join(map(repr, TINY_PROMPTS))}")
    elif task not in TASKS:
        note(
            f"note: {prompt!r} begins with no known task ({', '.join(TASKS)}): right for mix checkpoints and those "
            "tuned on such prompts"
        )
    sampling: dict[str, Any] = {"num_beams": beams}
    if samples:
        sampling = {"do_sample": True, "temperature": temperature or 1.0, "top_k": top_k, "top_p": top_p, "seed": seed}

    from paligemma.images import load_image
    from paligemma.inference import BOX_BUDGET, TEXT_BUDGET, load, shown

    budget = max_new_tokens or (BOX_BUDGET if boxes else TEXT_BUDGET)
    pg = None
    bad = 0
    for start in range(0, len(images), BATCH):  # no more pictures in memory than are answered at a time
        pictures = {}
        for n, name in enumerate(images[start : start + BATCH], start):
            try:
                if name == "-" and sys.stdin is None:
                    raise ValueError("'-' stands for a picture on stdin, and stdin is closed")
                pictures[n] = load_image(sys.stdin.buffer.read() if name == "-" else name)
            except (ValueError, OSError) as error:
                if len(images) == 1:
                    raise
                complain(error)
                bad += 1
        if not pictures:
            continue
        if pg is None:  # only now, so that a mistyped name is told at once
            if model == "tiny":
                note(
                    "note: this is the embedded model; it knows only its small world of pictograms. "
                    "For photographs use official weights: --model google/paligemma2-3b-mix-224"
                )
            with notes.status(Text(f"loading {model}")):
                pg = load(
                    model, device=device, dtype=dtype, quantize=quantize, revision=revision, image_size=image_size,
                    loc_scale=loc_scale, device_map=device_map,
                )  # fmt: skip
            codec = pg.codec if task == "segment" else None

        terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
        if terminal and not as_json and save is None and not boxes and len(images) == 1 and beams == 1:
            pieces = pg.stream(pictures[0], prompt, max_new_tokens=budget, **sampling)
            note_an_end_by_budget(images[0], shown(pieces, lambda piece: typer.echo(piece, nl=False)), budget)
            return

        answers = pg.generate(
            list(pictures.values()), prompt, max_new_tokens=budget, constrained=not free, codec=codec, **sampling
        )
        for (n, picture), answer in zip(pictures.items(), answers):
            name = images[n]
            if as_json:
                echo_json(answer_as_json(name, prompt, answer))
            else:
                for line in describe(answer, boxes):
                    typer.echo(line if len(images) == 1 else f"{name}: {line}")
                if boxes and answer.finished and not answer.text:
                    note(f"note: {name}: nothing found")
            note_an_end_by_budget(name, answer, budget)
            if save is not None and not (boxes or answer.detections or answer.segments):
                note(f"note: {name}: not drawn, the answer has no boxes")
            elif save is not None:
                # On a small picture the labels would hide what they name: it is drawn enlarged, to 512 pixels or more.
                save_picture(pg.draw(picture, answer, scale=max(1, -(-512 // max(picture.size)))), drawings[n])
                note(f"drawn: {drawings[n]}")
    if bad:
        note(f"note: {bad} of {len(images)} pictures could not be read")
        raise typer.Exit(1)


def note_an_end_by_budget(name: str, answer: Any, budget: int) -> None:
    if not answer.finished:
        note(f"note: {name}: stopped after {budget} tokens; --max-new-tokens allows more")


def describe(answer: Any, boxes: bool = False) -> list[str]:
    """What a person wants to read: a sentence as it is, boxes as lines of label, box and score.

    boxes: they are what was asked for, so an empty answer has no line. (An empty sentence is an empty line.)
    """
    items = [*answer.detections, *answer.segments]
    if not items:
        return [] if boxes and not answer.text else answer.text.split("\n")
    lines = []
    for item in items:
        x0, y0, x1, y1 = item.box
        score = "" if item.score is None else f"  {item.score:.2f}"
        lines.append(f"{item.label or '(no label)'}  [{x0:.0f} {y0:.0f} {x1:.0f} {y1:.0f}]{score}")
    return lines


def answer_as_json(image: str, prompt: str, answer: Any) -> dict[str, Any]:
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
