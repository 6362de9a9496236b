"""The runner, on stand-ins for a model: what it counts, what it saves, how it goes on after it was cut off."""

import io
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import paligemma.evaluate
from paligemma.answers.results import Detection, Segment
from paligemma.evaluate import METRICS, Example, Prediction, Region, evaluate
from paligemma.evaluate.comparison import compare
from paligemma.evaluate.intervals import wilson
from paligemma.evaluate.output_folder import check_folder
from paligemma.evaluate.report import Figure, Report
from paligemma.evaluate.runner import batches
from paligemma.evaluate.summary import badness
from paligemma.inference import Answer
from paligemma.tiny import evaluation as tiny
from paligemma.tiny.renderer import render
from paligemma.tiny.rows import TASKS, caption
from paligemma.train.run_report import card

IMAGE = np.full((40, 60, 3), 200, np.uint8)


class StubModel:
    """Answers by a function of the prompt and the image, and remembers what it was asked."""

    codec = "the codec"

    def __init__(self, answer, die_after: int | None = None):
        self.answer, self.die_after = answer, die_after
        self.calls: list[dict] = []

    @property
    def prompts(self) -> list[str]:
        return [prompt for call in self.calls for prompt in call["prompts"]]

    def generate(self, images, prompts, max_new_tokens, *, constrained, batch_size, codec):
        if self.die_after is not None and len(self.calls) == self.die_after:
            raise KeyboardInterrupt
        self.calls.append(
            {"prompts": prompts, "max_new_tokens": max_new_tokens, "constrained": constrained, "codec": codec}
        )
        assert len(images) == len(prompts) == batch_size
        return [self.answer(image, prompt) for image, prompt in zip(images, prompts)]


def says(text: str, score: float = 0.5, detections=(), segments=(), invalid=(), finished: bool = True) -> Answer:
    return Answer(text, [], [], score, finished, list(detections), list(segments), list(invalid))


def questions(count: int, task: str = "exact", right: str = "yes") -> list[Example]:
    return [Example(f"{task}{i}", IMAGE, f"answer en question {i} ?", task, (right,)) for i in range(count)]


def run(pg, examples, measures=METRICS, **options):
    return evaluate(pg, examples, measures, progress=False, **options)


# --- figures --------------------------------------------------------------------------------------


def test_share_of_right_answers_with_interval_baseline_and_target():
    examples = [Example(str(i), IMAGE, f"answer en {i} ?", "exact", ("red" if i < 14 else "blue",)) for i in range(20)]
    report = run(StubModel(lambda image, prompt: says("blue")), examples, targets={("exact", "exact"): 0.3})
    figure = report["exact", "exact"]
    assert figure.value == pytest.approx(6 / 20)
    assert (figure.low, figure.high) == wilson(6, 20)
    assert figure.baseline == pytest.approx(14 / 20), "always red"
    assert (figure.target, figure.reached, figure.rows) == (0.3, True, 20)
    with pytest.raises(KeyError, match="exact/exact"):
        report["exact", "CIDEr-D"]


def test_error_rates_are_reached_from_above():
    examples = [Example(str(i), IMAGE, "ocr", "reading", ("STOP",), group=str(i)) for i in range(4)]
    texts = iter(["STOP", "STOP", "STO", "SHOP"])
    targets = {("reading", "character error rate"): 0.1, ("reading", "exact"): 0.6}
    report = run(StubModel(lambda image, prompt: says(next(texts))), examples, targets=targets)
    assert report["reading", "character error rate"].value == pytest.approx(2 / 16)
    assert report["reading", "character error rate"].reached is False
    assert report["reading", "exact"].reached is False


