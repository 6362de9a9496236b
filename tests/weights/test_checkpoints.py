"""Weights on disk: what is saved comes back, every published layout gives the same model, damage is named."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from make_tokenizer import build_sentencepiece
from reference import make_inputs, make_theirs, randomize, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.tokenizer import load_tokenizer
from paligemma.weights import npz
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.layouts import bigvision_layout, our_name
from paligemma.weights.loading import load_model, resample_positions
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.published import PUBLISHED, config_of_arrays, published_config, published_name
from paligemma.weights.safetensors_file import MappedFile
from paligemma.weights.saving import save_pretrained

EMBEDDING = "language_model.model.embed_tokens.weight"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc or sets a limit on files")


def make_model(kind: str, **overrides) -> PaliGemmaForConditionalGeneration:
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **overrides)).eval()
    randomize(model)
    return model


@pytest.fixture(params=["gemma", "gemma2"])
def model(request):
    return make_model(request.param)


@pytest.fixture
def gemma():
    return make_model("gemma")


@pytest.fixture
def folder(gemma, tmp_path):
    """A saved checkpoint in one file."""
    save_pretrained(gemma, tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def logits_of(model):
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    return model(**inputs).logits


def assert_same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


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


def test_a_model_with_added_parameters_is_not_saved(gemma, tmp_path):
    gemma.lora = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 unexpected: lora.weight, lora.bias"):
        save_pretrained(gemma, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ transformers


@torch.no_grad()
def test_transformers_loads_what_we_save(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_size=40_000)
    loaded, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, nothing unexpected
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    logits = loaded(**inputs).logits
    assert torch.equal(logits, make_theirs(model)(**inputs).logits)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model)[valid], logits[valid], atol=1e-4, rtol=0)  # see test_parity.py


def test_transformers_finds_the_dtype_we_saved(gemma, tmp_path):
    save_pretrained(gemma.bfloat16(), tmp_path)
    assert transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_we_load_what_transformers_saves(model, tmp_path):
    make_theirs(model).save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = load_model(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))


# ------------------------------------------------------------------------------------------------ layouts

LAYOUTS = {
    "H, the hub's": lambda name: name,
    "W, written by transformers 5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "N, in the memory of transformers 5": lambda name: (
        "model."
        + name.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "language_model.model.", "language_model."
        )
    ),
    "in the memory of transformers 4.52": lambda name: (
        "model." + name.replace("language_model.model.", "language_model.")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names(model, tmp_path, layout):
    renamed = {LAYOUTS[layout](name): tensor for name, tensor in model.state_dict().items()}
    assert [our_name(name) for name in renamed] == list(model.state_dict())
    write(tmp_path, model.config, renamed)
    assert_same_weights(load_model(tmp_path), model)


def test_the_names_of_a_transformers_model_are_layout_n(model):
    names = [name for name in make_theirs(model).state_dict() if name != "lm_head.weight"]
    assert {our_name(name) for name in names} == set(model.state_dict())
    assert len(names) == len(model.state_dict())


def write(folder: Path, config: PaliGemmaConfig, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors")


HEADS = ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_the_embedding_is_dropped(gemma, tmp_path, name):
    state = gemma.state_dict()
    write(tmp_path, gemma.config, {**state, name: state[EMBEDDING].clone()})
    assert_same_weights(load_model(tmp_path), gemma)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_is_an_error(gemma, tmp_path, name):
    head = gemma.state_dict()[EMBEDDING].clone()
    head[300, 5] += 1e-3
    write(tmp_path, gemma.config, {**gemma.state_dict(), name: head})
    with pytest.raises(ValueError, match=rf"{name} differs from {EMBEDDING}.*trained apart"):
        load_model(tmp_path)


def test_a_head_in_whole_numbers_is_named_with_the_rest(gemma, tmp_path):
    whole = gemma.state_dict()[EMBEDDING].long()
    write(tmp_path, gemma.config, {**gemma.state_dict(), EMBEDDING: whole, "lm_head.weight": whole.clone()})
    with pytest.raises(ValueError, match=rf"not floating point.*{EMBEDDING} is I64"):
        load_model(tmp_path)


def test_a_file_that_holds_the_tied_matrix_under_the_heads_name_only(gemma, tmp_path):
    state = gemma.state_dict()
    write(tmp_path, gemma.config, {"lm_head.weight": state.pop(EMBEDDING), **state})
    assert_same_weights(load_model(tmp_path), gemma)


def test_one_parameter_under_two_names_is_an_error(gemma, tmp_path):
    state = gemma.state_dict()
    bias = "multi_modal_projector.linear.bias"
    write(tmp_path, gemma.config, {**state, "model." + bias: state[bias].clone()})
    with pytest.raises(ValueError, match=rf"{bias} twice"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ memory and dtype


def maps_of(folder: Path) -> list[range]:
    """Where in memory the files of a folder are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors") and str(folder) in line]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


