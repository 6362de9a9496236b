"""The command line of `paligemma train`, what people complain of most, and the report."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from training_runs import run
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.data.rows import Row
from paligemma.evaluate.own_rows import metric_of_prompt, to_example
from paligemma.train import run_report
from paligemma.train.batches import RowBatches
from paligemma.train.compare import compare
from paligemma.train.options import TrainOptions

# ----------------------------------------------------------------------------------------------------- the command


def test_two_runs_side_by_side(base, data, tmp_path):
    """`paligemma train compare`: options that differ, their figures; also of a run that is not finished."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    run(base, data, one, steps=2, validation=data)
    run(base, data, two, steps=3, validation=data, lr=1e-4)
    done = CliRunner().invoke(app, ["train", "compare", str(one), str(two)])
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") == 4}
    assert lines["lr"].split("│")[2:4] != ["", ""] and "0.003" in lines["lr"] and "0.0001" in lines["lr"]
    assert {"steps", "exact", "last loss", "peak memory"} <= set(lines) and "batch" not in lines and "out" not in lines
    shutil.copytree(two, three)
    (three / "finished.json").unlink()
    unfinished = CliRunner().invoke(app, ["train", "compare", str(two), str(three)]).stdout
    assert "options, data and weights" in unfinished and "in step 3" in unfinished
    done = CliRunner().invoke(app, ["train", "compare", str(one), str(tmp_path)])
    assert isinstance(done.exception, FileNotFoundError) and "has no settings.json" in str(done.exception)


def test_brackets_in_the_names_of_runs_are_no_markup(base, data, tmp_path):
    one, two = (str(tmp_path / name) for name in ("[old]", "[/x]"))
    shutil.copytree(Path(data).parent, tmp_path / "[data]")
    run(base, data, Path(one), steps=1)
    run(base, str(tmp_path / "[data]" / "rows.jsonl"), Path(two), steps=1)
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(compare(one, two))
    text = console.export_text()
    assert all(name in text for name in (one, two, str(tmp_path / "[data]" / "rows.jsonl")))


def test_help_shows_every_option_once_under_a_heading():
    page = CliRunner().invoke(app, ["train", "--help"]).stdout
    headings = re.findall(r"^(\S.*):$", page, re.MULTILINE)
    assert headings[0] == "Model, data and result" and headings[-1] == "Other" and "Options" not in headings
    for field in TrainOptions.__dataclass_fields__:
        assert len(re.findall(rf"^  (?:-m, )?--{field.replace('_', '-')}\b", page, re.MULTILINE)) >= 1, field