def test_rows_of_one_picture_widen_the_interval():
    def measured(group: str) -> float:
        examples = [Example(str(i), IMAGE, str(i), "exact", ("yes",), group=group and str(i // 10)) for i in range(200)]
        pg = StubModel(lambda image, prompt: says("yes" if int(prompt) // 10 % 2 else "no"))  # picture by picture
        figure = run(pg, examples)["exact", "exact"]
        return figure.high - figure.low

    assert measured("by picture") > 2 * measured("")


def dogs(*boxes, mask: bool = False) -> list[Region]:
    def filled(box):
        area = np.zeros((40, 60), bool)
        area[box[1] : box[3], box[0] : box[2]] = True
        return area

    return [Region("dog", box, filled(box) if mask else None) for box in boxes]


def test_detection_counts_over_all_rows():
    found = Detection("dog", (0, 0, 10, 8), 0.9)
    stray = Detection("dog", (30, 30, 40, 40), 0.4)
    examples = [
        Example("a", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 10, 10), (20, 0, 30, 10))),
        Example("b", IMAGE, "detect dog ; cat", "detect", regions=dogs((0, 0, 10, 10))),
        Example("c", IMAGE, "detect cat", "detect", regions=dogs((0, 0, 10, 10))),
    ]
    answers = {
        "detect dog": says("...", detections=[found, stray]),
        "detect dog ; cat": says("...", detections=[found]),
        "detect cat": says(""),
    }
    report = run(StubModel(lambda image, prompt: answers[prompt]), examples)
    assert report["detect", "precision"].value == pytest.approx(2 / 3)
    assert report["detect", "recall"].value == pytest.approx(2 / 4)
    assert report["detect", "mean IoU of matches"].value == pytest.approx(0.8)
    assert report["detect", "AP at IoU .5 by score"].value == pytest.approx(51 / 101), "precision 1 up to recall .5"
    assert report["detect", "precision"].baseline is None, "boxes have no commonest answer"


def test_coco_figures_of_a_run():
    examples = [Example("a", IMAGE, "detect dog", "coco", regions=dogs((0, 0, 10, 10)))]
    found = Detection("dog", (0, 0, 10, 7.6), 0.9)  # an IoU of .76: right at 6 of COCO's 10 thresholds
    report = run(StubModel(lambda image, prompt: says("...", detections=[found])), examples)
    assert report["coco", "AP"].value == pytest.approx(0.6)
    assert report["coco", "AP75"].value == pytest.approx(1)


def test_a_figure_without_a_denominator_has_no_value():
    examples = [Example("a", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 10, 10)))]
    report = run(StubModel(lambda image, prompt: says("")), examples, targets={("detect", "precision"): 0.5})
    assert report["detect", "precision"].value is None
    assert report["detect", "precision"].reached is False
    assert report["detect", "recall"].value == 0


def test_segments_are_found_at_most_once_and_missed_ones_count():
    regions = dogs((0, 0, 10, 10), (20, 0, 30, 10), mask=True)
    half = regions[0].mask.copy()
    half[5:] = False
    examples = [Example("a", IMAGE, "segment dog", "segment", regions=regions)]
    pg = StubModel(lambda image, prompt: says("...", segments=[Segment("dog", (0, 0, 10, 10), half, [0] * 16, 0.5)]))
    report = run(pg, examples)
    assert report["segment", "mIoU"].value == pytest.approx(0.25)
    assert report["segment", "recall"].value == 0.5, "an IoU of .5 is enough"


def test_the_score_of_a_detection_is_tested_against_a_constant_one():
    rng = random.Random(0)
    examples = [Example(str(i), IMAGE, f"detect dog {i}", "detect", regions=dogs((0, 0, 10, 10))) for i in range(120)]

    def detector(informed: bool):
        def detect(image, prompt):
            right = rng.random() < 0.6
            box = (0, 0, 10, 10) if right else (30, 30, 40, 40)
            score = 0.5 * rng.random() + 0.5 * (right if informed else 0)
            return says("...", detections=[Detection("dog", box, score)])

        return run(StubModel(detect), examples)

    knows, guesses = detector(True), detector(False)
    gain = knows["detect", "AP gained by the score"]
    assert gain.value == pytest.approx(
        knows["detect", "AP at IoU .5 by score"].value - knows["detect", "AP with constant scores"].value
    )
    assert gain.low > 0.05, "scores that know must be seen to"
    gain = guesses["detect", "AP gained by the score"]
    assert gain.low < 0 < gain.high, "and scores that don't, not"


def test_captions_are_measured_together():
    examples = [
        Example("a", IMAGE, "caption en", "caption", ("a dog on the grass", "the dog runs")),
        Example("b", IMAGE, "caption en", "caption", ("two cats on a table",)),
    ]
    texts = iter(["a dog on the grass", "two cats"])
    report = run(StubModel(lambda image, prompt: says(next(texts))), examples)
    assert report["caption", "BLEU-1"].value == pytest.approx(np.exp(1 - 10 / 7))
    assert 0 < report["caption", "CIDEr-D"].low < report["caption", "CIDEr-D"].value


def test_invalid_answers_count_as_wrong_and_are_counted():
    examples = [Example(str(i), IMAGE, f"detect {i}", "detect", regions=dogs((0, 0, 10, 10))) for i in range(5)]
    answers = [
        says("<loc0001> dog", invalid=[((0, 9), "1 loc tokens in a row, a box has 4")]),
        says("I see a dog"),  # no box at all
        says("", finished=False),  # an empty answer is a valid one
        says("...", detections=[Detection("dog", (0, 0, 10, 10), 1.0)]),
        says(
            "...", detections=[Detection("dog", (0, 0, 10, 10), 1.0)], invalid=[((40, 49), "seg tokens without a box")]
        ),
    ]
    report = run(StubModel(lambda image, prompt: answers[int(prompt.split()[1])]), examples)
    assert vars(report.counts["detect"]) == {"rows": 5, "invalid": 3, "unfinished": 1}
    assert report["detect", "recall"].value == 2 / 5


# --- running --------------------------------------------------------------------------------------


def test_batches_are_of_one_task_and_lose_nobody():
    examples = [Example(str(i), None, "", "ab"[i % 3 % 2]) for i in range(50)]
    made = list(batches(examples, 8))
    assert all(len({e.task for e in batch}) == 1 and len(batch) <= 8 for batch in made)
    assert Counter(e.id for batch in made for e in batch) == Counter(e.id for e in examples)
    assert sum(len(batch) < 8 for batch in made) <= 2


def test_every_prompt_gets_its_budget_and_only_masks_the_codec():
    examples = [
        Example("a", IMAGE, "answer en what ?", "exact", ("dog",)),
        Example("b", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 9, 9))),
        Example("c", IMAGE, "segment dog", "segment", regions=dogs((0, 0, 9, 9), mask=True)),
    ]
    pg = StubModel(lambda image, prompt: says(""))
    run(pg, examples, constrained=False)
    asked = {call["prompts"][0]: (call["max_new_tokens"], call["codec"], call["constrained"]) for call in pg.calls}
    assert asked == {
        "answer en what ?": (128, None, False),
        "detect dog": (512, None, False),
        "segment dog": (512, "the codec", False),
    }
    run(pg, examples[:1], max_new_tokens=7)
    assert pg.calls[-1]["max_new_tokens"] == 7
    assert pg.calls[-1]["constrained"]


