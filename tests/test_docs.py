"""What is written is true: README and tour name files that exist, options that exist, and code that runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from paligemma.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "paligemma" / "README.md"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), MAP]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every `paligemma ...` call in a page's shell blocks, in its indented lines and in its text."""
    written = page.read_text("utf-8")
    text = "\n".join(
        [
            *blocks(page, "sh"),
            *re.findall(r"^    (paligemma .+)", written, re.M),
            *re.findall(r"`(paligemma [^`]+)`", written),
        ]
    )
    calls = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and words[0] == "torchrun" and "paligemma" in words:  # torchrun ... -m paligemma command
                words = words[words.index("paligemma") :]
            if words and words[0] == "paligemma":
                calls.append(words[1:])
    return calls


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_and_option_exists(page):
    top = get_command(cli.app)
    for words in commands(page):
        command, rest = top, words
        if (pair := " ".join(words[:2])) in top.commands:  # "batch status": `batch` alone is a command too
            command, rest = top.commands[pair], words[2:]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"{page.name}: paligemma {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert used <= options, f"{page.name}: {used - options} in paligemma {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_script_and_module_is_there_and_has_the_options_it_is_given(page):
    script_or_module = r"(-m paligemma\.[.\w]+|(?:\w+/)+\w+\.py)"
    called = re.findall(rf"\b(?:python|torchrun)3?\b([^`\n#]*?){script_or_module}([^`\n#]*)", page.read_text("utf-8"))
    for _, name, rest in called:
        script = ROOT / (name.removeprefix("-m ").replace(".", "/") + ".py" if name.startswith("-m") else name)
        assert script.is_file(), f"{page.name}: {name}"
        source = script.read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--([a-z_-]+)", rest):
            assert f'"--{option}"' in source, f"{page.name}: {name} has no --{option}"


def test_every_extra_is_explained():
    """The table in docs/README.md has a row for each extra of pyproject.toml, with the packages that it names."""
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]$", section, re.M | re.S))
    page = (ROOT / "docs" / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.M))
    assert list(rows) == list(extras)
    for extra in extras.keys() - {"test"}:  # of which the table names the most important packages alone
        packages = re.findall(r'"([\w-]+)', extras[extra])
        assert sorted(re.sub(r" \(.*?\)", "", rows[extra]).split(", ")) == sorted(packages), extra


# Run elsewhere: the course's snippets by test_course.py, those that need a server by tests/serve/test_serving_docs.py.
RUN_HERE = [page for page in PAGES if page.parent.name != "course" and page.name != "serving.md"]


@pytest.mark.parametrize(
    "page",
    [page for page in RUN_HERE if blocks(page, "python")],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_snippet_of_python_runs(page):
    for snippet in blocks(page, "python"):
        result = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{snippet}\n{result.stderr}"


def test_the_example_says_what_is_wrong_with_its_picture():
    command = [sys.executable, "examples/everything.py", "nope.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: nope.png: no such file\n")


def every_command(command=None, path="paligemma"):
    """(name, command) of the whole tree: `paligemma`, its groups, and what they hold."""
    command = command or get_command(cli.app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{path} {name}")


def test_every_command_argument_and_option_has_a_help_text():
    """An option without a help text is a riddle."""
    riddles = []
    for path, command in every_command():
        riddles += [] if command.help else [path]
        riddles += [f"{path} {part.opts[0]}" for part in command.params if not getattr(part, "help", None)]
    assert riddles == []
    assert {"paligemma train", "paligemma tiny scenes", "paligemma data check"} <= {path for path, _ in every_command()}
