"""The command `paligemma`. stdout carries the answer alone; progress and notes go to stderr.

Each command imports its room when it runs, so that `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong
usage.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    name="paligemma",
    help="PaliGemma 1 and 2: captions, answers, boxes and masks for your pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tiny_app = typer.Typer(help="The small world and the model that ships.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tiny_app, name="tiny")
data_app = typer.Typer(help="Your data, before a model sees them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

notes = Console(stderr=True, highlight=False)
BATCH = 16  # pictures answered at a time
# The first words of the prompts that official checkpoints are trained on, and the prompts of the embedded model.
TASKS = ("caption", "cap", "describe", "answer", "question", "ocr", "detect", "segment")
TINY_PROMPTS = ("caption en", "answer en QUESTION", "ocr", "detect THIS ; THAT", "segment THIS ; THAT")


def one_of(*names: str) -> Any:
    """An option's callback: another value is wrong usage, told before torch is imported. "cuda:1" is a "cuda"."""

    def check(value: str | None) -> str | None:
        if value is not None and value.partition(":")[0] not in names:
            raise typer.BadParameter(f"{value!r}, expected {', '.join(names)}")
        return value

    return check


Model = Annotated[str, typer.Option("--model", "-m", help="'tiny', a hub id, a folder, or a big_vision .npz.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, mps or cpu. Default: the best there is.", callback=one_of("cuda", "mps", "cpu")),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32. Default: by the size of the model.",
        callback=one_of("bfloat16", "float16", "float32"),
    ),
]
Kind = Annotated[str | None, typer.Option(help="What the data is, where its content does not say.")]
Images = Annotated[str | None, typer.Option(help="The folder that names of pictures are relative to.")]
Annotations = Annotated[str | None, typer.Option(help="VQA: the file with the answers.")]
ImageName = Annotated[str | None, typer.Option(help="The picture's name by other fields: '{image_id}.jpg'.")]
Split = Annotated[str | None, typer.Option(help="Which one, in a folder with several.")]
Language = Annotated[str, typer.Option(help="In prompts made of questions and captions.")]
EveryLabel = Annotated[bool, typer.Option("--every-label", help="COCO: ask for all labels in every row.")]
Data = Annotated[str, typer.Argument(help="JSON lines, CSV, COCO, VQA, parquet, or a folder with one of them.")]


def version(show: bool) -> None:
    if show:
        from paligemma import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass  # `main` takes --debug out of the arguments: an error may come before or after this


@app.command()
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

    from paligemma.inference import BOX_BUDGET, TEXT_BUDGET, load, shown
    from paligemma.processing_paligemma import load_image

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


def drawing_paths(save: Path, images: list[str], option: str = "--save") -> list[Path]:
    """Where the drawing of each picture goes: `save` itself, or a PNG in the folder `save`, named after the picture and
    numbered where two would have one name. No drawing replaces a picture that is read."""
    for folder in save.parents if save.suffix and not save.is_dir() else (save, *save.parents):
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"{option} {save}: {folder} is a file, expected a folder, or a name such as a.png")
    read = {Path(name).resolve() for name in images if name != "-"}
    if save.suffix and not save.is_dir():
        from PIL import Image

        if len(images) > 1:
            raise typer.BadParameter(f"--save {save} names one file for {len(images)} pictures; name a folder")
        if Image.registered_extensions().get(save.suffix.lower()) not in Image.SAVE:
            raise typer.BadParameter(
                f"{option} {save}: no picture is written as {save.suffix}; try .png, or make a folder of that name"
            )
        if save.resolve() in read:
            raise typer.BadParameter(f"--save {save} would replace the picture itself; choose another name")
        return [save]
    paths: list[Path] = []
    taken: set[str] = set()  # in lower case: not every disk tells A.png from a.png
    for name in images:
        stem = "stdin" if name == "-" else Path(name).stem or "picture"
        path, number = save / f"{stem}.png", 1
        while str(path).lower() in taken or path.resolve() in read:
            number += 1
            path = save / f"{stem}-{number}.png"
        taken.add(str(path).lower())
        paths.append(path)
    return paths


