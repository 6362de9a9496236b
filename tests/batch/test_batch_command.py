"""The command: wrong usage is told at once, errors have their exit codes, and stdout stays empty."""

import io
import json
import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import standins
import typer
from openai.types.chat import ChatCompletion
from PIL import Image

from paligemma.batch import on_ray, run
from paligemma.batch.folder import RunFolder
from paligemma.batch.settings import Settings
from paligemma.batch.status import Tally, write_summary
from paligemma.batch.worker import finish_shards, shards_of
from paligemma.cli import main as cli
from paligemma.cli.batch import duration, finish, in_words, parsed_max_errors, worked


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/ with 8 pictures and one that is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "8.png").write_bytes(b"broken")
    return tmp_path


@pytest.fixture
def paligemma(photos, monkeypatch, capsys):
    """Runs a command, whose work is done by a stand-in in this process: `code, out, err = paligemma("batch", ...)`."""

    def run_batch(folder, workers, how, stop_after_errors, retry_errors, on_progress, note):
        answer = standins.opening(folder.settings)
        finish_shards(folder, shards_of(folder.num_shards, how.part), lambda: answer, lambda: False, lambda line: None)
        tally = Tally(folder, shards_of(folder.num_shards, how.part))
        tally.update()
        errors = dict(tally.errors)
        return run.Ended(write_summary(folder, 1.0, 9, 0), tally.answered, errors, tally.is_complete)

    monkeypatch.setattr(run, "run_batch", run_batch)

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["paligemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return run_command


def test_a_folder_of_pictures(paligemma):
    code, out, err = paligemma("batch", "caption en", "photos", "--out", "run")
    assert (code, out) == (1, "")
    assert "8 rows answered, 1 failed (1 unreadable): run" in err
    lines = standins.lines_of(RunFolder("run"))
    assert [line["id"] for line in lines] == [f"{number}.png" for number in range(9)]


@pytest.mark.parametrize(("allowed", "code"), [("0", 1), ("1", 0), ("12%", 0), ("11%", 1), ("100%", 0)])
def test_max_errors(paligemma, allowed, code):
    assert paligemma("batch", "caption en", "photos", "--out", "run", "--max-errors", allowed)[0] == code


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ({"signal": signal.SIGINT}, 130, "interrupted; the same command goes on"),
        ({"signal": signal.SIGTERM}, 143, "interrupted; the same command goes on"),
        ({"stopped": True}, 1, "error: stopped by --stop-after-errors. The same command goes on"),
        ({"failure": "all died", "signal": signal.SIGINT}, 1, "error: all died. The same command goes on"),
        ({}, 1, "error: the run is not complete. The same command goes on"),
    ],
)
def test_how_a_run_ended_before_it_was_complete(tmp_path, capsys, how, code, said):
    folder = standins.run_of(tmp_path / "run", 9)
    with pytest.raises(typer.Exit) as stopped:
        summary = {"complete": False, "rows_in_open_shards": 28}
        finish(folder, run.Ended(summary, 4, {}, False, **how), (0, False), tmp_path / "boxes.json")
    assert stopped.value.exit_code == code
    answered, kept, last = capsys.readouterr().err.splitlines()
    assert answered.startswith("4 rows answered") and last == said
    assert kept == "28 more rows stand in shards that are not finished; they are kept"
    assert not (tmp_path / "boxes.json").exists()


@pytest.mark.parametrize("how", [{"stopped": True}, {"signal": signal.SIGTERM}, {"failure": "a worker died"}])
def test_a_run_that_is_complete_is_not_called_stopped(tmp_path, capsys, how):
    """--stop-after-errors, a signal or a worker's end may come in the last moment, when every row has its line."""
    folder = standins.run_of(tmp_path / "run", 3)
    finish_shards(folder, [0], lambda: standins.quick(folder.settings), lambda: False, lambda line: None)
    finish(folder, run.Ended({"complete": True}, 6, {"missing": 3}, True, **how), (5, False), tmp_path / "boxes.json")
    assert (tmp_path / "boxes.json").exists() and "goes on" not in capsys.readouterr().err


def test_another_prompt_or_model_in_the_same_folder(paligemma, monkeypatch):
    paligemma("batch", "caption en", "photos", "--out", "run")
    before = {path: path.stat().st_mtime_ns for path in RunFolder("run").path.rglob("*")}
    code, out, err = paligemma("batch", "caption de", "photos", "--out", "run")
    assert (code, out) == (2, "") and "'caption en' there, 'caption de' here" in " ".join(err.split())
    monkeypatch.setattr("paligemma.batch.settings.fingerprint_of_model", lambda *_: "another")
    code, out, err = paligemma("batch", "caption en", "photos", "--out", "run")
    assert (code, out) == (2, "") and "the weights are others" in err
    assert {path: path.stat().st_mtime_ns for path in RunFolder("run").path.rglob("*")} == before


