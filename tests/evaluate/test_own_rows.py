"""Measuring on one's own rows: which answers count, how captions are gathered, what the command takes."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from paligemma.answers.parsing import parse
from paligemma.answers.results import Detection
from paligemma.cli import main as cli
from paligemma.data.options import open_rows
from paligemma.data.rows import Row
from paligemma.evaluate.own_rows import evaluate_rows, examples_of, metric_of_task, right_answers
from paligemma.inference import Answer, load
from paligemma.tiny.scenes import write_scenes
from paligemma.train.options import TrainOptions
from paligemma.train.validation import token_budget


class Says:
    """A stand-in for a model: an answer for every prompt."""

    loc_scale, codec = 1024, None

    def __init__(self, answers: dict[str, str], detections: dict[str, list[Detection]] | None = None):
        self.answers, self.detections, self.asked = answers, detections or {}, []

    def generate(self, images, prompts, max_new_tokens, **options):
        self.asked += zip(images, prompts)
        return [Answer(self.answers[p], [], [], 0.5, True, self.detections.get(p, []), [], []) for p in prompts]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50), "red").save(tmp_path / name)
    return tmp_path


def write(folder: Path, *rows: dict) -> Path:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    return path


def test_every_answer_of_a_row_counts(folder: Path):
    people = ["dog"] * 2 + ["puppy"] * 8
    path = write(
        folder,
        {"question": "what ?", "answers": people},
        {"prefix": "answer en who ?", "answers": [{"answer": answer} for answer in people]},
        {"prefix": "answer en where ?", "suffix": "here"},
    )
    rows = open_rows(path)
    assert [row.suffix for row in rows] == ["puppy", "puppy", "here"], "trained on the commonest"
    pg = Says({"answer en what ?": "dog", "answer en who ?": "a puppy", "answer en where ?": "Here."})
    report = evaluate_rows(pg, rows, "vqa", progress=False)
    # Two of ten agree: .6. Eight: 1, without the article. One alone is right or wrong.
    assert report["vqa", "VQA accuracy"].value == pytest.approx((0.6 + 1 + 1) / 3)
    assert evaluate_rows(pg, rows, "exact", progress=False)["exact", "exact"].value == pytest.approx(1 / 3)
    assert evaluate_rows(pg, rows, "exact", count=1, progress=False)["exact", "exact"].rows == 1


def test_the_metric_follows_from_the_prompt_unless_named(folder: Path):
    path = write(
        folder,
        {"prefix": "detect dog", "suffix": "<loc0000><loc0000><loc0512><loc0512> dog"},
        {"prefix": "ocr", "suffix": "STOP"},
        {"prefix": "answer en what ?", "suffix": "a dog"},
        {"prefix": "caption en", "suffix": "a dog"},
    )
    dog = Detection("dog", (0, 0, 50, 25), 0.9)  # half of the picture each way, in its pixels
    pg = Says(
        {"detect dog": "...", "ocr": "STOP", "answer en what ?": "a cat", "caption en": "a dog"}, {"detect dog": [dog]}
    )
    report = evaluate_rows(pg, open_rows(path), progress=False)
    assert report["detect", "recall"].value == report["detect", "mean IoU of matches"].value == 1
    assert report["reading", "exact"].value == 1 and report["exact", "exact"].value == 0
    assert report["caption", "BLEU-1"].value == pytest.approx(1)
    assert metric_of_task("ocr") == "reading" and metric_of_task(None) == "auto" and metric_of_task("vqa") == "vqa"
    with pytest.raises(
        ValueError, match=r"no task 'dance'. Metrics for your own rows: ocr, exact, .*Benchmarks: vqav2"
    ):
        metric_of_task("dance")


@pytest.mark.parametrize("prompt", ["caption en", "cap en", "describe en"])
def test_all_prompts_for_a_caption_are_measured_as_captions(folder: Path, prompt: str):
    """Official checkpoints know three; a caption is hardly ever word for word one of the right ones."""
    rows = open_rows(
        write(folder, {"prefix": prompt, "suffix": "a dog on grass"}, {"prefix": prompt, "suffix": "one dog"})
    )
    report = evaluate_rows(Says({prompt: "a dog"}), rows, progress=False)
    assert set(report.counts) == {"caption"} and report.counts["caption"].rows == 1, "two captions of one picture"
    assert report["caption", "BLEU-1"].value > 0


def test_coco_figures_of_boxes_and_of_masks(folder: Path):
    """On the same `segment` rows: an answer with the right boxes and, in one of two, another mask."""

    class Draws(Says):
        codec = load("tiny").codec

        def generate(self, images, prompts, max_new_tokens, codec, **options):
            read = [parse(self.answers[prompt], image.size, codec=codec) for image, prompt in zip(images, prompts)]
            return [Answer("...", [], [], 0.5, True, found.detections, found.segments, []) for found in read]

    def segment(label: str, code: int) -> str:
        return "<loc0000><loc0000><loc0512><loc0512>" + f"<seg{code:03d}>" * 16 + f" {label}"

    with torch.no_grad():
        decoded = Draws.codec.decode(torch.arange(128)[:, None].expand(-1, 16)) > 0  # [128, 64, 64]
    overlap = (decoded & decoded[64]).sum((1, 2)) / (decoded | decoded[64]).sum((1, 2))
    other = int(overlap.argmin())
    labels = ("dog", "cat")
    rows = open_rows(write(folder, *({"prefix": f"segment {label}", "suffix": segment(label, 64)} for label in labels)))
    pg = Draws({"segment dog": segment("dog", 64), "segment cat": segment("cat", other)})
    boxes, masks = (evaluate_rows(pg, rows, metric, progress=False) for metric in ("coco", "coco-masks"))
    assert boxes["coco", "AP"].value == pytest.approx(1)
    assert masks["coco-masks", "AP"].value == pytest.approx(0.5), "of two classes one was found"
    assert masks["coco-masks", "mIoU"].value == pytest.approx((1 + float(overlap[other])) / 2, abs=0.1)
    assert overlap[other] < 0.4
    assert evaluate_rows(pg, rows, "detect", progress=False)["detect", "recall"].value == 1


def test_captions_of_one_picture_are_one_row(folder: Path):
    path = write(
        folder,
        {"caption": "a dog"},
        {"caption": "a hound", "image": "b.png"},
        {"caption": "the dog"},
        {"caption": ["one", "two"], "image": "b.png"},
    )
    found = list(examples_of(open_rows(path), "auto", Says({})))
    assert [list(example.answers) for example in found] == [["a dog", "the dog"], ["a hound", "one", "two"]]
    assert [example.prompt for example in found] == ["caption en"] * 2


def test_count_takes_the_first_questions_with_all_their_captions(folder: Path):
    path = write(
        folder,
        {"prefix": "ocr", "suffix": "STOP"},
        {"caption": "a dog"},
        {"prefix": "ocr", "suffix": "GO", "image": "b.png"},
        {"caption": "a hound", "image": "b.png"},
        {"caption": "the dog"},
    )

    def first(count: int | None) -> list[tuple[str, list[str]]]:
        found = examples_of(open_rows(path), "auto", Says({}), count)
        return [(example.prompt, list(example.answers)) for example in found]

    assert first(1) == [("ocr", ["STOP"])]
    assert first(2) == [("ocr", ["STOP"]), ("caption en", ["a dog", "the dog"])]
    assert first(3) == [("ocr", ["STOP"]), ("ocr", ["GO"]), ("caption en", ["a dog", "the dog"])]
    assert first(None) == first(4) == [*first(3), ("caption en", ["a hound"])]


def test_what_is_trained_on_is_right(folder: Path):
    """Also where it is none of the answers. VQA counts how many people gave each of them: nothing is added there."""
    path = write(folder, {"question": "what is it ?", "answer": "a dog", "answers": ["puppy", "dog"]})
    (row,) = open_rows(path)
    assert right_answers(row, "exact") == ("puppy", "dog", "a dog") and right_answers(row, "vqa") == ("puppy", "dog")
    (row,) = open_rows(write(folder, {"question": "what is it ?", "answers": ["puppy", "dog"]}))
    assert right_answers(row, "exact") == ("puppy", "dog")


def test_rows_about_one_picture_are_not_independent(folder: Path):
    """Nothing is known of the spread over pictures when there is one; of two pictures the rows go together."""
    rows = [{"prefix": f"{i} ?", "suffix": "yes", "image": f"{'ab'[i // 10]}.png"} for i in range(20)]
    pg = Says({f"{i} ?": "yes" if i < 10 else "no" for i in range(20)})
    figure = evaluate_rows(pg, open_rows(write(folder, *rows)), progress=False)["exact", "exact"]
    assert (figure.value, figure.low, figure.high) == (0.5, 0, 1)
    figure = evaluate_rows(pg, open_rows(write(folder, *rows[5:15])), count=7, progress=False)["exact", "exact"]
    assert figure.value == pytest.approx(5 / 7) and figure.low is not None
    alone = [row | {"image": "a.png"} for row in rows]
    figure = evaluate_rows(pg, open_rows(write(folder, *alone)), progress=False)["exact", "exact"]
    assert (figure.value, figure.low, figure.high) == (0.5, None, None)


def test_yes_and_no_are_the_only_right_answers_of_their_metric(folder: Path):
    path = write(folder, {"prefix": "a", "suffix": "Yes"}, {"prefix": "b", "suffix": "No"})
    report = evaluate_rows(Says({"a": "yes", "b": "no"}), open_rows(path), "yes-no", progress=False)
    assert report["yes-no", "accuracy"].value == report["yes-no", "recall"].value == 1
    path = write(folder, {"prefix": "a", "suffix": "yes"}, {"prefix": "b", "suffix": "purple"})
    with pytest.raises(ValueError, match="row 1: the right answer is 'purple', and yes-no is for"):
        evaluate_rows(Says({"a": "yes", "b": "no"}), open_rows(path), "yes-no", progress=False)


TWO_PICTURES = [  # of which the same is asked
    {"prefix": "what color is it ?", "suffix": "red", "image": "a.png"},
    {"prefix": "what color is it ?", "suffix": "green", "image": "b.png"},
]


def test_a_folder_is_only_continued_on_the_same_data(folder: Path):
    """Rows are known by their number: what each was asked and saw is compared. Right answers may be corrected, rows
    added, files moved."""
    pg = Says({"what color is it ?": "red"})
    Image.new("RGB", (100, 50), "green").save(folder / "b.png")

    def measure(path: Path) -> float | None:
        report = evaluate_rows(pg, open_rows(path), "exact", out_folder=folder / "run", progress=False)
        return report["exact", "exact"].value

    assert measure(write(folder, *TWO_PICTURES)) == measure(write(folder, *TWO_PICTURES)) == 0.5
    assert len(pg.asked) == 2, "the second time all was known"
    with pytest.raises(ValueError, match=r"row 0, 'what color is it \?', saw another picture there than here"):
        measure(write(folder, *TWO_PICTURES[::-1]))
    corrected = {**TWO_PICTURES[1], "suffix": "red"}
    assert measure(write(folder, TWO_PICTURES[0], corrected)) == 1.0 and len(pg.asked) == 2
    moved = folder / "moved.jsonl"
    write(folder, *TWO_PICTURES, TWO_PICTURES[0]).rename(moved)
    assert measure(moved) == pytest.approx(2 / 3) and len(pg.asked) == 3, "one row more"
    Image.new("RGB", (100, 50), "blue").save(folder / "b.png")
    with pytest.raises(ValueError, match=r"row 1, 'what color is it \?', saw another picture there than here"):
        measure(write(folder, *TWO_PICTURES))
    assert len(pg.asked) == 3


def test_an_answer_may_be_as_long_as_the_longest_right_one():
    words = SimpleNamespace(processor=SimpleNamespace(tokenizer=SimpleNamespace(encode=str.split)))
    row = Row("a.png", "caption en", "a dog", 0, "rows:1")
    longer = 20 * "long "
    for more, longest in ({}, 2), ({"answers": ("a dog", longer)}, 20), ({"suffixes": ("a dog", longer)}, 20):
        assert token_budget([row, replace(row, **more)], words) == 2 * longest + 8


@pytest.mark.parametrize("metric", ["coco", "coco-masks"])
def test_a_package_that_a_metric_needs_is_missed_before_the_first_answer(folder: Path, monkeypatch, metric):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    pg, rows = Says({}), open_rows(write(folder, {"prefix": "detect dog", "suffix": ""}))
    with pytest.raises(ImportError, match="faster-coco-eval: pip install"):
        evaluate_rows(pg, rows, metric, progress=False)
    with pytest.raises(ImportError, match="faster-coco-eval"):
        TrainOptions("tiny", str(folder / "test.jsonl"), str(folder / "run"), validation="test.jsonl", metric=metric)
    assert pg.asked == []


def test_a_row_that_cannot_be_measured_is_named(folder: Path):
    with pytest.raises(FileNotFoundError, match=r"test.jsonl:2: .*gone.png: no such file"):
        rows = open_rows(
            write(folder, {"prefix": "x", "suffix": "y"}, {"image": "gone.png", "prefix": "x", "suffix": "y"})
        )
        evaluate_rows(Says({"x": "y"}), rows, progress=False)
    with pytest.raises(ValueError, match=r"test.jsonl:1: boxes and masks of 'detect dog' need a picture"):
        rows = open_rows(write(folder, {"image": None, "prefix": "detect dog", "suffix": ""}))
        evaluate_rows(Says({}), rows, progress=False)
    upside_down = "<loc0000><loc0000><loc0512><loc0512> dog ; <loc0900><loc0000><loc0512><loc0512> dog"
    with pytest.raises(ValueError, match=r"test.jsonl:1: the right answer cannot be read: '<loc0900>"):
        rows = open_rows(write(folder, {"prefix": "detect dog", "suffix": upside_down}))
        evaluate_rows(Says({}), rows, progress=False)


def test_rows_without_a_picture_are_measured(folder: Path):
    lines = [{"image": None, "prefix": f"what is {i} ?", "suffix": str(i)} for i in range(3)]
    lines.append({"image": None, "prefix": "caption en", "suffix": "one"})
    pg = Says({"what is 0 ?": "0", "what is 1 ?": "wrong", "what is 2 ?": "2", "caption en": "one"})
    rows = open_rows(write(folder, *lines))
    for _ in range(2):  # the second time from the folder
        report = evaluate_rows(pg, rows, out_folder=folder / "run", progress=False)
        assert report["exact", "exact"].value == pytest.approx(2 / 3) and report.counts["caption"].rows == 1
    assert len(pg.asked) == 4 and (folder / "run" / "worst").is_dir()
    assert [example.group for example in examples_of(rows, "exact", pg)] == ["row 0", "row 1", "row 2", "row 3"]


def test_vqa_files_keep_all_ten_answers(folder: Path):
    (folder / "questions.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image_id": 7, "question": "what ?"}], "data_subtype": "val2014"})
    )
    answers = [{"answer": "dog"}, {"answer": "dog"}, {"answer": "cat"}]
    (folder / "answers.json").write_text(json.dumps({"annotations": [{"question_id": 1, "answers": answers}]}))
    (row,) = open_rows(folder / "questions.json", annotations=folder / "answers.json")
    assert row.answers == ("dog", "dog", "cat") and row.suffix == "dog"


# --- seldom rows and mistakes ---------------------------------------------------------------------


def test_a_question_that_is_a_prompt_is_measured_as_boxes(folder: Path):
    """Exports of annotation tools have the prompt as a question: "detect nucleus", also as "Detect nucleus."."""
    right = Detection("nucleus", (12.5, 10.4, 37.5, 31.25))
    pg = Says(dict.fromkeys(("detect nucleus", "Detect nucleus."), "..."), {"detect nucleus": [right]})
    answer = "<loc0213><loc0128><loc0640><loc0384> nucleus"
    rows = write(
        folder,
        {"question": "detect nucleus", "multiple_choice_answer": answer},
        {"question": "Detect nucleus.", "multiple_choice_answer": answer},
        {"question": "what is it ?", "multiple_choice_answer": "a cell"},
    )
    pg.answers["answer en what is it ?"] = "a cell"
    report = evaluate_rows(pg, open_rows(rows), progress=False)
    assert report["detect", "recall"].value == 0.5 and report["detect", "recall"].rows == 2
    assert report["exact", "exact"].value == 1


@pytest.mark.parametrize("metric", ["segment", "coco-masks"])
def test_boxes_are_not_measured_as_masks(folder: Path, metric: str):
    """It gave a table without a value."""
    rows = open_rows(write(folder, {"prefix": "detect dog", "suffix": "<loc0000><loc0000><loc0512><loc0512> dog"}))
    pg = load("tiny")
    with pytest.raises(ValueError, match=rf"test.jsonl:1: {metric} measures masks, and the answer has boxes alone"):
        list(examples_of(rows, metric, pg))


def test_two_runs_do_not_write_to_one_folder(folder: Path, monkeypatch):
    """Both would ask all rows, and write each of them."""
    rows = open_rows(write(folder, {"prefix": "ocr", "suffix": "red"}))
    out = folder / "run"

    class Starter(Says):
        def generate(self, *arguments, **options):
            holder = "import sys; from pathlib import Path; from paligemma.evaluate.output_folder import held\n"
            done = subprocess.run(
                [sys.executable, "-c", holder + "with held(Path(sys.argv[1])): pass", str(out)],
                capture_output=True,
                text=True,
            )
            self.other = done.stderr
            return super().generate(*arguments, **options)

    pg = Starter({"ocr": "red"})
    evaluate_rows(pg, rows, out_folder=out, progress=False)
    assert "run is being written by another process (paligemma evaluate, process" in pg.other
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.jsonl", "results.json", "run.json", "scores.jsonl", "worst",
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def paligemma(folder: Path, monkeypatch, capsys):
    """Runs a command in this process: `code, out, err = paligemma("evaluate", ...)`."""
    monkeypatch.chdir(folder)

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["paligemma", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def test_evaluate_your_rows(paligemma, folder: Path):
    """`paligemma evaluate --model M --data test.jsonl --task vqa`, on the embedded model."""
    write(folder, {"question": "what color is the background ?", "answers": ["red"] * 10})
    command = ("evaluate", "--data", "test.jsonl", "--task", "vqa", "--out", "run", "--json")
    code, out, _ = paligemma(*command)
    report = json.loads(out)
    (figure,) = report["figures"]
    prompt = "answer en what color is the background ?"
    answer = load("tiny").generate("a.png", prompt).text
    assert code == 0 and figure["name"] == "VQA accuracy" and figure["value"] == (answer == "red")
    (line,) = (folder / "run/predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == answer
    assert report["about"]["metric"] == "vqa" and report["about"]["data"] == "test.jsonl"


def test_a_run_is_only_continued_with_the_options_that_choose_its_rows(paligemma, folder: Path):
    Image.new("RGB", (100, 50), "green").save(folder / "b.png")
    write(folder, *TWO_PICTURES)
    command = ("evaluate", "--data", "test.jsonl", "--out", "run", "--max-new-tokens", "1", "--json")
    assert paligemma(*command)[0] == 0
    for option in (["--kind", "jsonl"], ["--language", "de"]):
        code, out, err = paligemma(*command, *option)
        assert (code, out) == (1, "") and f"{option[0][2:]} " in err and "choose another folder" in err
    write(folder, *TWO_PICTURES[::-1])
    code, out, err = paligemma(*command)
    assert (code, out) == (1, "") and "saw another picture" in err, "the same path, but not the same rows"


def test_rows_are_read_as_they_were_trained_on(paligemma, folder: Path):
    """`train --language de` and `--every-label` make other prompts; the same options measure and show them."""
    write(folder, {"question": "was ist das ?", "answers": ["red"]})
    command = ("evaluate", "--data", "test.jsonl", "--language", "de", "--max-new-tokens", "2", "--out", "run")
    assert paligemma(*command)[0] == 0
    assert json.loads((folder / "run/predictions.jsonl").read_text())["prompt"] == "answer de was ist das ?"
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 50, 25]}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    command = ("evaluate", "--data", "coco.json", "--every-label", "--out", "boxes")
    assert paligemma(*command)[0] == 0
    assert json.loads((folder / "boxes/predictions.jsonl").read_text())["prompt"] == "detect cat ; dog"
    assert paligemma("data", "check", "coco.json", "--every-label")[0] == 0
    assert paligemma("data", "show", "coco.json", "--every-label", "--out", "rows.png")[0] == 0


def test_evaluate_masks_of_a_coco_file(paligemma, folder: Path):
    """The model's own codec makes tokens of the masks that are to be found."""
    write_scenes(2, folder / "scenes", size=128, progress=False)
    command = ("evaluate", "--data", "scenes/coco.json", "--kind", "coco-segment", "--count", "1", "--json")
    code, out, err = paligemma(*command)
    assert code == 0, err
    figures = {(figure["task"], figure["name"]) for figure in json.loads(out)["figures"]}
    assert ("segment", "mIoU") in figures


