"""What is saved comes back, whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same_weights, digests, files_of_at_most, linux, logits_of, make_model
from safetensors.torch import load_file

import paligemma
from paligemma.answers.scores import IDENTITY
from paligemma.weights.converting import convert
from paligemma.weights.loading import load_model
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import checkpoint_written_whole, save_pretrained

# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("max_shard_size", [10**9, 40_000])
def test_what_is_saved_comes_back(model, tmp_path, max_shard_size):
    save_pretrained(model, tmp_path, max_shard_size=max_shard_size)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())


def test_other_patches_than_the_published(tmp_path):
    model = make_model("gemma", patch_size=10, image_size=20)
    save_pretrained(model, tmp_path)
    assert_same_weights(load_model(tmp_path), model)
    convert(tmp_path, tmp_path / "b" / "x.npz")
    assert_same_weights(load_model(tmp_path / "b"), model)


def test_shards_are_as_large_as_allowed_and_the_index_is_right(gemma, tmp_path):
    save_pretrained(gemma, tmp_path, max_shard_size=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"]) == set(gemma.state_dict())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in gemma.state_dict().values())
    for shard in shards:
        tensors = load_file(shard)  # safetensors' own reading of what we wrote
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 40_000 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert torch.equal(tensor, gemma.state_dict()[name])


def test_a_model_of_mixed_dtypes_keeps_them_on_disk(gemma, tmp_path):
    gemma.vision_tower.bfloat16()
    save_pretrained(gemma, tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("vision") else torch.float32)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    dtypes = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
    starts = [entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    assert starts == sorted(starts) and dtypes == sorted(dtypes, reverse=True)  # wide first: each lies on its own size
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}


def test_the_tensors_of_a_saved_file_begin_at_a_cache_line(folder):
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0


def test_a_smaller_save_leaves_no_old_shards_behind(gemma, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(gemma, tmp_path, max_shard_size=40_000)
    save_pretrained(gemma, tmp_path, max_shard_size=100_000)
    save_pretrained(gemma, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    save_pretrained(gemma, tmp_path, max_shard_size=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(load_model(tmp_path), gemma)


def test_saving_over_the_files_the_model_was_loaded_from(folder, gemma):
    loaded = load_model(folder)
    with torch.no_grad():
        loaded.language_model.model.norm.weight += 1
    save_pretrained(loaded, folder)
    assert torch.equal(load_model(folder).language_model.model.norm.weight, gemma.language_model.model.norm.weight + 1)


def test_the_processors_files_are_saved_too(gemma, tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (Path(folder) / "preprocessor_config.json").write_text("{}")

    save_pretrained(gemma, tmp_path, processor=Processor())
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_a_mask_codec_of_the_checkpoint_s_own_is_saved_too(tmp_path):
    """The official one has 128 codes as well: it would draw other masks, and nobody would notice."""
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    paligemma.save_pretrained(pg.model, tmp_path, pg.processor)
    again = paligemma.load(tmp_path, device="cpu", dtype="float32")
    codes = torch.arange(16)[None]
    assert again.loaded_codec is not None
    assert torch.equal(again.loaded_codec.decode(codes), pg.codec.decode(codes))
    assert again.calibration == pg.calibration != IDENTITY
    pg.processor.mask_codec = None
    paligemma.save_pretrained(pg.model, tmp_path, pg.processor)
    assert paligemma.load(tmp_path, device="cpu").loaded_codec is None  # the old file is gone


def test_a_mask_codec_put_beside_converted_weights_is_nobody_else_s(gemma, tmp_path):
    save_pretrained(gemma, tmp_path / "source")
    (tmp_path / "source" / "preprocessor_config.json").write_text("{}")
    convert(tmp_path / "source", tmp_path / "new")
    (tmp_path / "new" / "mask_codec.npz").write_bytes(b"of my own")
    convert(tmp_path / "source", tmp_path / "new")  # given twice: the same content is no loss
    assert (tmp_path / "new" / "mask_codec.npz").read_bytes() == b"of my own"


def test_a_model_with_added_parameters_is_not_saved(gemma, tmp_path):
    gemma.lora = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 unexpected: lora.weight, lora.bias"):
        save_pretrained(gemma, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_part_that_counts_in_whole_numbers_is_named(gemma, tmp_path):
    gemma.norm = torch.nn.BatchNorm1d(8)
    with pytest.raises(ValueError, match=r"^norm.num_batches_tracked is torch.int64: a checkpoint holds floating"):
        save_pretrained(gemma, tmp_path / "new", extra=["norm"])
    gemma.norm.num_batches_tracked = None
    save_pretrained(gemma, tmp_path / "new", extra=["norm"])


# ------------------------------------------------------------------------------------------------ a full disk


@linux
@pytest.mark.parametrize("max_shard_size", [10**9, 100_000])
def test_a_disk_that_fills_while_saving_leaves_the_old_files_whole(gemma, tmp_path, max_shard_size):
    save_pretrained(gemma, tmp_path, max_shard_size=max_shard_size)
    before = digests(tmp_path)
    other = make_model("gemma2")
    with files_of_at_most(50_000), pytest.raises(OSError, match=r"could not be written.*what was there is untouched"):
        save_pretrained(other, tmp_path, max_shard_size=max_shard_size)
    assert digests(tmp_path) == before  # nothing lies about, either
    assert_same_weights(load_model(tmp_path), gemma)


@linux
@pytest.mark.parametrize("target", ["new", "new/x.npz"])
def test_a_disk_that_fills_while_converting_leaves_no_half_a_checkpoint(folder, tmp_path, target):
    with files_of_at_most(50_000), pytest.raises(OSError, match="could not be written"):
        convert(folder, tmp_path / target)
    assert not (tmp_path / "new").exists()


@linux
def test_a_disk_that_fills_while_a_file_is_copied_is_an_error_of_the_target(folder, tmp_path):
    """Such an error names the file that is read first."""
    (folder / "tokenizer.json").write_text("x" * 1000)
    refused = pytest.raises(OSError, match="new could not be written")
    with files_of_at_most(50), refused, checkpoint_written_whole(tmp_path / "new") as staging:
        shutil.copyfile(folder / "tokenizer.json", staging / "tokenizer.json")
    assert not (tmp_path / "new").exists()


def test_an_error_before_the_last_byte_leaves_the_old_files_whole(gemma, tmp_path, monkeypatch):
    save_pretrained(gemma, tmp_path)
    before = digests(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_pretrained(make_model("gemma2"), tmp_path)
    assert digests(tmp_path) == before


def test_a_file_that_cannot_be_read_is_named_and_not_the_target(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        convert(checkpoint, tmp_path / "new")
    assert "could not be written" not in str(error.value) and str(folder / "model.safetensors") in str(error.value)
    assert not (tmp_path / "new").exists()


def test_an_error_without_a_number_is_told_without_one(tmp_path):
    with pytest.raises(OSError) as error, checkpoint_written_whole(tmp_path / "new"):
        raise OSError("the library says no")
    said = "could not be written (the library says no); what was there is untouched"
    assert str(error.value) == f"{tmp_path / 'new'} {said}"


def test_saving_into_a_file(gemma, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_pretrained(gemma, tmp_path / "file")
