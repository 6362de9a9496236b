"""The fuzzing itself: valid inputs pass, some broken ones of every kind end well, and what goes wrong is counted."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if not hasattr(os, "fork"):
    pytest.skip("forks processes", allow_module_level=True)

import run as fuzzing
from kinds import KINDS, Kind, build


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    build(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_some_broken_inputs_of_every_kind_end_well(kind, valid):
    if not (valid / kind.folder).is_dir():
        pytest.skip("needs pyarrow")
    result = fuzzing.fuzz(kind, valid, seed=1, inputs=6, seconds=None)
    assert result.inputs == 6 and not result.bad, result


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.files], ids=lambda kind: kind.name)
def test_without_a_change_the_inputs_are_valid(kind, valid, monkeypatch, tmp_path):
    if not (valid / kind.folder).is_dir():
        pytest.skip("needs pyarrow")
    monkeypatch.setattr("kinds.of_file", lambda random, name, data: data)
    for number in range(4):
        kind.one(0, number, valid, tmp_path / "input")


def test_what_goes_wrong_is_counted_and_the_rest_is_done(valid, monkeypatch):
    def use(random, folder, broken):
        match used.pop(0):
            case "error":
                raise ValueError("refused")
            case "bug":
                raise KeyError("a bug")
            case "signal":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                while True:
                    pass

    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2)
    outcomes = ["well", "error", "bug", "signal", "hang", "well"]
    used = list(outcomes)

    class Numbered(Kind):
        def one(self, seed, number, valid, scratch):
            used[:] = outcomes[number:]
            self.use(None, scratch, scratch)

    result = fuzzing.fuzz(Numbered("numbered", "model", (), use), valid, 0, inputs=6, seconds=None)
    assert (result.inputs, result.errors, result.tracebacks, result.signals, result.hangs) == (6, 1, 1, 1, 1)
    assert result.bad and set(result.first.values()) == {2, 3, 4}
    assert "| numbered | 6 | 1 | 1 | 1 | 1 |" in fuzzing.table({"numbered": result})
