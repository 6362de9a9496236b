"""`config.json` of a checkpoint <-> the dataclasses of the model files: strict about what matters, and only that.

The dataclasses (`SiglipVisionConfig`, `GemmaConfig`, `PaliGemmaConfig`) stand in the files of their models, where a
reader wants to see them. Here is how they are read, checked and written:

    config.json --read_config--> read_text_config, read_vision_config --take_fields--> keyword arguments
    dataclass   --check_text_config, check_vision_config--> ValueError, or nothing
    dataclass   --write_config--> config.json

A `config.json` has three kinds of keys. Those that shape the model become fields. Those that never reach the
arithmetic (`use_cache`, `initializer_range`, ...) are listed below and dropped. All others are errors in text_config
and vision_config, since a key that nobody knows may be one that changes the result, and warnings at the top.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from paligemma.arguments import check_path
from paligemma.files import LARGEST_JSON, parse_json, read_bytes

if TYPE_CHECKING:
    from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig
    from paligemma.modeling_siglip import SiglipVisionConfig

Config = TypeVar("Config")

# Written by one release of transformers or another, and read by none of the arithmetic. `num_image_tokens`,
# `num_positions` and `projection_dim` are decorative: the model follows image_size, patch_size and hidden_size. So is
# `vocab_size` in a vision_config; in a text_config it is a field, and fields are read whatever stands here.
INERT_KEYS = frozenset(
    """
    _name_or_path architectures dtype torch_dtype transformers_version model_type use_cache initializer_range
    initializer_factor attention_dropout dropout cache_implementation num_image_tokens num_positions projection_dim
    projector_hidden_act vision_use_head use_bidirectional_attention pad_token_id bos_token_id eos_token_id
    vocab_size sep_token_id decoder_start_token_id prefix is_decoder is_encoder_decoder add_cross_attention
    tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward pruned_heads torchscript use_bfloat16
    tf_legacy_loss return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    finetuning_task problem_type task_specific_params id2label label2id tokenizer_class max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty attn_implementation _attn_implementation
    _attn_implementation_autoset image_seq_length
    """.split()
)

# Keys that would change the arithmetic if they ever held another value than these.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, False, None),  # opening a checkpoint shows whether it holds a head of its own
    "num_channels": (3, None),
    "rope_scaling": (None,),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}

# Far beyond every published model (46 layers, 257,216 tokens). A larger size is a mistake or worse, and the model
# would be built for hours before the weights are found not to fit.
MOST_LAYERS, LARGEST_SIZE = 1_000, 10_000_000

# ---------------------------------------------------------------------------------------------- the whole file


def read_config_file(folder: str | os.PathLike[str], parse: Callable[[dict[str, Any]], Config]) -> Config:
    """`parse` of the `config.json` in a folder. Raises FileNotFoundError or ValueError, naming the file."""
    path = check_path("folder", folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a checkpoint folder holds a config.json")
    try:
        # Any number: those that are none, or beyond any float, are refused by name where the fields are read.
        return parse(parse_json(read_bytes(path, LARGEST_JSON), any_number=True))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_config(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `PaliGemmaConfig`, with `text_config` and `vision_config` still as they were given.

    Raises ValueError if it is the configuration of another model, or one that cannot be honoured.
    """
    given = as_object(given, "the configuration")
    if given.get("model_type") != "paligemma":
        raise ValueError(f"model_type is {given.get('model_type')!r}, expected 'paligemma': another model's checkpoint")
    # Never rely on a default for this one: the default of transformers, 256000, is <loc0000>.
    image_token = given.get("image_token_index", given.get("image_token_id"))
    if type(image_token) is not int or image_token < 0:
        raise ValueError(f"image_token_index is {image_token!r}, expected the id of <image>")
    for name in ("text_config", "vision_config"):
        if name not in given:
            raise ValueError(f"{name} is missing: not a complete PaliGemma configuration")
    known = {"text_config", "vision_config", "image_token_index", "image_token_id", "hidden_size", "vocab_size"}
    known |= {"_vocab_size", "ignore_index", "num_hidden_layers", "tie_word_embeddings"}
    unknown = sorted(set(given) - known - INERT_KEYS)
    if unknown:
        warnings.warn(f"config.json has keys that are not used: {', '.join(unknown)}", stacklevel=4)
    text = as_object(given["text_config"], "text_config")
    fields = {"text_config": text, "vision_config": given["vision_config"], "image_token_index": image_token}
    return {**fields, **_special_tokens(given, text)}


