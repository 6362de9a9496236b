"""What is fuzzed: for every entrance of the package, valid inputs and the call that takes them.

A `Kind` has a folder of valid files, of which a copy is broken for each input, and a function that uses the copy. What
the function raises must be one of `OUR_ERRORS`; the command line must end by an exit code of its own.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from make_tokenizer import build_tokenizer
from mutate import HOSTILE, of_file, of_text
from PIL import Image
from reference import randomize, tiny_config
from typer.main import get_command

import paligemma
from paligemma.answers.mask_codec import MaskCodec
from paligemma.cli import main as cli
from paligemma.data.check import check
from paligemma.data.options import DataOptions
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.train.parts import add_lora
from paligemma.weights.adapters import save_adapter

# What the command line turns into one line. A bug looks different: TypeError, KeyError, AttributeError, ...
OUR_ERRORS = (ValueError, OSError, RuntimeError, ImportError, MemoryError, ArithmeticError)


@dataclass(frozen=True)
class Kind:
    """files: patterns of the valid files of which one is broken for each input. use: takes (random, folder, broken)."""

    name: str
    folder: str
    files: tuple[str, ...]
    use: Callable[[Random, Path, Path], Any]

    def one(self, seed: int, number: int, valid: Path, scratch: Path) -> None:
        """Makes input `number` and uses it; the same whenever it is made."""
        random = Random(f"{self.name} {seed} {number}")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(valid / self.folder, scratch)
        candidates = sorted(path for pattern in self.files for path in scratch.glob(pattern))
        broken = random.choice(candidates) if candidates else scratch
        if candidates:
            broken.write_bytes(of_file(random, broken.name, broken.read_bytes()))
        torch.manual_seed(0)
        self.use(random, scratch, broken)


# ------------------------------------------------------------------------------------------------ valid inputs


def build(folder: Path) -> None:
    """The valid inputs: a checkpoint of random weights in several formats, pictures, data."""
    torch.manual_seed(0)
    tokenizer = paligemma.load_tokenizer(build_tokenizer(folder / "tokenizer"))
    rows = (len(tokenizer) + 63) // 64 * 64
    model = PaliGemmaForConditionalGeneration(
        tiny_config("gemma2", vocab_size=rows, image_token_index=tokenizer.image_token_id)
    )
    randomize(model)
    paligemma.save_pretrained(model, folder / "model", processor=paligemma.PaliGemmaProcessor(tokenizer, 4, 28))
    small: dict[str, Any] = {"embedding_dim": 8, "encoder_widths": (4,) * 4, "decoder_widths": (4,) * 5}
    MaskCodec(**small).save(folder / "model" / "mask_codec.npz")
    paligemma.convert(folder / "model", folder / "npz" / "model.npz")
    _sharded(folder / "model", folder / "sharded")
    _adapter(model, folder)
    _pictures(folder / "pictures")
    _data(folder)


def _sharded(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, target / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(model: PaliGemmaForConditionalGeneration, folder: Path) -> None:
    add_lora(model, ("decoder",), rank=2)
    save_adapter(model, folder / "adapter", folder / "model")


def _pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    for suffix in ("png", "gif", "bmp", "webp", "tiff", "ppm", "ico", "tga", "jp2"):
        with contextlib.suppress(KeyError, OSError):  # not every Pillow has every codec
            picture.save(folder / f"a.{suffix}")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    picture.save(folder / "two.gif", save_all=True, append_images=[picture.rotate(90)])


def _data(folder: Path) -> None:
    picture = folder / "pictures" / "a.png"

    def new(name: str) -> Path:
        (folder / name).mkdir()
        shutil.copy(picture, folder / name / "a.png")
        return folder / name

    rows = [
        {"image": "a.png", "prefix": "caption en", "suffix": "a dog"},
        {"image": "a.png", "prefix": "detect dog", "suffix": "<loc0100><loc0100><loc0500><loc0500> dog"},
        {"image": ["a.png", "a.png"], "question": "what?", "answers": ["a", "b"]},
    ]
    (new("jsonl") / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (new("csv") / "rows.csv").write_text('image,prefix,suffix\na.png,caption en,"a ""dog"""\na.png,ocr,text\n')
    objects = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 12}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0,
             "segmentation": [[1, 2, 6, 2, 6, 8, 1, 8]]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 1,
             "segmentation": {"size": [12, 16], "counts": [0, 5, 187]}},
        ],
    }  # fmt: skip
    (new("coco") / "objects.json").write_text(json.dumps(objects))
    vqa = new("vqa")
    (vqa / "questions.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image_id": 1, "image": "a.png", "question": "what?"}]})
    )
    answers = [{"answer": word, "answer_id": i} for i, word in enumerate("abcdefghij")]
    (vqa / "annotations.json").write_text(
        json.dumps({"annotations": [{"question_id": 1, "image_id": 1, "answers": answers}]})
    )
    yolo = new("yolo")
    (yolo / "data.yaml").write_text("train: images\nnames: [dog, cat]\n")
    for name in ("images", "labels"):
        (yolo / name).mkdir()
    shutil.move(yolo / "a.png", yolo / "images" / "a.png")
    (yolo / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.4 0.1 0.4 0.4\n")
    voc = "<annotation><filename>a.png</filename><size><width>16</width><height>12</height><depth>3</depth></size>"
    voc += "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
    (new("voc") / "a.xml").write_text(voc + "</annotation>")
    shape = {"label": "dog", "points": [[1, 2], [9, 8]], "shape_type": "rectangle"}
    labelme = {"shapes": [shape], "imagePath": "a.png", "imageHeight": 12, "imageWidth": 16}
    (new("labelme") / "a.json").write_text(json.dumps(labelme))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    columns = {
        "image": [{"bytes": picture.read_bytes(), "path": "a.png"}] * 2,
        "prefix": ["ocr"] * 2,
        "suffix": ["a"] * 2,
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, new("parquet") / "rows.parquet")
    with pyarrow.ipc.new_stream(new("arrow") / "rows.arrow", table.schema) as stream:
        stream.write_table(table)


# ------------------------------------------------------------------------------------------------ their use


def load_and_answer(random: Random, folder: Path, broken: Path) -> None:
    source = folder / "model.npz" if (folder / "model.npz").exists() else folder
    pg = paligemma.load(str(source), device="cpu")
    pg.generate(Image.new("RGB", (8, 8)), "segment dog", 24, constrained=True)


def open_tokenizer(random: Random, folder: Path, broken: Path) -> None:
    tokenizer = paligemma.load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a <loc0012> dog ; 猫\n"))


def open_processor(random: Random, folder: Path, broken: Path) -> None:
    processor = paligemma.PaliGemmaProcessor.from_pretrained(folder)
    processor(text=["caption en"], images=[Image.new("RGB", (8, 8))])


def open_picture(random: Random, folder: Path, broken: Path) -> None:
    paligemma.load_image(random.choice([broken, str(broken), broken.read_bytes()]))


def open_rows(random: Random, folder: Path, broken: Path) -> None:
    vqa = {"annotations": folder / "annotations.json"} if (folder / "questions.json").exists() else {}
    source = (
        folder / "questions.json" if vqa else broken if broken.suffix == ".arrow" else random.choice([folder, broken])
    )
    annotated = broken.suffix in (".xml", ".yaml") or broken.name == "objects.json"
    rows = DataOptions(source, every_label=annotated and random.random() < 0.3, **vqa).open()
    str(check(rows, open_pictures=True))
    for number in range(min(len(rows), 5)):
        with contextlib.suppress(*OUR_ERRORS):
            rows[number]


_models: dict[Path, Any] = {}


def answer_prompts(random: Random, folder: Path, broken: Path) -> None:
    if folder not in _models:
        _models[folder] = paligemma.load(str(folder), device="cpu")
    start = random.choice(["caption en", "detect dog ; cat", "segment dog", "answer en what?", "", "ocr"])
    prompt = of_text(random, start)
    _models[folder].generate(Image.new("RGB", (8, 8)), prompt, 4, constrained=random.random() < 0.5)
    answer = of_text(random, "<loc0100><loc0100><loc0500><loc0500>" + "<seg001>" * 16 + " dog ; cat")
    paligemma.parse(answer, image_size=(random.choice([1, 640, 10**6]), 480), codec=_models[folder].codec)


# Command lines that work, on the folder of valid inputs. To one of them, or to the bare command, options are added.
WORKING = [
    ["run", "caption en", "pictures/a.png", "--model", "model"],
    ["run", "detect dog", "pictures", "--model", "model", "--save", "drawn", "--save-labels", "labels"],
    ["explore", "caption en", "pictures/a.png", "--model", "model", "--out", "look.html", "--knock-out"],
    ["explore", "detect dog", "pictures/a.png", "--model", "model", "--json"],
    ["train", "jsonl/rows.jsonl", "--data", "jsonl/rows.jsonl", "--model", "model", "--steps", "1", "--out", "tuned"],
    ["train", "--data", "coco/objects.json", "--model", "model", "--steps", "1", "--plan"],
    ["train", "compare", "tuned", "tuned"],
    ["evaluate", "--data", "jsonl/rows.jsonl", "--model", "model", "--out", "measured"],
    ["info", "model"],
    ["convert", "model", "new", "--dtype", "bfloat16"],
    ["convert", "npz/model.npz", "new.npz"],
    ["merge", "adapter", "merged"],
    ["quantize", "model", "small", "--int8"],
    ["download", "model"],
    ["data", "check", "jsonl/rows.jsonl", "--model", "model"],
    ["data", "show", "coco/objects.json", "--out", "shown", "--model", "model"],
    ["tiny", "scenes", "--out", "scenes", "--count", "1"],
]
# Too long for one input of ten thousand, whatever the options: their arguments are checked alone.
NEVER_RUN = [["bench"], ["tiny", "train"], ["tiny", "evaluate"]]


def run_command(random: Random, folder: Path, broken: Path) -> None:
    """A random command line, in this process. It ends by an exit code, and never by another exception."""
    arguments = a_command_line(random)
    before, sys.argv = sys.argv, ["paligemma", *arguments]
    here, stdin = Path.cwd(), sys.stdin
    torch.set_num_threads(1)  # a line before may have asked for more
    try:
        sys.stdin = io.TextIOWrapper(io.BytesIO(b""))
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.main()
    except SystemExit as stop:
        assert stop.code in (None, 0, 1, 2), f"exit code {stop.code}: {arguments}"
    except Exception as error:
        if not isinstance(error, OUR_ERRORS):
            error.add_note(f"paligemma {arguments}")
            raise
        raise AssertionError(f"{type(error).__name__} left the command line: {arguments}") from error
    finally:
        sys.argv, sys.stdin = before, stdin
        os.chdir(here)


def a_command_line(random: Random) -> list[str]:
    """Mostly one that works, with up to four options more, whose values are mostly of the right type."""
    line = [*random.choice(WORKING)]
    if random.random() < 0.1:
        line = [*random.choice(NEVER_RUN), "--help"]
    elif random.random() < 0.2:  # something is missing, or is another file
        at = random.randrange(len(line))
        line[at : at + 1] = [] if random.random() < 0.5 else [random.choice(PLAIN)]
    elif random.random() < 0.05:
        line = [of_text(random, "run")]
    command: Any = get_command(cli.app)
    for words in (" ".join(line[:2]), line[0] if line else "", line[1] if len(line) > 1 else ""):
        command = getattr(command, "commands", {}).get(words, command)
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("-")]
    for _ in range(random.randrange(5)):
        if not options:
            break
        option = random.choice(options)
        line.append(random.choice([*option.opts, *option.secondary_opts]))
        if not getattr(option, "is_flag", False) and random.random() < 0.95:
            line.append(a_value(random, str(option.type_descriptor.annotation)))
    return line


