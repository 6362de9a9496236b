"""`--threads` starts at most one thread for each core: a thousand on two cores took a minute, most of it waiting."""

import os
import subprocess
import sys

import pytest
import torch

from paligemma import devices
from paligemma.__main__ import SPINS
from paligemma.cli import batch
from paligemma.cli import main as cli
from paligemma.cli.options import within_cores
from paligemma.devices import cpu_count


def test_more_threads_than_cores_are_as_many_as_cores(capsys):
    cores = cpu_count()
    assert within_cores(cores + 1000) == cores
    expected = f"note: --threads is {cores + 1000}, this process may use {cores} cores, so {cores} are used"
    assert capsys.readouterr().err.strip() == expected

    assert [within_cores(threads) for threads in (None, 1, cores)] == [None, 1, cores]
    assert capsys.readouterr().err == ""


def test_a_job_may_have_fewer_cores_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "CONTAINER", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5, 9}, raising=False)
    assert cpu_count() == within_cores(1000) == 3
    assert batch.threads_of_each(1, None) == 3
    for quota, cores in (("max 100000", 3), ("150000 100000", 2), ("900000 100000", 3), ("1000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")  # as `docker run --cpus 1.5` has it
        assert cpu_count() == cores


def test_threads_that_wait_sleep_soon_unless_the_user_chose(monkeypatch):
    """It is in the environment before torch is imported, whose libgomp reads it then."""
    code = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
from paligemma.__main__ import main
sys.argv = ["paligemma", "run", "caption en", "examples/scene.png"]
main()
"""
    for given, expected in ({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None"):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | given, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("line", ["explore ocr scene.png --json", "batch ocr scene.png --dry-run"])
def test_pytorch_gets_no_more_threads_than_cores(line, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(
        sys, "argv", ["paligemma", *line.replace("scene", "examples/scene").split(), "--threads", "1023"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert not stop.value.code
    assert set(given) == {cpu_count()}
    assert "note: --threads is 1023" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["serve --model nothing/here", "bench --serve --train", "batch ocr nothing.png --out runs/x"]
)
def test_every_command_with_threads_bounds_them(line, tmp_path, monkeypatch, capsys):
    """Each of these lines ends by itself, with an error that comes later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["paligemma", *line.split(), "--threads", "1023"])
    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code
    assert "note: --threads is 1023" in capsys.readouterr().err


def test_a_cluster_may_have_more_cores_than_this_machine(monkeypatch):
    """With --ray the threads are those of other machines."""
    given = []
    monkeypatch.setattr(batch, "opened", lambda *rest: None)
    monkeypatch.setattr(batch, "worked", lambda folder, workers, threads, *rest: given.append(threads))
    monkeypatch.setattr(batch, "finish", lambda *rest: None)
    line = "paligemma batch ocr examples/scene.png --out x --threads 1023"
    for more in ([], ["--ray", "local"]):
        monkeypatch.setattr(sys, "argv", [*line.split(), *more])
        with pytest.raises(SystemExit):
            cli.main()

    assert given == [cpu_count(), 1023]