def test_what_may_differ_when_a_run_goes_on(paligemma):
    paligemma("batch", "caption en", "photos", "--out", "run", "--part", "1/2", "--shard-size", "2")
    more = ["--workers", "2", "--threads", "1", "--max-errors", "5%", "--stop-after-errors", "9", "--retry-errors"]
    code, _, err = paligemma(
        "batch", "caption en", "photos", "--out", "run", "--shard-size", "2", *more, "--draw", "drawn"
    )
    assert code == 1 and "1 failed" in err
    assert len(standins.lines_of(RunFolder("run"))) == 9


@pytest.mark.parametrize(
    ("address", "given", "threads"), [("a cluster", None, None), ("a cluster", 48, 48), ("local", None, 12)]
)
def test_threads_of_workers_on_ray(tmp_path, monkeypatch, address, given, threads):
    """The cores of this machine do not count on a cluster: its nodes may have fewer."""
    hows = []
    monkeypatch.setattr(on_ray, "run_on_ray", lambda folder, address, workers, how, *_: hows.append(how))
    monkeypatch.setattr("paligemma.devices.cpu_count", lambda: 24)
    worked(standins.run_of(tmp_path / "run", 3), 2, given, (1, 1), None, address, None, False)
    assert hows[0].threads == threads


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected PROMPT INPUT"),
        (["caption en"], "no INPUT after the prompt"),
        (["caption en", "photos"], "--out DIR is missing"),
        (["caption en", "photos", "--ray", "--out", "run"], "--ray needs an address, or 'local', got --out"),
        (["caption en", "photos", "--rows", "rows.jsonl", "--out", "run"], "from INPUT or from --rows"),
        (["caption en", "photos", "--labels", "dog", "--out", "run"], "--labels is for the prompt"),
        (["detect", "photos", "--labels", ", ,", "--out", "run"], "--labels names nothing"),
        (["detect", "photos", "--out", "run"], "name at least one thing to look for"),
        (["segment dog ;", "photos", "--out", "run"], "name at least one thing to look for"),
        (["caption en", "photos", "--out", "run", "--max-errors", "many"], "--max-errors is 'many'"),
        (["caption en", "photos", "--out", "run", "--max-errors", "0.5"], "--max-errors is '0.5'"),
        (["caption en", "photos", "--out", "run", "--every", "inf"], "--every is inf"),
        (["caption en", "photos", "--out", "run", "--part", "3/2"], "--part is '3/2'"),
        (["caption en", "photos", "--out", "run", "--every", "0"], "--every is 0"),
        (["caption en", "photos", "--out", "run", "--max-pixels", "0"], "--max-pixels is 0"),
        (["caption en", "photos", "--out", "run", "--loc-scale", "7"], "--loc-scale is 7"),
        (["caption en", "photos", "--out", "run", "--seed", "1"], "--seed is for sampling"),
        (["photos/0.png", "caption en", "--out", "run"], "the prompt comes first"),
        (["photos", "answer en what is this ?", "--out", "run"], "the prompt comes first"),
        (["caption en", "photos", "--out", "run", "--free"], "are for detect and segment"),
        (["detect dog", "photos", "--out", "run", "--free", "--forbid-repeats"], "choose one"),
        (["caption en", "https://x/a.jpg", "--out", "run"], "download it first"),
        (["caption en", "*.gif", "--out", "run"], "no file matches"),
        (["caption en", "photos/0.png", "photos/0.png", "--out", "run"], "more than once"),
        (["caption en", "photos", "--out", "photos/0.png"], "is a file"),
        (["caption en", "photos", "--out", "photos"], "holds no run"),
        (["--rows", "nowhere.jsonl", "--out", "run"], "no such file"),
    ],
)
def test_wrong_usage_is_told_at_once(paligemma, photos, arguments, said):
    code, out, err = paligemma("batch", *arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (photos / "run").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has a folder in which nothing can be made")
def test_what_the_system_refuses_is_named_without_its_number(paligemma):
    code, _, err = paligemma("batch", "caption en", "photos", "--out", "/proc/run")
    assert code == 2 and "/proc/run: No such file" in " ".join(err.split()) and "Errno" not in err


def test_a_coco_file_that_cannot_be_written_is_told_before_the_work(paligemma, photos):
    code, out, err = paligemma("batch", "detect dog", "photos", "--out", "run", "--coco", "photos/0.png/coco.json")
    assert (code, out) == (1, "") and "--coco photos/0.png/coco.json cannot be written (Not a directory)" in err
    assert not (photos / "run").exists()


def test_a_folder_may_be_called_like_the_prompt(paligemma, monkeypatch):
    """Pictures of stdin and of a pattern are no files by their names."""
    os.mkdir("ocr")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"photos/0.png\n")))
    for number, pictures in enumerate(["-", "photos/[0-7].png"]):
        code, _, err = paligemma("batch", "ocr", pictures, "--out", f"run {number}")
        assert code == 0, err


