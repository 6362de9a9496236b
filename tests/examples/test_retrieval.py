"""The example that trains ColPali on the small world: its queries, its loss, how it counts, and that it learns."""

import importlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import paligemma

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def retrieval():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # as if it were started there: it imports colpali.py
        yield importlib.import_module("retrieval")


def test_a_query_names_what_its_page_shows(retrieval):
    scene = retrieval.page(0, "test")
    names = {thing.name for thing in scene.objects if thing.label != "sign"}
    objects, text, both = (retrieval.query(scene, kind, np.random.default_rng(0)) for kind in retrieval.KINDS)
    assert names == {"purple heart", "snake", "green key"}
    assert all(name in objects and name in both for name in names)
    assert text == f"a sign that says {scene.sign.text}" and text in both
    assert "sign" not in objects


def test_pages_have_a_sign_and_other_objects(retrieval):
    for seed in range(10):
        scene = retrieval.page(seed, "train")
        assert 3 <= len(scene.sign.text) <= 6 and 3 <= len(scene.objects) <= 5


def test_recall_of_a_perfect_matrix_is_one_and_a_tie_counts_as_wrong(retrieval):
    perfect = 2 * torch.eye(4) + torch.rand(4, 4)
    assert retrieval.recall_at_1(perfect) == 1
    assert retrieval.recall_at_1(torch.ones(4, 4)) == 0
    tied = perfect.clone()
    tied[0, 1] = tied[0, 0]
    assert retrieval.recall_at_1(tied) == 0.75


def test_the_loss_compares_the_right_page_with_the_wrong_ones(retrieval):
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 2.0], [1.0, 1.0, 5.0]])
    wrong = [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]
    expected = [
        math.log1p(sum(map(math.exp, row)) / math.exp(float(right))) for row, right in zip(wrong, scores.diagonal())
    ]
    assert float(retrieval.loss_of(scores)) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_letters_of_a_sign_are_one_word_of_several_tokens(retrieval):
    words = retrieval.words_of(paligemma.load("tiny"), "two dogs and a sign that says STOP")
    assert list(words) == ["two", "dogs", "sign", "STOP"]
    assert len(words["dogs"]) == 1 and len(words["STOP"]) > 1


def test_the_loss_falls(retrieval, monkeypatch):
    """The same three pages at each step, and a clock that counts steps."""
    scenes = [retrieval.page(seed, "train") for seed in range(3)]
    monkeypatch.setattr(retrieval, "page", lambda seed, split: scenes[seed % 3])
    monkeypatch.setattr(retrieval, "KINDS", ("both",))
    monkeypatch.setattr(retrieval.time, "process_time", itertools.count().__next__)
    torch.manual_seed(0)
    pg = retrieval.colpali.load("tiny", 256, device="cpu", dtype="float32")
    before = {name: x.clone() for name, x in pg.model.state_dict().items() if "patch_embedding" in name}
    losses = retrieval.train(pg, 8, 3, 1e-3, print)
    assert len(losses) == 8 and np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    assert all(torch.equal(pg.model.state_dict()[name], x) for name, x in before.items())  # the vision tower rests


def test_help_says_what_it_does():
    command = [sys.executable, EXAMPLES / "retrieval.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "small world" in done.stdout


@pytest.mark.slow
def test_the_command_trains_saves_measures_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    base = [sys.executable, EXAMPLES / "retrieval.py", "--pages", "4", "--picture", tmp_path / "drawn.png"]
    command = [*base, "--out", tmp_path / "model", "--minutes", "0.02", "--batch", "4"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    again = subprocess.run([*base, "--model", tmp_path / "model"], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == first.stdout  # what was saved is what was measured
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["asked", "objects", "text", "both"]
    assert (tmp_path / "drawn.png").stat().st_size > 1000
    third = subprocess.run(command, capture_output=True, text=True)  # never written over
    assert third.returncode == 2 and "is not empty" in third.stderr
