"""A LoRA adapter on disk: what fine-tuning changed, apart from the model that it changes.

    adapter_config.json           which model it belongs to (`base_model_name_or_path`), rank, alpha
    adapter_model.safetensors     two small matrices A [rank, in], B [out, rank] per changed layer

    save_adapter(model, "runs/mine", "google/paligemma2-3b-pt-224")
    folded(open_checkpoint(base), open_adapter("runs/mine"))      # W + factor * B A, layer by layer as it is read

Written for peft beside transformers' own model; read from whatever peft writes there. (`paligemma.load("runs/mine")`
does the rest.) Reading needs no peft: folded into the weights, an adapter costs nothing when the model runs.

What is unusual:
- *Names.* Transformers has renamed its modules twice. It writes `base_model.model.model.language_model.layers.0...`
  today and wrote `base_model.model.language_model.model.layers.0...`; `layouts.our_name` knows all of them.
- *Strict.* An adapter that asks for more than LoRA on linear layers (DoRA, biases, ...), or that holds a tensor with no
  place in the model, is refused: folding in a part of it would give a model that nobody has trained.
- *Rounded once.* The sum is made in float32, whatever the dtype of the base.
"""

from __future__ import annotations

import copy
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from paligemma.files import read_json
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.weights.layouts import EMBEDDING, HEAD, our_name, their_name
from paligemma.weights.opening import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED, Checkpoint
from paligemma.weights.published import TINY
from paligemma.weights.safetensors_file import MappedFile, Shape
from paligemma.weights.saving import check_apart, checkpoint_written_whole

CONFIG, TENSORS = ADAPTER_CONFIG, ADAPTER_WEIGHTS
PREFIX = "base_model.model."  # peft's own wrapping, before the names of transformers

# Of the settings in `adapter_config.json`: what is read, and what only says how the tensors came about.
READ = (
    "peft_type base_model_name_or_path revision r lora_alpha alpha_pattern use_rslora init_lora_weights "
    "ensure_weight_tying"
).split()
INERT = (
    "task_type auto_mapping peft_version inference_mode target_modules exclude_modules modules_to_save lora_dropout "
    "layers_to_transform layers_pattern rank_pattern fan_in_fan_out megatron_config megatron_core qalora_group_size "
    "loftq_config eva_config corda_config lora_ga_config runtime_config"
).split()

# The regular expressions that `alpha_pattern` may hold: with one group, and one repetition besides those of digits.
# With more of these, one can take longer than anybody waits, and Python has no way to stop it.
SIMPLE_PATTERN = re.compile(r"(?:[\w^$|()-]|\\[.d]|\\d\+|\.[*+]?|\[[\w-]*\])*")
MOST_PATTERNS = 20  # of these; plain names are not counted

# Ways to begin that leave the base as it is. Others (PiSSA, OLoRA, LoftQ, ...) train beside a base of their own.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


# ------------------------------------------------------------------------------------------------ writing


def save_adapter(
    model: PaliGemmaForConditionalGeneration,
    folder: str | os.PathLike[str],
    base_name: str | os.PathLike[str],
    processor: Any = None,
) -> None:
    """Writes what LoRA has learned (see `train.parts.add_lora`) so that peft loads it beside transformers' model.

    base_name: the model that LoRA was added to: a hub id, a folder, "tiny". processor: whose files are written too.
    An adapter or a whole model that lies in `folder` is replaced; other files in it are left alone.
    Raises ValueError for a model without LoRA and where `folder` is that of the base, which the adapter needs; OSError
    when the files cannot be written. Then what was there is left.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("the model has no LoRA to save: `save_pretrained` writes all of its weights")
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    learned: Any = model  # with what peft has put into it
    state = get_peft_model_state_dict(learned, save_embedding_layers=False)
    tensors = {PREFIX + their_name(key): value.detach().cpu().contiguous() for key, value in state.items()}
    config = copy.copy(learned.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = str(base_name)
    if (path := TINY if str(base_name) == "tiny" else Path(base_name).expanduser()).exists():
        config.base_model_name_or_path = str(path.resolve())  # so that it is found from everywhere, and by peft
        check_apart(Path(folder), [path if path.is_dir() else path.parent])
    with checkpoint_written_whole(Path(folder)) as place:
        if processor is not None:
            processor.save_pretrained(place)
        try:
            save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{Path(folder) / TENSORS} could not be written: {error}") from None
        config.save_pretrained(place)


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class Adapter:
    """An opened adapter: which tensors of the base it changes, by our names, and to what."""

    folder: Path
    base: str  # hub id or path
    revision: str | None  # of the base
    factors: dict[str, float] = field(default_factory=dict)  # alpha / rank of every layer with LoRA
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # where its A and its B lie in the file
    shapes: dict[str, Shape] = field(default_factory=dict)  # of B A
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)  # tensors that were trained whole (peft's modules_to_save)
    whole_shapes: dict[str, Shape] = field(default_factory=dict)

    def read(self, key: str) -> Tensor:
        with safe_open(self.folder / TENSORS, "pt") as file:
            return file.get_tensor(key).float()


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter. Raises ValueError if it holds a whole checkpoint as well."""
    if not (path / CONFIG).is_file():
        return False
    if weights := sorted(file.name for file in path.glob("model*.safetensors*")):
        raise ValueError(
            f"{path} holds an adapter ({CONFIG}) and whole weights ({weights[0]}): move one of them to another folder"
        )
    return True


