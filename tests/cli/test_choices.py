"""Options with a few values take these and nothing that only begins with one of them."""

import pytest
import typer
from typer.testing import CliRunner

from paligemma.cli.main import app
from paligemma.cli.options import device_in, one_of


def accepts(check, value):
    try:
        return check(value) == value
    except typer.BadParameter:
        return False


def test_only_cuda_has_numbers():
    check = device_in("cuda", "mps", "cpu")
    for value in (None, "cuda", "cuda:0", "cuda:1", "mps", "cpu"):
        assert accepts(check, value), value
    for value in ("", "cpu:0", "mps:0", "cuda:", "cuda:x", "cuda:1:2", "cuda:\u0663", "gpu", "CUDA", "cuda\n"):
        assert not accepts(check, value), value


def test_a_choice_is_the_whole_value():
    check = one_of("yolo", "coco", "voc")
    assert accepts(check, "voc") and accepts(check, None)
    assert not any(accepts(check, value) for value in ("voc:1", "voc:", "coco:x", "", "VOC"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "detect dog", "a.png", "--label-format", "voc:1"], "'voc:1', expected yolo, coco, voc"),
        (["batch", "ocr", "a.png", "--out", "x", "--format", "jsonl:x"], "'jsonl:x', expected jsonl, parquet"),
        (["bench", "--device", "cpu:0"], "'cpu:0', expected cpu, cuda or a numbered one such as cuda:1"),
        (["run", "ocr", "a.png", "--dtype", "float32:0"], "'float32:0', expected bfloat16, float16, float32"),
        (["run", "ocr", "a.png", "--device", "cpu:0"], "'cpu:0', expected cuda, mps, cpu or a numbered one"),
    ],
)
def test_commands_refuse_it(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.replace("\u2502", " ").split())
