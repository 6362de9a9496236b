"""What reaches a terminal: no control characters, errors that name their cause, no traceback after Ctrl-C."""

import errno
import functools
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from paligemma.cli import main as cli
from paligemma.cli import output
from paligemma.terminal import error_line, printable

RED = "\x1b[31m"


def test_control_characters_are_spelled_out_and_letters_stay():
    assert printable(f"a{RED}b\x07\x9b\u202e") == "a\\x1b[31mb\\x07\\x9b\\u202e"
    assert printable("zwei\n\tZeilen, ü, 猫, 👩‍🚀") == "zwei\n\tZeilen, ü, 猫, 👩‍🚀"
    assert printable("\udcff") == "\\udcff"


def test_a_file_name_cannot_steer_the_terminal(tmp_path, monkeypatch, capsys):
    name = f"{RED}evil\x07.png"
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / f"no{RED}.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["detect dog", name, f"no{RED}.png", "--save", "out"],
        ["detect dog", name, "--save", name],  # wrong usage
        ["ocr", f"missing{RED}.png"],
        ["ocr", name, f"--{RED}"],
        ["ocr", name, "--model", f"./{RED}"],
    ):
        monkeypatch.setattr(sys, "argv", ["paligemma", "run", "--max-new-tokens", "8", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        err = capsys.readouterr().err
        assert "\\x1b[31m" in err and "\x1b" not in err and "\x07" not in err, arguments


def test_an_answer_cannot_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.say(f"a {RED}dog")
    assert capsys.readouterr().out == "a \\x1b[31mdog\n"


def test_errors_without_a_name_say_what_was_asked():
    doing = "paligemma convert a b"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error_line(full, doing) == "No space left on device (paligemma convert a b)"
    full.filename = "b/model.safetensors"
    assert error_line(full, doing) == "b/model.safetensors: No space left on device"
    assert error_line(MemoryError(), doing) == "not enough memory (paligemma convert a b)"
    torch = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried to"
    )
    assert error_line(torch, doing).startswith("not enough memory: [enforce")
    assert error_line(ValueError("a.png: broken"), doing) == "a.png: broken"
    assert error_line(KeyError()) == "KeyError"


def test_a_missing_package_is_named_with_its_way_in():
    missing = "the package {} is not installed: pip install {}"
    assert error_line(ModuleNotFoundError("No module named 'abc'", name="abc.d")) == missing.format("abc", "abc")
    for module, extra in (("faster_coco_eval", "evaluate"), ("accelerate", "train"), ("matplotlib", "bench")):
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert error_line(error) == missing.format(module, f"'paligemma[{extra}]'")
    assert error_line(ImportError("pip install peft")) == "pip install peft"  # a message of ours


INTERRUPTED = """
import os, signal, sys

class PressesCtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

interrupted = sys.argv.pop()
sys.meta_path.insert(0, PressesCtrlC())
from paligemma.__main__ import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["typer", "rich", "PIL.Image", "numpy", "torch", "torch.nn", "tokenizers"])
def test_ctrl_c_during_imports_ends_without_a_traceback(module, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", INTERRUPTED, "run", "caption en", "a.png", module]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # in a background job it is not
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heard)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
