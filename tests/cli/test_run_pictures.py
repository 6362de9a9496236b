"""`paligemma run`: which pictures are meant, and what is probably a mistake."""

import errno
import sys

import pytest
from PIL import Image

from paligemma.cli import main as cli
from paligemma.cli.output import save_picture
from paligemma.cli.run import expanded
from paligemma.inference import Answer, PaliGemma


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "album" / "more").mkdir(parents=True)
    for name in ("album/b.png", "album/a.JPG", "album/more/c.png", "alone.png", "odd[1].png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "album" / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The command in this process; the model answers every picture by "seen"."""
    monkeypatch.setattr(
        PaliGemma, "generate", lambda self, images, prompt, **_: [Answer("seen", [], [], 0.5, True) for _ in images]
    )

    def command(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["paligemma", "run", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return command


def test_folders_and_patterns_stand_for_their_pictures_in_order(folder):
    assert expanded(["album"]) == ["album/a.JPG", "album/b.png"]
    assert expanded(["album/*.png", "alone.png"]) == ["album/b.png", "alone.png"]
    assert expanded(["album/**/*.png"]) == ["album/b.png", "album/more/c.png"]
    assert expanded(["odd[1].png", "-", "missing.png"]) == ["odd[1].png", "-", "missing.png"]  # as they are named
    with pytest.raises(ValueError, match="empty: there is no picture in this folder"):
        expanded(["empty"])
    with pytest.raises(ValueError, match="x\\*: no file matches"):
        expanded(["x*"])


def test_documents_and_videos_of_a_folder_are_no_pictures(folder):
    """Pillow writes some of these, and reads others with programs that nobody has: they would fail one by one."""
    for name in ("notes.pdf", "logo.eps", "page.PS", "clip.mpg", "clip.mpeg"):
        (folder / "album" / name).write_bytes(b"no picture")
        (folder / "empty" / name).write_bytes(b"no picture")
    assert expanded(["album"]) == ["album/a.JPG", "album/b.png"]
    with pytest.raises(ValueError, match="empty: there is no picture in this folder"):
        expanded(["empty"])
    assert expanded(["album/*.pdf"]) == ["album/notes.pdf"]  # who names one is told why it cannot be read


def test_what_programs_leave_in_a_folder_is_no_picture(folder):
    (folder / "album" / "._a.JPG").write_bytes(b"as macOS writes it on a USB disk")
    assert expanded(["album"]) == ["album/a.JPG", "album/b.png"]


def test_a_folder_may_get_drawings_of_its_own_pictures(folder):
    """A second run does not answer the drawings of the first."""
    save_picture(Image.new("RGB", (8, 8)), folder / "album" / "a.png")
    assert expanded(["album"], drawn=folder / "album") == ["album/a.JPG", "album/b.png"]
    assert expanded(["album/a.png"], drawn=folder / "album") == ["album/a.png"]  # who names one means it
    assert expanded(["album"], drawn=folder / "empty") == ["album/a.JPG", "album/a.png", "album/b.png"]


@pytest.mark.parametrize("save", ["drawn", "drawn/a.png", "new/drawn"])
def test_a_place_for_drawings_that_cannot_be_written_is_told_before_the_work(run, folder, monkeypatch, save):
    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    code, out, err = run("detect dog", "alone.png", "--save", save)
    assert (code, out) == (1, "") and f"--save {save}" in err and "cannot be written (Permission denied)" in err
    assert not (folder / "drawn").exists() and not (folder / "new").exists()


def test_every_line_of_a_folder_names_its_picture(run, folder):
    assert run("ocr", "album")[:2] == (0, "album/a.JPG: seen\nalbum/b.png: seen\n")
    assert run("ocr", "album/more")[1] == "album/more/c.png: seen\n"  # also where there is only one
    assert run("ocr", "alone.png")[1] == "seen\n"


def test_a_prompt_and_a_picture_in_the_wrong_order_are_told(run):
    code, out, err = run("alone.png", "caption en")
    assert (code, out) == (2, "")
    assert "the prompt comes first, then the picture: paligemma run 'caption en' alone.png" in " ".join(err.split())


def test_commas_between_labels_get_a_note(run):
    assert "'detect dog ; book' asks for each" in run("detect dog, book", "alone.png")[2]
    assert "comma" not in run("detect dog ; book", "alone.png")[2]


def test_max_pixels_counts_millions(run):
    code, _, err = run("ocr", "alone.png", "--max-pixels", "0.00006")
    assert code == 1 and "alone.png is too large: 8 x 8 are 64 pixels, and 60 are allowed" in err
    assert run("ocr", "alone.png", "--max-pixels", "0.00007")[0] == 0
    assert run("ocr", "alone.png", "--max-pixels", "0")[0] == 2


def test_a_mistyped_name_of_the_embedded_model_is_told(run):
    code, out, err = run("ocr", "alone.png", "--model", "tinny")
    assert (code, out) == (1, "") and "tinny: no such file or folder. Did you mean tiny, the embedded model?" in err
    assert "Did you mean" not in run("ocr", "alone.png", "--model", "whale")[2]