def save_picture(picture: Any, path: Path) -> None:
    """Written beside and renamed: a full disk leaves no half of a picture, and an old one whole."""
    from paligemma.files import written_whole

    try:
        with written_whole(path) as beside:
            picture.save(beside)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def echo_json(value: Any) -> None:
    """One line. Letters stay letters, unless stdout cannot hold them (another encoding, a file name that is none)."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    typer.echo(text)


def hinted(pg: Any) -> Any:
    """The model; with a hint where what follows would be slow. (Published sizes help themselves, see `utils.py`.)"""
    import torch

    from paligemma.fast.kernels import multiplies_bfloat16
    from paligemma.weights.checkpoints import published_name

    small = pg.model.dtype == torch.bfloat16 and published_name(pg.model.config) is None
    if small and not multiplies_bfloat16(pg.model.device):
        note("hint: this CPU has no fast products of bfloat16; --dtype float32 answers several times as fast")
    return pg


def note(text: str) -> None:
    """A line on stderr. File names are no markup, and long lines are not broken."""
    notes.print(text, style="dim", markup=False, soft_wrap=True)


def print_table(table: Any) -> None:
    """On stdout, as wide as the terminal; a file is as wide as the table."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if terminal else 160).print(table)


def complain(error: BaseException) -> None:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and text.startswith("[Errno"):  # what the system refused, without its number
        text = f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
    notes.print(f"error: {text}", style="bold red", markup=False, soft_wrap=True)


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


