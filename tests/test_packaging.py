"""What a user installs: a wheel that holds the whole package and runs from another folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import paligemma

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_and_answers_in_another_folder(tmp_path, monkeypatch):
    """Built offline from a copy of the sources, installed into an environment of its own. That one finds the
    dependencies where this one has them, but not this one's `paligemma`."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "paligemma", sources / "paligemma", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path / "wheels", sources)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")

    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("paligemma/")}
    present = {path.relative_to(ROOT).as_posix() for path in (ROOT / "paligemma").rglob("*") if path.is_file()}
    assert packed == {name for name in present if "__pycache__" not in name}

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    commands = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin")
    run(*pip, "--python", commands / "python", "install", "--no-deps", "--no-index", wheel)
    installed = Path(run(commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (installed / "dependencies.pth").write_text(
        "\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    )

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "examples" / "scene.png", elsewhere)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = run(
        commands / "python", "-c", "import paligemma; print(paligemma.__file__)", cwd=elsewhere, env=environment
    )
    assert Path(where.strip()).parent == installed / "paligemma"
    answer = run(commands / "paligemma", "run", "caption en", "scene.png", cwd=elsewhere, env=environment)
    assert answer == paligemma.load("tiny").caption(ROOT / "examples" / "scene.png").text + "\n"


def test_every_place_tells_the_same_version():
    for name, pattern in (("pyproject.toml", r'(?m)^version = "(.+)"$'), ("CITATION.cff", r"(?m)^version: (.+)$")):
        assert re.findall(pattern, (ROOT / name).read_text(encoding="utf-8")) == [paligemma.__version__], name
