"""`paligemma data check` and `paligemma data show`."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import BOX, good, write_coco, write_lines

import paligemma
import paligemma.cli.main
import paligemma.weights.finding
from paligemma.data.checkpoint import processor_of
from paligemma.data.options import open_rows
from paligemma.data.show import show_rows


def test_the_command_check_names_bad_rows_and_fails(folder, paligemma_command):
    path = write_lines(folder, good(), good(image="gone.png"), good(suffix=""), good())
    code, out, _ = paligemma_command("data", "check", path)
    assert code == 1
    assert f"{path}:2: no picture at" in out and f"{path}:3: the suffix is empty" in out
    assert "2 of 4 rows have a problem" in out and "rows/s" in out
    code, out, _ = paligemma_command("data", "check", write_lines(folder, good(), good(), name="fine.jsonl"))
    assert code == 0 and "0 of 2 rows have a problem" in out


def test_the_command_check_counts_tokens_and_opens_pictures_if_asked(folder, paligemma_command):
    (folder / "text.png").write_text("no picture")
    other = folder / "other"
    other.mkdir()
    path = write_lines(other, good(image="text.png"), good(suffix="a dog " * 40))
    asked = ("data", "check", path, "--images", folder)
    assert paligemma_command(*asked)[0] == 0
    code, out, _ = paligemma_command(*asked, "--open-pictures", "--model", "tiny", "--max-length", "184")
    assert code == 1
    assert f"{path}:1: {folder / 'text.png'} is not a picture" in out
    assert "suffix too long: 1 row" in out and f"{path}:2: " in out and "max_length is 184" in out
    code, _, err = paligemma_command(*asked, "--max-length", "100")
    assert code == 2 and "--model" in err
    code, _, err = paligemma_command("data", "check", folder / "nothing.jsonl")
    assert code == 1 and "no such file" in err


def test_the_command_show_draws_a_sheet_or_a_folder(folder, paligemma_command):
    path = write_lines(folder, *[good(prefix="detect dog", suffix=f"{BOX} dog") for _ in range(6)])
    code, out, err = paligemma_command("data", "show", path, "--out", folder / "sheet.png", "--rows", "0,5")
    assert (code, out) == (0, "") and "drawn: " in err
    with Image.open(folder / "sheet.png") as sheet:
        processor, codec = processor_of("tiny")
        rows = open_rows(path)
        expected = show_rows([rows[0], rows[5]], processor, codec)
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    assert paligemma_command("data", "show", path, "--out", folder / "each", "--count", "3")[0] == 0
    assert sorted(p.name for p in (folder / "each").iterdir()) == [f"row-00000{k}.png" for k in (0, 2, 4)]


@pytest.mark.parametrize("command", [["check"], ["show", "--out", "x.png"]])
def test_a_model_without_a_codec_takes_the_official_one(folder, paligemma_command, command, monkeypatch):
    """Which may be missing too: the ways to it are named."""
    shutil.copytree(paligemma.weights.finding.TINY, folder / "bare", ignore=shutil.ignore_patterns("mask_codec.npz"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(folder / "cache"))
    square = {"image_id": 30, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": [[10, 5, 30, 5, 30, 15]]}
    path = write_coco(folder, annotations=[square])
    asked = ("data", *command, path, "--kind", "coco-segment", "--model", folder / "bare")
    code, out, err = paligemma_command(*asked)
    assert (code, out) == (1, "") and "as mask_codec.npz into the folder of the checkpoint" in err
    (folder / "cache" / "paligemma").mkdir(parents=True)
    shutil.copy(paligemma.weights.finding.TINY / "mask_codec.npz", folder / "cache" / "paligemma" / "vae-oid.npz")
    monkeypatch.chdir(folder)
    assert paligemma_command(*asked)[0] == 0


@pytest.mark.parametrize("options, message", [
    (["--out", "x.xyz"], "--out x.xyz: no picture is written as .xyz"),
    (["--out", "x.png", "--rows", "9"], "there is no row 9"),
    (["--out", "x.png", "--rows", "first"], "expected numbers of rows"),
])  # fmt: skip
def test_what_show_cannot_draw(folder, paligemma_command, options, message):
    path = write_lines(folder, good())
    code, _, err = paligemma_command("data", "show", path, *options)
    assert code == 2 and message in " ".join(err.replace("│", " ").split())


def test_data_without_rows_fails(folder, paligemma_command):
    (folder / "empty.csv").write_text("image,prefix,suffix\n")
    code, out, _ = paligemma_command("data", "check", folder / "empty.csv")
    assert code == 1 and "there are no rows" in out and "0 of 0 rows have a problem" in out


def test_the_commands_of_the_page_about_data_run(folder, paligemma_command, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "data.md"
    (block,) = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(folder)
    for line in block.splitlines():
        code, _, err = paligemma_command(*shlex.split(line, comments=True)[1:])
        assert code == 0, f"{line}: {err}"


def test_show_draws_every_row_of_a_few_and_never_replaces_a_picture(folder, paligemma_command):
    path = write_lines(folder, good(), good(), good())
    code, _, _ = paligemma_command("data", "show", path, "--out", folder / "drawn")
    assert code == 0
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == [f"row-{n:06d}.png" for n in range(3)]
    picture = folder / good()["image"]
    before = picture.read_bytes()
    code, _, err = paligemma_command("data", "show", path, "--out", picture)
    assert code == 2 and "would replace a picture of the data" in " ".join(err.split())
    assert picture.read_bytes() == before
    (folder / "drawn" / "row-000001.png").write_bytes(before)  # a picture of somebody's
    assert paligemma_command("data", "show", path, "--out", folder / "drawn", "--rows", "0")[0] == 0
    code, _, err = paligemma_command("data", "show", path, "--out", folder / "drawn", "--rows", "1")
    assert code == 2 and "was not drawn here" in " ".join(err.split())
    assert (folder / "drawn" / "row-000001.png").read_bytes() == before
    (folder / "none.csv").write_text("image,prefix,suffix\n")
    code, _, err = paligemma_command("data", "show", folder / "none.csv", "--out", folder / "x.png")
    assert code == 1 and "there are no rows" in err
