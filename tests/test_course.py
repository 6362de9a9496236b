"""The course is true: its code runs, its figures and numbers are those of the model that ships, its exercises exist."""

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma.cli import exercises

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHAPTERS = sorted((DOCS / "course").glob("[0-9]*.md"))
NUMBERS = json.loads((DOCS / "course" / "figures" / "numbers.json").read_text("utf-8"))
MARKED = re.compile(r"(\[[^\[\]\n]*\]|`[^`\n]*`|[^\s<>`]+)<!--([\w.-]+)-->")

# Numbers that a chapter may state without a name, because they do not depend on the model: what an exercise asks for,
# sizes of official models, how a logarithm works.
FREE = {
    "01": "3 1 -1 0 20 440 283",
    "02": "27 28 1 0 -1",
    "03": "1 3 5 7 20 5%",
    "04": "0 1",
    "06": "0 1 2 4",
    "07": "0 0.7 1 2 2.3",
    "08": "0 3",
    "09": "1 0",
    "10": "0 1",
    "11": "20 1024 [1024] /1024",
    "12": "1 2 3b 448 paligemma2-3b 28 bfloat16",
}


def prose(text: str) -> str:
    """A chapter's text without its code, links, headings, and the references to chapters."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"!?\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"^(#|Next:|\|).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\bchapters? \d+", "", re.sub(r"\s+", " ", text), flags=re.IGNORECASE)


def unnamed(text: str) -> list[str]:
    """Numbers of the prose that have no name."""
    left = re.sub(r"`[^`]*`", "", MARKED.sub("", prose(text)))
    return [word.strip(".,;:()*") for word in left.split() if re.search(r"\d", word)]


def test_there_are_twelve_chapters_and_each_leads_to_the_next():
    assert [path.name[:2] for path in CHAPTERS] == [f"{number:02d}" for number in range(1, 13)]
    for path, following in pairwise(CHAPTERS):
        assert f"]({following.name})" in path.read_text("utf-8")
        assert f"]({path.name})" in (DOCS / "course" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_has_its_parts(path):
    text, number = path.read_text("utf-8"), int(path.name[:2])
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert text.startswith(f"# {number}. ")
    assert [name for name in headings if name != "Five predictions"] == [
        "The tensor", "Run it", "Exercise", "What this does not prove",
    ]  # fmt: skip
    assert re.findall(r"\]\((figures/.*?)\)", text) == [f"figures/{number:02d}.png"]
    assert re.findall(r"^paligemma explore --check (\d+) \"?ANSWER\"?$", text, re.MULTILINE) == [str(number)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_number_in_a_chapter_was_found_in_the_model(path):
    text, known = path.read_text("utf-8"), NUMBERS[path.name[:2]]
    for value, name in MARKED.findall(text):
        assert known[name] == value, f"{path.name} says {value} for {name}: run `python docs/figures.py`"
    free = FREE.get(path.name[:2], "").split()
    assert [number for number in unnamed(text) if number not in free] == [], "a number needs a name"


def test_a_number_without_a_name_is_found():
    assert unnamed("There are 64<!--patches--> patches in 8 rows (chapter 2).\n```python\n3\n```") == ["8"]


def test_the_exercises_ask_for_what_is_judged():
    row, column = exercises.PIXEL
    assert f"row {row}, column {column}" in " ".join(CHAPTERS[0].read_text("utf-8").split())
    assert f"cosine with position {exercises.MOST_LIKE}," in CHAPTERS[1].read_text("utf-8")
    assert f"Layer {exercises.LAYER}, the word" in CHAPTERS[5].read_text("utf-8")


def test_every_tensor_of_the_flow_is_explained():
    import paligemma
    from paligemma import explore
    from paligemma.tiny import course

    stages = explore.flow(paligemma.load("tiny", device="cpu"), course.scene().image, "caption en")
    explained = re.findall(r"^\| `(\w+)`", CHAPTERS[-1].read_text("utf-8"), re.MULTILINE)
    assert set(explained) == {name for stage in stages for name in stage.shapes}


def test_figures_are_small():
    for path in CHAPTERS:
        figure = DOCS / "course" / "figures" / f"{path.name[:2]}.png"
        assert figure.stat().st_size < 120_000
        assert Image.open(figure).width <= 1300


# ---------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_figures_and_numbers_are_those_of_the_model(tmp_path, monkeypatch):
    """Numbers to the printed digit. Pixels nearly: another version of matplotlib draws letters a little differently."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    figures = importlib.import_module("figures")
    seen = figures.first_sight()
    for number in range(1, 13):
        name = f"{number:02d}"
        assert figures.draw(number, seen, tmp_path) == NUMBERS[name]
        drawn, kept = Image.open(tmp_path / f"{name}.png"), Image.open(DOCS / "course" / "figures" / f"{name}.png")
        assert abs(drawn.width - kept.width) <= 4 and abs(drawn.height - kept.height) <= 4
        small = [np.asarray(one.convert("RGB").resize((120, 80)), dtype=float) for one in (drawn, kept)]
        assert np.abs(small[0] - small[1]).mean() < 1, name  # attention of the column beside: 1.6


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_runs_as_a_notebook(path):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    notebook = jupytext.read(path)
    # The command of the exercise is a cell too, where a student writes the answer.
    exercise = [cell for cell in notebook.cells if cell.source.startswith("%%sh")]
    assert len(exercise) == 1
    notebook.cells.remove(exercise[0])
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells, "no code was recognised"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]