def open_settings(folder: Path) -> Adapter:
    """Which base an adapter says that it belongs to; its tensors need not be here. Raises as `open_adapter` does."""
    settings = _settings(folder / CONFIG)
    return Adapter(folder, settings["base_model_name_or_path"], settings.get("revision"))


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Reads the settings of an adapter and the headers of its tensors.

    Raises FileNotFoundError or ValueError, naming the file: when something is missing, damaged or pickled, or when the
    adapter asks for more than LoRA on linear layers.
    """
    folder = Path(folder)
    settings = _settings(folder / CONFIG)
    adapter = Adapter(folder, settings["base_model_name_or_path"], settings.get("revision"))
    if not (folder / TENSORS).is_file():
        pickled = [file.name for file in folder.iterdir() if file.suffix in PICKLED]
        raise FileNotFoundError(
            f"{folder} has no {TENSORS}"
            + (f"; {pickled[0]} is a pickle, which can run any code when it is read: it is not" if pickled else "")
        )
    halves: dict[str, dict[str, tuple[str, Shape]]] = {}  # layer -> "A" and "B" -> key and shape
    strange, tied = [], {}  # what cannot be read; the embedding and the output layer, trained whole
    for key, (shape, _) in MappedFile(folder / TENSORS).tensors.items():
        name = key.removeprefix(PREFIX)
        if (half := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)) and len(shape) == 2:
            halves.setdefault(half[1], {})[half[2]] = key, shape
        elif our_name(name) in (EMBEDDING, HEAD):
            tied[our_name(name)] = key, shape
        elif "lora_" in name:
            strange.append(key)
        else:
            adapter.whole[our_name(name)], adapter.whole_shapes[our_name(name)] = key, shape

    for module, pair in halves.items():
        name = our_name(module + ".weight")
        (key_a, a), (key_b, b) = pair.get("A", ("", ())), pair.get("B", ("", ()))
        if not a or not b or a[0] != b[1] or not a[0] or name in adapter.keys:
            strange += [key for key in (key_a, key_b) if key]
            continue
        adapter.keys[name], adapter.shapes[name], adapter.ranks[name] = (key_a, key_b), (b[0], a[1]), a[0]
        alpha = _alpha(module, settings)
        adapter.factors[name] = alpha / math.sqrt(a[0]) if settings.get("use_rslora") else alpha / a[0]
    if tied and _stay_tied(folder, tied, settings):
        adapter.whole[EMBEDDING], adapter.whole_shapes[EMBEDDING] = next(iter(tied.values()))
    else:
        strange += [key for key, _ in tied.values()]
    if strange:
        raise ValueError(
            f"{folder / TENSORS}: {_listed(strange)} cannot be folded into the base. Read are pairs of lora_A and "
            "lora_B of linear layers, and whole tensors; the embedding only where it stays the output layer too: train "
            "it with peft's ensure_weight_tying=True"
        )
    if not adapter.keys and not adapter.whole:
        raise ValueError(f"{folder / TENSORS} holds no tensors")
    return adapter


def _stay_tied(folder: Path, tied: Mapping[str, tuple[str, Shape]], settings: Mapping[str, Any]) -> bool:
    """Whether a trained embedding is the output layer as well: both are there and equal, or peft has tied them."""
    if len(tied) < 2:
        return settings.get("ensure_weight_tying") is True
    (one, shape), (other, other_shape) = tied.values()
    file = MappedFile(folder / TENSORS)
    return shape == other_shape and torch.equal(file.read(one), file.read(other))


def _settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked: nothing in it asks for what is not done here."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an adapter's folder holds one")
    settings = read_json(path, any_number=True)
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'; of peft's adapters only LoRA is read"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}: write in which model the adapter belongs to")
    if not isinstance(patterns := settings.get("alpha_pattern") or {}, dict):
        raise ValueError(f"{path}: alpha_pattern is {patterns!r}, expected an object of names and numbers")
    _check_patterns(patterns)
    for name, value in {"lora_alpha": settings.get("lora_alpha"), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{path}: {name} is {value!r}, expected a number")
    asks = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if name not in (*READ, *INERT) and value and value != "none"
    ]
    if settings.get("init_lora_weights", True) not in BEGINNINGS:
        asks.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if asks:
        raise ValueError(
            f"{path} asks for {', '.join(asks)}, which is not done here: merge it where it was trained, with peft's "
            "merge_and_unload, and save the whole model"
        )
    return settings


def _alpha(module: str, settings: dict[str, Any]) -> float:
    """The alpha of a layer: that of the first pattern which is the end of its name, else the common one."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(r"[\w.]+", pattern):
            matches = module == pattern or module.endswith("." + pattern)
        else:  # no layer of ours has a name of 200 letters
            matches = len(module) < 200 and re.match(rf"(.*\.)?({pattern})$", module) is not None
        if matches:
            return float(alpha)
    return float(settings["lora_alpha"])


