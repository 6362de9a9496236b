"""`paligemma train`: from rows to a folder that everything opens."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import COLORS
from training_runs import SMALL, log_of, run, write_data

import paligemma
from paligemma.data.options import open_rows
from paligemma.evaluate.own_rows import evaluate_rows, merge_captions
from paligemma.train.finetune import finetune
from paligemma.train.options import TrainOptions
from paligemma.train.setup import prepare

# ------------------------------------------------------------------------------------------------- from rows to a model


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run to its end, with validation on the rows it learns by heart."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_data(folder / "data")
    wanted = {"steps": 60, "batch": 8, "lr": 1e-2, "validation": data, "validate_every": 20, "save_every": 100.0}
    return folder / "run", run(base, data, folder / "run", **wanted)


def test_the_task_is_learned_and_the_folder_opens(finished):
    out, _ = finished
    pg = paligemma.load(str(out))
    for name, color in COLORS.items():
        picture = np.full((28, 28, 3), color, np.uint8)
        assert pg.ask(picture, "what color is it ?").text == name


def test_it_is_said_what_will_happen_before_the_first_step(finished):
    _, said = finished
    everything = "\n".join(said)
    assert re.search(r"data .* 8 rows; a row has \d+ tokens, [\d.]+ of them the answer, the longest \d+", everything)
    assert re.search(r"learns .*vision [\d,]+, projector [\d,]+, decoder [\d,]+: ([\d,]+) of \1 parameters", everything)
    assert re.search(r"steps .* 60 steps \(60 epochs\) of 8 rows; adamw, learning rate 0.01, 5% warm-up", everything)
    assert re.search(r"computed in float32", everything)
    assert said.index(next(line for line in said if line.startswith("steps"))) < said.index(
        next(line for line in said if line.startswith("step 20:"))
    )


def test_generated_answers_are_measured_on_the_way_and_drawn(finished):
    out, _ = finished
    measured = {entry["step"]: entry["validation"]["exact"] for entry in log_of(out) if "validation" in entry}
    assert list(measured) == [20, 40, 60] and measured[60] == 1.0
    for name in ("step-00000020", "step-00000040", "final"):
        folder = out / "validation" / name
        assert len(list((folder / "examples").glob("*.png"))) == 8
        assert len((folder / "predictions.jsonl").read_text().splitlines()) == 8
    result = json.loads((out / "finished.json").read_text())
    assert result["figures"][0]["value"] == 1.0 and result["summary"]["steps"] == 60


def test_the_final_figures_are_told_in_words(finished):
    (line,) = [line for line in finished[1] if line.startswith("validation")]
    assert re.fullmatch(r"validation, 8 rows by exact: share of exact answers 1\.000 \(95%: 0\.\d+ … 1\.000\)", line)


def test_validation_measures_captions_as_evaluate_does(base, tmp_path):
    """Against all captions of a picture, also those of rows that were not drawn by lot."""
    captions = ["red", "all red", "a red square", "red as can be"]
    folder = Path(write_data(tmp_path / "data")).parent
    lines = [{"image": "0.png", "caption": caption} for caption in captions]
    lines += [{"image": "1.png", "caption": "green"}, {"image": "2.png", "prefix": "ocr", "suffix": "red"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = open_rows(folder / "captions.jsonl")
    kept = merge_captions([rows[1], rows[2], rows[5]], rows, "auto")
    assert [(row.number, row.answers) for row in kept] == [(1, tuple(captions)), (5, ())]

    run(base, str(folder / "captions.jsonl"), tmp_path / "run", steps=1, validation=str(folder / "captions.jsonl"))
    report = evaluate_rows(paligemma.load(str(tmp_path / "run")), rows, progress=False)
    for entry in json.loads((tmp_path / "run" / "finished.json").read_text())["figures"]:
        figure = report[entry["task"], entry["name"]]  # made with a larger budget of tokens, so values may differ
        assert (entry["rows"], entry["baseline"]) == (figure.rows, figure.baseline), entry["name"]


def test_rows_without_a_picture_are_trained_and_measured(base, tmp_path):
    lines = [{"image": None, "prefix": f"answer en what is {i} ?", "suffix": "red"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = str(tmp_path / "rows.jsonl")
    run(base, data, tmp_path / "run", steps=40, lr=1e-2, validation=data, save_every=100.0)
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["figures of"] == "validation" and finished["figures"][0]["value"] == 1.0


def test_validation_whose_pictures_are_gone_does_not_end_the_run(base, data, tmp_path):
    more = {"validation": write_data(tmp_path / "validation"), "validate_every": 1, "steps": 2}
    options = TrainOptions(model=base, data=data, out=str(tmp_path / "run"), **{**SMALL, **more})
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("numbers"):
            for picture in (tmp_path / "validation").glob("*.png"):
                picture.unlink()

    finetune(options, say)
    assert sum("none of the pictures can be read" in line for line in said) == 2, "on the way and at the end"
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["figures"] == []
    paligemma.load(str(tmp_path / "run"))


def test_killed_at_its_end_it_logs_the_last_figures_once(base, data, tmp_path, monkeypatch):
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paligemma.train.results.write_report", cut)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "run", steps=2, validation=data)
    monkeypatch.undo()
    run(base, data, tmp_path / "run", steps=2, validation=data)
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "validation" in entry] == [2]


@pytest.mark.parametrize("gpu", [True, False])
def test_the_peak_of_memory_is_of_the_device_that_computed(base, data, tmp_path, monkeypatch, gpu):
    """Also on a machine with a GPU that is not used."""
    monkeypatch.setattr("paligemma.train.results.torch.cuda.is_available", lambda: gpu)
    run(base, data, tmp_path / "run", steps=1, device="cpu")
    peak = json.loads((tmp_path / "run" / "finished.json").read_text())["summary"]["peak memory"]
    assert float(peak.removesuffix(" GB")) > 0.05


def test_the_report_is_one_page_with_curves_figures_and_examples(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and page.count('src="data:image/jpeg;base64,') == 8
    assert "answer en what color is it ?" in page and "<td>exact</td>" in page and "<code>0.01</code>" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs nothing else"


def test_tensorboard_has_the_curves(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 61))
    assert [event.step for event in events.Scalars("validation/exact")] == [20, 40]
    assert "examples/00" in events.Tags()["images"]


def test_without_tensorboard_it_is_said_once(base, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = run(base, data, tmp_path / "run", steps=2)
    assert sum("TensorBoard" in line for line in said) == 1


def test_a_finished_run_is_left_alone(finished, base):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    options = json.loads((out / "settings.json").read_text())["settings"]
    said: list[str] = []
    again = finetune(TrainOptions(**{**options, "freeze": (), "lora": ()}), said.append)
    assert "finished already" in said[0] and again["summary"]["steps"] == 60
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_frozen_parts_stay(base, data, tmp_path):
    said = run(base, data, tmp_path / "run", freeze=("vision", "embedding"), steps=2)
    assert any("learns  projector" in line for line in said)
    before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "multi_modal_projector.linear.weight" in changed and any("layers.0.mlp" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


def test_nothing_is_kept_for_the_gradient_of_a_frozen_vision_tower(base):
    model = paligemma.load(base).model.train()
    prepare(model, TrainOptions(model=base, data="d", out="o", freeze=("vision",)))
    pixels = torch.zeros(1, 3, 28, 28)
    assert model.vision_tower(pixels).grad_fn is None and model.encode_image(pixels).grad_fn is not None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_vision_tower_learns_at_its_share_of_the_rate(base, data, tmp_path, optimizer):
    def moved(name: str, **others) -> dict[str, float]:
        said = run(base, data, tmp_path / name, steps=1, warmup=0.0, optimizer=optimizer, **others)
        assert any("0.1 of it for the vision tower" in line for line in said) == bool(others)
        before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / name))
        return {key: float((after[key] - before[key]).abs().max()) for key in before}

    same, slower = moved("same"), moved("slower", vision_lr=0.1)
    for key in same:
        if "k_proj.bias" not in key:  # under softmax it has no gradient but rounding
            share = 0.1 if key.startswith("vision_tower") else 1.0
            assert slower[key] == pytest.approx(share * same[key], rel=0.02, abs=1e-7), key


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_of_eye_and_projector_alone(base, data, tmp_path, optimizer):
    for name, decay in (("none", 0.0), ("some", 0.5)):
        run(base, data, tmp_path / name, steps=1, warmup=0.0, optimizer=optimizer, weight_decay=decay)
    none, some = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("none", "some"))
    for key in none:
        kernel = key.startswith(("vision_tower", "multi_modal_projector")) and none[key].ndim > 1
        kernel &= "position_embedding" not in key
        assert torch.equal(none[key], some[key]) != kernel, key


def test_beside_muon_adamw_gets_a_third_of_the_rate(base, data, tmp_path):
    said = run(base, data, tmp_path / "run", steps=1, warmup=0.0, optimizer="muon", lr=3e-3)
    assert any("learning rate 0.003 (0.001 for embedding, norms and biases, by AdamW)" in line for line in said)
    before, after = (paligemma.load(str(folder)).model.state_dict() for folder in (base, tmp_path / "run"))
    key = "language_model.model.embed_tokens.weight"  # the first step of Adam is the learning rate
    assert float((after[key] - before[key]).abs().max()) == pytest.approx(1e-3, rel=0.01)
