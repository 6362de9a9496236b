"""Pictures that vanish, rows that are too long, losses that are no numbers, a full disk, too little memory."""

import json
import os
import re
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from training_runs import SMALL, during, log_of, run, write_data

import paligemma
from paligemma.train import checkpointing
from paligemma.train.batches import MOST_SKIPPED, RowBatches
from paligemma.train.finetune import finetune
from paligemma.train.options import TrainOptions

# ------------------------------------------------------------------------------------------------------- bad data


def test_a_picture_that_vanishes_is_skipped_and_counted(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 8, "steps": 3})
    result = finetune(options, during((Path(data).parent / "3.png").unlink))
    assert result["summary"]["rows skipped"] == 3  # once in each epoch
    skipped = [entry for entry in log_of(tmp_path / "run") if "skipped" in entry]
    assert {entry["skipped"] for entry in skipped} == {f"{data}:4"}
    assert sorted(entry["step"] for entry in skipped) == [1, 2, 3]
    assert "rows.jsonl:4" in (tmp_path / "run" / "report.html").read_text()


def test_or_it_is_an_error_with_strict(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 8}, strict=True)
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        finetune(options, during((Path(data).parent / "3.png").unlink))


def test_missing_before_the_first_step(base, data, tmp_path):
    (Path(data).parent / "3.png").unlink()
    said = run(base, data, tmp_path / "run")
    assert any("missing picture: 1 of 8 rows, they are skipped; the first is" in line for line in said)
    with pytest.raises(ValueError, match=r"missing picture: 1 row.*\n.*rows\.jsonl:4: no picture at"):
        run(base, data, tmp_path / "strict", strict=True)


def test_too_many_pixels_are_told_before_the_first_step_and_skipped(base, data, tmp_path):
    Image.new("RGB", (28, 29)).save(Path(data).parent / "3.png")
    limit = 28 * 28 / 1e6
    said = run(base, data, tmp_path / "run", max_pixels=limit, validation=data)
    told = "too many pixels: 1 of 8 rows, they are skipped (--max-pixels); the first is"
    assert sum(told in line for line in said) == 2  # of the rows to train on, and of those for validation
    assert any("validation: the pictures of 1 of 8 rows cannot be read" in line for line in said)
    skipped = [entry for entry in log_of(tmp_path / "run") if "skipped" in entry]
    assert {entry["skipped"] for entry in skipped} == {f"{data}:4"} and "is too large" in skipped[0]["error"]
    with pytest.raises(ValueError, match=r"too many pixels: 1 row.*\n.*rows\.jsonl:4: .*28 x 29 are 812 pixels"):
        run(base, data, tmp_path / "strict", max_pixels=limit, strict=True)


def test_pictures_that_are_all_missing_are_an_error(base, data, tmp_path):
    """Which is what a mistyped --images looks like. Those of the validation rows too: better now than after hours."""
    wrong = r"none of the pictures is there: .*rows\.jsonl:1: no picture at .*or to the folder given as --images"
    with pytest.raises(ValueError, match=wrong):
        run(base, data, tmp_path / "run", images="nowhere")
    validation = write_data(tmp_path / "validation")
    for picture in Path(validation).parent.glob("*.png"):
        picture.unlink()
    with pytest.raises(ValueError, match=wrong):
        run(base, data, tmp_path / "run", validation=validation)
    assert not (tmp_path / "run").exists()


BOX = "<loc0256><loc0256><loc0768><loc0768> square"


@pytest.mark.parametrize(
    "metric, prefix, suffix, words",
    [
        ("segment", "detect square", BOX, "segment measures masks, and the answer has boxes alone"),
        ("yes-no", "what color ?", "blue", "the right answer is 'blue'"),
    ],
)
def test_validation_rows_that_the_metric_cannot_measure(base, data, tmp_path, metric, prefix, suffix, words):
    """They are an error before the first step, not after the last."""
    base = shutil.copytree(base, tmp_path / "base")
    shutil.copy(resources.files(paligemma) / "assets" / "tiny" / "mask_codec.npz", base)
    row = {"image": str(Path(data).parent / "0.png"), "prefix": prefix, "suffix": suffix}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"validation: .*other.jsonl:1: .*{words}"):
        run(str(base), data, tmp_path / "run", validation=str(tmp_path / "other.jsonl"), metric=metric)
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_measured_do_not_end_a_run_without_validation(base, data, tmp_path):
    """They would only have been examples in its report."""
    row = {"image": None, "prefix": "detect square", "suffix": BOX}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(row) + "\n")
    said = run(base, str(tmp_path / "boxes.jsonl"), tmp_path / "run", batch=1, steps=1)
    (line,) = [line for line in said if line.startswith("no validation")]
    assert "none of the rows can be measured, the first is" in line and line.endswith("the row has none")