MEASURED = """
import re, sys
import torch
torch.set_num_threads(1)
from paligemma.train import finetune

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

load = finetune.load
def loaded(*arguments):
    pg = load(*arguments)
    print(memory("VmRSS"))
    return pg

finetune.load = loaded
base, data, out = sys.argv[1:]
finetune.finetune(finetune.TrainOptions(model=base, data=data, out=out, steps=100, batch=4))
print(memory("VmHWM"))
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_million_rows_need_little_memory(base, data, tmp_path):
    """All rows checked, 100 steps, in a process of its own."""
    with open(data, "a") as file:
        for i in range(1_000_000):
            file.write(json.dumps({"image": f"{i % 8}.png", "prefix": f"answer en {i} ?", "suffix": f"{i}"}) + "\n")
    command = [sys.executable, "-c", MEASURED, base, data, str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=1800)
    with_model, most = map(float, done.stdout.split())
    assert most - with_model < 300, "megabytes; a gigabyte is what it must never be"


# ------------------------------------------------------------------------------------------- the commonest complaints


def batch_of(processor, prefix: str, suffix: str, pictures: int = 1, max_length: int | None = None):
    picture = np.full((28, 28, 3), 200, np.uint8)
    row = {"image": (picture,) * pictures, "prefix": prefix, "suffix": suffix}
    return RowBatches([row], processor, 1, max_length=max_length)(0)


def test_labels_end_in_eos_and_hold_nothing_of_the_prompt(base):
    processor = paligemma.load(base).processor
    batch = batch_of(processor, "answer en what ?", "a red car")
    labels = batch["labels"][0]
    tokenizer = processor.tokenizer
    learned = labels[labels != -100].tolist()
    assert learned == [*tokenizer.encode("a red car"), tokenizer.eos_token_id]
    assert (labels[batch["token_type_ids"][0] == 0] == -100).all()


def test_the_mask_does_not_leak_the_answer(base):
    """Another token in the answer changes what is predicted after it, and nothing before it or in the prompt."""
    pg = paligemma.load(base)
    batch = batch_of(pg.processor, "answer en what ?", "a red car and a blue car")
    first = int((batch["labels"][0] != -100).nonzero()[0])
    changed = first + 2

    def logits(ids):
        with torch.no_grad():
            return pg.model(ids, batch["pixel_values"], batch["attention_mask"], batch["token_type_ids"]).logits[0]

    other = batch["input_ids"].clone()
    other[0, changed] = pg.processor.tokenizer.encode("green")[0]
    assert other[0, changed] != batch["input_ids"][0, changed]
    one, two = logits(batch["input_ids"]), logits(other)
    torch.testing.assert_close(one[:changed], two[:changed], rtol=0, atol=0)
    assert ((one[changed:] - two[changed:]).abs().amax(-1) > 1e-4).all()
    # And the prompt is read whole: its last token changes what stands at its first.
    prompt = batch["input_ids"].clone()
    prompt[0, first - 2] = pg.processor.tokenizer.encode("green")[0]
    assert (one[0] - logits(prompt)[0]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*suffixes were cut")
def test_image_tokens_are_never_cut(base):
    """Whatever max_length: either all of them are there, or the row is refused."""
    processor = paligemma.load(base).processor
    for pictures in (1, 2):
        whole = pictures * 4
        for max_length in range(1, 30):
            try:
                batch = batch_of(processor, "caption en", "a red car", pictures, max_length)
            except ValueError as error:
                assert "never cut" in str(error)
                continue
            assert int((batch["input_ids"] == processor.tokenizer.image_token_id).sum()) == whole


# ------------------------------------------------------------------------------------------------------- sight


@pytest.mark.parametrize(
    "prompt, measure",
    [
        ("detect dog ; cat", "detect"),
        ("segment dog", "segment"),
        ("caption en", "caption"),
        ("ocr", "reading"),
        ("answer en how many ?", "exact"),
    ],
)
def test_the_prompt_says_how_its_answers_are_measured(prompt, measure):
    assert metric_of_prompt(prompt) == measure
    assert metric_of_prompt(prompt, "anls") == "anls"


def test_boxes_of_the_suffix_are_the_truth():
    pg = paligemma.load("tiny")
    picture = Image.new("RGB", (200, 100))
    row = Row("a.png", "detect dog", "<loc0512><loc0000><loc0768><loc0512> dog", 3, "rows.jsonl:4")
    example = to_example(row, "detect", picture, pg)
    (region,) = example.regions
    assert (region.label, region.box) == ("dog", (0.0, 50.0, 100.0, 75.0)) and not example.answers
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    row = Row("a.png", "segment dog", f"<loc0512><loc0000><loc0768><loc0512>{codes} dog", 3, "rows.jsonl:4")
    assert to_example(row, "segment", picture, pg).regions[0].mask.shape == (100, 200)
    nothing = to_example(Row("a.png", "detect dog", "", 3, "rows.jsonl:4"), "detect", picture, pg)
    assert nothing.answers == ("",) and not nothing.regions


def test_what_others_wrote_cannot_break_the_page(tmp_path):
    from paligemma.evaluate import Example, Prediction

    example = Example("1", Image.new("RGB", (8, 8)), "<script>alert(1)</script>", "exact", ("<b>",))
    log = [{"step": k, "loss": 1.0 / k, "lr": 1.0} for k in range(1, 2000)]
    log += [{"step": 3, "skipped": "<i>.jsonl:3", "error": "&"}, {"step": 4, "validation": {"CIDEr-D": 1.7, "x": None}}]
    path = tmp_path / "report.html"
    run_report.write_report(path, "<title>", {}, log, [], [(example, Prediction("</p><img src=x>"))], {"a": "<u>"})
    page = path.read_text()
    assert not re.search(r"<script|<b>\W|<i>|<u>|<img src=x", page.replace("<b>prompt", "").replace("<b>truth", ""))
    assert "&lt;script&gt;" in page and "CIDEr-D" in page
    longest = max(len(points.split()) for points in re.findall(r'points="([^"]*)"', page))
    assert longest <= run_report.MOST_POINTS * 2, "a curve of a million steps is thinned"


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 7.3, [0, 2, 4, 6, 8]), (0, 1e-5, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert run_report.nice_ticks(low, high) == pytest.approx(ticks)
