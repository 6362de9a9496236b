"""The compiled library: how it is kept, and that everything works without it."""

import os
import shlex
import stat
from pathlib import Path

import pytest
import torch
from ways import KERNEL, layers, needs_kernel, relative

import paligemma
from paligemma import devices
from paligemma.fast import library
from paligemma.fast.fast_layers import FastLinear
from paligemma.tiny.renderer import render

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet: no library is loaded, and none lies in the cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(library, "REQUESTED", "1")
    cached = library._library, devices.vector_instructions
    for function in cached:
        function.cache_clear()
    yield tmp_path / "extensions"
    for function in cached:
        function.cache_clear()


def answers_still(capfd, reason: str):
    weight, bias, eight, _ = layers()
    x = torch.randn(2, 512)
    exact = x.double() @ weight.double().T + bias.double()
    assert relative(eight(x) - exact, exact) < 0.02
    eight(x)
    noted = capfd.readouterr()
    assert noted.out == "" and noted.err.count("plain PyTorch") == 1 and reason in noted.err


@needs_kernel
def test_a_compiler_that_fails_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "false")
    answers_still(capfd, "false failed")
    assert list(fresh.rglob("*.so")) == []


@needs_kernel
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int main( {", "error:"),
        ("int f() {\n    return undeclared;\n}", "'undeclared'"),
    ],
)
def test_a_source_that_does_not_compile_is_noted_once_and_done_without(
    fresh, monkeypatch, capfd, tmp_path, source, said
):
    """The note has the error. Inside a function, the compiler first says in which one it is."""
    monkeypatch.setenv("LC_ALL", "C")  # the language of the compiler
    broken = tmp_path / "broken.cpp"
    broken.write_text(source)
    monkeypatch.setattr(library, "SOURCES", {"AVX-512": broken, "AVX2": broken})
    answers_still(capfd, said)


def test_the_line_that_says_what_is_wrong_is_found():
    for last in ("collect2: error: ld returned 1 exit status", "clang++: error: linker command failed"):
        assert library.first_error(f"ld: cannot find -lm\n{last}\n") == "ld: cannot find -lm"
    assert library.first_error("Segmentation fault\n") == "Segmentation fault"
    assert library.first_error("") == "no message"


@needs_kernel
@pytest.mark.parametrize(
    ("given", "said"),
    [("no-such-compiler -O1", "CXX is 'no-such-compiler -O1', and there is no such"), ('"g++', "quot")],
)
def test_a_cxx_that_is_no_command_is_noted_once_and_done_without(fresh, monkeypatch, capfd, given, said):
    monkeypatch.setenv("CXX", given)
    answers_still(capfd, said)


@needs_kernel
def test_a_library_that_does_not_load_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setattr(library, "compiled", lambda source: os.open(source, os.O_RDONLY))
    answers_still(capfd, ".cpp")


def test_no_compiler_at_all(fresh, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    answers_still(capfd, "compiler" if KERNEL else "")


def test_another_cpu(fresh, monkeypatch, capfd):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    answers_still(capfd, "AVX2" if KERNEL else "")


# ---------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def small(fresh, monkeypatch, tmp_path):
    """A source with all functions, each empty, that compiles at once. Returns the folder of the libraries."""
    source = tmp_path / "small.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in library.FUNCTIONS))
    monkeypatch.setattr(library, "SOURCES", {"AVX-512": source, "AVX2": source})
    monkeypatch.setattr(library, "HEADERS", [])
    return fresh / "paligemma"


def start_again():
    """As another process would: the library, or None."""
    library._library.cache_clear()
    return library.library()


@needs_kernel
def test_cxx_may_have_arguments(small, monkeypatch, tmp_path):
    """As in "ccache g++"."""
    with (tmp_path / "small.cpp").open("a") as source:
        source.write("#ifndef ASKED\n#error\n#endif\n")
    monkeypatch.setenv("CXX", f"env {shlex.join(library.compiler())} -DASKED")
    assert start_again() is not None


@needs_kernel
@pytest.mark.parametrize("asked", ["off", "AVX2"])
def test_a_value_that_means_nothing_is_noted_once(small, monkeypatch, capfd, asked):
    monkeypatch.setattr(library, "REQUESTED", asked)
    assert start_again() is not None and library.library() is not None
    noted = capfd.readouterr().err
    assert noted.count(f"PALIGEMMA_KERNEL is {asked!r}, which means nothing: 0 asks for plain PyTorch, avx2 for") == 1


@needs_kernel
def test_another_compiler_or_flag_is_another_library(small, monkeypatch):
    assert start_again() is not None
    monkeypatch.setenv("CXX", f"env LC_ALL=C {shlex.join(library.compiler())}")
    assert start_again() is not None
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, "-g0"])
    assert start_again() is not None
    assert len(list(small.iterdir())) == 3


