"""A checkpoint in another format or dtype; no file of somebody else is lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import (
    EMBEDDING,
    LAYOUTS,
    as_void,
    assert_same_weights,
    bigvision_arrays,
    digests,
    linux,
    make_model,
    write,
    write_npz,
)
from make_tokenizer import build_sentencepiece
from safetensors.torch import load_file

from paligemma.tokenizer import load_tokenizer
from paligemma.weights import converting, writing
from paligemma.weights.converting import convert
from paligemma.weights.loading import load_model
from paligemma.weights.saving import save_pretrained


def test_convert_writes_big_visions_arrays(model, tmp_path):
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    written = np.load(tmp_path / "b" / "x.npz")  # NumPy's own reading of what we wrote
    expected = bigvision_arrays(model)
    assert set(written) == {"params/" + key for key in expected}
    for key, array in expected.items():
        np.testing.assert_array_equal(written["params/" + key], array)


def test_convert_to_bfloat16_and_npz(model, tmp_path):
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", dtype="bfloat16", format="npz")
    written = np.load(tmp_path / "b" / "model.npz")["params/llm/layers/mlp/linear"]
    np.testing.assert_array_equal(written, as_void(torch.tensor(bigvision_arrays(model)["llm/layers/mlp/linear"])))
    assert_same_weights(load_model(tmp_path / "b"), model.bfloat16())


def test_a_layer_of_another_dtype_goes_into_an_array_of_the_widest(model, tmp_path):
    """In an .npz, one array holds a matrix of all layers, and an array has one dtype."""
    model = model.bfloat16()
    name = "language_model.model.layers.1.mlp.down_proj"
    model.get_submodule(name).float()
    with torch.no_grad():
        model.get_submodule(name).weight += 1e-4
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    assert np.load(tmp_path / "b" / "x.npz")["params/llm/layers/mlp/linear"].dtype == np.float32
    convert(tmp_path / "b" / "x.npz", tmp_path / "c", dtype="float32")
    assert_same_weights(load_model(tmp_path / "c"), model.float())


def test_there_and_back_gives_the_same_files(model, tmp_path):
    save_pretrained(model, tmp_path / "a", max_shard_size=40_000)
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    convert(tmp_path / "b" / "x.npz", tmp_path / "c", max_shard_size=40_000)
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    convert(tmp_path / "b", tmp_path / "d" / "x.npz")
    assert digests(tmp_path / "d") == digests(tmp_path / "b")


def test_an_npz_keeps_the_rows_of_added_tokens(tmp_path, monkeypatch):
    """In the published vocabulary `add_tokens` puts them where big_vision has no rows."""
    model = make_model("gemma", vocab_size=257216, image_token_index=257152)
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    rows = np.load(tmp_path / "b" / "x.npz")["params/llm/embedder/input_embedding"].shape[0]
    assert rows == 257152
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(converting, "load_tokenizer", lambda folder: range(257154))
    convert(tmp_path / "a", tmp_path / "c" / "x.npz")
    assert_same_weights(load_model(tmp_path / "c"), model)


def test_a_big_vision_checkpoint_becomes_a_folder_whose_processor_transformers_reads(tmp_path):
    tokenizer = load_tokenizer(build_sentencepiece(tmp_path / "a"))
    model = make_model("gemma", vocab_size=len(tokenizer) + 3, image_token_index=tokenizer.image_token_id)
    write_npz(tmp_path / "a" / "a.npz", model.config, bigvision_arrays(model))
    convert(tmp_path / "a", tmp_path / "b")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "b")
    text = "detect cat ; dog\n<loc0012><seg003>"
    assert processor.tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size
    assert_same_weights(load_model(tmp_path / "b"), model)


def test_convert_between_layouts_and_dtypes(model, tmp_path):
    layout_n = {LAYOUTS["N, in the memory of transformers 5"](n): t for n, t in model.state_dict().items()}
    write(tmp_path / "a", model.config, layout_n)
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert set(written) == set(model.state_dict())
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_published_vocabulary_is_cut_for_big_vision_and_padded_on_the_way_back(tmp_path):
    model = make_model("gemma", vocab_size=257216, image_token_index=257152, hidden_size=2)
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    embedding = np.load(tmp_path / "b" / "x.npz")["params/llm/embedder/input_embedding"]
    assert embedding.shape == (257152, 2)
    back = load_model(tmp_path / "b").state_dict()[EMBEDDING]
    assert torch.equal(back[:257152], model.state_dict()[EMBEDDING][:257152]) and not back[257152:].any()


def test_the_tokenizer_goes_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "optimizer.bin").write_text("not this")
    convert(folder, tmp_path / "b")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_convert_never_harms_what_is_there(folder, gemma, tmp_path):
    with pytest.raises(ValueError, match="is where the source lies"):
        convert(folder, folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="is where the source lies"):
        convert(folder, folder / "x.npz")
    save_pretrained(make_model("gemma2"), tmp_path / "other")
    before = digests(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds config.json of other content, which would be lost: choose"):
        convert(folder, tmp_path / "other" / "x.npz")
    assert digests(tmp_path / "other") == before
    assert_same_weights(load_model(folder), gemma)


@pytest.mark.parametrize("target", [".", "x.npz"])
def test_convert_loses_no_file_of_somebody_else(folder, tmp_path, target, monkeypatch):
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    Path("tokenizer.json").write_text("mine")
    monkeypatch.setattr("paligemma.weights.writing.write_tensor", None)  # told before any weight is written
    with pytest.raises(ValueError, match=r"the current folder holds tokenizer.json of other content, which would"):
        convert(folder, target)
    assert {path.name: path.read_text() for path in Path().iterdir()} == {"tokenizer.json": "mine"}


@pytest.mark.parametrize("old", ["one file", "shards", "a folder of its name"])
def test_convert_loses_no_weights_of_the_same_configuration(folder, gemma, tmp_path, old):
    with torch.no_grad():
        gemma.language_model.model.norm.weight += 1
    save_pretrained(gemma, tmp_path / "tuned", max_shard_size=40_000 if old == "shards" else 10**9)
    if old == "a folder of its name":
        (tmp_path / "tuned" / "model.safetensors").unlink()
        (tmp_path / "tuned" / "model.safetensors").mkdir()
        (tmp_path / "tuned" / "model.safetensors" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "tuned").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"tuned holds model.*safetensors.* of other content, which would be lost"):
        convert(folder, tmp_path / "tuned")
    assert {path: path.read_bytes() for path in (tmp_path / "tuned").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("old", ["calibration.json", "adapter_config.json"])
def test_what_belongs_to_other_weights_is_told_before_gigabytes_are_written(folder, tmp_path, old, monkeypatch):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / old).write_text("{}")
    monkeypatch.setattr("paligemma.weights.writing.write_tensor", None)
    with pytest.raises(ValueError, match=rf"tuned holds {old} of other content, which would be lost"):
        convert(folder, tmp_path / "tuned")
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == [old]


def test_a_broken_calibration_is_not_taken_along(folder, tmp_path):
    """The new checkpoint could not be loaded."""
    (folder / "calibration.json").write_text('{"boxes": [0, -1], "masks": [0, 1]}')
    with pytest.raises(ValueError, match=r"calibration.json is no calibration \(boxes has the slope -1"):
        convert(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("target", "weights"), [("b", "model.safetensors"), ("b/x.npz", "x.npz")])
def test_the_same_conversion_again_is_no_loss(folder, tmp_path, target, weights):
    (folder / "tokenizer.json").write_text('{"a": 1}')
    names = sorted(["config.json", "tokenizer.json", weights])
    for _ in range(2):
        assert convert(folder, tmp_path / target) == [tmp_path / "b" / name for name in names]
        assert sorted(digests(tmp_path / "b")) == names


def test_formats_that_do_not_exist(folder, tmp_path):
    with pytest.raises(ValueError, match="format is 'gguf', expected 'safetensors' or 'npz'"):
        convert(folder, tmp_path / "b", format="gguf")
    with pytest.raises(ValueError, match=r"x.npz is to hold safetensors: name a folder"):
        convert(folder, tmp_path / "x.npz", format="safetensors")


def test_brackets_in_a_path_are_no_markup(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    with writing.progress_in_bytes("writing [/x]", total=10) as advance:
        advance(10)
    assert "writing [/x]" in capsys.readouterr().err


TERMINATED = """
import os, signal, sys
from paligemma.cli.main import main
from paligemma.weights import writing

name, write = sys.argv.pop(), writing.write_tensor
def and_then_the_end(file, tensor):
    write(file, tensor)
    os.kill(os.getpid(), getattr(signal, name))
writing.write_tensor = and_then_the_end
main()
"""


@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_conversion_that_is_ended_leaves_nothing_for_ever(folder, tmp_path, name):
    command = [sys.executable, "-c", TERMINATED, "convert", str(folder), str(tmp_path / "b"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    if name == "SIGTERM":
        assert done.returncode == 143 and done.stderr == "" and not (tmp_path / "b").exists()
    else:
        assert done.returncode == -9 and list((tmp_path / "b").glob(".saving-*"))
    written = convert(folder, tmp_path / "b")
    assert sorted((tmp_path / "b").iterdir()) == sorted(written)