def _special_tokens(given: dict[str, Any], text: dict[str, Any]) -> dict[str, int]:
    # At the top in published files, inside text_config in what transformers 5 writes. PaliGemma 2 lists Gemma's chat
    # stop token beside eos inside text_config: that one is never meant here.
    specials: dict[str, int] = {}
    for name, usual in (("pad_token_id", 0), ("bos_token_id", 2), ("eos_token_id", 1)):
        value: Any = given.get(name)
        if value is None:
            value = text.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name} is {value!r}, expected the id of a token")
        specials[name] = usual if value is None else value
    return specials


def write_config(config: PaliGemmaConfig) -> dict[str, Any]:
    """The content of a `config.json` that this project, transformers and what builds on it read alike."""
    vision = {"model_type": "siglip_vision_model", **dataclasses.asdict(config.vision_config)}
    vision |= {"vision_use_head": False, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    vision |= {"num_image_tokens": config.vision_config.num_patches, "projection_dim": config.text_config.hidden_size}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": config.image_token_index,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_size": config.text_config.hidden_size,
        "projection_dim": config.text_config.hidden_size,
        "text_config": {
            **_write_text_config(config.text_config),
            "num_image_tokens": config.vision_config.num_patches,
        },
        "vision_config": vision,
    }


# ---------------------------------------------------------------------------------------------- text_config


def read_text_config(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `GemmaConfig` (`cls`) from a `text_config`, with the values that published files leave out.

    Raises ValueError on missing sizes, on unknown keys, and on another model than Gemma 1 or 2.
    """
    given = as_object(given, "text_config")
    if given.get("model_type") not in ("gemma", "gemma2"):
        raise ValueError(f"text_config.model_type is {given.get('model_type')!r}, expected 'gemma' or 'gemma2'")
    if (rope := given.pop("rope_parameters", None)) is not None:
        # How transformers 5 writes rope_theta and rope_scaling.
        rope = as_object(rope, "text_config.rope_parameters")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"text_config.rope_parameters asks for {rope['rope_type']!r}; PaliGemma only has 'default'"
            )
        given.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if given.get("hidden_act") == "gelu":
        del given["hidden_act"]  # Gemma's first files say so, and have always been run with the tanh approximation
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    fields = take_fields(cls, given, "text_config", required=sizes + heads)
    if given["model_type"] == "gemma2":
        fields.setdefault("query_pre_attn_scalar", 256)
        fields.setdefault("sliding_window", 4096)
        fields.setdefault("attn_logit_softcapping", 50.0)
        fields.setdefault("final_logit_softcapping", 30.0)
        if fields.get("layer_types") is None:
            fields["layer_types"] = alternating_layers(fields["num_hidden_layers"])
    if fields.get("layer_types") is not None:
        fields["layer_types"] = tuple(fields["layer_types"])
    return fields


def alternating_layers(num_layers: int) -> tuple[str, ...]:
    """Gemma 2's order: layers 0, 2, 4, ... slide, the others see everything."""
    return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers))


def check_text_config(config: GemmaConfig) -> None:
    """Raises ValueError for another model than Gemma 1 or 2 and for values that do not fit together."""
    if config.model_type not in ("gemma", "gemma2"):
        raise ValueError(f"model_type is {config.model_type!r}, expected 'gemma' or 'gemma2'")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} does not divide by num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} is odd: rotary positions rotate pairs of numbers")
    if config.sliding_window is not None and (type(config.sliding_window) is not int or config.sliding_window < 1):
        raise ValueError(f"sliding_window is {config.sliding_window!r}, expected a positive whole number or null")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(config, name)
        if cap is not None and not cap > 0:
            raise ValueError(f"{name} is {cap!r}, expected a positive number, or null for none")
    if config.position_offset not in (0, 1):
        raise ValueError(f"position_offset is {config.position_offset!r}, expected 1 (transformers) or 0 (big_vision)")
    if config.layer_types is not None:
        if len(config.layer_types) != config.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(config.layer_types)} layers, num_hidden_layers is {config.num_hidden_layers}"
            )
        strange = [kind for kind in config.layer_types if kind not in ("sliding_attention", "full_attention")]
        if strange:
            raise ValueError(f"layer_types has {strange[0]!r}, expected sliding_attention or full_attention")