# Counts stay small: ten thousand steps are no fault of the command.
PLAIN = [
    "caption en", "detect dog", "model", "pictures/a.png", "pictures", "jsonl/rows.jsonl", "coco/objects.json", "yolo",
    "voc", "csv/rows.csv", "vqa/questions.json", "out", "adapter", "npz/model.npz", "sharded", "tokenizer", "1", "2",
    "0", "-1", "int8", "int4", "float32", "float16", "bfloat16", "cpu", "cuda", "mps", "auto", "-", "*", "coco", "voc",
    "boxes", "exact_match", "train", "validation", "adamw", "muon", "cosine", "linear", "all",
]  # fmt: skip


def a_value(random: Random, kind: str) -> str:
    if random.random() < 0.15:
        value = str(random.choice([value for value in HOSTILE if isinstance(value, str | int)]))
        return value.replace("\0", "") if len(value) < 10 or not value.isdigit() else "3"
    if "int" in kind:
        return random.choice(["0", "1", "2", "3", "7", "28", "56", "-1", "1023"])
    if "float" in kind:
        return random.choice(["0", "0.5", "1", "1e-3", "1e-300", "-1", "nan", "inf", "2.5"])
    return random.choice(PLAIN)


KINDS = [
    Kind("pictures", "pictures", ("*",), open_picture),
    Kind("safetensors", "model", ("*.safetensors",), load_and_answer),
    Kind("index", "sharded", ("*.index.json",), load_and_answer),
    Kind("config", "model", ("config.json",), load_and_answer),
    Kind("preprocessor", "model", ("preprocessor_config.json",), open_processor),
    Kind("tokenizer", "model", ("tokenizer*.json",), open_tokenizer),
    Kind("mask codec", "model", ("mask_codec.npz",), load_and_answer),
    Kind("adapter", "adapter", ("adapter_*",), load_and_answer),
    Kind("npz", "npz", ("model.npz",), load_and_answer),
    Kind("parquet", "parquet", ("*.parquet",), open_rows),
    Kind("arrow", "arrow", ("*.arrow",), open_rows),
    Kind("jsonl", "jsonl", ("*.jsonl",), open_rows),
    Kind("csv", "csv", ("*.csv",), open_rows),
    Kind("coco", "coco", ("*.json",), open_rows),
    Kind("vqa", "vqa", ("*.json",), open_rows),
    Kind("yolo", "yolo", ("*.yaml", "labels/*.txt"), open_rows),
    Kind("voc", "voc", ("*.xml",), open_rows),
    Kind("labelme", "labelme", ("*.json",), open_rows),
    Kind("prompts", "model", (), answer_prompts),
    Kind("command lines", ".", (), run_command),
]
