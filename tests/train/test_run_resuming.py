"""Runs that are interrupted, killed, continued, made longer or begun anew, and two in one folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import kill_in_moment
from training_runs import SMALL, during, interrupt_in_step_4, log_of, losses, run

import paligemma
from paligemma.train import run_folder
from paligemma.train.batches import RowBatches
from paligemma.train.finetune import finetune
from paligemma.train.interruption import Terminated
from paligemma.train.options import TrainOptions
from paligemma.train.setup import open_rows as open_both_rows
from paligemma.weights.saving import save_pretrained

# ------------------------------------------------------------------------------------------------------- going on


def test_ctrl_c_saves_and_the_same_command_goes_on(base, data, tmp_path, monkeypatch):
    """Dropout is on: random numbers have to be the same too."""
    run(base, data, tmp_path / "whole", dropout=0.2, save_every=100.0)

    interrupt_in_step_4(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4, which is saved; the same command goes on"):
        run(base, data, tmp_path / "cut", dropout=0.2, save_every=100.0)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "finished.json").exists()
    said = run(base, data, tmp_path / "cut", dropout=0.2, save_every=100.0)
    assert any("going on" in line and "step-00000004" in line for line in said)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_saves_too_and_has_an_exit_code_of_its_own(base, data, tmp_path, monkeypatch):
    interrupt_in_step_4(monkeypatch, signal.SIGTERM)
    with pytest.raises(Terminated, match="stopped after step 4, which is saved") as stop:
        run(base, data, tmp_path / "out")
    assert isinstance(stop.value, KeyboardInterrupt) and stop.value.exit_code == 143


def test_stopped_while_the_next_batch_is_loaded(base, data, tmp_path, monkeypatch):
    """At once, as by a second Ctrl-C. A picture of the step after is missing, which is told when that comes: once."""
    options = TrainOptions(model=base, data=data, out="", **{**SMALL, "batch": 8, "dropout": 0.2})
    finetune(replace(options, out=str(tmp_path / "whole")), during((Path(data).parent / "3.png").unlink))
    shutil.copy(Path(data).parent / "7.png", Path(data).parent / "3.png")  # which is checked before the first step

    load, lay_out = RowBatches.load, RowBatches.lay_out
    loaded_step_5, threads = threading.Event(), []

    def loading(self, step, *part):
        loaded = load(self, step, *part)
        if step == 4:
            threads.append(threading.current_thread())
            loaded_step_5.set()
        return loaded

    def stopped(self, step, loaded):
        if step == 3:
            assert loaded_step_5.wait(60)
            raise KeyboardInterrupt
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "load", loading)
    monkeypatch.setattr(RowBatches, "lay_out", stopped)
    options = replace(options, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at once: the last good checkpoint is .*step-00000003"):
        finetune(options, during((Path(data).parent / "3.png").unlink))
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()
    monkeypatch.undo()
    assert finetune(options)["summary"]["rows skipped"] == 6
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_of_an_older_version_goes_on(base, data, tmp_path):
    """It had fewer options, and did what is now the default."""
    out = tmp_path / "run"
    run(base, data, out)
    saved = json.loads((out / "settings.json").read_text())
    assert saved["settings"].pop("label_smoothing") == 0.0
    (out / "settings.json").write_text(json.dumps(saved))
    run(base, data, out)
    with pytest.raises(ValueError, match=r"other settings: label_smoothing 0\.0 there, 0\.1 here"):
        run(base, data, out, label_smoothing=0.1)


def test_a_run_goes_on_only_with_the_same_settings_and_data(base, data, tmp_path):
    out = tmp_path / "run"
    run(base, data, out)
    with pytest.raises(ValueError, match=r"other settings: batch 4 there, 2 here; seed 0 there, 5 here.*--no-resume"):
        run(base, data, out, batch=2, seed=5)
    path = Path(data)
    path.write_text(path.read_text().replace('"red"', '"blue"', 1))
    with pytest.raises(ValueError, match="other settings: data '"):
        run(base, data, out)
    run(base, data, out, resume=False, steps=2)
    assert len(losses(out)) == 2, "begun anew"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_and_validation_have_splits_of_their_own(base, data, tmp_path):
    both = Path(data).with_name("train.jsonl")
    Path(data).rename(both)
    lines = both.read_text().splitlines(keepends=True)
    both.with_name("val.jsonl").write_text("".join(lines[:3]))
    folder = str(both.parent)
    options = TrainOptions(model=base, data=folder, split="train", out=str(tmp_path), validation=folder)
    assert [len(rows) for rows in open_both_rows(replace(options, validation_split="val"))] == [8, 3]
    assert [len(rows) for rows in open_both_rows(replace(options, validation=str(both)))] == [8, 8]
    with pytest.raises(ValueError, match=r"train.*val"):
        open_both_rows(options)


def test_data_and_validation_have_answers_of_their_own(base, data, tmp_path):
    for number, answer in enumerate(("yes", "no")):
        question = {"question_id": 1, "image_id": number, "question": "is it ?"}
        for name, content in {"questions": question, "answers": {**question, "answers": [{"answer": answer}]}}.items():
            key = "questions" if name == "questions" else "annotations"
            Path(data).with_name(f"{name}{number}.json").write_text(json.dumps({key: [content]}))
    names = [str(Path(data).with_name(f"{name}{n}.json")) for n in (0, 1) for name in ("questions", "answers")]
    options = TrainOptions(
        base, names[0], str(tmp_path), annotations=names[1], validation=names[2], validation_annotations=names[3],
        image_name="{image_id}.png",
    )  # fmt: skip
    rows, measured = open_both_rows(options)
    assert (rows[0].suffix, measured[0].suffix) == ("yes", "no")


def test_a_refused_command_leaves_the_old_run_as_it_is(base, data, tmp_path):
    """Also with --no-resume, which begins anew in its place: not before all is known to be right."""
    out = tmp_path / "run"
    run(base, data, out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(data).read_text() + '{"image": null, "prefix": "caption en"}\n')
    with pytest.raises(ValueError, match="no part 'visoin'"):
        run(base, data, out, resume=False, freeze=("visoin",))
    with pytest.raises(ValueError, match="no suffix"):
        run(base, str(broken), out, resume=False, images=str(Path(data).parent))
    with pytest.raises(ValueError, match="no suffix"):
        run(base, data, out, resume=False, images=str(Path(data).parent), validation=str(broken))
    with pytest.raises(ValueError, match="none of them learns"):
        run(base, data, out, resume=False, optimizer="muon", freeze=("vision", "decoder"))
    assert contents(out) == before
    run(base, data, out, resume=False, steps=2)
    assert len(losses(out)) == 2 and (out / "notes.txt").read_text() == "mine"


def test_a_run_is_not_put_where_its_model_lies(base, data, tmp_path):
    out = tmp_path / "run"
    run(base, data, out)
    save_pretrained(paligemma.load(base).model, out / "base", paligemma.load(base).processor)
    adapter = tmp_path / "adapter"
    run(str(out), data, adapter, lora=("decoder",), steps=1)
    before = contents(out)
    for model in (out, out / "base", tmp_path / "adapter" / ".." / "run", adapter):
        for others in ({"lora": ("decoder",)}, {}):
            if model != adapter or not others:  # an adapter is refused LoRA anyway
                with pytest.raises(ValueError, match=rf"lies in {re.escape(str(out))}, .*choose another --out"):
                    run(str(model), data, out, resume=False, **others)
    assert contents(out) == before


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_the_old_run_is_removed(base, data, tmp_path, monkeypatch, moment):
    """The same command begins anew all the same, and so does the old one."""
    out = tmp_path / "run"
    run(base, data, out, steps=2)
    (out / "notes.txt").write_text("mine")
    kill_in_moment(monkeypatch, "paligemma.train.run_folder", moment)
    with pytest.raises(KeyboardInterrupt):
        run_folder.clear(out)
    monkeypatch.undo()
    shutil.copytree(out, tmp_path / "old")
    run(base, data, tmp_path / "old", steps=2)
    run(base, data, out, resume=False, steps=3)
    assert len(losses(out)) == 3 and (out / "notes.txt").exists()
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


def test_moved_data_are_the_same_data(base, data, tmp_path):
    run(base, data, tmp_path / "run")
    Path(data).parent.rename(tmp_path / "elsewhere")
    assert "finished already" in run(base, str(tmp_path / "elsewhere" / "rows.jsonl"), tmp_path / "run")[0]


def test_moved_pictures_are_the_same_pictures(base, data, tmp_path):
    """Their folder may be named by --images, and no other one is compared."""
    pictures = Path(data).parent.rename(tmp_path / "pictures")
    rows = str((pictures / "rows.jsonl").rename(tmp_path / "rows.jsonl"))
    run(base, rows, tmp_path / "run", images=str(pictures))
    moved = str(pictures.rename(tmp_path / "moved"))
    assert "finished already" in run(base, rows, tmp_path / "run", images=moved)[0]


def test_a_folder_of_something_else_is_not_touched(base, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run"):
        run(base, data, tmp_path)


KILLED = """
import os, random, signal, sys, time
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from training_runs import TrainOptions, SMALL, finetune
from paligemma.train import checkpointing

