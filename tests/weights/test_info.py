"""What a checkpoint is and needs: the numbers of the published sizes, and those of a file from its header alone."""

import json
import math
import weakref

import pytest
import torch
from make_tokenizer import build_tokenizer
from reference import make_inputs, randomize, tiny_config
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma.kv_cache import KVCache, bytes_per_token
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.weights.converting import convert
from paligemma.weights.info import describe, memory, render
from paligemma.weights.quantized import quantize_checkpoint
from paligemma.weights.saving import save_pretrained


@pytest.fixture
def model():
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma2")).eval()
    randomize(model)
    return model


# parameters in all, image tokens, KV bytes per token in bfloat16
PUBLISHED = {
    "google/paligemma-3b-mix-224": (2_923_466_480, 256, 18_432),
    "paligemma-3b-ft-refcoco-seg-896": (2_923_466_480 + 4_423_680, 4096, 18_432),
    "google/paligemma2-3b-pt-448": (3_032_242_416 + 884_736, 1024, 106_496),
    "google/paligemma2-10b-ft-docci-448": (9_662_638_832 + 884_736, 1024, 344_064),
    "paligemma2-28b-pt-224-jax": (27_650_487_024, 256, 376_832),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_needs_no_files(name):
    parameters, tokens, kv_bytes = PUBLISHED[name]
    facts = describe(name)
    assert facts["parameters"]["total"] == parameters
    assert sum(facts["parameters"].values()) == 2 * parameters  # the parts make up the total
    assert facts["image_tokens"] == tokens
    assert facts["kv_bytes_per_token"] == kv_bytes
    assert facts["memory"]["weights"] == 2 * parameters
    assert facts["dtype"] == "bfloat16" and facts["files"] == []
    family, size = name.removeprefix("google/").split("-")[:2]
    assert facts["variant"] == f"{family}-{size}-{facts['image_size']}"
    assert (facts["family"], facts["size"]) == ("PaliGemma 2" if family == "paligemma2" else "PaliGemma 1", size)


def test_a_configuration_without_weights_is_enough(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    facts = describe(tmp_path)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["format"] is None


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_checkpoint_from_its_headers(tmp_path, model, kind, monkeypatch):
    save_pretrained(model.bfloat16(), tmp_path / "a", max_shard_size=10**9)
    path = tmp_path / "a"
    if kind == "npz":
        convert(path, tmp_path / "b" / "x.npz")
        path = tmp_path / "b" / "x.npz"
    facts = describe(path)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert facts["parameters"] == {
        "vision": sum(n for name, n in sizes.items() if name.startswith("vision_tower")),
        "projector": 16 * 32 + 32,
        "embedding": 320 * 32,
        "decoder": sum(n for name, n in sizes.items() if "model.layers" in name or "model.norm" in name),
        "total": sum(sizes.values()),
    }
    assert facts["variant"] is None and facts["size"] is None and facts["family"] == "PaliGemma 2"
    assert (facts["format"], facts["stored_dtype"], facts["stored_bytes"]) == (
        kind,
        "bfloat16",
        2 * sum(sizes.values()),
    )
    assert len(facts["files"]) == 1
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantised_checkpoint_counts_what_its_files_hold(tmp_path, model, mode):
    save_pretrained(model.bfloat16(), tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", mode)
    facts, plain = describe(tmp_path / "b"), describe(tmp_path / "a")
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert (facts["stored_dtype"], facts["stored_bytes"], facts["format"]) == (mode, held, "safetensors")
    assert facts["parameters"] == plain["parameters"] and facts["dtype"] == "bfloat16"
    assert facts["memory"]["weights"] == held, "they stay rounded in memory"
    assert facts["memory"]["cache"] == plain["memory"]["cache"]
    assert f"of {mode} in 1 safetensors file" in render(facts)


def test_a_damaged_checkpoint_is_an_error_here_too(tmp_path, model):
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated or damaged"):
        describe(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        describe(build_tokenizer(tmp_path / "b"))


def test_a_folder_that_lacks_a_shard_is_an_error_and_not_a_folder_without_weights(tmp_path, model):
    save_pretrained(model, tmp_path, max_shard_size=20_000)
    *_, last = sorted(tmp_path.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{last.name} is missing"):
        describe(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        describe(str(tmp_path))


def test_a_hub_id_of_which_only_the_settings_were_fetched_is_described_by_them(tmp_path, model, monkeypatch):
    save_pretrained(model, tmp_path, max_shard_size=20_000)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    monkeypatch.setattr("paligemma.weights.info.resolve", lambda *_, **__: tmp_path)
    assert describe("somebody/model")["format"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_per_token_are_those_of_the_cache(model, dtype):
    cache = KVCache(model.config.text_config, batch=3, max_length=7, dtype=dtype)
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert held == 3 * 7 * bytes_per_token(model.config.text_config, dtype)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it: alive now, and at most."""

    def __init__(self):
        super().__init__()
        self.storages: set[int] = set()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages.add(storage.data_ptr())
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        return result

    def freed(self, pointer: int, count: int) -> None:
        self.storages.discard(pointer)
        self.alive -= count


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "intermediate_size", "image_size"),
    [("gemma", 2048, 224), ("gemma", 2048, 448), ("gemma2", 256, 224), ("gemma2", 256, 448), ("gemma", 64, 896)],
)  # in the last, nearly all are masks
def test_the_estimate_of_memory_is_not_exceeded_and_not_wild(kind, intermediate_size, image_size, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": intermediate_size, "head_dim": 32, "image_size": image_size}
    config = tiny_config(kind, **sizes)
    model = PaliGemmaForConditionalGeneration(config).to(dtype).eval()
    inputs = make_inputs(config, prefix=[256])
    cache = KVCache(config.text_config, 1, inputs["input_ids"].shape[1], dtype)
    estimate = memory(config, 0, dtype)
    assert estimate["tokens"] == inputs["input_ids"].shape[1]
    with Peak() as measured:
        measured.storages |= {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        measured.storages |= {tensor.untyped_storage().data_ptr() for tensor in [*cache.keys, *cache.values]}
        model(**inputs, cache=cache, logits_to_keep=1)
    assert 0.5 * estimate["activations"] < measured.peak <= estimate["activations"]


def test_what_people_read():
    text = render(describe("google/paligemma2-3b-pt-448"))
    for part in (
        "PaliGemma 2, paligemma2-3b-448",
        "448 x 448 pixels = 1,024 tokens",
        "3,033,127,152  in all",
        "106,496 bytes per token in bfloat16",
        "6.07 GB weights, 136.3 MB cache",
    ):
        assert part in text, text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_what_people_read_about_a_folder(tmp_path, model):
    save_pretrained(model, tmp_path, max_shard_size=100_000)
    text = render(describe(tmp_path))
    assert "a size of its own" in text
    size = sum(p.nbytes for p in model.parameters())
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert f"{size / 1000:.1f} kB of float32 in {shards} safetensors files" in text
    assert math.isclose(describe(tmp_path)["memory"]["weights"], size)