def test_a_mistyped_model_is_told_before_anything_is_written(paligemma, photos):
    code, _, err = paligemma("batch", "caption en", "photos", "--out", "run", "-m", "tyni")
    assert code in (1, 2) and "tyni: no such file" in err and not (photos / "run").exists()


def test_labels_complete_a_prompt(paligemma):
    paligemma("batch", "detect", "photos", "--labels", "dog, cat", "--out", "run")
    assert RunFolder("run").settings.prompt == "detect dog ; cat"


def test_status_and_export(paligemma, photos):
    paligemma("batch", "caption en", "photos", "--out", "run", "--shard-size", "4", "--part", "1/3")
    assert paligemma("batch", "status", "run")[1].splitlines() == [
        "4 of 9 rows are done",
        "4 answered, 0 failed",
        "1 of 3 shards finished, 0 worked on",
    ]
    paligemma("batch", "caption en", "photos", "--out", "run", "--shard-size", "4")
    state = json.loads(paligemma("batch", "status", "run", "--json")[1])
    assert (state["rows"], state["answered"], state["errors"], state["complete"]) == (9, 8, {"unreadable": 1}, True)
    code, out, err = paligemma("batch", "export", "run", "--to", "jsonl", "all.jsonl")
    assert (code, out) == (0, "") and "9 rows written" in err
    assert len((photos / "all.jsonl").read_text().splitlines()) == 9
    assert paligemma("batch", "status", "nowhere")[0] == 2
    assert paligemma("batch", "export", "run", "--to", "word", "x")[0] == 2


def test_rows_whose_drawings_would_be_one_file_are_refused_before_the_start(paligemma, photos):
    names = ["a/b", "c", "a//b", "a\\b", "../b"]
    rows = [{"id": name, "image": "photos/0.png", "prompt": "detect dog"} for name in names]
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = paligemma("batch", "--rows", "rows.jsonl", "--out", "run", "--draw", "drawn")
    assert code == 2 and "'a/b' and 'a//b' would have one drawing, a/b.png" in " ".join(err.split())
    assert not RunFolder("run").done()
    assert paligemma("batch", "--rows", "rows.jsonl", "--out", "run")[0] == 0  # without --draw they do not meet


def test_a_folder_of_drawings_that_cannot_be_made_is_told_before_the_start(paligemma, photos):
    code, _, err = paligemma("batch", "caption en", "photos", "--out", "run", "--draw", "photos/0.png")
    assert code == 1 and "--draw photos/0.png/ID.png cannot be written (Not a directory)" in " ".join(err.split())
    assert not (photos / "run").exists()


def test_a_batch_file_of_openai_is_answered_in_its_format(paligemma, photos):
    content = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": "photos/0.png"}}]
    body = {"model": "x", "messages": [{"role": "user", "content": content}]}
    request = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (photos / "batch.jsonl").write_text(json.dumps(request) + "\n")
    code, _, err = paligemma("batch", "--rows", "batch.jsonl", "--out", "run")
    assert code == 0 and "run/output.jsonl" in err
    answer = json.loads((photos / "run" / "output.jsonl").read_text())
    assert answer["custom_id"] == "r1"
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "caption en r1"
    completion = ChatCompletion.model_validate(answer["response"]["body"])  # OpenAI's own class has all that it needs
    assert 0 <= time.time() - completion.created < 600


@pytest.fixture
def threads_set(monkeypatch):
    """A dry run answers with a stand-in. The numbers of threads that it asks torch for."""
    numbers = []
    answer = standins.opening(standins.Settings())
    monkeypatch.setattr("paligemma.batch.answering.load_answer", lambda settings, device, draw: answer)
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    monkeypatch.setattr("paligemma.devices.cpu_count", lambda: 8)
    return numbers


def test_dry_run_estimates_and_writes_nothing(paligemma, photos, threads_set):
    code, out, _ = paligemma("batch", "caption en", "photos", "--dry-run")
    assert code == 0 and out.startswith("9 rows in 1 shards\n9 of them answered")
    assert sorted(path.name for path in photos.iterdir()) == ["photos"]


@pytest.mark.parametrize(("more", "threads"), [([], 8), (["--workers", "4"], 2), (["--threads", "3"], 3)])
def test_dry_run_has_the_threads_and_workers_of_the_run(paligemma, threads_set, more, threads):
    """Each worker has its share of the cores; 9 rows in 5 shards and 4 workers at most."""
    code, out, _ = paligemma("batch", "caption en", "photos", "--dry-run", "--shard-size", "2", *more)
    assert code == 0 and threads_set == [threads]
    assert f"with {4 if '--workers' in more else 1} workers" in out
    assert "with 1 workers" in paligemma("batch", "caption en", "photos", "--dry-run", *more)[1]  # one shard