def test_a_run_that_could_read_no_picture_is_no_success(base, data, tmp_path):
    """All of them vanish after they were seen, and there are too few rows for `MOST_SKIPPED`."""
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **SMALL)

    def vanish():
        for picture in Path(data).parent.glob("*.png"):
            picture.rename(picture.with_suffix(".away"))

    for say in (during(vanish), None):  # nor when the same command is given again
        with pytest.raises(OSError, match=r"nothing was learned.* 24 rows .*no such file\. .*--no-resume"):
            finetune(options, say)
    assert not (tmp_path / "run" / "finished.json").exists() and not list((tmp_path / "run").glob("model*"))
    for picture in Path(data).parent.glob("*.away"):
        picture.rename(picture.with_suffix(".png"))
    run(base, data, tmp_path / "run", resume=False)


def test_a_disk_that_went_away_ends_the_run(base, tmp_path):
    processor = paligemma.load(base).processor
    rows = [{"image": str(tmp_path / f"{i}.png"), "prefix": "a", "suffix": "b"} for i in range(2 * MOST_SKIPPED)]
    told = []
    batches = RowBatches(rows, processor, 32, on_skip=lambda *skipped: told.append(skipped))
    with pytest.raises(OSError, match=f"pictures of {MOST_SKIPPED} rows one after the other"):
        for step in range(10):
            assert batches(step) is None
    assert len(told) == MOST_SKIPPED


def test_single_rows_may_be_missing_for_ever(base, tmp_path):
    picture = np.zeros((28, 28, 3), np.uint8)
    rows = [{"image": image, "prefix": "a", "suffix": "b"} for image in (picture, str(tmp_path / "gone.png"))]
    told = []
    batches = RowBatches(rows, paligemma.load(base).processor, 2, on_skip=lambda *skipped: told.append(skipped))
    assert all(len(batches(step)["input_ids"]) == 1 for step in range(2 * MOST_SKIPPED))
    assert len(told) == 2 * MOST_SKIPPED


def test_a_step_without_any_readable_row_is_passed_over(base, data, tmp_path):
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, "batch": 1, "steps": 8})
    finetune(options, during((Path(data).parent / "3.png").unlink))
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert len(steps) == 7 and checkpointing.load_last(tmp_path / "run" / "checkpoints")["step"] == 8


def test_a_suffix_that_is_too_long_is_named_and_cut(base, data, tmp_path, recwarn):
    """As the reference's tokens are, the end first; with strict it is an error."""
    with open(data, "a") as file:
        file.write(json.dumps({"image": "0.png", "prefix": "caption en", "suffix": "red " * 40}) + "\n")
    wanted = {"max_length": 40, "batch": 9, "steps": 2}
    said = run(base, data, tmp_path / "run", **wanted)
    (note,) = [line for line in said if "suffix too long" in line]
    assert "1 of 9 rows, the ends of their answers are cut off" in note and "rows.jsonl:9: " in note
    assert any("the longest 40" in line for line in said), "as it is trained on"
    assert not [warning for warning in recwarn if "suffixes were cut" in str(warning.message)], "which is said once"
    (first, _) = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    tokenizer = paligemma.load(base).processor.tokenizer
    prompt = 4 + 1 + len(tokenizer.encode("caption en\n"))
    others = [len(tokenizer.encode(json.loads(line)["suffix"])) + 1 for line in Path(data).read_text().splitlines()[:8]]
    assert first["weight"] == sum(others) + 40 - prompt, "answer tokens that were learned"
    with pytest.raises(ValueError, match=r"suffix too long: 1 row.*\n.*rows\.jsonl:9: \d+ tokens, max_length is 40"):
        run(base, data, tmp_path / "strict", strict=True, **wanted)