@app.command()
def info(model: Annotated[str, typer.Argument()] = "tiny", revision: Revision = None) -> None:
    """What a checkpoint is and what it needs, without loading its weights."""
    from paligemma.weights.info import describe as describe_checkpoint
    from paligemma.weights.info import render

    typer.echo(render(describe_checkpoint(model, revision)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A hub id, a folder or an .npz.")],
    target: Annotated[Path, typer.Argument(help="A folder, or a file that ends in .npz.")],
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Rewrite a checkpoint in another format or dtype: safetensors as transformers reads it, or big_vision's .npz.

    What else a checkpoint has goes into the same folder, beside the .npz too: config.json, the tokenizer's files
    (tokenizer.json or .model, ...), preprocessor_config.json, generation_config.json, mask_codec.npz. No file there is
    replaced by another: such a command is refused.
    """
    from paligemma.utils import resolve
    from paligemma.weights.checkpoints import convert as convert_checkpoint

    note_written(target, convert_checkpoint(resolve(source, revision=revision), target, dtype=dtype))


def note_written(target: Path, files: list[Path]) -> None:
    """What came of a command, in a line on stderr. What lies beside a single file is named: nobody has asked for it."""
    from paligemma.weights.info import in_units

    if target in files:
        beside = ", ".join(file.name for file in files if file != target)
        note(f"written: {target}, {in_units(target.stat().st_size)}; beside it {beside}")
    else:
        size = in_units(sum(file.stat().st_size for file in files))
        note(f"written: {target}, {size} in {len(files)} files")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder (or hub id) of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Fold a LoRA adapter into its base and write one whole checkpoint, as transformers reads it."""
    from paligemma.utils import merge as merge_adapter

    note_written(out, merge_adapter(adapter, out, dtype=dtype, revision=revision))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A hub id, a folder (an adapter's too) or an .npz.")],
    target: Annotated[Path, typer.Argument(help="A folder.")],
    int8: Annotated[bool, typer.Option("--int8", help="8 bits a weight: half the size, hardly a difference.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="4 bits in the decoder, 8 elsewhere: a third of it.")] = False,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with rounded weights: smaller, and several times faster on a CPU."""
    if int8 == int4:
        raise typer.BadParameter("choose one of --int8 and --int4")
    if target.suffix == ".npz":
        raise typer.BadParameter(f"{target} is the name of an .npz, which cannot hold rounded weights: name a folder")

    from paligemma.fast.quantization import quantize_checkpoint
    from paligemma.utils import open_model, resolve

    checkpoint, folders = open_model(resolve(source, revision=revision), dtype)
    note_written(target, quantize_checkpoint(checkpoint, target, "int8" if int8 else "int4", dtype, folders=folders))


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="A hub id, e.g. google/paligemma2-3b-mix-224.")],
    revision: Revision = None,
) -> None:
    """Fetch a checkpoint into the hub's cache and print where it lies."""
    from paligemma.utils import resolve

    typer.echo(resolve(model, revision=revision))


@app.command()
def evaluate(
    model: Model = "tiny",
    data: Annotated[
        str,
        typer.Option(
            help="tiny, tiny:heldout, tiny:twemoji (the small world; a folder of this name is ./tiny), your rows, or a "
            "benchmark's folder."
        ),
    ] = "tiny",
    task: Annotated[
        str | None, typer.Option(help="A benchmark (textvqa, nlvr2, ...), or a metric for your rows (vqa, exact, ...).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a benchmark, or of a folder with several.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="The first rows alone; scenes: 1000 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Predictions, results and the worst rows; go on there.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default 128; 512 for detect and segment.")] = None,
    free: Annotated[bool, typer.Option("--free", help="Decode detect and segment without the grammar.")] = False,
    kind: Kind = None,
    images: Images = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    language: Language = "en",
    every_label: EveryLabel = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as one JSON object.")] = False,
) -> None:
    """Measure a model: a table of metrics with 95% intervals, beside baselines, targets and published figures.

    On scenes of the small world; on your own rows (as for `train`), by the metric that --task names; or on a published
    benchmark in the folder --data, with the prompt, decoding and metric of PaliGemma's transfers.
    """
    from paligemma.evaluate.benchmarks import BENCHMARKS, check_benchmark, evaluate_benchmark, resolved_split
    from paligemma.evaluate.runner import check_folder
    from paligemma.inference import load

    def opened() -> Any:  # after the data: what is wrong with them, or with --out, is told at once
        if out is not None:
            check_folder(out)
        return hinted(load(model, device=device, dtype=dtype, revision=revision))

    options: dict[str, Any] = {"batch_size": batch_size, "out_folder": out}
    about: dict[str, Any] = {"model": model, "data": data, "dtype": dtype}
    scenes = data.partition(":")[0] == "tiny"  # whatever lies here: a folder of this name is ./tiny
    if task in BENCHMARKS and not scenes:
        if free or max_new_tokens or kind or images or annotations or image_name or every_label or language != "en":
            raise typer.BadParameter(f"how {task} is read and decoded is part of it: leave out the options for rows")
        split = resolved_split(task, split)
        if split in BENCHMARKS[task].hidden and out is None:
            raise typer.BadParameter(
                f"the answers to {task}/{split} are kept on a server: --out FOLDER saves the predictions to send there"
            )
        check_benchmark(task, data, split)
        report = evaluate_benchmark(opened(), task, data, split, count=count, about=about, **options)
    elif scenes:
        from paligemma.evaluate import evaluate as run_evaluation
        from paligemma.tiny.evaluation import MEASURES, ROWS_PER_SCENE, targets, tiny_examples

        world = data.partition(":")[2] or "test"
        if world not in ("test", "heldout", "twemoji"):
            raise typer.BadParameter(f"--data is {data!r}, expected tiny, tiny:heldout or tiny:twemoji")
        if task or split:
            raise typer.BadParameter("the small world has its own tasks: --task and --split are for other --data")
        count = count or 1000
        report = run_evaluation(
            opened(),
            tiny_examples(count, world),
            MEASURES,
            targets=targets(world),
            about={**about, "data": f"tiny:{world}"},
            constrained=not free,
            max_new_tokens=max_new_tokens,
            total=round(count * ROWS_PER_SCENE),
            **options,
        )
    else:
        from paligemma.data.rows import open_rows
        from paligemma.data.show import codec_of
        from paligemma.train.measuring import evaluate_rows, metric_of

        metric = metric_of(task)
        source: dict[str, Any] = {
            "images": images,
            "annotations": annotations,
            "image_name": image_name,
            "split": split,
            "language": language,
            "every_label": every_label,
        }
        # How rows are made of the data: --out is only continued with the same, wherever the files lie.
        about |= {"kind": kind, **{name: value for name, value in source.items() if value}}
        source["codec"] = codec_of(model, revision, kind)
        rows = open_rows(data, kind, **source)
        report = evaluate_rows(
            opened(),
            rows,
            metric,
            count=count,
            about=about,
            constrained=not free,
            max_new_tokens=max_new_tokens,
            **options,
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        print_table(report.table())


@app.command()
def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A published name (random weights, no download), or a checkpoint.")
    ] = "paligemma-3b-pt-224",
    precisions: Annotated[
        str, typer.Option(help="plain, bf16, int8, int4; with -torch without the kernel. Separated by commas.")
    ] = "bf16,int8,int4",
    transformers: Annotated[
        bool | None, typer.Option("--transformers/--no-transformers", help="Default: if it is installed.")
    ] = None,
    grow: Annotated[bool, typer.Option("--grow", help="Also how cost grows: length, batch, resolution.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One round of less, for a try.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Of each timed answer.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: PyTorch's own choice.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where random weights lie for the time of the run.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the record and the picture.")] = Path("benchmarks"),
) -> None:
    """Measure speed and memory on this machine, beside its limits and beside transformers."""
    from paligemma.bench.plot import draw
    from paligemma.bench.report import growth_lines, table
    from paligemma.bench.run import benchmark, record_path

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: gigabytes of random weights are removed
    path = record_path(out, model)
    with notes.status("") as status:
        record = benchmark(
            model,
            [name.strip() for name in precisions.split(",") if name.strip()],
            transformers=transformers,
            rounds=1 if quick else rounds,
            passes=1 if quick else 2,
            tokens=min(tokens, 8) if quick else tokens,
            grow=grow,
            quick=quick,
            threads=threads,
            work=work,
            out=path,
            command="paligemma " + " ".join(sys.argv[1:]),
            say=lambda text: status.update(Text(text)),
        )
    print_table(table(record))
    for line in growth_lines(record):
        typer.echo(line)
    for failed in record["failed"]:
        note(f"failed: {failed['what']}: {failed['why']}")
    note(f"record: {path}")
    try:
        draw(record, path.with_suffix(".png"))
        note(f"picture: {path.with_suffix('.png')}")
    except (ImportError, ValueError) as error:
        note(f"note: no picture: {error}")
    if record["failed"]:
        raise typer.Exit(1)


@app.command("train")
def finetune(
    data: Annotated[str, typer.Option(help="JSON lines, CSV, COCO, VQA, parquet, or a folder with one of them.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; in the end the model itself.")],
    model: Model = "tiny",
    validation: Annotated[str | None, typer.Option(help="Rows to measure answers on; the same kind of data.")] = None,
    validation_split: Annotated[str | None, typer.Option(help="Which one, as --split.")] = None,
    validation_annotations: Annotated[str | None, typer.Option(help="VQA: the file with its answers.")] = None,
    metric: Annotated[str, typer.Option(help="auto (by prompt), exact, vqa, anls, caption, detect, ...")] = "auto",
    validate_every: Annotated[int, typer.Option(min=0, help="Steps. Default: only at the end.")] = 0,
    validation_rows: Annotated[int, typer.Option(min=1, help="How many of them, drawn by lot.")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="How long, in batches.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How long, in times through the data. Default 1.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long at most; the schedule ends with them.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Work through a batch in so many pieces.")] = 1,
    keep_together: Annotated[
        bool,
        typer.Option("--keep-together", help="Shuffle pictures, not rows: one with several rows is encoded once."),
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default 1e-5; with LoRA 1e-4.")] = None,
    vision_lr: Annotated[float, typer.Option(help="The vision tower's share of the learning rate, e.g. 0.1.")] = 1.0,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[
        float,
        typer.Option(help="As torch's, times the learning rate; of eye and projector alone, as in the reference."),
    ] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target given to all other tokens.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="In the decoder.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Most that the norm of the gradient may be.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Measure and save a running average with this decay, e.g. 0.999.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or muon (a third of the rate for all but matrices).")] = "adamw",
    freeze: Annotated[str, typer.Option(help="Parts that stay: vision, projector, decoder, embedding (a,b).")] = "",
    lora: Annotated[str, typer.Option(help="Train LoRA in these parts alone: decoder, vision, projector (a,b).")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Of LoRA. Default: its rank.")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.0,
    quantize: Annotated[
        str | None, typer.Option(help="Round what LoRA leaves as it is: nf4 (QLoRA), bnb-int8; by bitsandbytes, CUDA.")
    ] = None,
    checkpoint_gradients: Annotated[
        bool, typer.Option("--checkpoint-gradients", help="Less memory, a third more time.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: share weights and optimizer out among the processes.")
    ] = False,
    seed: int = 0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row, pictures included; longer answers are cut.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Another resolution than the checkpoint's.")] = None,
    kind: Annotated[str | None, typer.Option(help="What the data is, where its content does not say.")] = None,
    images: Annotated[str | None, typer.Option(help="The folder that names of pictures are relative to.")] = None,
    annotations: Annotated[str | None, typer.Option(help="VQA: the file with the answers.")] = None,
    image_name: Annotated[
        str | None, typer.Option(help="The picture's name by other fields: '{image_id}.jpg'.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which one, in a folder with several.")] = None,
    language: Language = "en",
    every_label: EveryLabel = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="To compute and save in. Default: the checkpoint's; float32 to compute in where bfloat16 is slow."
        ),
    ] = None,
    revision: Revision = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, or remove it.")] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at rows that are otherwise skipped (a picture that cannot be read) or cut (a box that reaches "
            "out of it, an answer that is too long).",
        ),
    ] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 120.0,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how much memory it would need.")] = False,
) -> None:
    """Fine-tune a model on your rows: pictures, prompts, answers.

    The same command again goes on where it was cut off. Ctrl-C saves first.
    """
    given = dict(locals())
    from paligemma.train.finetune import Options, plan_of
    from paligemma.train.finetune import finetune as run_finetune

    del given["plan"]
    named = {
        name: tuple(part.strip() for part in given[name].split(",") if part.strip()) for name in ("freeze", "lora")
    }
    try:
        options = Options(**{**given, **named, "out": str(out)})
    except ValueError as error:  # out of range, unknown, or without effect; nothing was looked at yet
        raise typer.BadParameter(str(error)) from None
    if plan:
        Console().print(plan_of(options).table())
        return
    try:
        run_finetune(options)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        raise typer.Exit(130) from None


