"""What docs/serving.md and the Dockerfile say is done here as it is written there."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import data_url, running

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(name, language):
    """The code blocks that stand behind a marker <!-- name -->."""
    return re.findall(rf"<!-- {name} -->\n```{language}\n(.*?)```", DOCS, re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples(pg):
    examples = blocks("curl", "bash")
    assert len(examples) >= 5
    with running(pg, api_key="choose-one") as server:
        for example in examples:
            command = example.replace("http://localhost:8000", server.url)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                env={**os.environ, "PALIGEMMA_API_KEY": "choose-one"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() and '"error"' not in done.stdout, (example, done.stdout)


def test_the_python_examples(pg, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PALIGEMMA_API_KEY", "choose-one")
    with running(pg, api_key="choose-one") as server:
        for example in blocks("python", "py"):
            exec(compile(example.replace("http://localhost:8000", server.url), "docs/serving.md", "exec"), {})
    assert "book" in capsys.readouterr().out


def test_the_options_are_those_of_the_command():
    """The table of the page names every option that the command has for limits."""
    from paligemma.cli.serve import serve as command

    named = set(re.findall(r"`--([a-z-]+)", DOCS))
    options = {name.replace("_", "-") for name in command.__annotations__} - {"return"}
    shared = {"model", "revision", "device", "dtype", "quantize", "device-map", "image-size", "loc-scale"}  # of `run`
    assert options - shared <= named


def test_the_table_of_fields_is_that_of_the_endpoints():
    """Each field of the native endpoints, and no other; `labels` of detect and segment alone, and so on."""
    from paligemma.serve.openapi import schemas
    from paligemma.serve.settings import Settings

    known, endpoints = schemas(Settings()), ("answer", "detect", "segment", "explore")
    table = DOCS.split("## Fields of a request")[1].split("\n## ")[0]
    fields = {name: set() for name in endpoints}
    for field, of in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.M):
        named = {"all": endpoints, "all but explore": endpoints[:-1]}.get(of, of.split(", "))
        for name in named:
            fields[name].add(field)
    schema = {"answer": "Answer", "detect": "Detect", "segment": "Detect", "explore": "Explore"}
    assert fields == {name: set(known[schema[name]]["properties"]) for name in endpoints}


def dockerfile():
    """(instruction, argument) of each line of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def test_the_container_is_nobody_and_has_the_steps_of_the_readme():
    steps = dockerfile()
    instructions = dict(steps)
    assert instructions["USER"].isdigit() and int(instructions["USER"]) > 0
    runs = " ".join(argument for instruction, argument in steps if instruction == "RUN")
    assert "pip install" in runs and '-c constraints.txt ".[serve]"' in runs
    assert "https://download.pytorch.org/whl/cpu" in instructions["ARG"]
    assert "https://download.pytorch.org/whl/cpu" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert json.loads(instructions["CMD"])[:2] == ["paligemma", "serve"]


def reachable(host):
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_in_a_clean_environment(tmp_path):
    """Its RUN lines, in a copy of the sources and a new virtual environment, then its CMD."""
    app, venv = tmp_path / "app", tmp_path / "venv"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", "build", "*.egg-info")
    shutil.copytree(ROOT, app, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "PIP_RETRIES": "0"}
    if not reachable("download.pytorch.org"):
        environment["TORCH_INDEX"] = "https://pypi.org/simple"  # whatever this machine's pip has in its place
    for instruction, argument in dockerfile():
        if instruction in ("ARG", "ENV"):
            name, value = argument.split("=", 1)
            environment.setdefault(name, value if name != "HF_HOME" else str(tmp_path / "models"))
        elif instruction == "RUN":
            subprocess.run(["sh", "-c", argument], cwd=app, env=environment, check=True, timeout=900)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (command,) = [json.loads(argument) for instruction, argument in dockerfile() if instruction == "CMD"]
    environment["PALIGEMMA_API_KEY"] = "choose-one"
    process = subprocess.Popen([*command, "--port", str(port)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == f"http://0.0.0.0:{port}\n".encode()
        with httpx.Client(
            base_url=f"http://localhost:{port}", headers={"authorization": "Bearer choose-one"}
        ) as client:
            assert client.get("/").status_code == 200 and client.get("/health").status_code == 200
            reply = client.post("/v1/detect", json={"image": data_url(), "labels": ["book"]}, timeout=60)
            assert reply.json()["detections"]
    finally:
        process.terminate()
        assert process.wait(60) == 0
