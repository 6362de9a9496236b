"""The table over several sets of scenes: what is in it, what counts as lost, and that a run continues."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.evaluate import Figure, Report
from paligemma.tiny import generalization
from paligemma.tiny.degradations import DEGRADATIONS
from paligemma.tiny.evaluation import METRICS, targets, tiny_examples
from paligemma.tiny.generalization import FIGURES, PARTS, evaluate_parts, largest_loss, paired_loss, tables, to_dict


def test_the_parts_are_the_renderer_s_own_scenes_what_is_new_and_each_degradation_alone():
    assert [part.name for part in PARTS] == ["test", "heldout", "emojione", "clean", *DEGRADATIONS]
    for part in PARTS[3:]:
        examples = list(tiny_examples(3, part.split, world=2, degradations=part.degradations))
        clean = list(tiny_examples(3, world=2, degradations=()))
        assert {example.id for example in examples} <= {example.id for example in clean}
        assert {example.task for example in examples} <= set(METRICS)


def test_aims_are_those_of_own_scenes_and_of_the_unseen_artist():
    assert targets("test", 2)["caption", "exact"] == 0.78 and targets("emojione", 2)["caption", "exact"] == 0.35
    assert targets("heldout", 2)["ocr", "character error rate"] == pytest.approx(0.13)
    assert targets("test", 1)["caption", "exact"] == 0.75, "world 1 keeps its own"
    assert set(targets("test", 2)) == set(targets("emojione", 2)) == set(FIGURES)


def report(value, error, target=None):
    return Report(
        [
            Figure("caption", "exact", value, None, None, 10, target=target),
            Figure("ocr", "character error rate", error, None, None, 10, lower_is_better=True),
        ],
        {},
        {},
    )


def test_a_degradation_may_cost_four_points():
    reports = {
        "test": report(0.8, 0.3, 0.78),
        "clean": report(0.8, 0.3),
        "jpeg": report(0.77, 0.4),
        "blur": report(0.7, 0.2),
    }
    console = Console(width=200)
    with console.capture() as shown:
        console.print(*tables(reports, 200))
    lines = [line for line in shown.get().splitlines() if "exact" in line or "error" in line]
    exact, error = (line for line in lines if "0." in line)
    assert "0.800 ✓" in exact and "0.770 " in exact and "0.770 ✗" not in exact and "0.700 ✗" in exact
    assert "0.400 ✗" in error and "0.200 ✗" not in error
    assert largest_loss(reports, "jpeg") == ("ocr: character error rate", pytest.approx(0.1))
    assert to_dict(reports)["largest_loss"]["blur"] == {"figure": "caption: exact", "loss": pytest.approx(0.1)}
    assert largest_loss({"jpeg": report(1, 0)}, "jpeg") is None


@pytest.mark.parametrize("width", [60, 80, 160, 300])
def test_the_table_of_all_parts_is_cut_into_tables_that_fit(width):
    figures = [Figure(task, name, 0.5, None, None, 10, target=0.4) for task, name in FIGURES]
    console = Console(width=width)
    with console.capture() as shown:
        console.print(*tables({part.name: Report(figures, {}, {}) for part in PARTS}, width))
    text = shown.get()
    assert "…" not in text and text.count("0.500") == len(PARTS) * len(FIGURES)
    marked = [figure for figure in figures if figure.reached] * len(
        [part for part in PARTS if part.name not in DEGRADATIONS]
    )
    assert text.count("✓") == len(marked)
    for name in [part.name for part in PARTS] + [figure for _, figure in FIGURES]:
        assert name in text


def test_a_loss_is_measured_scene_by_scene():
    """Of ten scenes, two lose their answer. Two runs on different scenes could hardly tell; the same scenes can."""
    key = ("what", "exact")
    clean = replace(report(1, 0), shares={key: {f"{n}": (f"scene {n}", 1, 1) for n in range(100)}})
    rows = {f"{n}": (f"scene {n}", n % 5 > 0, 1) for n in range(90)}  # ten rows were not asked
    loss, low, high = paired_loss(clean, replace(clean, shares={key: rows}), *key)
    assert loss == pytest.approx(0.2) and 0.1 < low < 0.2 < high < 0.3
    error = ("ocr", "character error rate")
    before = replace(clean, shares={error: {"1": ("a", 1, 10), "2": ("b", 1, 10)}})
    after = replace(clean, shares={error: {"1": ("a", 3, 10), "2": ("b", 3, 10)}})
    assert paired_loss(before, after, *error) == pytest.approx((0.2, 0.2, 0.2))
    assert paired_loss(clean, after, *key) is None


def test_the_embedded_model_is_measured_and_a_run_continues(tmp_path, monkeypatch):
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    options = {"count": 2, "names": ["emojione", "gray"], "out_folder": tmp_path, "progress": False}
    first = evaluate_parts(pg, **options)
    assert list(first) == ["emojione", "gray"]
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["figures"]["emojione"]["caption: object F1"] == first["emojione"]["caption", "object F1"].value
    assert (tmp_path / "gray" / "results.json").is_file()
    evaluate_parts(pg, **options | {"names": ["clean"]})
    both = json.loads((tmp_path / "table.json").read_text())
    assert list(both["figures"]) == ["emojione", "gray", "clean"], "what an earlier call measured stays"
    assert both["figures"]["gray"] == saved["figures"]["gray"]
    assert both["about"]["clean"]["data"] == "world 2, clean" and both["about"]["gray"]["count"] == 2
    monkeypatch.setattr(pg, "generate", None)  # nothing is answered again
    again = evaluate_parts(pg, **options)
    assert to_dict(again) == to_dict(first)


def test_an_unknown_part_is_wrong_usage_before_the_model_is_loaded():
    result = CliRunner().invoke(app, ["tiny", "evaluate", "--part", "rain"])
    assert result.exit_code == 2 and "unknown part 'rain'; there is: test, heldout" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="unknown part 'rain'"):
        generalization.check_names(["test", "rain"])
