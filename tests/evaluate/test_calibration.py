"""Scores against how often they are right: the figure, the diagram, the fit, and how it travels with a checkpoint."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import paligemma
from paligemma.answers.scores import CALIBRATION_FILE, Calibration
from paligemma.cli.evaluate import _own_folder as own_folder
from paligemma.cli.main import app
from paligemma.evaluate.benchmarks import BENCHMARKS
from paligemma.evaluate.calibration import (
    draw_reliability,
    expected_calibration_error,
    fitted,
    reliability,
    scored_items,
)
from paligemma.evaluate.regions import Region, match_masks
from paligemma.tiny.evaluation import tiny_examples
from paligemma.weights.published import TINY

runner = CliRunner()


def test_the_calibration_error_by_hand():
    items = [(0.95, True), (0.91, True), (0.99, False), (0.15, False), (1.0, True)]
    bins = reliability(items)
    assert [one.items if one else 0 for one in bins] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert bins[9].right == 0.75 and bins[9].score == pytest.approx(0.9625)
    assert expected_calibration_error(items) == pytest.approx((4 * (0.9625 - 0.75) + 0.15) / 5)
    assert np.isnan(expected_calibration_error([]))


def test_scores_that_are_probabilities_have_no_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=50_000)
    assert expected_calibration_error(list(zip(p, rng.random(len(p)) < p))) < 0.01


def test_an_object_is_found_once_and_by_its_own_label():
    cat = Region("cat", (0, 0, 10, 10))
    predicted = [
        Region("cat", (0, 0, 10, 9), score=0.9),
        Region("cat", (0, 0, 10, 10), score=0.8),  # of the same cat
        Region("dog", (0, 0, 10, 10), score=0.7),
        Region("cat", (0, 0, 10, 10)),  # without a score there is nothing to compare
    ]
    assert scored_items([cat], predicted, masks=False) == [(0.9, True), (0.8, False), (0.7, False)]


def test_a_mask_is_right_by_its_own_iou():
    left, right, most = (np.zeros((4, 4), bool) for _ in range(3))
    left[:, :2], right[:, 2:], most[:, :3] = True, True, True
    truth = [Region("cat", (0, 0, 2, 4), left), Region("cat", (2, 0, 4, 4), right)]
    predicted = [Region("cat", (0, 0, 3, 4), most, 0.6), Region("cat", (0, 0, 3, 4), right, 0.5)]
    assert match_masks(truth, predicted) == [(1, 1, 1.0), (0, 0, pytest.approx(2 / 3))]
    assert scored_items(truth, predicted, masks=True) == [(0.6, True), (0.5, True)]


def test_kinds_are_fitted_apart_and_what_is_missing_stays():
    before = Calibration(boxes=(1.0, 2.0), masks=(0.5, 0.5))
    items = [(0.9, True), (0.8, True), (0.7, False), (0.2, False), (0.3, True)] * 5
    calibration = fitted([], items, before)
    assert calibration.boxes == before.boxes and calibration.masks != before.masks
    with pytest.raises(ValueError, match="no boxes or masks with a score"):
        fitted([], [])


def test_a_map_is_not_fitted_to_a_handful():
    """Four items would make .9 a score of .0001."""
    few = [(1.0, True)] * 3 + [(0.9999, False)]
    with pytest.raises(ValueError, match="boxes: 3 right and 1 wrong ones are too few to fit a map to, expected 10"):
        fitted(few, [])
    with pytest.raises(ValueError, match="masks: 50 right and 0 wrong ones are too few"):
        fitted([], [(0.5, True)] * 50)


def test_the_diagram_has_a_part_for_each_task():
    bins = reliability([(0.95, True), (0.15, False)])
    one, two = draw_reliability({"detect": bins}), draw_reliability({"detect": bins, "segment": bins})
    assert two.width == 2 * one.width and two.height == one.height
    assert len(one.getcolors(100_000)) > 4


POOR = (("noise", 1.0), ("rescale", 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the model that ships, and rows that it often gets wrong: an artist that it has never seen, in poor
    pictures, of which every second one has 16 pixels."""
    folder = tmp_path_factory.mktemp("calibrated")
    lines = []
    for number, example in enumerate(tiny_examples(18, "emojione", world=2, tasks=("detect_all",), degradations=POOR)):
        picture = Image.fromarray(example.image)
        (picture.resize((16, 16)) if number % 2 else picture).save(folder / f"{number}.png")
        boxes = [(r.label, r.box) for r in example.regions]
        suffix = suffix_of(boxes, example.image.shape[0])
        lines.append({"image": f"{number}.png", "prefix": example.prompt, "suffix": suffix})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paligemma.convert("tiny", folder / "model")
    return folder


def suffix_of(boxes, side):
    def locations(box):
        x0, y0, x1, y1 = (min(1023, round(edge / side * 1024)) for edge in box)
        return "".join(f"<loc{edge:04d}>" for edge in (y0, x0, y1, x1))

    return " ; ".join(f"{locations(box)} {label}" for label, box in boxes)