@needs_kernel
def test_what_is_compiled_once_is_kept_and_named_by_its_content(small, capfd):
    before = os.umask(0o002)  # as on systems where each user has a group
    try:
        assert start_again() is not None and start_again() is not None
    finally:
        os.umask(before)
    assert capfd.readouterr().err.count("compiling the kernels") == 1
    (file,) = small.iterdir()  # and nothing of the work is left
    assert file.stem.endswith(library._hash(file.read_bytes()))
    assert stat.S_IMODE(small.stat().st_mode) == stat.S_IMODE(file.stat().st_mode) == 0o700


@needs_kernel
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: b"x" * 99])
def test_a_damaged_library_is_never_loaded_and_compiled_again(small, capfd, damage):
    """One that was cut off would end each start by a signal (SIGBUS)."""
    assert start_again() is not None
    (file,) = small.iterdir()
    whole = file.read_bytes()
    file.unlink()  # this process has loaded it: a new file, so that it stays whole here
    file.write_bytes(damage(whole))
    file.chmod(0o700)
    capfd.readouterr()
    assert start_again() is not None
    assert "compiling the kernels" in capfd.readouterr().err and file.read_bytes() == whole


@needs_kernel
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_not_loaded(small, capfd, mode):
    assert start_again() is not None
    (file,) = small.iterdir()
    file.chmod(mode)
    capfd.readouterr()
    assert start_again() is not None
    assert "compiling the kernels" in capfd.readouterr().err and stat.S_IMODE(file.stat().st_mode) == 0o700


@needs_kernel
def test_a_link_and_a_pipe_are_not_loaded(small, capfd, tmp_path):
    assert start_again() is not None
    (file,) = small.iterdir()
    for make in (lambda: file.symlink_to(file.rename(tmp_path / "elsewhere")), lambda: os.mkfifo(file)):
        make()
        capfd.readouterr()
        assert start_again() is not None
        assert "compiling the kernels" in capfd.readouterr().err and stat.S_ISREG(file.lstat().st_mode)
        file.unlink()


@needs_kernel
def test_somebody_elses_library_and_folder_are_not_used(small, capfd, monkeypatch):
    """Root would run the code of whoever owns the folder."""
    assert start_again() is not None
    (file,) = small.iterdir()
    real, other = os.fstat, os.geteuid() + 1
    owned = lambda file: os.stat_result((*real(file)[:4], other, *real(file)[5:]))  # noqa: E731
    monkeypatch.setattr(os, "fstat", owned)
    assert library.open_checked(file) is None
    monkeypatch.setattr(os, "fstat", real)
    monkeypatch.setattr(os, "geteuid", lambda: other)
    capfd.readouterr()
    assert start_again() is None
    assert "belongs to another user, whose code is not run: set TORCH_EXTENSIONS_DIR" in capfd.readouterr().err


@needs_kernel
def test_a_folder_that_others_can_write_is_closed_to_them(small):
    small.mkdir(parents=True)
    small.chmod(0o777)
    assert start_again() is not None
    assert stat.S_IMODE(small.stat().st_mode) == 0o700


@needs_kernel
def test_a_library_gets_its_name_when_it_is_on_the_disk(small, monkeypatch):
    done, replace, fsync = [], Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: done.append("replace") or replace(self, to))
    assert start_again() is not None
    assert done == ["fsync", "replace"]


@needs_kernel
def test_a_missing_function_is_noted_once_and_done_without(small, capfd, tmp_path):
    (tmp_path / "small.cpp").write_text('extern "C" void linear_bf16() {}')
    answers_still(capfd, "undefined symbol")


@needs_kernel
def test_a_compiler_that_writes_no_utf8_is_noted_once_and_done_without(small, capfd, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b"#!/bin/sh\nprintf 'erreur: \\351\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    answers_still(capfd, "erreur: \N{REPLACEMENT CHARACTER}")


@needs_kernel
@pytest.mark.parametrize("place", ["a file", "full"])
def test_a_cache_that_cannot_be_written_is_noted_once_and_done_without(small, capfd, monkeypatch, place, tmp_path):
    if place == "a file":
        (tmp_path / "extensions").write_text("")
    else:
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    answers_still(capfd, "No space left" if place == "full" else "extensions")
    assert place == "a file" or list(small.iterdir()) == []


@needs_kernel
def test_no_home_folder_is_noted_once_and_done_without(small, capfd, monkeypatch):
    """As in a container for a user without a name."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    answers_still(capfd, "no home folder to keep them in: set TORCH_EXTENSIONS_DIR")


@needs_kernel
def test_the_file_that_was_checked_is_the_one_that_is_loaded(small):
    """Whatever its path means by now; and the next file is not taken for it."""
    assert start_again() is not None
    (file,) = small.iterdir()
    checked = library.open_checked(file)
    file.unlink()
    file.write_text("another")
    assert library.load(checked).linear_bf16


# ---------------------------------------------------------------------------------------------- the model that ships


def test_nothing_is_compiled_for_the_model_that_ships_unless_asked(monkeypatch):
    def must_not(kind):
        raise AssertionError("asked for the compiled library")

    monkeypatch.setattr(library, "_library", must_not)
    pg = paligemma.load("tiny", device="cpu")
    assert pg.caption(render(1, "test", 128).image).text
    assert not any(isinstance(module, FastLinear) for module in pg.model.modules())