@data_app.command("check")
def data_check(
    data: Data,
    images: Images = None,
    kind: Kind = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
    language: Language = "en",
    every_label: EveryLabel = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also count tokens, as this model's tokenizer does.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row, pictures included; needs --model.")
    ] = None,
    open_pictures: Annotated[bool, typer.Option("--open-pictures", help="Also open every picture.")] = False,
    show: Annotated[int, typer.Option(min=1, help="Rows to name for each problem.")] = 3,
    revision: Revision = None,
) -> None:
    """Look for what is wrong in every row. Exit code 1 if something is."""
    if max_length is not None and model is None:
        raise typer.BadParameter("--max-length is in tokens, and counting them takes --model")
    from paligemma.data.check import check
    from paligemma.data.rows import open_rows
    from paligemma.data.show import processor_of

    processor, codec = processor_of(model, revision, kind) if model is not None else (None, None)
    with notes.status(Text(f"reading {data}")) as status:
        rows = open_rows(
            data,
            kind,
            images=images,
            annotations=annotations,
            image_name=image_name,
            split=split,
            language=language,
            every_label=every_label,
            codec=codec,
        )
        report = check(
            rows, processor, max_length, open_pictures, show,
            progress=lambda done: status.update(Text(f"{done:,} of {len(rows):,} rows")),
        )  # fmt: skip
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    data: Data,
    out: Annotated[Path, typer.Option(help="A picture of all the rows, or a folder for one of each.")],
    rows: Annotated[str | None, typer.Option(help="Their numbers, from 0: 7,12. Default: some from all over.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many, without --rows.")] = 4,
    model: Model = "tiny",
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut rows there, as training would.")] = None,
    images: Images = None,
    kind: Kind = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
    language: Language = "en",
    every_label: EveryLabel = False,
    revision: Revision = None,
) -> None:
    """Draw rows as the model will see them: picture, tokens, labels and mask."""
    numbers = [part.strip() for part in (rows or "").split(",") if part.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"--rows is {rows!r}, expected numbers of rows such as 7,12")
    drawing_paths(out, [], "--out")  # a name that no picture can have is told at once
    from paligemma.data.rows import open_rows
    from paligemma.data.show import processor_of, show_rows

    processor, codec = processor_of(model, revision, kind)
    found = open_rows(
        data,
        kind,
        images=images,
        annotations=annotations,
        image_name=image_name,
        split=split,
        language=language,
        every_label=every_label,
        codec=codec,
    )
    chosen = [int(number) for number in numbers] or [k * len(found) // count for k in range(min(count, len(found)))]
    for number in chosen:
        if number >= len(found):
            raise typer.BadParameter(f"there is no row {number}: {data} has {len(found):,}, counted from 0")
    sheets = [chosen] if out.suffix and not out.is_dir() else [[number] for number in chosen]
    for sheet in sheets:
        path = out if sheet is chosen else out / f"row-{sheet[0]:06d}.png"
        save_picture(show_rows([found[k] for k in sheet], processor, codec, max_length=max_length), path)
        note(f"drawn: {path}")


@tiny_app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    count: Annotated[int, typer.Option(min=1)] = 20,
    split: Annotated[
        str,
        typer.Option(
            help="train, val, test, heldout or twemoji.", callback=one_of("train", "val", "test", "heldout", "twemoji")
        ),
    ] = "test",
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures in pixels.")] = 384,
    seed: int = 0,
    task: Annotated[
        str | None, typer.Option(help="count_color: a question about each picture, which the model has yet to learn.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="About each picture, with --task count_color.")] = 1,
    most: Annotated[int, typer.Option(min=1, max=5, help="Of the colour asked about, with --task count_color.")] = 5,
    apart: Annotated[
        bool, typer.Option("--apart", help="Nothing hides a part of another, with --task count_color.")
    ] = False,
) -> None:
    """Write pictures of the small world with prompts and answers (JSONL) and COCO annotations."""
    if task not in (None, "count_color"):
        raise typer.BadParameter(f"--task is {task!r}, expected count_color; without it all that the model knows")
    if task == "count_color":
        from paligemma.tiny.color_counts import write_color_counts

        write_color_counts(count, out, split=split, size=size, seed=seed, questions=questions, most=most, apart=apart)
        note(f"written: {out}")
        return
    if questions != 1 or most != 5 or apart:
        raise typer.BadParameter("--questions, --most and --apart are for --task count_color")

    from paligemma.tiny.scenes import write_scenes

    write_scenes(count, out, split=split, size=size, seed=seed)
    note(f"written: {out}")


@tiny_app.command()
def train(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to train; run it again to go on.")] = 30,
    out: Annotated[Path, typer.Option(help="State, log and checkpoint.")] = Path("runs/tiny"),
) -> None:
    """Train the embedded model from nothing, or go on where the last run stopped."""
    from paligemma.tiny.recipe.train import train as train_tiny

    train_tiny(minutes, out)


def main() -> None:
    """Runs the command line. Errors are a line on stderr; with --debug, a traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    debug = len(arguments) < len(sys.argv) - 1
    # Pillow warns of a large picture at half the size at which it refuses one, with the place in its code.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer is not lost to a terminal without its letters
    try:
        app(arguments, standalone_mode=True)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError, ArithmeticError) as error:
        if debug:
            raise
        complain(error)
        sys.exit(1)
