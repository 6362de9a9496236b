"""What a checkpoint is and what it needs, from its configuration and the headers of its files: no weights are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paligemma.kv_cache import bytes_per_token
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.adapters import TENSORS, Adapter, check_fits, is_adapter, open_adapter
from paligemma.weights.expected import expected_shapes
from paligemma.weights.finding import find_base, resolve
from paligemma.weights.layouts import EMBEDDING
from paligemma.weights.loading import default_dtype
from paligemma.weights.opening import INDEX, Checkpoint, open_checkpoint
from paligemma.weights.published import PUBLISHED, published_config, published_name
from paligemma.weights.quantized import QuantizedCheckpoint, open_quantized, stored_mode, stored_tensors
from paligemma.weights.safetensors_file import Shape

TEXT_TOKENS = 256  # prompt and answer, in the estimate of memory


def describe(model_path: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """The facts about a model, as a dictionary that can be written as JSON. Sizes are in bytes.

    model_path: what `load_hf_model` takes, also the name of a published model ("paligemma2-28b-pt-448"), whose
    numbers follow from its size alone. Of any other hub id only the settings are downloaded, and of an adapter's its
    tensors. The facts of an adapter are those of its base, which is what runs; "adapter" says what it adds.
    Raises ValueError or OSError as `load_hf_model` does.
    """
    if revision is None and (config := _published(model_path)) is not None:
        return _describe(str(model_path), config, None)
    path = resolve(model_path, revision, weights=False)
    if not is_adapter(path):
        return _describe(str(model_path), *_opened(path, Path(model_path).expanduser().exists()))

    adapter = open_adapter(resolve(model_path, revision))
    beside = adapter.folder / adapter.base
    config, checkpoint = _published(adapter.base), None
    if config is None or beside.exists():
        own = beside.exists() or Path(adapter.base).expanduser().exists()
        config, checkpoint = _opened(find_base(adapter, weights=False), own)
    check_fits(adapter, expected_shapes(config), adapter.base)
    return {**_describe(str(model_path), config, checkpoint), "adapter": _describe_adapter(adapter)}


def _published(model_path: str | os.PathLike[str]) -> PaliGemmaConfig | None:
    """The configuration that follows from the name of a published model; None for other names and what lies here."""
    name = str(model_path).removeprefix("google/").removesuffix("-jax")
    found = re.fullmatch(rf"({'|'.join(PUBLISHED)})-(?:.+-)?(224|448|896)", name)
    return published_config(found[1], int(found[2])) if found and not Path(model_path).exists() else None


def _opened(path: Path, own: bool) -> tuple[PaliGemmaConfig, Checkpoint | QuantizedCheckpoint | None]:
    """A checkpoint, or None where only its configuration is here. own: it is the user's, and not of the hub."""
    try:
        checkpoint = open_checkpoint(path) if stored_mode(path) is None else open_quantized(path)
    except FileNotFoundError:
        # Of a hub id the settings alone were fetched. A folder of the user's either holds no weights at all, or all.
        some = (path / INDEX).is_file() or any(path.glob("*.safetensors"))
        if not (path / "config.json").is_file() or (some and own):
            raise
        return PaliGemmaConfig.from_pretrained(path), None
    return checkpoint.config, checkpoint


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    changed = {**adapter.shapes, **adapter.whole_shapes}
    parts = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "decoder"}
    return {
        "base": adapter.base,
        "ranks": sorted(set(adapter.ranks.values())),
        "parts": [part for tower, part in parts.items() if any(name.startswith(tower) for name in changed)],
        "layers": len(adapter.ranks),
        "parameters": sum(rank * sum(adapter.shapes[name]) for name, rank in adapter.ranks.items())
        + sum(map(math.prod, adapter.whole_shapes.values())),
        "stored_bytes": (adapter.folder / TENSORS).stat().st_size,
    }


def _describe(
    source: str, config: PaliGemmaConfig, checkpoint: Checkpoint | QuantizedCheckpoint | None
) -> dict[str, Any]:
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    parts = {
        "vision": sum(size for name, size in sizes.items() if name.startswith("vision_tower.")),
        "projector": sum(size for name, size in sizes.items() if name.startswith("multi_modal_projector.")),
        "embedding": sizes[EMBEDDING],
    }
    parts["decoder"] = sum(sizes.values()) - sum(parts.values())
    published = published_name(config)
    text, vision = config.text_config, config.vision_config
    runs_in, kind, files, stored_in, stored = torch.bfloat16, None, [], None, None
    if isinstance(checkpoint, QuantizedCheckpoint):
        runs_in, kind, stored_in = checkpoint.dtype, "safetensors", checkpoint.mode
        files = sorted(set(checkpoint.file_of.values()))
        stored = _bytes_of(stored_tensors(config, checkpoint.mode, checkpoint.dtype))
    elif checkpoint is not None:
        runs_in, kind, stored_in = default_dtype(checkpoint), checkpoint.format, _name(checkpoint.dtype)
        files, stored = checkpoint.files, _bytes_of(checkpoint.tensors)
    total = sum(sizes.values())
    # Rounded weights stay as they are stored; all others are converted to what the model runs in.
    weights = stored if isinstance(checkpoint, QuantizedCheckpoint) else total * runs_in.itemsize
    return {
        "source": source,
        # What was trained (pt, mix, ft) cannot be seen in the weights; a published folder has it in its name.
        "variant": f"{published}-{vision.image_size}" if published else None,
        "family": "PaliGemma 2" if text.model_type == "gemma2" else "PaliGemma 1",
        "size": published.rpartition("-")[2] if published else None,
        "image_size": vision.image_size,
        "image_tokens": vision.num_patches,
        "max_tokens": text.max_position_embeddings,
        "format": kind,
        "files": [str(file) for file in files],
        "stored_dtype": stored_in,  # of a quantised checkpoint its mode: "int8" or "int4"
        "stored_bytes": stored,
        "dtype": _name(runs_in),
        "parameters": {**parts, "total": total},
        "kv_bytes_per_token": bytes_per_token(text, runs_in),
        "memory": memory(config, total, runs_in, weights),
        "adapter": None,
    }


