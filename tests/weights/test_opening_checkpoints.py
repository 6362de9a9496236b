"""What does not fit, and what is damaged, is named; headers alone are read."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import EMBEDDING, assert_same_weights, make_model, write
from reference import tiny_config
from safetensors import safe_open

from paligemma.weights import expected
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.layouts import our_name
from paligemma.weights.loading import load_model
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.published import published_config
from paligemma.weights.saving import save_pretrained

# ------------------------------------------------------------------------------------------------ headers


def test_opening_reads_no_weights(folder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "safetensors" and checkpoint.dtype == torch.float32
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(checkpoint.tensors) == set(file.keys())


def test_an_empty_model_takes_no_memory():
    model = empty_model(published_config("paligemma2-3b", 224))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_names_of_other_models_stay_as_they_are():
    assert our_name("model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert re.match(r"vision_tower\.vision_model\.head", our_name("vision_tower.head.probe"))


# ------------------------------------------------------------------------------------------------ what does not fit


def test_all_that_does_not_fit_is_named_in_one_error(gemma, tmp_path):
    state = gemma.state_dict()
    del state["multi_modal_projector.linear.bias"]
    state["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    state["language_model.model.norm.weight"] = torch.zeros(31)
    state["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(16, dtype=torch.int64)
    write(tmp_path, gemma.config, state)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert str(error.value).splitlines()[1:-1] == [
        "  1 missing: multi_modal_projector.linear.bias",
        "  1 unexpected: language_model.model.layers.9.mlp.up_proj.weight",
        "  1 of another shape: language_model.model.norm.weight is [31], expected [32]",
        "  1 not floating point: vision_tower.vision_model.post_layernorm.bias is I64",
    ]


def test_a_long_list_of_what_is_missing_is_cut(gemma, tmp_path):
    state = gemma.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("language_model")}
    write(tmp_path, gemma.config, kept)
    missing = len(state) - len(kept)
    with pytest.raises(ValueError, match=rf"{missing} missing: language_model.*and {missing - 8} more\n"):
        load_model(tmp_path)


def test_the_weights_of_the_other_family(tmp_path):
    save_pretrained(make_model("gemma2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma").to_dict()))
    with pytest.raises(ValueError, match=r"unexpected: .*feedforward_layernorm"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config.json does not exist"),
        ("{", r"config.json: "),
        ('{"model_type": "gemma"}', "expected 'paligemma'"),
        ('{"model_type": "llava"}', "expected 'paligemma'"),
    ],
)
def test_a_configuration_that_cannot_be_used(folder, config, message):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(folder)


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_a_configuration_that_claims_a_thousand_layers_is_refused_before_they_are_built(
    folder, tmp_path, format, monkeypatch
):
    convert(folder, tmp_path / "b", format=format)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1000
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    layers, build = [], expected.empty_model
    monkeypatch.setattr(
        expected, "empty_model", lambda config: layers.append(config.text_config.num_hidden_layers) or build(config)
    )
    with pytest.raises(ValueError, match=r"these weights are not those of the model"):
        open_checkpoint(tmp_path / "b")
    assert max(layers, default=0) <= 1


# ------------------------------------------------------------------------------------------------ damage


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing"):
        load_model(sharded)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_shard(sharded, kept):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or damaged"):
        load_model(sharded)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(folder, gemma, tmp_path, mapped):
    """Its header is read once: other bytes may lie there now."""
    checkpoint = open_checkpoint(folder)
    checkpoint.read(EMBEDDING)
    write(tmp_path / "other", gemma.config, {name: value + 1 for name, value in gemma.state_dict().items()})
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read"):
        checkpoint.read(EMBEDDING, mapped=mapped)


@pytest.mark.parametrize("start", [b"\xff" * 8, (40).to_bytes(8, "little") + b'{"a": "not a tensor"}'])
def test_a_shard_with_a_bad_header(sharded, start):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(start + shard.read_bytes()[len(start) :])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or damaged"):
        load_model(sharded)


def test_a_pointer_instead_of_a_file(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000]
)
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is not an index"):
        load_model(sharded)


def test_an_index_of_nothing(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="names no files"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..\\a", "c:a", "sub/a", "..", "", 7])
def test_an_index_that_points_outside_its_folder(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][EMBEDDING] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected the plain name of a file in its own folder|is not an index"):
        load_model(sharded)


def test_the_hubs_cache_keeps_its_files_elsewhere(sharded, gemma, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        try:
            (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
        except OSError:
            pytest.skip("no symbolic links here")
    assert_same_weights(load_model(snapshot), gemma)


def test_shards_without_their_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_never_read(folder, name):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / name)
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=rf"pickled weights \({name}\).*can run any code.*save_pretrained"):
            load_model(path)


def test_paths_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model.gguf is no checkpoint: expected"):
        load_model(tmp_path / "model.gguf")


def test_a_safetensors_file_by_its_own_name(folder, gemma):
    (folder / "model.safetensors").rename(folder / "step-100.safetensors")
    assert_same_weights(load_model(folder / "step-100.safetensors"), gemma)


def test_weights_of_mlx_are_recognised(gemma, tmp_path):
    state = gemma.state_dict()
    name = "language_model.model.layers.0.mlp.up_proj"
    state[f"{name}.scales"], state[f"{name}.biases"] = torch.zeros(64, 1), torch.zeros(64, 1)
    state[f"{name}.weight"] = torch.zeros(64, 4, dtype=torch.uint32)
    write(tmp_path, gemma.config, state)
    with pytest.raises(ValueError, match=r"quantised by mlx .*: take the checkpoint they were made of"):
        open_checkpoint(tmp_path)


def test_lora_that_was_not_merged_is_recognised(gemma, tmp_path):
    state = {f"base_model.model.{name}": tensor for name, tensor in gemma.state_dict().items()}
    name = "base_model.model.language_model.model.layers.0.mlp.up_proj"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state[f"{name}.lora_A.default.weight"] = torch.zeros(2, 32)
    write(tmp_path, gemma.config, state)
    with pytest.raises(ValueError, match=r"LoRA is still beside its layers: .*merge_and_unload"):
        open_checkpoint(tmp_path)


def test_an_edited_image_size_is_recognised(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 56
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says image_size 56, and the weights are those of 28: write 28 there"):
        open_checkpoint(folder)