base, data, out = sys.argv[1:]
options = TrainOptions(model=base, data=data, out=out, **{{**SMALL, "steps": 40, "dropout": 0.1, "ema": 0.9}})
moments, kills = random.Random(7), 0
for attempt in range(200):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        finetune(options)
        os._exit(0)
    wait = moments.uniform(0.05, 1.2) if kills < 20 else float("inf")
    deadline = time.monotonic() + wait
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.002)
    if done[0]:
        assert done[1] == 0, done
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    for place in checkpointing.checkpoints(Path(out) / "checkpoints"):
        checkpointing.load(place)  # whatever the moment: what has its name is whole
print(kills)
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(base, data, tmp_path):
    """A process forks a run and kills it, again and again; in the end the losses are those of a run left alone."""
    run(base, data, tmp_path / "whole", steps=40, dropout=0.1, ema=0.9, save_every=100.0)
    script = KILLED.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, base, data, str(tmp_path / "killed")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("together", [(), ("--keep-together",)])
@pytest.mark.parametrize("shard", [(), ("--shard",)])
def test_two_processes_do_what_one_does(base, data, tmp_path, shard, together):
    """The command under torchrun, with a look at answers on the way; dropout draws the same in the same part. Also
    where two questions are about the same picture."""
    if together:
        lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
        pairs = [line | {"image": f"{i}.png"} for i in range(4) for line in (lines[i], lines[i + 4])]
        Path(data).write_text("".join(json.dumps(line) + "\n" for line in pairs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run(base, data, tmp_path / "one", dropout=0.1, accumulate=2, keep_together=bool(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "paligemma", "train", "--model", base, "--data", data, "--out", str(tmp_path / "two")]
    command += [*shard, *together]
    command += ["--validation", data, "--validate-every", "3", "--steps", "6", "--batch", "4", "--lr", "3e-3"]
    done = subprocess.run(
        [*command, "--dropout", "0.1"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [entry["step"] for entry in log_of(tmp_path / "two") if "validation" in entry] == [3, 6]
    one, two = (paligemma.load(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    for name in one:
        if "k_proj.bias" not in name:  # under softmax it has no gradient but rounding, which Adam makes large
            assert torch.allclose(one[name], two[name], atol=5e-5), name


# ------------------------------------------------------------------------------------------------- longer, locked


def test_a_finished_run_goes_on_for_longer(base, data, tmp_path):
    """Nothing of it is lost: weights, the optimizer's state, log, figures. The schedule is that of the new length."""
    out = tmp_path / "run"
    run(base, data, out, schedule="constant", warmup=0.0, validation=data)
    with pytest.raises(ValueError, match=r"steps 6 there, 9 here\. .*add --longer to train it further"):
        run(base, data, out, schedule="constant", warmup=0.0, validation=data, steps=9)
    longer = {"schedule": "constant", "warmup": 0.0, "validation": data, "steps": 9, "longer": True}
    said = run(base, data, out, **longer)
    assert any("longer than before: from step 6 on" in line for line in said)
    run(base, data, tmp_path / "whole", schedule="constant", warmup=0.0, validation=data, steps=9)
    assert losses(out) == losses(tmp_path / "whole")
    one, other = (paligemma.load(str(folder)).model.state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((out / "finished.json").read_text())["summary"]["steps"] == 9
    assert json.loads((out / "finished-00000006.json").read_text())["summary"]["steps"] == 6
    assert [entry["step"] for entry in log_of(out) if "validation" in entry] == [6, 9]
    before = contents(out)
    assert "finished already" in run(base, data, out, **longer)[0], "the same again is done"
    with pytest.raises(ValueError, match="has made 9 steps already, and 8 are no more"):
        run(base, data, out, **{**longer, "steps": 8})
    with pytest.raises(ValueError, match="other settings: batch 4 there, 2 here"):
        run(base, data, out, **{**longer, "steps": 12, "batch": 2})
    assert contents(out) == before


def test_longer_with_fewer_minutes_is_refused(base, data, tmp_path):
    """Those of the last checkpoint count. Nothing is renamed."""
    out = tmp_path / "run"
    run(base, data, out, steps=None, minutes=0.02)
    before = contents(out)
    with pytest.raises(ValueError, match=r"has trained for 0\.0\d+ minutes already, and 0\.01 are no more"):
        run(base, data, out, steps=None, minutes=0.01, longer=True)
    assert contents(out) == before
    assert any("longer than before" in line for line in run(base, data, out, steps=None, minutes=0.04, longer=True))


def test_longer_goes_on_where_it_was_interrupted(base, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(base, data, out, steps=2)
    longer = {"steps": 6, "longer": True, "save_every": 100.0}
    interrupt_in_step_4(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4"):
        run(base, data, out, **longer)
    monkeypatch.undo()
    run(base, data, out, steps=6)  # by now it is a run of six steps
    assert len(losses(out)) == 6


def test_two_runs_in_one_folder_are_refused(base, data, tmp_path):
    """The second one in another process, while the first has it: it says who does and changes nothing."""
    out = tmp_path / "runs" / "one"
    second = "import sys; from test_finetune import *; run(*sys.argv[1:3], Path(sys.argv[3]), resume=False)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, Path(__file__).parents[:2]), *sys.path])}

    def start() -> None:
        before = {path: path.read_bytes() for path in out.rglob("*.json*")}
        done = subprocess.run(
            [sys.executable, "-c", second, base, data, str(out)], capture_output=True, text=True, env=environment
        )
        assert re.search(r"BlockingIOError: .*paligemma train", done.stderr), done.stderr
        assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before

    finetune(TrainOptions(model=base, data=data, out=str(out), **SMALL), during(start))
    assert len(losses(out)) == 6
    run(base, data, out, resume=False, steps=1)  # free again


def test_a_refused_run_leaves_no_folder(base, data, tmp_path):
    with pytest.raises(ValueError, match="no part 'visoin'"):
        run(base, data, tmp_path / "new" / "run", freeze=("visoin",))
    assert not (tmp_path / "new").exists()
