"""The same on Ray: a cluster of this machine alone, on loopback, without the dashboard."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from standins import lines_of, run_of, slow

from paligemma.batch import on_ray
from paligemma.batch.folder import RunFolder
from paligemma.batch.run import run_batch
from paligemma.batch.worker import How

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")

# A run on two actors, one of which is killed by -9 as soon as something has been answered.
KILLED_RUN = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standins import run_of, slow
from paligemma.batch.on_ray import run_on_ray
from paligemma.batch.worker import How
from paligemma.files import parse_json

folder = run_of(Path(sys.argv[2]), 300, shard_size=20)
killed = []

def kill_one():
    while not killed:
        for lease in folder.work.glob("*.lease"):
            try:
                pid = parse_json(lease.read_bytes())["pid"]
                if any(path.stat().st_size for path in folder.work.glob("*.jsonl")):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            except (OSError, ValueError):
                pass
        time.sleep(0.05)

threading.Thread(target=kill_one, daemon=True).start()
ended = run_on_ray(folder, "local", 2, How(load=slow))
assert killed and ended.complete and ended.answered == 300, ended
"""

# One shard of 3,000 rows takes a minute. SIGTERM comes when its first rows are answered.
INTERRUPTED_RUN = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standins import run_of, slow
from paligemma.batch.on_ray import run_on_ray
from paligemma.batch.worker import How

folder = run_of(Path(sys.argv[2]), 3000, shard_size=3000)

def interrupt():
    while not any(path.stat().st_size for path in folder.work.glob("*.jsonl")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=interrupt, daemon=True).start()
ended = run_on_ray(folder, "local", 1, How(load=slow))
lines = sum(path.read_bytes().count(b'{"id"') for path in folder.work.glob("*.jsonl"))
assert 0 < lines < 1500 and not ended.complete and not list(folder.work.glob("*.lease*")), (lines, ended)
print(128 + ended.signal)
"""

# `Predictor` in a pipeline that somebody else wrote, with a picture that is cut short.
FOREIGN = """
import json, logging, os, sys
import paligemma
assert "ray" not in sys.modules and paligemma.Predictor and "ray" not in sys.modules
import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
folder = sys.argv[1]
scene = open("examples/scene.png", "rb").read()
for number in range(4):
    with open(f"{folder}/{number}.png", "wb") as file:
        file.write(scene[: len(scene) // 2] if number == 2 else scene)
rows = ray.data.from_items(
    [{"image": f"{folder}/{number}.png", "prompt": "detect book", "number": number} for number in range(4)]
)
done = PIPELINE.take_all()
found = {row["number"]: row for row in done}
assert [json.loads(found[n]["error"])["kind"] if found[n]["error"] else None for n in range(4)] == [
    None, None, "unreadable", None
], found
assert json.loads(found[0]["detections"])[0]["label"] == "book"
print("four rows")
"""

# A command in a folder; with "--ray auto" beside a cluster that this process has begun.
CLUSTER = """
import os, subprocess, sys
import ray

folder, *arguments = sys.argv[1:]
if "auto" in arguments:
    context = ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
done = subprocess.run([sys.executable, "-m", "paligemma", *arguments], cwd=folder, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
"""


@pytest.fixture
def python():
    """Runs code in a process of its own, with a Ray that tells nobody and asks nobody."""
    pytest.importorskip("ray")
    # The last one keeps Ray on loopback: its name says for which systems that is the default.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    quiet["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])  # for the actors

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=500, env={**os.environ, **quiet}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in ("ms", "attempts")} for line in lines]


@pytest.mark.slow
def test_one_of_two_actors_is_killed_and_the_parts_are_those_of_two_workers(python, tmp_path):
    python(KILLED_RUN, HERE, tmp_path / "ray")
    whole = run_of(tmp_path / "processes", 300, shard_size=20)
    assert run_batch(whole, 2, How(load=slow)).complete
    folder = RunFolder(tmp_path / "ray")
    assert without_times(lines_of(folder)) == without_times(lines_of(whole))
    assert not [path.name for path in folder.work.iterdir()]
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["answered"], summary["workers_lost"]) == (300, 1)


@pytest.mark.slow
def test_a_truncated_picture_does_not_end_a_foreign_pipeline(python, tmp_path):
    """The pipeline is that of docs/batch.md, on a machine without its GPUs."""
    pipeline = re.search(r"^rows\.map_batches\(\n.*?^\)$", PAGE, re.MULTILINE | re.DOTALL)[0]
    for there, here in (
        ('{"model": "google/paligemma2-3b-mix-224"}', '{"model": "tiny", "device": "cpu", "max_new_tokens": 30}'),
        ("batch_size=64", "batch_size=2"),
        ("num_gpus=1", "num_gpus=0"),
        ("size=4", "size=1"),
    ):
        assert there in pipeline
        pipeline = pipeline.replace(there, here)
    assert python(FOREIGN.replace("PIPELINE", pipeline), tmp_path).endswith("four rows\n")


@pytest.mark.slow
def test_the_commands_of_the_page_run(python, tmp_path):
    """docs/batch.md: on a cluster of this machine alone, and on one that runs already, whose nodes were started in some
    other folder."""
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^paligemma batch .*--ray.*$", PAGE, re.MULTILINE)
    ]
    assert [words[words.index("--ray") + 1] for words in commands] == ["auto", "local"]
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "photos" / f"{number}.png")
    for words in commands:
        python(CLUSTER, tmp_path, *words[1:])
        lines = lines_of(RunFolder(tmp_path / "answers"))
        assert [line["id"] for line in lines] == ["0.png", "1.png", "2.png"] and all(line["text"] for line in lines)
        shutil.rmtree(tmp_path / "answers")


def test_a_signal_asks_the_actors_to_stop_before_a_shard_is_done(tmp_path, monkeypatch):
    """The file that asks them is there at once, and gone in the end. (A stand-in hands out the shards.)"""
    folder = run_of(tmp_path / "run", 30)

    def handed_out(ray, folder, shards, workers, how, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exists()
        yield from ({"shard": [shard], "lost": [0]} for shard in shards)

    monkeypatch.setattr(on_ray, "handed_out", handed_out)
    monkeypatch.setattr(on_ray, "start", lambda *arguments: None)
    monkeypatch.setattr(on_ray, "check_shared", lambda *arguments: None)
    no_error = SimpleNamespace(exceptions=SimpleNamespace(RayError=ArithmeticError))
    monkeypatch.setattr(on_ray, "imported_ray", lambda address: no_error)
    ended = on_ray.run_on_ray(folder, "a cluster", 1, How())
    assert (ended.signal, ended.complete) == (signal.SIGTERM, False) and not list(folder.work.iterdir())


@pytest.mark.slow
def test_a_signal_ends_a_run_in_the_middle_of_its_only_shard(python, tmp_path):
    assert python(INTERRUPTED_RUN, HERE, tmp_path / "run") == "143\n"


def test_without_ray_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'paligemma\[ray\]'"):
        on_ray.run_on_ray(run_of(tmp_path / "run", 3), "local", 1, How())
