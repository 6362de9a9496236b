"""What is written is true: README and tour name files that exist, options that exist, and code that runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from paligemma import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every `paligemma ...` call in a page's shell blocks and in its text."""
    text = "\n".join(blocks(page, "sh")) + "\n" + "\n".join(re.findall(r"`(paligemma [^`]+)`", page.read_text("utf-8")))
    calls = []
    for line in text.splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and words[0] == "paligemma":
                calls.append(words[1:])
    return calls


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page):
    top = get_command(cli.app)
    for words in commands(page):
        command, rest = top, words
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"{page.name}: paligemma {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert used <= options, f"{page.name}: {used - options} in paligemma {' '.join(words)}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "tour.md"], ids=lambda page: page.name)
def test_every_snippet_of_python_runs(page):
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        result = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{snippet}\n{result.stderr}"


def test_help_names_every_option_with_a_reason(capsys):
    """An option without a help text is a riddle."""
    top = get_command(cli.app)
    for name, command in {**top.commands, **top.commands["tiny"].commands}.items():
        assert command.help or hasattr(command, "commands"), name