def test_without_max_length_the_limit_is_the_models(base, data, tmp_path):
    with open(data, "a") as file:
        file.write(json.dumps({"image": "0.png", "prefix": "caption en", "suffix": "red " * 9000}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:9: 9010 tokens, max_length is 8192"):
        run(base, data, tmp_path / "run", strict=True)
    with pytest.raises(ValueError, match="max_length is 9,000, but the model has 8,192 positions"):
        run(base, data, tmp_path / "run", max_length=9000)


def test_a_prompt_that_leaves_no_room_is_an_error(base, data, tmp_path):
    with pytest.raises(ValueError, match=r"no room: 8 rows.*\n.*rows\.jsonl:1: pictures and prompt take \d+ tokens"):
        run(base, data, tmp_path / "run", max_length=6)


def test_rows_that_are_none_are_named(base, data, tmp_path):
    with open(data, "a") as file:
        file.write('{"image": "0.png", "prefix": "caption en"}\n')
    with pytest.raises(ValueError, match=r"missing key: 1 row.*\n.*rows\.jsonl:9: no suffix"):
        run(base, data, tmp_path / "run")


def test_a_loss_that_is_no_number_stops_and_names_step_and_rows(base, data, tmp_path):
    with pytest.raises(FloatingPointError) as stopped:
        run(base, data, tmp_path / "run", lr=1e30, warmup=0.0, steps=20)
    message = str(stopped.value)
    step = int(re.search(r"of step (\d+) is (nan|inf)", message)[1]) - 1  # steps that were made before it
    rows = {int(number) for number in re.findall(r"rows\.jsonl:(\d+)", message)}
    batches = RowBatches(range(8), paligemma.load(base).processor, 4)
    assert rows == {1 + batches._row(place) for place in range(4 * step, 4 * step + 4)}
    assert f"step-{step:08d}" in message, "the last good checkpoint is of the step before"
    state = checkpointing.load_last(tmp_path / "run" / "checkpoints")
    assert state["step"] == step and all(value.isfinite().all() for value in state["model"].values())


def test_its_step_is_named_also_after_one_without_rows(base, data, tmp_path, monkeypatch):
    """The second step, which batches know as 1, has nothing to log."""
    lay_out = RowBatches.lay_out
    monkeypatch.setattr(
        RowBatches, "lay_out", lambda self, step, loaded: None if step == 1 else lay_out(self, step, loaded)
    )
    with pytest.raises(FloatingPointError, match="of step 3 is") as stopped:
        run(base, data, tmp_path / "run", lr=1e30, warmup=0.0, batch=1)
    row = RowBatches(range(8), paligemma.load(base).processor, 1)._row(2)
    assert re.findall(r"rows\.jsonl:(\d+)", str(stopped.value)) == [str(row + 1)]


@pytest.mark.parametrize("where", ["tensors", "rename", "log"])
def test_a_full_disk_leaves_the_last_good_checkpoint(base, data, tmp_path, monkeypatch, where):
    out = tmp_path / "run"
    reached = []

    def full(function, error):
        def fails(*arguments, **named):
            if (out / "checkpoints" / "step-00000003").exists():
                reached.append(arguments)
                raise error
            return function(*arguments, **named)

        return fails

    no_space = OSError(28, "No space left on device")
    if where == "tensors":  # safetensors has an error of its own
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(checkpointing, "save_file", full(checkpointing.save_file, error))
    elif where == "rename":
        monkeypatch.setattr(os, "replace", full(os.replace, no_space))
    else:
        monkeypatch.setattr("paligemma.train.loop.Log.write", full(lambda *_: None, no_space))
    with pytest.raises(OSError, match=r"disk is full .* the last good checkpoint is .*step-00000003: make room"):
        run(base, data, out)
    assert reached
    monkeypatch.undo()
    assert checkpointing.checkpoints(out / "checkpoints")[-1].name == "step-00000003"
    assert not list((out / "checkpoints").glob("*.part"))
    assert checkpointing.load_last(out / "checkpoints")["step"] == 3
    run(base, data, out)
    assert checkpointing.load_last(out / "checkpoints")["step"] == 6


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_says_what_needs_less(base, data, tmp_path, monkeypatch, error):
    lay_out = RowBatches.lay_out

    def full(self, step, loaded):
        if step == 2:
            raise error
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "lay_out", full)
    with pytest.raises(
        MemoryError, match=r"out of memory \(.+\); the last good checkpoint is .*step-00000002\. --accum"
    ):
        run(base, data, tmp_path / "run")
