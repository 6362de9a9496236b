"""PaliGemma 1 and 2 from scratch in PyTorch.

    import paligemma

    pg = paligemma.load("tiny")            # or a hub id, a folder, a big_vision .npz
    pg.caption("photo.png").text           # a sentence
    pg.ask("photo.png", "what is this ?").text
    pg.detect("photo.png", ["dog", "cat"]) # boxes in pixels; a notebook shows them over the picture
    pg.segment("photo.png", ["dog"])       # boxes and masks
    pg.generate("photo.png", "caption en") # any prompt; lists in, lists out
    for piece in pg.stream("photo.png", "caption en"): ...

What else there is, by what it is for:

    results        Answer, Detection, Segment, Items, Parsed, parse
    files          load_hf_model, save_pretrained, convert, merge, quantize, load_tokenizer, load_image
    inputs         PaliGemmaProcessor, Tokenizer, MaskCodec
    generation     generate, Options, Generated, prefill, decode_one_token, KVCache, StaticKVCache
    many rows      Engine, Request, Ticket: rows that come and go
    the model      PaliGemmaForConditionalGeneration, GemmaModel, GemmaAttention, GemmaMLP, SiglipVisionModel,
                   SiglipVisionTransformer, PaliGemmaConfig, GemmaConfig, SiglipVisionConfig
    many pictures  Predictor, for Ray Data; the command is `paligemma batch`
    look inside    explore: explore.look(pg, "photo.png", "caption en"), and what follows from it

A name is imported when it is first used: `import paligemma` alone is instant and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paligemma import explore
    from paligemma.answers.mask_codec import MaskCodec
    from paligemma.answers.parsing import parse
    from paligemma.answers.results import Answer, Detection, Items, Parsed, Segment
    from paligemma.batch.predictor import Predictor
    from paligemma.engine import Engine, generate
    from paligemma.fast.swap import quantize
    from paligemma.generation import Generated, Options, decode_one_token, prefill
    from paligemma.images import load_image
    from paligemma.inference import PaliGemma, load
    from paligemma.kv_cache import KVCache
    from paligemma.modeling_gemma import (
        GemmaAttention,
        GemmaConfig,
        GemmaMLP,
        GemmaModel,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
    )
    from paligemma.modeling_siglip import SiglipVisionConfig, SiglipVisionModel, SiglipVisionTransformer
    from paligemma.processing_paligemma import PaliGemmaProcessor
    from paligemma.static_kv_cache import StaticKVCache
    from paligemma.tickets import Request, Ticket
    from paligemma.tokenizer import Tokenizer, load_tokenizer
    from paligemma.utils import load_hf_model
    from paligemma.weights.converting import convert, merge
    from paligemma.weights.saving import save_pretrained

__version__ = "0.1.0"

# Where each name is defined.
_HOME = {
    "inference": "PaliGemma load",
    "answers.results": "Answer Detection Items Parsed Segment",
    "answers.parsing": "parse",
    "answers.mask_codec": "MaskCodec",
    "engine": "Engine generate",
    "batch.predictor": "Predictor",
    "generation": "Generated Options decode_one_token prefill",
    "kv_cache": "KVCache",
    "static_kv_cache": "StaticKVCache",
    "modeling_gemma": "GemmaAttention GemmaConfig GemmaMLP GemmaModel PaliGemmaConfig "
    "PaliGemmaForConditionalGeneration",
    "modeling_siglip": "SiglipVisionConfig SiglipVisionModel SiglipVisionTransformer",
    "images": "load_image",
    "tickets": "Request Ticket",
    "tokenizer": "Tokenizer load_tokenizer",
    "processing_paligemma": "PaliGemmaProcessor",
    "utils": "load_hf_model",
    "weights.saving": "save_pretrained",
    "weights.converting": "convert merge",
    "fast.swap": "quantize",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Answer",
    "Detection",
    "Engine",
    "GemmaAttention",
    "GemmaConfig",
    "GemmaMLP",
    "GemmaModel",
    "Generated",
    "Items",
    "KVCache",
    "MaskCodec",
    "Options",
    "PaliGemma",
    "PaliGemmaConfig",
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaProcessor",
    "Parsed",
    "Predictor",
    "Request",
    "Segment",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "SiglipVisionTransformer",
    "StaticKVCache",
    "Ticket",
    "Tokenizer",
    "__version__",
    "convert",
    "decode_one_token",
    "explore",
    "generate",
    "load",
    "load_hf_model",
    "load_image",
    "load_tokenizer",
    "merge",
    "parse",
    "prefill",
    "quantize",
    "save_pretrained",
]


def __getattr__(name: str) -> object:
    if name == "explore":  # a package, whose functions are public
        return import_module("paligemma.explore")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'paligemma' has no attribute {name!r}")
    value = getattr(import_module(f"paligemma.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
