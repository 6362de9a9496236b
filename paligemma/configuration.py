"""Reading the configuration dictionaries of published checkpoints: strict about what matters, deaf to what does not.

`config.json` files carry three kinds of keys. Those that shape the model become dataclass fields
(`SiglipVisionConfig`, `GemmaConfig`, `PaliGemmaConfig`, each in the file of its model). Those that never reach the
arithmetic (`use_cache`, `initializer_range`, ...) are listed below and dropped. All others are errors: a key that we
do not know may be one that changes the result.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

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

# Keys that would change the arithmetic if they ever held another value than this one.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "num_channels": (3, None),
    "rope_scaling": (None,),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}


# Far beyond every published model (46 layers, 257,216 tokens). What is beyond these is a slip of the pen or worse, and
# would be built for hours before the weights are found not to fit.
MOST_LAYERS, LARGEST_SIZE = 1_000, 10_000_000


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