def _write_text_config(config: GemmaConfig) -> dict[str, Any]:
    text = dataclasses.asdict(config)
    if config.position_offset == 1:
        del text["position_offset"]  # a key of ours alone; written only where it differs from everybody's
    if config.model_type == "gemma":
        gemma2_only = "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window layer_types"
        for name in gemma2_only.split():
            if text[name] is None:
                del text[name]
        text["hidden_act"] = "gelu_pytorch_tanh"
        return text
    text["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_dim
    every_layer = ("full_attention",) * config.num_hidden_layers
    text["layer_types"] = list(config.layer_types or every_layer)
    if config.sliding_window is None:  # transformers reads no null here, but it knows layers that do not slide
        text |= {"sliding_window": 4096, "layer_types": list(every_layer)}
    text["hidden_activation"] = "gelu_pytorch_tanh"
    return text


# ---------------------------------------------------------------------------------------------- vision_config


def read_vision_config(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `SiglipVisionConfig` (`cls`) from a `vision_config`. Raises ValueError on unknown keys."""
    given = as_object(given, "vision_config")
    if given.get("model_type") not in (None, "siglip_vision_model"):
        raise ValueError(f"vision_config.model_type is {given['model_type']!r}, expected 'siglip_vision_model'")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return take_fields(cls, given, "vision_config", required=sizes)


def check_vision_config(config: SiglipVisionConfig) -> None:
    """Raises ValueError for values that do not fit together."""
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"vision hidden_size {config.hidden_size} does not divide by num_attention_heads "
            f"{config.num_attention_heads}"
        )


# ---------------------------------------------------------------------------------------------- keys and values


def as_object(given: Any, where: str) -> dict[str, Any]:
    """A copy of one part of a configuration. Raises ValueError, naming it, if it is not a JSON object."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {type(given).__name__}, expected an object with the settings of the model")
    return dict(given)


def take_fields(cls: type, given: dict[str, Any], where: str, required: tuple[str, ...]) -> dict[str, Any]:
    """The keyword arguments for the dataclass `cls` out of one configuration dictionary.

    `where` ("text_config") is named in errors. Raises ValueError for sizes that are missing, not positive whole
    numbers or absurdly large, for fixed keys with another value, and for keys that nobody knows.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    missing = [key for key in required if given.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: without them the size of the model is unknown")
    for key, allowed in FIXED_KEYS.items():
        if key in given and key not in fields and given[key] not in allowed:
            raise ValueError(f"{where}.{key} is {given[key]!r}; PaliGemma only has {allowed[0]!r}")
    unknown = sorted(key for key in given if key not in fields and key not in INERT_KEYS and key not in FIXED_KEYS)
    if unknown:
        raise ValueError(
            f"{where} has keys that this model does not know: {', '.join(unknown)}. "
            "They may change the arithmetic, so they are not skipped; remove them if they do not"
        )
    # null is a value of its own where null is the default (no window, no cap); elsewhere it means the default.
    taken = {key: v for key, v in given.items() if key in fields and (v is not None or fields[key].default is None)}
    for key, value in taken.items():
        if fields[key].type in ("float", "float | None") and type(value) not in (int, float, type(None)):
            raise ValueError(f"{where}.{key} is {value!r}, expected a number")
        # Python's json reads NaN, Infinity and whole numbers beyond any float too. Bases, caps, scales and epsilons are
        # all above zero.
        if fields[key].type in ("float", "float | None") and value is not None and not 0 < value <= sys.float_info.max:
            raise ValueError(f"{where}.{key} is {value!r}, expected a positive number")
    if not isinstance(taken.get("layer_types"), (list, tuple, type(None))):
        raise ValueError(f"{where}.layer_types is {taken['layer_types']!r}, expected a list with a word for each layer")
    for key in (*required, "head_dim", "image_size", "max_position_embeddings"):
        if key in taken and (type(taken[key]) is not int or taken[key] <= 0):
            raise ValueError(f"{where}.{key} is {taken[key]!r}, expected a positive whole number")
        most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST_SIZE
        if taken.get(key, 0) > most:
            raise ValueError(f"{where}.{key} is {taken[key]:,}, expected at most {most:,}")
    return taken