@linux
def test_tensors_of_the_files_dtype_stay_in_the_file(folder):
    loaded = load_model(folder)
    (mapped,) = maps_of(folder)  # one map for all
    assert all(parameter.data_ptr() in mapped for parameter in loaded.parameters())


@linux
def test_a_file_larger_than_the_machine_can_be_mapped(tmp_path):
    """A header, a number, and a hole. Of the map every page may be written to, which changes no file."""
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    size = 2 * 1024 * int(total.split()[1])
    header = {
        "one": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
        "large": {"dtype": "U8", "shape": [size], "data_offsets": [4, 4 + size]},
        "last": {"dtype": "F32", "shape": [], "data_offsets": [4 + size, 8 + size]},
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"\x80\x3f\x00\xc0")
        file.truncate(8 + len(text) + 8 + size)
    file = MappedFile(path)
    assert file.tensors == {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    assert torch.equal(file.read("one"), torch.tensor([[1.0, -2.0]]).bfloat16())
    assert file.read("none").shape == (0, 3) and file.read("last") == 0
    large = file.read("large")
    large[-1] = 7
    assert len(large) == size and file.read("large")[-1] == 7 and MappedFile(path).read("large")[-1] == 0


@linux
def test_tensors_of_another_dtype_keep_nothing_of_the_file(folder):
    loaded = load_model(folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert maps_of(folder) == []


def test_training_in_place_leaves_the_file_alone(folder):
    before = digests(folder)
    loaded = load_model(folder)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(**make_inputs(loaded.config, prefix=[5], suffix=[3], labels=True)).loss.backward()
    optimizer.step()
    norm = "language_model.model.norm.weight"
    assert not torch.equal(loaded.state_dict()[norm], load_model(folder).state_dict()[norm])
    assert digests(folder) == before


def test_the_dtype_is_the_files_own_unless_asked_for(gemma, tmp_path):
    save_pretrained(gemma.bfloat16(), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    for dtype in ("float32", torch.float32):
        loaded = load_model(tmp_path, dtype=dtype)
        assert_same_weights(loaded, gemma.float())


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int64, torch.float64])
def test_an_unknown_dtype(folder, dtype):
    with pytest.raises(ValueError, match="expected one of bfloat16, float16, float32"):
        load_model(folder, dtype=dtype)


def test_values_that_do_not_fit_into_float16(gemma, tmp_path):
    with torch.no_grad():
        gemma.language_model.model.norm.weight[0] = 70_000
    save_pretrained(gemma, tmp_path / "a")
    with pytest.raises(ValueError, match=r"norm.weight has values beyond 65504"):
        load_model(tmp_path / "a", dtype="float16")
    with pytest.raises(ValueError, match=r"norm.weight has values beyond 65504"):
        convert(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


MEASURE = """
import sys, torch
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.loading import load_model
from paligemma.weights.saving import save_pretrained

def most():  # the most memory that this process ever held, touched maps of files included
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
empty_model(__import__("paligemma").PaliGemmaConfig())  # what building a model imports
start = most()
exec(sys.argv[1])
print(most() - start)
"""


@linux
@pytest.mark.slow
def test_nothing_is_held_twice(tmp_path):
    """Each step in a process of its own: memory over that of the imports, in parts of the checkpoint's size."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64}
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma", **sizes))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 1e8
    save_pretrained(model, tmp_path / "a")
    del model

    def taken(code: str) -> float:
        code = code.replace("$", str(tmp_path))
        result = subprocess.run([sys.executable, "-c", MEASURE, code], capture_output=True, text=True, check=True)
        return int(result.stdout) / size

    # The model is small, so the slack of the allocator shows (up to 0.2); a second copy would add 0.5 or 1.
    assert taken("convert('$/a', '$/b/x.npz', dtype='bfloat16'); convert('$/b/x.npz', '$/c', dtype='float32')") < 0.3
    assert taken("model = load_model('$/a', dtype='bfloat16')") < 0.8  # half the bytes
    assert taken("model = load_model('$/b/x.npz'); save_pretrained(model, '$/d')") < 0.8
    assert taken("model = load_model('$/a'); save_pretrained(model, '$/e')") < 1.3


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


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def sharded(gemma, tmp_path):
    save_pretrained(gemma, tmp_path / "sharded", max_shard_size=100_000)
    return tmp_path / "sharded"


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


# ------------------------------------------------------------------------------------------------ a full disk


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let any file grow further: what a full disk does, without filling one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_an_error_before_the_last_byte_leaves_the_old_files_whole(gemma, tmp_path, monkeypatch):
    save_pretrained(gemma, tmp_path)
    before = digests(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_pretrained(make_model("gemma2"), tmp_path)
    assert digests(tmp_path) == before


def test_saving_into_a_file(gemma, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_pretrained(gemma, tmp_path / "file")


# ------------------------------------------------------------------------------------------------ big_vision .npz


def bigvision_arrays(model: PaliGemmaForConditionalGeneration) -> dict[str, np.ndarray]:
    """The arrays that big_vision would hold for a model, written down from its code: einsums over [in, out] kernels.
    (An account of the layout beside the one that is tested.)"""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    text, vision = model.config.text_config, model.config.vision_config
    H, K, E, D = text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.hidden_size
    d, heads = vision.hidden_size, vision.num_attention_heads

    def stack(template, layers, change=lambda w: w):
        return np.stack([change(state[template.format(i)]) for i in range(layers)])

    eye, L = "vision_tower.vision_model.", vision.num_hidden_layers
    layer = eye + "encoder.layers.{}."
    arrays = {
        "img/embedding/kernel": state[eye + "embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "img/embedding/bias": state[eye + "embeddings.patch_embedding.bias"],
        "img/pos_embedding": state[eye + "embeddings.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": state[eye + "post_layernorm.weight"],
        "img/Transformer/encoder_norm/bias": state[eye + "post_layernorm.bias"],
        "img/head/kernel": state["multi_modal_projector.linear.weight"].T,
        "img/head/bias": state["multi_modal_projector.linear.bias"],
    }
    block = "img/Transformer/encoderblock/"
    for n in (0, 1):
        arrays[f"{block}LayerNorm_{n}/scale"] = stack(f"{layer}layer_norm{n + 1}.weight", L)
        arrays[f"{block}LayerNorm_{n}/bias"] = stack(f"{layer}layer_norm{n + 1}.bias", L)
        arrays[f"{block}MlpBlock_0/Dense_{n}/kernel"] = stack(f"{layer}mlp.fc{n + 1}.weight", L, np.transpose)
        arrays[f"{block}MlpBlock_0/Dense_{n}/bias"] = stack(f"{layer}mlp.fc{n + 1}.bias", L)
    attention = block + "MultiHeadDotProductAttention_0/"
    for name in ("query", "key", "value"):
        proj = f"{layer}self_attn.{name[0]}_proj"
        arrays[f"{attention}{name}/kernel"] = stack(proj + ".weight", L, lambda w: w.T.reshape(d, heads, -1))
        arrays[f"{attention}{name}/bias"] = stack(proj + ".bias", L, lambda b: b.reshape(heads, -1))
    arrays[f"{attention}out/kernel"] = stack(
        f"{layer}self_attn.out_proj.weight", L, lambda w: w.T.reshape(heads, -1, d)
    )
    arrays[f"{attention}out/bias"] = stack(f"{layer}self_attn.out_proj.bias", L)

    layer, L = "language_model.model.layers.{}.", text.num_hidden_layers

    def einsum(name, n):  # "BTD,NDH->BTNH"
        return stack(f"{layer}self_attn.{name}.weight", L, lambda w: w.T.reshape(D, n, E).transpose(1, 0, 2))

    arrays["llm/embedder/input_embedding"] = state[EMBEDDING]
    arrays["llm/final_norm/scale"] = state["language_model.model.norm.weight"]
    arrays["llm/layers/attn/q_einsum/w"] = einsum("q_proj", H)
    arrays["llm/layers/attn/kv_einsum/w"] = np.stack([einsum("k_proj", K), einsum("v_proj", K)], axis=1)
    # "BTNH,NHD->BTD"
    arrays["llm/layers/attn/attn_vec_einsum/w"] = stack(
        f"{layer}self_attn.o_proj.weight", L, lambda w: w.T.reshape(H, E, D)
    )
    gate_up = [stack(f"{layer}mlp.{name}_proj.weight", L, np.transpose) for name in ("gate", "up")]
    arrays["llm/layers/mlp/gating_einsum"] = np.stack(gate_up, axis=1)
    arrays["llm/layers/mlp/linear"] = stack(f"{layer}mlp.down_proj.weight", L, np.transpose)
    arrays["llm/layers/pre_attention_norm/scale"] = stack(f"{layer}input_layernorm.weight", L)
    if text.model_type == "gemma":
        arrays["llm/layers/pre_ffw_norm/scale"] = stack(f"{layer}post_attention_layernorm.weight", L)
    else:
        arrays["llm/layers/post_attention_norm/scale"] = stack(f"{layer}post_attention_layernorm.weight", L)
        arrays["llm/layers/pre_ffw_norm/scale"] = stack(f"{layer}pre_feedforward_layernorm.weight", L)
        arrays["llm/layers/post_ffw_norm/scale"] = stack(f"{layer}post_feedforward_layernorm.weight", L)
    return arrays


def write_npz(path: Path, config: PaliGemmaConfig | None, arrays: dict[str, np.ndarray], save=np.savez) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        save(file, **arrays)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def as_void(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as NumPy keeps it when it does not know it: two nameless bytes."""
    return tensor.bfloat16().contiguous().view(torch.int16).numpy().view("V2")


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_an_npz_is_the_same_model(model, tmp_path, prefix):
    arrays = {prefix + key: np.ascontiguousarray(array) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.npz", model.config, arrays)
    loaded = load_model(path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    for name, parameter in loaded.named_parameters():  # memory of its own, in its own order
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert_same_weights(load_model(tmp_path), model)  # by its folder


def test_bfloat16_comes_as_void(model, tmp_path):
    arrays = {key: as_void(torch.tensor(array)) for key, array in bigvision_arrays(model).items()}
    loaded = load_model(write_npz(tmp_path / "a.b16.npz", model.config, arrays))
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model.bfloat16())


def test_float16(model, tmp_path):
    arrays = {key: array.astype(np.float16) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.f16.npz", model.config, arrays)
    assert_same_weights(load_model(path), model.half())
    assert_same_weights(load_model(path, dtype="float32"), model.half().float())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_fortrans_order_and_compressed_ones(model, tmp_path, save):
    arrays = {key: np.asfortranarray(array) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.npz", model.config, arrays, save)
    assert_same_weights(load_model(path), model)


@pytest.mark.parametrize("pieces", [2, 12])
@pytest.mark.parametrize("digits", [1, 3])
def test_parts_are_read_as_one_file(model, tmp_path, pieces, digits):
    path = write_npz(tmp_path / "a.npz", model.config, bigvision_arrays(model))
    content = path.read_bytes()
    path.unlink()
    length = len(content) // pieces + 1
    for n in range(pieces):  # part10 comes after part9
        (tmp_path / f"a.npz.part{n:0{digits}d}").write_bytes(content[n * length : (n + 1) * length])
    for name in ("a.npz", f"a.npz.part{0:0{digits}d}", "."):
        assert_same_weights(load_model(tmp_path / name), model)


def test_a_missing_part(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    content = path.read_bytes()
    path.unlink()
    for n in (0, 2):
        (tmp_path / f"a.npz.part{n}").write_bytes(content[n * 1000 : n * 1000 + 1000])
    with pytest.raises(FileNotFoundError, match=r"a.npz has only its parts \[0, 2\]"):
        load_model(tmp_path / "a.npz")
    (tmp_path / "a.npz.part2").unlink()
    with pytest.raises(ValueError, match=r"a.npz.part0 is truncated or damaged"):
        load_model(tmp_path / "a.npz")


def test_the_rows_that_big_vision_lacks_are_zeros(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:300]  # <image> is 300, of 320
    loaded = load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))
    embedding = loaded.state_dict()[EMBEDDING]
    assert torch.equal(embedding[:300], gemma.state_dict()[EMBEDDING][:300])
    assert embedding.shape == (320, 32) and not embedding[300:].any()


def test_an_embedding_too_short_for_the_configuration(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:299]
    with pytest.raises(ValueError, match=r"input_embedding is \[299, 32\], expected \[320, 32\]"):
        load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))


@pytest.mark.parametrize("image_size", [224, 448, 896])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_of_every_published_npz_follows_from_its_shapes(name, image_size):
    config = published_config(name, image_size)
    shapes = {row.key: row.shape for row in bigvision_layout(config, 257152)}
    assert config_of_arrays(Path("a.npz"), shapes) == config
    assert published_name(config) == name


def test_a_size_of_its_own_is_not_published():
    config = published_config("paligemma2-3b", 448)
    assert published_name(replace(config, text_config=replace(config.text_config, num_key_value_heads=2))) is None
    assert published_name(replace(config, vision_config=replace(config.vision_config, num_hidden_layers=26))) is None


def test_an_npz_without_a_configuration_beside_it(tmp_path):
    model = make_model("gemma2", vocab_size=257216, image_token_index=257152, hidden_size=8, sliding_window=4096)
    arrays = bigvision_arrays(model)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:257152]
    loaded = load_model(write_npz(tmp_path / "a.npz", None, arrays))
    assert loaded.config.text_config.query_pre_attn_scalar == 16  # the head size, as in all published ones but one
    assert loaded.config.text_config.sliding_window == 4096
    assert (loaded.config.vision_config.image_size, loaded.config.vision_config.patch_size) == (28, 14)
    state = model.state_dict()
    state[EMBEDDING][257152:] = 0
    for tensor, expected in zip(loaded.state_dict().values(), state.values()):
        assert torch.equal(tensor, expected)


def test_an_unknown_vocabulary_needs_a_configuration(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", None, bigvision_arrays(gemma))
    with pytest.raises(ValueError, match=r"embedding of 320 rows.*Put its config.json beside it"):
        load_model(path)


QUERY = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (QUERY, (10**9, 0, 2, 4), "num_hidden_layers"),
        (QUERY, (1, 8, 0, 4), "num_attention_heads"),
        ("img/embedding/kernel", (0, 14, 3, 8), "patch_size"),
        ("img/pos_embedding", (1, 0, 8), "image_size"),
        ("llm/layers/attn/q_einsum/w", (10**9, 0, 8, 4), "num_hidden_layers"),
        ("llm/layers/attn/q_einsum/w", (1, 0, 4608, 4), "num_attention_heads"),
        ("llm/layers/attn/kv_einsum/w", (1, 2, 0, 8, 4), "num_key_value_heads"),
    ],
)
def test_shapes_of_no_model_are_refused_before_a_model_is_built(key, shape, message, monkeypatch):
    """An array without elements takes no bytes, whatever number of layers it claims."""
    monkeypatch.setattr("paligemma.weights.expected.empty_model", None)
    shapes = {row.key: row.shape for row in bigvision_layout(published_config("paligemma2-3b", 224), 257152)}
    with pytest.raises(ValueError, match=rf"^a\.npz: .* no model: \w+\.{message} is "):
        config_of_arrays(Path("a.npz"), shapes | {key: shape})