def _check_patterns(patterns: Mapping[str, Any]) -> None:
    """ValueError for regular expressions that are none, or that may take for ever."""
    expressions = [pattern for pattern in patterns if not re.fullmatch(r"[\w.]+", pattern)]
    for pattern in expressions:
        repeats = sum(map(pattern.count, "*+?")) - pattern.count(r"\d+")
        simple = SIMPLE_PATTERN.fullmatch(pattern) and len(pattern) <= 500
        if not simple or repeats > 1 or pattern.count("(") > 1 or len(expressions) > MOST_PATTERNS:
            raise ValueError(
                f"alpha_pattern: {pattern[:80]!r} is a regular expression that may take very long: write the names of "
                "layers, or a simple one such as 'layers\\.\\d+\\.mlp\\..*'"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"alpha_pattern: {pattern!r} is no pattern ({error})") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ------------------------------------------------------------------------------------------------ folding in


def check_fits(adapter: Adapter, shapes: Mapping[str, Shape], base: str | Path) -> None:
    """ValueError, naming the tensors, when an adapter changes what its base doesn't have or has in another shape."""
    changed = {**adapter.shapes, **adapter.whole_shapes}
    wrong = [
        f"{name} {list(shape)}" + (f" (there {list(shapes[name])})" if name in shapes else "")
        for name, shape in changed.items()
        if shapes.get(name) != shape
    ]
    if wrong:
        raise ValueError(
            f"the adapter {adapter.folder} does not fit its base {base}, which has no {_listed(wrong)}: it was trained "
            "beside another model"
        )


def folded(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with an adapter's changes in it, made as each tensor is read. Raises as `check_fits` does."""
    check_fits(adapter, {name: shape for name, (shape, _) in checkpoint.tensors.items()}, checkpoint.path)

    def read(name: str, mapped: bool = False) -> Tensor:
        if name in adapter.whole:
            return adapter.read(adapter.whole[name])
        if name not in adapter.keys:
            return checkpoint.read(name, mapped)
        a, b = (adapter.read(key) for key in adapter.keys[name])  # [rank, in], [out, rank]
        return torch.addmm(checkpoint.read(name).float(), b, a, alpha=adapter.factors[name])

    return replace(checkpoint, read=read)
