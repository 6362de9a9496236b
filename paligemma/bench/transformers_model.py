"""transformers' PaliGemma, timed beside ours. No other file of the package imports transformers, an optional package.

It runs as its documentation says: `from_pretrained` in bfloat16 with its default attention, then greedy `generate`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def installed() -> bool:
    return find_spec("transformers") is not None


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
