"""PaliGemma 1 and 2 from scratch in PyTorch.

    import paligemma

    pg = paligemma.load("tiny")
    pg.caption("photo.png").text

The public names are imported when they are first used: `import paligemma` alone is instant and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec
    from paligemma.answers.parsing import parse
    from paligemma.answers.results import Detection, Parsed, Segment
    from paligemma.generation import Generated, generate
    from paligemma.images import load_image
    from paligemma.inference import Answer, PaliGemma, load
    from paligemma.modeling_gemma import (
        GemmaAttention,
        GemmaConfig,
        GemmaMLP,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
    )
    from paligemma.modeling_siglip import SiglipVisionConfig, SiglipVisionTransformer
    from paligemma.processing_paligemma import PaliGemmaProcessor
    from paligemma.tokenizer import Tokenizer, load_tokenizer
    from paligemma.utils import load_hf_model

__version__ = "0.1.0"

_HOME = {
    "inference": ("Answer", "PaliGemma", "load"),
    "answers.parsing": ("parse",),
    "answers.results": ("Detection", "Parsed", "Segment"),
    "generation": ("Generated", "generate"),
    "answers.mask_codec": ("MaskCodec",),
    "modeling_gemma": (
        "GemmaAttention",
        "GemmaConfig",
        "GemmaMLP",
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
    ),
    "modeling_siglip": ("SiglipVisionConfig", "SiglipVisionTransformer"),
    "images": ("load_image",),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
    "processing_paligemma": ("PaliGemmaProcessor",),
    "utils": ("load_hf_model",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Answer",
    "Detection",
    "GemmaAttention",
    "GemmaConfig",
    "GemmaMLP",
    "Generated",
    "MaskCodec",
    "PaliGemma",
    "PaliGemmaConfig",
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaProcessor",
    "Parsed",
    "Segment",
    "SiglipVisionConfig",
    "SiglipVisionTransformer",
    "Tokenizer",
    "__version__",
    "generate",
    "load",
    "load_hf_model",
    "load_image",
    "load_tokenizer",
    "parse",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'paligemma' has no attribute {name!r}")
    value = getattr(import_module(f"paligemma.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