def test_what_does_not_fit_in_an_npz_is_named(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    del arrays["img/head/bias"]
    arrays["opt/count"] = np.zeros(1)
    arrays["llm/final_norm/scale"] = np.zeros(31, np.float32)
    arrays["llm/layers/mlp/linear"] = arrays["llm/layers/mlp/linear"].astype(np.int32)
    with pytest.raises(ValueError) as error:
        load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))
    assert str(error.value).splitlines()[1:-1] == [
        "  1 missing: img/head/bias",
        "  1 unexpected: opt/count",
        "  1 of another shape: llm/final_norm/scale is [31], expected [32]",
        "  1 not floating point: llm/layers/mlp/linear is <i4",
    ]


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_an_npz_stays_closed(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["img/head/bias"] = np.array([Evil(tmp_path / "opened")], dtype=object)
    path = write_npz(tmp_path / "a.npz", gemma.config, arrays)
    with pytest.raises(ValueError, match=r"not floating point: img/head/bias is \|O"):
        load_model(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("kept", [0, 100, 60_000, -1])
def test_a_truncated_npz(gemma, tmp_path, kept):
    path = write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a.npz is truncated or damaged"):
        load_model(path)


def test_an_array_of_another_size_than_it_says(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", gemma.config, {})
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in bigvision_arrays(gemma).items():
            with archive.open(key + ".npy", "w") as file:
                np.lib.format.write_array(file, array)
                file.write(b"more" if key == "img/head/bias" else b"")
    with pytest.raises(ValueError, match=r"damaged \(img/head/bias has 260 bytes, expected 256\)"):
        load_model(path)


@pytest.mark.parametrize("header", ["{'shape': (1,), (", "{'shape': ((1,}", "{'descr': '<f4' 4}", "(" * 900, "\0"])
def test_a_header_of_an_array_that_nobody_can_read(header, tmp_path, monkeypatch):
    """It is a Python literal, and what Python says of a broken one is not said to the user."""
    text = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("llm/a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    real, opened = Path.open, []
    monkeypatch.setattr(Path, "open", lambda *args: opened.append(real(*args)) or opened[-1])
    with pytest.raises(ValueError, match=r"a\.npz is truncated or damaged"):
        open_checkpoint(tmp_path / "a.npz")
    assert all(file.closed for file in opened)


def test_a_flipped_bit_in_an_npz(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    path = write_npz(tmp_path / "a.npz", gemma.config, arrays)
    content = bytearray(path.read_bytes())
    content[content.index(arrays["llm/layers/mlp/linear"].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz is truncated or damaged \(Bad CRC-32"):
        load_model(path)


def test_a_folder_with_other_archives(gemma, tmp_path):
    write_npz(tmp_path / "mask_codec.npz", None, {"decoder.0.weight": np.zeros(3)})
    write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    assert_same_weights(load_model(tmp_path), gemma)
    write_npz(tmp_path / "a.bf16.npz", gemma.config, bigvision_arrays(gemma))
    with pytest.raises(ValueError, match=r"several checkpoints: name one of a.npz, a.bf16.npz"):
        load_model(tmp_path)
    assert_same_weights(load_model(tmp_path / "a.npz"), gemma)


def test_no_more_than_a_slice_of_an_array_is_read_at_a_time(gemma, tmp_path, monkeypatch):
    read = []
    fill = npz.NpzReader.fill

    def spy(self, key, out, index=None):
        read.append((key, index, out.numel()))
        return fill(self, key, out, index)

    monkeypatch.setattr(npz.NpzReader, "fill", spy)
    load_model(write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma)))
    assert ("llm/layers/mlp/gating_einsum", 1, 2 * 32 * 64) in read
    assert len(read) == len(set(read))  # and each once, though it holds two tensors


# ------------------------------------------------------------------------------------------------ convert


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


def test_there_and_back_gives_the_same_files(model, tmp_path):
    save_pretrained(model, tmp_path / "a", max_shard_size=40_000)
    convert(tmp_path / "a", tmp_path / "b" / "x.npz")
    convert(tmp_path / "b" / "x.npz", tmp_path / "c", max_shard_size=40_000)
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    convert(tmp_path / "b", tmp_path / "d" / "x.npz")
    assert digests(tmp_path / "d") == digests(tmp_path / "b")


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


# ------------------------------------------------------------------------------------------------ another resolution


def zoom(table: np.ndarray, new: int) -> np.ndarray:
    """scipy.ndimage.zoom(grid, order=1), written out: corners on corners, linear in between. [old, old, D]"""
    old = table.shape[0]
    result = np.empty((new, new, table.shape[2]))
    for row in range(new):
        for column in range(new):
            y, x = row * (old - 1) / (new - 1), column * (old - 1) / (new - 1)
            y0, x0 = min(int(y), old - 2), min(int(x), old - 2)
            b, a = y - y0, x - x0
            top = table[y0, x0] * (1 - a) + table[y0, x0 + 1] * a
            bottom = table[y0 + 1, x0] * (1 - a) + table[y0 + 1, x0 + 1] * a
            result[row, column] = top * (1 - b) + bottom * b
    return result


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (3, 7), (16, 16)])
def test_positions_are_resampled_as_big_vision_does(old, new):
    table = torch.randn(old * old, 5)
    expected = zoom(table.reshape(old, old, 5).double().numpy(), new)
    resampled = resample_positions(table, new * new)
    np.testing.assert_allclose(resampled.reshape(new, new, 5).numpy(), expected, atol=1e-6)
    with contextlib.suppress(ImportError):
        from scipy import ndimage

        theirs = ndimage.zoom(table.reshape(old, old, 5).numpy(), (new / old, new / old, 1), order=1)
        np.testing.assert_allclose(resampled.reshape(new, new, 5).numpy(), theirs, atol=1e-5)


def test_a_checkpoint_at_another_resolution(folder, gemma, tmp_path):
    loaded = load_model(folder, image_size=56)
    positions = "vision_tower.vision_model.embeddings.position_embedding.weight"
    assert loaded.config.vision_config.image_size == 56
    assert torch.equal(loaded.state_dict()[positions], resample_positions(gemma.state_dict()[positions], 16))
    assert logits_of(loaded).isfinite().all()
    save_pretrained(loaded, tmp_path / "b")
    assert load_model(tmp_path / "b").config.vision_config.num_patches == 16
    assert_same_weights(load_model(folder, image_size=28), gemma)
    with pytest.raises(ValueError, match=r"image_size 14,000,000 makes 1,000,000,000,000 image tokens, .* positions"):
        load_model(folder, image_size=14_000_000)  # told before any memory is asked for
    with pytest.raises(ValueError, match="image_size 57 is not a multiple of patch_size 14"):
        load_model(folder, image_size=57)
    for wrong in (0, -14, "28", 28.0, True):
        with pytest.raises(ValueError, match=f"image_size is {wrong!r}, expected a positive whole number of pixels"):
            load_model(folder, image_size=wrong)


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
