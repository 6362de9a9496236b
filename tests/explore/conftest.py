"""A random model of each family, small and in float32, behind the face that people use; and the model that ships."""

from collections.abc import Callable

import numpy as np
import pytest
from make_tokenizer import build_tokenizer
from reference import randomize, tiny_config

import paligemma
from paligemma.inference import PaliGemma
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer

FAMILIES = {"gemma": {"num_key_value_heads": 1}, "gemma2": {"sliding_window": 4, "num_hidden_layers": 3}}


@pytest.fixture(scope="session")
def make_pg(tmp_path_factory) -> Callable[..., PaliGemma]:
    """(family, **sizes) -> a random model of these sizes."""
    tokenizer = load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    rows = (len(tokenizer) + 63) // 64 * 64

    def make(family: str, **sizes: int) -> PaliGemma:
        sizes = {**FAMILIES[family], "vocab_size": rows, "image_token_index": tokenizer.image_token_id, **sizes}
        model = PaliGemmaForConditionalGeneration(tiny_config(family, **sizes)).eval()
        randomize(model)
        return PaliGemma(model, PaliGemmaProcessor(tokenizer, 4, 28))

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def random_pg(request, make_pg) -> PaliGemma:
    return make_pg(request.param)


@pytest.fixture(scope="session")
def tiny() -> PaliGemma:
    return paligemma.load("tiny", device="cpu", dtype="float32")


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