def test_calibrate_writes_the_map_and_later_scores_follow_it(folder):
    arguments = ["evaluate", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--task", "detect"]
    result = runner.invoke(app, [*arguments, "--calibrate", "--out", str(folder / "before")])
    assert result.exit_code == 0, result.output
    assert "calibration error" in result.stdout and "with it" in result.stderr
    assert (folder / "before" / "reliability.png").exists()
    calibration, shipped = (Calibration.load(at / CALIBRATION_FILE) for at in (folder / "model", TINY))
    assert calibration.boxes != shipped.boxes and calibration.masks == shipped.masks  # these rows have no masks

    pg = paligemma.load(folder / "model", device="cpu")
    assert pg.calibration == calibration
    image, labels = folder / "0.png", ["dog", "cat", "car", "bird"]
    mapped = pg.detect(image, labels)
    pg.calibration = None
    assert mapped and [item.score for item in mapped] == [calibration(item.score) for item in pg.detect(image, labels)]

    again = runner.invoke(app, [*arguments, "--out", str(folder / "before")])
    assert again.exit_code == 1 and "calibration not given there" in str(again.exception)  # scores there are others
    once_more = runner.invoke(app, [*arguments, "--calibrate", "--json"])
    assert json.loads(once_more.stdout)["reliability"]["detect"][9]["items"] > 0
    assert Calibration.load(folder / "model" / CALIBRATION_FILE) == calibration  # not a map on top of a map


def test_only_a_folder_of_your_own_is_calibrated():
    result = runner.invoke(app, ["evaluate", "--model", "tiny", "--calibrate"])
    assert result.exit_code == 2 and "paligemma convert tiny FOLDER" in " ".join(result.stderr.split())


@pytest.mark.parametrize("data", ["tiny", "tiny:test", "tiny:emojione"])
def test_scores_are_not_fitted_to_the_scenes_that_figures_are_reported_on(tmp_path, data):
    result = runner.invoke(app, ["evaluate", "--model", str(tmp_path), "--data", data, "--calibrate"])
    assert result.exit_code == 2 and "--data tiny:val" in " ".join(result.stderr.split())


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption"])
def test_tasks_without_scores_are_not_calibrated(tmp_path, monkeypatch, task):
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    (tmp_path / "rows.jsonl").write_text('{"prefix": "caption en", "suffix": "a cat"}\n')
    data = str(tmp_path / "rows.jsonl")
    result = runner.invoke(app, ["evaluate", "--model", str(tmp_path), "--data", data, "--task", task, "--calibrate"])
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2 and f"--task {task} has none: expected one of detect, coco, segment" in said


def test_rows_that_ask_for_no_boxes_are_not_calibrated(tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("it is loaded")

    monkeypatch.setattr("paligemma.inference.load", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "none.png", "prefix": "caption en", "suffix": "a cat"}\n')
    arguments = ["evaluate", "--model", str(tmp_path), "--data", str(rows), "--calibrate"]
    result = runner.invoke(app, arguments)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2 and "for the scores of boxes and masks, and no row of" in said
    with rows.open("a") as file:
        file.write('{"image": "none.png", "prefix": "Detect cat.", "suffix": ""}\n')
    assert runner.invoke(app, [*arguments, "--count", "1"]).exception.args == ("it is loaded",), "captions come last"
    rows.write_text(rows.read_text().replace("caption en", "answer en what is this ?"))
    assert runner.invoke(app, [*arguments, "--count", "2"]).exception.args == ("it is loaded",)
    assert runner.invoke(app, [*arguments, "--count", "1"]).exit_code == 2


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "refcoco-seg"])
def test_scores_are_not_fitted_to_a_benchmark(tmp_path, monkeypatch, task):
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    assert task in BENCHMARKS
    arguments = ["evaluate", "--model", str(tmp_path), "--data", str(tmp_path), "--task", task, "--calibrate"]
    result = runner.invoke(app, arguments)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2 and f"does not fit to {task}: figures are reported on it" in said


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    result = runner.invoke(app, ["evaluate", "--model", str(tmp_path), "--data", "tiny:val", "--calibrate"])
    said = f"--calibrate {tmp_path / CALIBRATION_FILE} cannot be written (Permission denied): choose another folder"
    assert isinstance(result.exception, OSError) and str(result.exception) == said


def test_a_folder_named_tiny_is_not_the_embedded_model(tmp_path, monkeypatch):
    """`--model tiny` is the model that ships: what is measured on it does not belong beside another one."""
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    result = runner.invoke(app, ["evaluate", "--model", "tiny", "--calibrate"])
    assert result.exit_code == 2 and "paligemma convert tiny FOLDER" in " ".join(result.stderr.split())
    assert own_folder("./tiny") == Path("tiny")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert own_folder("~/model") == tmp_path / "model"


def test_the_map_travels_with_the_checkpoint(tmp_path):
    paligemma.convert("tiny", tmp_path / "a")
    kept = Calibration(boxes=(0.5, 1.5), masks=(-1.0, 0.25))
    (tmp_path / "a" / CALIBRATION_FILE).write_text(json.dumps(kept.to_dict()))

    paligemma.convert(tmp_path / "a", tmp_path / "converted")
    pg = paligemma.load(tmp_path / "a", device="cpu")
    paligemma.save_pretrained(pg.model, tmp_path / "saved", pg.processor)
    result = runner.invoke(app, ["quantize", str(tmp_path / "a"), str(tmp_path / "rounded"), "--int8"])
    assert result.exit_code == 0, result.output
    for name in ("converted", "saved", "rounded"):
        assert Calibration.load(tmp_path / name / CALIBRATION_FILE) == kept, name

    pg.calibration = None  # other weights are saved over it
    paligemma.save_pretrained(pg.model, tmp_path / "saved", pg.processor)
    assert not (tmp_path / "saved" / CALIBRATION_FILE).exists()
