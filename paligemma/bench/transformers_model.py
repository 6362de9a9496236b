"""transformers' PaliGemma, timed beside ours. No other file of the package imports transformers, an optional package.

It runs as its documentation says: `from_pretrained` in bfloat16 with its default attention, then greedy `generate`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def installed() -> bool:
    return find_spec("transformers") is not None


def import_its_code() -> None:
    """What `import transformers` leaves for later: the modules of the model."""
    import transformers

    _ = transformers.PaliGemmaForConditionalGeneration


def load_transformers(folder: str) -> Any:
    """transformers' model in bfloat16, without an end token: every answer has the same length."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def answer_transformers(model: Any, inputs: dict[str, Any], tokens: int) -> None:
    model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


def answer_compiled(model: Any, inputs: dict[str, Any], tokens: int) -> None:
    """With its static cache, for which `generate` compiles the decoding step on a GPU by itself."""
    model.generate(**inputs, max_new_tokens=tokens, do_sample=False, cache_implementation="static")


def load_to_train(folder: str, dtype: torch.dtype, lora: bool) -> Any:
    """transformers' model to be trained: all of it in float32, or with peft's LoRA of rank 8 beside every linear layer
    of the language model, which stays in `dtype` (the dtype of the matrix products)."""
    import torch
    import transformers

    from paligemma.train.parts import LINEAR_LAYERS

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kept = dtype if lora else torch.float32
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=kept)
    if not lora:
        return model
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR_LAYERS["decoder"]))