@pytest.mark.parametrize(
    ("part", "said"), [("1/2", "5 rows in 3 shards"), ("2/2", "4 rows in 2 shards"), ("9/9", "0 rows in 0")]
)
def test_dry_run_of_a_part_counts_what_is_in_it(paligemma, threads_set, part, said):
    """9 rows in shards of 2: the fifth has one row."""
    code, out, _ = paligemma("batch", "caption en", "photos", "--dry-run", "--shard-size", "2", "--part", part)
    assert code == 0 and out.startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["caption en", "https://x/a.jpg"], "download it first"),
        (["caption en", "empty"], "empty"),
        (["caption en", "photos/0.png", "photos/0.png"], "more than once"),
        (["--rows", "bad.jsonl"], "bad.jsonl"),
        (["--rows", "none.jsonl"], "nothing to answer"),
    ],
)
def test_dry_run_refuses_what_the_run_refuses(paligemma, photos, threads_set, arguments, said):
    (photos / "empty").mkdir()
    (photos / "bad.jsonl").write_text('{"image": \n')
    (photos / "none.jsonl").write_text("")
    answers = [paligemma("batch", *arguments, *last) for last in (["--dry-run"], ["--out", "run"])]
    assert answers[0] == answers[1] and answers[0][:2] == (2, "")
    assert said in " ".join(answers[0][2].split())


def test_the_sample_of_an_estimate_is_spread_over_all_rows():
    from paligemma.batch.estimate import sample_of

    count, sample = sample_of(standins.rows_of(1000), 4)
    numbers = [int(row.id.split()[1]) for row in sample]
    assert count == 1000 and len(numbers) == 12 and numbers[0] == 0 and numbers[-1] > 700


def test_words_of_progress():
    now = run.Progress(rows=1500, total=3000, errors=3, seconds=100, new=1000)
    assert in_words(now) == "1,500 of 3,000 rows, 3 failed, 10 rows/s, 2:30 left"
    assert duration(3725) == "1:02:05"
    assert parsed_max_errors("2.5%") == (2.5, True)
    for errors, fine in ((29, True), (30, False)):  # 29 / 100 * 100 is a little less than 29
        ended = run.Ended({"complete": False}, 100 - errors, {"missing": errors}, True)
        folder = SimpleNamespace(path=Path("run"), settings=Settings())
        with nullcontext() if fine else pytest.raises(typer.Exit):
            finish(folder, ended, parsed_max_errors("29%"), None)
    assert run.killed_by(-9) == "SIGKILL, perhaps for want of memory"


@pytest.mark.slow
def test_the_model_that_ships_answers_in_two_workers(photos, monkeypatch, capsys):
    """Whatever the workers, threads and interruptions: the same lines."""
    lines = {}
    for name, more in {"one": ["--workers", "1"], "two": ["--workers", "2", "--threads", "1"]}.items():
        options = [
            "--out",
            name,
            "--shard-size",
            "2",
            "--batch-size",
            "2",
            "--max-new-tokens",
            "8",
            "--max-errors",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", ["paligemma", "batch", "caption en", "photos", *options, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0, capsys.readouterr().err
        free = ("ms", "attempts", "score")
        lines[name] = [
            {key: value for key, value in line.items() if key not in free}
            for line in standins.lines_of(RunFolder(name))
        ]
    assert lines["one"] == lines["two"] and len(lines["one"]) == 9


@pytest.mark.slow
def test_the_first_commands_of_the_page_run(photos, monkeypatch, capsys):
    """docs/batch.md, from the pictures to the export; with fewer new tokens and pictures than there."""
    page = Path(__file__).parent.parent.parent / "docs" / "batch.md"
    first = re.search(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    commands = [shlex.split(line, comments=True) for line in first.splitlines()]
    assert len(commands) == 4
    for words in commands:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, (words, capsys.readouterr().err)
    assert json.loads((photos / "answers.json").read_text())["categories"]


@pytest.mark.slow
def test_the_job_array_of_the_page_answers_everything(photos, monkeypatch, capsys):
    """docs/batch.md: the command of a job, as each of the 16 jobs runs it."""
    page = Path(__file__).parent.parent.parent / "docs" / "batch.md"
    (photos / "photos" / "8.png").unlink()  # the broken one
    (line,) = re.findall(r"^paligemma batch .*SLURM.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for number in range(16, 0, -1):  # whichever comes first
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        monkeypatch.setattr(sys, "argv", shlex.split(os.path.expandvars(line)))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
    summary = json.loads((photos / "answers" / "summary.json").read_text())
    assert summary["complete"] and summary["answered"] == summary["rows"] > 0