def memory(config: PaliGemmaConfig, parameters: int, dtype: torch.dtype, weights: int | None = None) -> dict[str, int]:
    """An estimate of what one image with a short prompt and answer takes to run, in bytes.

    weights      parameters x bytes per number, if their bytes are not given
    cache        tokens x kv bytes per token; tokens = image tokens + 256 of text
    activations  those of the vision tower or of the language model, whichever needs more, with b bytes per number:
                 vision    P x (2 F + 6 D) x b                P patches, F and D of the vision tower
                 language  tokens x (3 F + 6 D) x b           gate, up and their product; hidden states and their norms
                           + tokens^2 x (2 + b)               the masks, and one as the numbers added to the scores
                           + 12 x min(2^24, H x tokens^2)     soft-capped scores, which are computed in chunks
    """
    text, vision = config.text_config, config.vision_config
    tokens = vision.num_patches + TEXT_TOKENS
    vision_tower = vision.num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * dtype.itemsize
    language_model = tokens * (3 * text.intermediate_size + 6 * text.hidden_size) * dtype.itemsize
    language_model += tokens**2 * (2 + dtype.itemsize)
    if text.attn_logit_softcapping is not None:
        language_model += 12 * min(2**24, text.num_attention_heads * tokens**2)
    result = {
        "tokens": tokens,
        "weights": parameters * dtype.itemsize if weights is None else weights,
        "cache": tokens * bytes_per_token(text, dtype),
        "activations": max(vision_tower, language_model),
    }
    return {**result, "total": result["weights"] + result["cache"] + result["activations"]}


def render(facts: dict[str, Any]) -> str:
    """What `describe` found, for people."""
    parameters, need = facts["parameters"], facts["memory"]
    name = facts["variant"] or "a size of its own"
    stored = "not here: the numbers follow from the configuration"
    if facts["format"]:
        count = len(facts["files"])
        stored = f"{in_units(facts['stored_bytes'])} of {facts['stored_dtype']} in {count} {facts['format']} file"
        stored += "s" if count > 1 else ""
    share = {part: f"{parameters[part]:>15,}" for part in parameters}
    lines = [
        ("model", f"{facts['source']}: {facts['family']}, {name}"),
        *([("adapter", _adapter_line(facts["adapter"]))] if facts["adapter"] else []),
        ("weights", f"{stored}, the base's" if facts["adapter"] else stored),
        ("image", f"{facts['image_size']} x {facts['image_size']} pixels = {facts['image_tokens']:,} tokens"),
        ("tokens", f"{facts['max_tokens']:,} at most, image included"),
        ("parameters", f"{share['vision']}  vision tower"),
        ("", f"{share['projector']}  projector"),
        ("", f"{share['embedding']}  embedding (and output layer)"),
        ("", f"{share['decoder']}  decoder"),
        ("", f"{share['total']}  in all"),
        ("cache", f"{facts['kv_bytes_per_token']:,} bytes per token in {facts['dtype']}"),
        (
            "memory",
            f"{in_units(need['total'])} in {facts['dtype']} for one image and {TEXT_TOKENS} text tokens, estimated",
        ),
        ("", ", ".join(f"{in_units(need[part])} {part}" for part in ("weights", "cache", "activations"))),
    ]
    return "\n".join(f"{label:<12}{text}".rstrip() for label, text in lines)


def _adapter_line(adapter: dict[str, Any]) -> str:
    ranks = " and ".join(map(str, adapter["ranks"]))
    kind = f"LoRA of rank {ranks}" if ranks else "tensors trained whole"
    return (
        f"of {adapter['base']}: {kind} in {', '.join(adapter['parts'])}; {adapter['layers']} layers, "
        f"{adapter['parameters']:,} parameters, {in_units(adapter['stored_bytes'])}"
    )


def _bytes_of(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_units(count: int) -> str:
    """Decimal units, as disks and downloads are counted."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 10 * size else f"{count / size:.1f} {unit}"
    return f"{count} bytes"