def test_mistakes_in_the_rows_are_named():
    pg = StubModel(lambda image, prompt: says("yes"))
    with pytest.raises(ValueError, match="row x: no measure for the task 'dance'"):
        run(pg, [Example("x", IMAGE, "dance", "dance")])
    with pytest.raises(ValueError, match="two rows have the id 'exact0'"):
        run(pg, questions(1) + questions(1))
    with pytest.raises(ValueError, match="no examples"):
        run(pg, [])


# --- the folder -----------------------------------------------------------------------------------


def coin(image, prompt) -> Answer:
    """The same pseudo-random answer to the same prompt, in any order of asking."""
    return says(random.Random(prompt).choice(["yes", "no"]), random.Random(prompt + "!").random())


def results(folder: Path) -> dict:
    saved = json.loads((folder / "results.json").read_text())
    saved.pop("environment")
    return saved


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path):
    examples = [replace(example, group=str(i // 3)) for i, example in enumerate(questions(50))]
    examples.insert(7, Example("box", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 10, 10))))
    whole = StubModel(coin)
    run(whole, examples, out_folder=tmp_path / "whole", batch_size=8)

    dying = StubModel(coin, die_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(dying, examples, out_folder=tmp_path / "cut", batch_size=8)
    assert not (tmp_path / "cut/results.json").exists()
    saved = tmp_path / "cut/predictions.jsonl"
    saved.write_bytes(saved.read_bytes()[:-5])  # and the last line was half written
    second = StubModel(coin)
    run(second, examples, out_folder=tmp_path / "cut", batch_size=8)
    assert len(second.prompts) == 51 - 23
    assert results(tmp_path / "cut") == results(tmp_path / "whole")

    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(e.id for e in examples)
    third = StubModel(coin)
    run(third, examples, out_folder=tmp_path / "cut")
    assert third.prompts == [], "nothing is left to do"


def test_an_answer_may_hold_any_character(tmp_path):
    """U+2028 and others part lines for `str.splitlines`, not in a file of JSON lines."""
    odd = "a\u2028b\x85c\x0b\x1cd\re"
    examples = questions(3, right=odd)
    run(StubModel(lambda image, prompt: says(odd)), examples, out_folder=tmp_path)
    again = StubModel(lambda image, prompt: says(""))
    assert run(again, examples, out_folder=tmp_path)["exact", "exact"].value == 1
    assert again.prompts == []


def test_predictions_and_scores_are_saved_row_by_row(tmp_path):
    region = dogs((0, 0, 10, 10), mask=True)[0]
    segment = Segment("dog", (0.5, 0, 10.25, 10), region.mask, [1] * 16, 0.75)
    pg = StubModel(lambda image, prompt: says("é <loc>", 0.5, segments=[segment], invalid=[((0, 1), "why")]))
    run(pg, [Example("a", IMAGE, "segment dog", "segment", regions=[region])], out_folder=tmp_path)
    line = json.loads((tmp_path / "predictions.jsonl").read_text(encoding="utf-8"))
    prediction = Prediction.from_dict(line)
    assert (line["id"], line["prompt"], line["task"]) == ("a", "segment dog", "segment")
    assert (prediction.text, prediction.score, prediction.invalid) == ("é <loc>", 0.5, ["why"])
    assert (prediction.regions[0].label, prediction.regions[0].box) == ("dog", (0.5, 0, 10.25, 10))
    assert np.array_equal(prediction.regions[0].mask, region.mask)
    scores = json.loads((tmp_path / "scores.jsonl").read_text(encoding="utf-8"))
    assert scores["scores"]["mIoU"] == [1, 1]


def test_a_folder_is_not_continued_with_something_else(tmp_path):
    pg = StubModel(coin)
    run(pg, questions(3), out_folder=tmp_path, about={"metric": "one", "model": "here", "data": "here"})
    run(pg, questions(3), out_folder=tmp_path, about={"metric": "one", "model": "moved", "data": "moved"})
    with pytest.raises(
        ValueError, match=r"another run: metric one there, two here; dtype not given there, float32 here"
    ):
        run(pg, questions(3), out_folder=tmp_path, about={"metric": "two", "dtype": "float32"})
    with pytest.raises(ValueError, match="constrained yes there, no here"):
        run(pg, questions(3), out_folder=tmp_path, about={"metric": "one"}, constrained=False)
    changed = [Example("exact0", IMAGE, "answer en something else ?", "exact", ("yes",))]
    with pytest.raises(ValueError, match="row exact0 was asked"):
        run(pg, changed, out_folder=tmp_path, about={"metric": "one"})


def test_a_folder_is_not_continued_with_other_weights(tmp_path):
    pg = StubModel(coin)
    pg.model = torch.nn.Linear(3, 3)
    run(pg, questions(3), out_folder=tmp_path)
    run(pg, questions(4), out_folder=tmp_path)
    assert len(pg.prompts) == 4, "more rows are no other run"
    with torch.no_grad():
        pg.model.bias += 0.01  # the same folder, one training step later
    with pytest.raises(ValueError, match="weights"):
        run(pg, questions(4), out_folder=tmp_path)


def test_masks_of_another_codec_are_not_kept(tmp_path):
    """The masks in the folder were drawn by the codec of then."""
    mask = np.ones((40, 40), bool)
    pg = StubModel(lambda image, prompt: says("...", segments=[Segment("dog", (0, 0, 40, 40), mask, [0] * 16, 0.9)]))
    pg.model, pg.codec = torch.nn.Linear(3, 3), torch.nn.Linear(30, 30)
    examples = [Example("a", IMAGE, "segment dog", "segment", regions=[Region("dog", (0, 0, 40, 40), mask)])]
    assert run(pg, examples, out_folder=tmp_path)["segment", "mIoU"].value == 1
    run(pg, examples, out_folder=tmp_path)
    assert len(pg.prompts) == 1
    with torch.no_grad():
        pg.codec.weight[-1, -1] += 0.01
    with pytest.raises(ValueError, match="the masks of row a were drawn by another codec"):
        run(pg, examples, out_folder=tmp_path)


def test_a_figure_that_is_neither_good_nor_bad_makes_no_row_bad():
    """The right answer to a question is "no": the share of "yes" is 0, and nothing is wrong."""
    no = Example("a", IMAGE, "answer en is there a dog ?", "yes-no", ("no",))
    assert badness(METRICS["yes-no"].score(no, says("no")), METRICS["yes-no"]) == 0
    assert badness(METRICS["yes-no"].score(no, says("yes")), METRICS["yes-no"]) > 0.5


@pytest.mark.parametrize("kind", ["a file", "pixels", "one of two"])
def test_a_row_that_sees_another_picture_is_another_row(tmp_path, kind: str):
    """The prompt is the same, and so is the name of the picture."""

    def row(color: str) -> list[Example]:
        picture = Image.new("RGB", (8, 8), color)
        picture.save(tmp_path / "a.png")
        image = {"a file": str(tmp_path / "a.png"), "pixels": picture, "one of two": (IMAGE, picture)}[kind]
        return [Example("0", image, "answer en what color ?", "exact", (color,))]

    pg = StubModel(lambda image, prompt: says("red"))
    run(pg, row("red"), out_folder=tmp_path / "run")
    assert run(pg, row("red"), out_folder=tmp_path / "run")["exact", "exact"].value == 1
    assert len(pg.prompts) == 1, "the same picture, opened once more, is not asked about again"
    with pytest.raises(ValueError, match=r"row 0, 'answer en what color \?', saw another picture there than here"):
        run(pg, row("blue"), out_folder=tmp_path / "run")


def test_a_run_that_is_refused_before_its_first_answer_leaves_nothing(tmp_path):
    def rows():
        yield from questions(1)
        raise ValueError("the second row is none")

    with pytest.raises(ValueError, match="the second row is none"):
        run(StubModel(coin), rows(), out_folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(StubModel(coin), questions(3), out_folder=tmp_path / "run", constrained=False)  # with other options


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["predictions.jsonl", "scores.jsonl", "results.json", "worst/me.png"])
def test_a_folder_with_files_of_somebody_else_is_left_as_it_is(tmp_path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"image": 7}\nand no line break at the end')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"has {name.split('/')[0]} and no run.json .*choose another folder"):
        run(StubModel(coin), questions(3), out_folder=tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_is_tried_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file, expected a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/run cannot be written to .*: choose another folder"):
        check_folder(tmp_path / "file" / "run")
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ValueError, match=r"has results.json and no run.json"):
        check_folder(tmp_path)
    check_folder(tmp_path / "new" / "run")
    run(StubModel(coin), questions(1), out_folder=tmp_path / "there")
    check_folder(tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "results.json", "there"}, "nothing is left of it"


@pytest.mark.parametrize(
    ("text", "message"), [("", "Expecting value"), ("[1]", "expected an object, got list"), ("\xff", "can't decode")]
)
def test_a_damaged_run_json_is_named(tmp_path, text: str, message: str):
    run(StubModel(coin), questions(3), out_folder=tmp_path)
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"run.json does not say what run this is \(.*{message}.*choose another"):
        run(StubModel(coin), questions(3), out_folder=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{'id': 1}", "Expecting property"), ("", "Expecting value"), ('{"i": 1}', "no 'id'"), ("\xff", "can't decode")],
)
def test_a_damaged_prediction_is_named_and_nothing_is_cut_off(tmp_path, line: str, message: str):
    """Only the last line can be one that was cut off. It is here too, and stays until all others are read."""
    run(StubModel(coin), questions(3), out_folder=tmp_path)
    path = tmp_path / "predictions.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(b"\n".join([first, line.encode("latin-1"), rest[:-5]]))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"predictions.jsonl:2 is no prediction \(.*{message}.*: remove this line"):
        run(StubModel(coin), questions(3), out_folder=tmp_path)
    assert contents(tmp_path) == before
    path.write_bytes(b"\n".join([first, rest[:-5]]))
    pg = StubModel(coin)
    run(pg, questions(3), out_folder=tmp_path)
    assert len(pg.prompts) == 1, "the row that was cut off"


def test_a_prediction_that_is_not_whole_is_named(tmp_path):
    run(StubModel(coin), questions(3), out_folder=tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[1]["regions"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"the line with the id 'exact1' is no prediction \(no 'regions'\): remove"):
        run(StubModel(coin), questions(3), out_folder=tmp_path)


def test_no_pictures_or_masks_are_kept_in_memory():
    """A million rows must not fill the memory: the rows that are summed up have lost theirs."""
    examples = [Example("a", IMAGE, "segment dog", "segment", regions=dogs((0, 0, 9, 9), mask=True))]
    kept = []
    measure = METRICS["segment"]
    spying = paligemma.evaluate.Metric(measure.score, lambda rows: kept.extend(rows) or {}, regions=True)
    segment = Segment("dog", (0, 0, 9, 9), np.ones((40, 60), bool), [0] * 16, 0.5)
    run(StubModel(lambda image, prompt: says("...", segments=[segment])), examples, {"segment": spying})
    ((example, prediction),) = kept
    assert example.image is None
    assert [(region.mask, region.packed) for region in (*example.regions, *prediction.regions)] == [(None, None)] * 2


def test_masks_that_are_compared_together_are_kept_packed():
    """Average precision needs those of all rows."""
    true = dogs((0, 0, 40, 40), mask=True)
    kept = []
    measure = replace(METRICS["coco-masks"], corpus=lambda rows: kept.extend(rows) or {})
    segment = Segment("dog", (0, 0, 40, 40), true[0].mask, [0] * 16, 0.5)
    examples = [Example("a", IMAGE, "segment dog", "coco-masks", regions=true)]
    run(StubModel(lambda image, prompt: says("...", segments=[segment])), examples, {"coco-masks": measure})
    ((example, prediction),) = kept
    for region in (*example.regions, *prediction.regions):
        assert region.mask is None and len(region.packed["counts"]) < 20
    assert prediction.regions[0].score == 0.5, "by which they are ranked"


def test_coco_figures_of_masks():
    """Half of the mask in the same box: an IoU of .5, which is right at one of COCO's ten thresholds."""
    true = dogs((0, 0, 40, 40), mask=True)
    half = true[0].mask.copy()
    half[20:] = False
    segment = Segment("dog", (0, 0, 40, 40), half, [0] * 16, 0.9)
    examples = [Example("a", IMAGE, "segment dog", "coco-masks", regions=true)]
    report = run(StubModel(lambda image, prompt: says("...", segments=[segment])), examples)
    assert report["coco-masks", "AP"].value == pytest.approx(0.1)
    assert report["coco-masks", "AP50"].value == report["coco-masks", "AP_medium"].value * 10 == pytest.approx(1)
    assert report["coco-masks", "mIoU"].value == 0.5
    report = run(StubModel(lambda image, prompt: says("")), examples)
    named = {figure.name: figure.value for figure in report.figures}
    assert named["AP"] == named["AP_medium"] == 0 and "AP_small" not in named, "no object is small"


def test_the_worst_rows_are_drawn_task_by_task_the_surest_first(tmp_path):
    examples = [
        *questions(30),
        Example("box", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 10, 10))),
        Example("fine", IMAGE, "answer en fine ?", "exact", ("no",)),
    ]

    def answer(image, prompt):
        if prompt.startswith("detect"):
            return says("...", 0.9, detections=[Detection("dog", (30, 30, 40, 40), 0.9)])
        return says("no", float(prompt.split()[3]) / 100 if "question" in prompt else 1.0)

    report = run(StubModel(answer), examples, out_folder=tmp_path, worst=4)
    assert [row["id"] for row in report.worst] == ["exact29", "box", "exact28", "exact27"]
    for row in report.worst:
        with Image.open(tmp_path / row["file"]) as picture:
            assert min(picture.size) > 200
            truth_and_answer = row["id"] == "box"
            assert (picture.width > 700) == truth_and_answer
    assert results(tmp_path)["worst"] == report.worst


def test_a_drawn_row_shows_all_its_pictures_and_all_its_words():
    """Truth and answer side by side where there are boxes; a narrow picture leaves room for the words."""
    two = (np.zeros((40, 60, 3), np.uint8), np.full((40, 60, 3), 255, np.uint8))
    answer = Prediction("True", 0.5)
    width, height = compare(Example("1", two, "answer en both ?", "exact", ("False",)), answer).size
    assert width == 2 * 400 + 3 * 12
    one = compare(Example("1", two[0], "answer en both ?", "exact", ("False",)), answer)
    assert one.size == (400 + 2 * 12, height - 20), "a single picture needs no name"
    strange = compare(Example("1", two[0], "answer en both ?", "exact", ("False",)), Prediction("\n\ufffd\u05d0"))
    assert strange.size == one.size  # a line break, and what Pillow cannot set behind one
    boxes = compare(Example("1", two, "detect dog", "detect", regions=dogs((0, 0, 10, 10))), Prediction(""))
    assert boxes.width == width
    narrow = compare(Example("1", np.zeros((400, 4, 3), np.uint8), "answer en " + 20 * "why ", "exact", ("x",)), answer)
    assert narrow.width >= 400
    assert card(Example("1", two, "answer en both ?", "exact", ("False",)), answer).count("<img") == 2


def test_the_table_shows_every_figure(tmp_path):
    examples = [*questions(5), Example("box", IMAGE, "detect dog", "detect", regions=dogs((0, 0, 10, 10)))]
    report = run(
        StubModel(coin), examples, out_folder=tmp_path, targets={("exact", "exact"): 1.0}, about={"model": "coin"}
    )
    console = Console(width=140, record=True, file=open(tmp_path / "table.txt", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    for figure in report.figures:
        assert figure.name in text
    assert "model coin" in text
    assert "≥ 1.000" in text and "✗" in text
    assert "1 of 6 answers invalid, 0 unfinished" in text, "'yes' is no box"
    assert "NaN" not in (tmp_path / "results.json").read_text()


# --- the small world ------------------------------------------------------------------------------


def ideal(examples: list[Example]) -> StubModel:
    by_prompt = {(id(example.image), example.prompt): example for example in examples}

    def answer(image, prompt):
        example = by_prompt[id(image), prompt]
        items = [Segment(r.label, r.box, r.mask, [0] * 16, 1.0) for r in example.regions]
        if example.task != "segment":
            items = [Detection(r.label, r.box, 1.0) for r in example.regions]
        key = "segments" if example.task == "segment" else "detections"
        return says(example.answers[0] if example.answers else "...", **{key: items})

    return StubModel(answer)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(tiny.tiny_examples(60, size=128))


def test_the_table_fits_a_terminal_and_rounds_to_no_minus_zero():
    """80 columns: names of tasks and intervals stay whole, words of a figure's name go below one another."""
    figures = [
        Figure("detect_absent", "AP gained by the score", -1e-16, 0.0, 0.0, rows=3, target=0.95),
        Figure("detect_absent", "mean IoU of matches", 0.75, 0.667, 1.0, rows=3, baseline=0.25, target=0.8),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Report(figures, {}, {"model": "tiny", "dtype": None}).table())
    text = console.export_text()
    assert "detect_absent" in text and "0.667 … 1.000" in text
    assert "-0.000" not in text and "dtype" not in text


def test_brackets_in_a_path_are_no_markup():
    """Rich would leave out "[old]", and raise at "[/x]" after all answers were made."""
    about = {"model": "/tmp/[old]/model", "data": "/tmp/[/x]/:car:.jsonl"}
    figures = [Figure("[bold]", "[red]share", 0.5, None, None, rows=1)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Report(figures, {}, about).table())
    text = console.export_text()
    assert all(name in text for name in (*about.values(), "[bold]", "[red]share"))


def test_the_right_answers_reach_every_target(examples):
    report = run(ideal(examples), examples, tiny.METRICS, targets=tiny.targets())
    assert {figure.task for figure in report.figures} == set(TASKS)
    for figure in report.figures:
        if not figure.name.startswith("AP"):
            assert figure.value == (0 if figure.lower_is_better else 1), figure
        if figure.target is not None:
            assert figure.reached, figure
    assert {(f.task, f.name) for f in report.figures if f.target is not None} == set(tiny.targets())


def test_always_the_commonest_answer_is_the_baseline(examples):
    for task in ("caption", "background", "exists", "count", "ocr", "detect_absent"):
        rows = [example for example in examples if example.task == task]
        commonest = Counter(example.answers[0] for example in rows).most_common(1)[0][0]
        report = run(StubModel(lambda image, prompt, text=commonest: says(text)), rows, tiny.METRICS)
        for figure in report.figures:
            assert figure.value == pytest.approx(figure.baseline), figure


def test_examples_are_the_same_every_time_and_not_those_of_other_splits(examples):
    again = list(tiny.tiny_examples(5, size=128))
    assert [(e.id, e.prompt, e.answers) for e in again] == [(e.id, e.prompt, e.answers) for e in examples[: len(again)]]
    assert np.array_equal(again[0].image, examples[0].image)
    assert not np.array_equal(next(tiny.tiny_examples(1, "val", size=128)).image, examples[0].image)
    assert len(examples) == pytest.approx(60 * tiny.ROWS_PER_SCENE, rel=0.15)
    with pytest.raises(ValueError, match="count must be at least 1"):
        next(tiny.tiny_examples(0))


def test_the_objects_of_every_caption_can_be_read_back():
    for seed in range(200):
        scene = render(seed, "test", size=96)
        assert tiny.caption_objects(caption(scene)) == Counter(thing.name for thing in scene.objects), caption(scene)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("an orange on an orange background", {"orange": 1}),
        ("an orange car and two oranges on a white background", {"orange car": 1, "orange": 2}),
        ("three sheep, a bus and two buses on a red background", {"sheep": 3, "bus": 3}),
        ("two strawberries, two snowmen and two butterflies", {"strawberry": 2, "snowman": 2, "butterfly": 2}),
        ("dog", {"dog": 1}),
        ("zero dogs", {}),
        ("a unicorn and a a dog on", {"unicorn": 1, "a dog on": 1}),
        ("", {}),
        (", ,", {}),
        ("a on a blue background", {}),
    ],
)
def test_any_caption_can_be_read(text: str, objects: dict[str, int]):
    assert tiny.caption_objects(text) == Counter(objects)


def test_object_f1_is_of_all_captions_together():
    examples = [
        Example("a", IMAGE, "caption en", "caption", ("a dog and two cats on a red background",)),
        Example("b", IMAGE, "caption en", "caption", ("a red car on a blue background",)),
    ]
    texts = iter(["a dog and a cat on a red background", "a blue car on a blue background"])
    report = run(StubModel(lambda image, prompt: says(next(texts))), examples, tiny.METRICS)
    assert report["caption", "object F1"].value == pytest.approx(2 * 2 / (4 + 3))
    assert report["caption", "exact"].value == 0


def test_targets_of_other_splits():
    assert tiny.targets("heldout")["caption", "object F1"] == pytest.approx(0.90)
    assert tiny.targets("heldout")["ocr", "character error rate"] == pytest.approx(0.13)
    assert tiny.targets("twemoji") == {("caption", "object F1"): 0.60}