def test_evaluate_a_benchmark(paligemma, folder: Path):
    pope = [
        {"image": "a.png", "text": "answer en is there a dog ?", "label": label, "question_id": k}
        for k, label in enumerate(("yes", "no"))
    ]
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in pope))
    (folder / "val2014").mkdir()
    (folder / "a.png").rename(folder / "val2014/a.png")
    code, out, err = paligemma("evaluate", "--task", "pope", "--split", "random", "--data", ".", "--json")
    assert code == 0, err
    figures = {figure["name"]: figure["value"] for figure in json.loads(out)["figures"]}
    assert figures["accuracy"] == 0.5 and figures["valid"] == 1, "one of two opposite answers is right"
    code, out, _ = paligemma("evaluate", "--task", "pope", "--split", "random", "--data", ".")
    assert code == 0 and "pope" in out and "accuracy" in out and "published" not in out, "none of this model"


def test_tiny_is_the_small_world_whatever_lies_here(paligemma, folder: Path):
    """As for --model: a folder of this name is ./tiny."""
    write(folder, {"question": "what color is the background ?", "answers": ["red"]})
    (folder / "tiny").mkdir()
    for name in ("test.jsonl", "a.png"):
        (folder / name).rename(folder / "tiny" / name)
    code, out, err = paligemma("evaluate", "--count", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["about"]["data"] == "tiny:test"
    code, out, err = paligemma("evaluate", "--data", "tiny:emojione", "--world", "2", "--count", "1", "--json")
    about = json.loads(out)["about"]
    assert code == 0 and (about["data"], about["world"]) == ("tiny:emojione", 2), err
    code, out, err = paligemma("evaluate", "--data", "./tiny", "--task", "exact", "--max-new-tokens", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["about"]["data"] == "./tiny"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--data", "tiny:moon", "--world", "1"],
            2,
            "expected tiny, tiny:val, tiny:heldout or tiny:twemoji in world 1",
        ),
        (["--data", "tiny:twemoji", "--world", "2"], 2, "tiny:heldout or tiny:emojione in world 2"),
        (["--data", "tiny:emojione", "--world", "1"], 2, "tiny:heldout or tiny:twemoji in world 1"),
        (["--data", "tiny", "--task", "vqa"], 2, "has its own tasks"),
        (["--data", ".", "--task", "gqa", "--free"], 2, "leave out the options for rows"),
        (["--data", ".", "--task", "vqav2", "--split", "test"], 2, "kept on a server: --out FOLDER"),
        (["--data", ".", "--task", "gqa", "--split", "dev"], 2, "gqa has no split 'dev'"),
        (["--data", ".", "--task", "gqa"], 1, "no testdev_balanced_questions.json"),
        (["--data", "a.png", "--task", "gqa"], 1, "a.png: a file, no folder; expected one with the published files"),
        (["--out", "a.png"], 1, "a.png is a file, expected a folder"),
        (["--out", "a.png/run"], 1, "a.png/run cannot be written to"),
        (["--data", "gone.jsonl", "--task", "vqa"], 1, "gone.jsonl: no such file or folder"),
        (["--data", "gone.jsonl", "--task", "dance"], 2, "no task 'dance'"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    paligemma, arguments: list[str], code: int, message: str, monkeypatch
):
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    found, out, err = paligemma("evaluate", *arguments)
    assert (found, out) == (code, "") and message in " ".join(err.replace("│", " ").split())
