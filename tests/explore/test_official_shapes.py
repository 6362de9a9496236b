"""Looking into a model of the published sizes: what it costs, and how large the page becomes.

The page depends on the numbers of layers, heads and patches alone, so its size is tested on narrow models. What looking
costs is measured on random weights of the published widths, with 7 GB of memory and for minutes:

    pytest tests/explore/test_official_shapes.py -m official -s
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tokenizer import build_tokenizer
from reference import randomize

import paligemma
from paligemma import explore
from paligemma.bench.worker import peak_memory_of_process
from paligemma.inference import PaliGemma
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.weights.expected import empty_model, expected_shapes
from paligemma.weights.published import published_config

PICTURE = np.random.default_rng(3).integers(0, 256, (300, 400, 3), dtype=np.uint8)
QUESTION = "answer en what is this ?"
ANSWER = "the " * 30  # a word each


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def with_processor(model, tokenizer) -> PaliGemma:
    return PaliGemma(model, PaliGemmaProcessor.for_config(tokenizer, model.config))


def narrow(tokenizer, image_size: int) -> PaliGemma:
    """The layers, heads and patches of PaliGemma 2 3b, at a hundredth of the width."""
    config = published_config("paligemma2-3b", image_size)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "vocab_size": 2048}
    text = replace(config.text_config, **sizes, query_pre_attn_scalar=8)
    vision = SiglipVisionConfig(16, 32, 1, 2, image_size)
    model = PaliGemmaForConditionalGeneration(replace(
        config, text_config=text, vision_config=vision, image_token_index=tokenizer.image_token_id
    )).eval()  # fmt: skip
    assert (text.num_hidden_layers, text.num_attention_heads) == (26, 8)
    randomize(model)  # attention that chooses: even weights would pack too well
    return with_processor(model, tokenizer)


@pytest.mark.parametrize(
    ("image_size", "megabytes", "coarser"),
    [
        (224, 3, ""),
        pytest.param(448, 6, "", marks=pytest.mark.slow),
        pytest.param(896, 8, "2 x 2 patches share", marks=pytest.mark.official),
    ],
)
def test_the_page_of_26_layers_is_small_and_says_what_it_leaves_out(
    image_size, megabytes, coarser, tokenizer, tmp_path
):
    look = explore.look(narrow(tokenizer, image_size), PICTURE, QUESTION, ANSWER)
    assert len(look.answer_ids) >= 30
    page = tmp_path / "look.html"
    left_out = explore.page(look, page, knock_out=False, routes=False)
    text = page.read_text(encoding="utf-8")
    print(f"\n{image_size}: {len(text.encode()) / 1e6:.2f} MB, left out: {left_out}")
    assert len(text.encode()) <= megabytes * 1e6
    assert coarser in left_out.get("attention", "") and ("attention" in left_out) == bool(coarser)
    assert {"knock-out", "routes"} <= set(left_out)
    for what, why in left_out.items():
        assert f"{what}: {why}" in text  # for the reader of the page as well
    if image_size > 224:  # all queries at once are refused with the gigabytes that they would take
        queries = len(look.input_ids)
        gigabytes = 26 * 8 * queries * queries * 4 / 1e9
        with pytest.raises(ValueError, match=rf"{queries:,} queries would take {gigabytes:.1f} GB, at most 0.5"):
            explore.attention(look, "all")


def official(tokenizer, name: str, image_size: int) -> PaliGemma:
    """Random weights in bfloat16, with the kernels. The values decide nothing here, so layers share a block of them."""
    config = replace(published_config(name, image_size), image_token_index=tokenizer.image_token_id)
    model, shapes = empty_model(config).eval(), expected_shapes(config)
    block = torch.randn(max(map(math.prod, shapes.values())), dtype=torch.bfloat16).mul_(0.02)
    model.load_state_dict({n: block[: math.prod(s)].view(s) for n, s in shapes.items()}, assign=True)
    return with_processor(paligemma.quantize(model, "bf16"), tokenizer)


def reset_peak() -> int:
    """Linux forgets the most memory that this process ever held. Returns what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_of_process()


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resets the peak in /proc/self/clear_refs")
@pytest.mark.parametrize("image_size", [224, 448])
@pytest.mark.parametrize("name", ["paligemma-3b", "paligemma2-3b"])
def test_capturing_text_queries_costs_next_to_nothing(name, image_size, tokenizer):
    pg = official(tokenizer, name, image_size)
    explore.look(pg, PICTURE, QUESTION, "a")  # what is allocated and compiled once
    begun = time.process_time()
    look = explore.look(pg, PICTURE, QUESTION, ANSWER)
    looking = time.process_time() - begun
    begun, before = time.process_time(), reset_peak()
    weights = explore.attention(look, "text").weights
    capturing, most = time.process_time() - begun, peak_memory_of_process() - before
    print(
        f"\n{name} at {image_size}: {looking:.1f} CPU s for the pass, {capturing:.2f} for the weights "
        f"{list(weights.shape)} ({capturing / looking:.1%}), {most / 1e6:.0f} MB"
    )
    assert capturing <= 0.1 * looking and most <= 200e6
    if image_size == 448:
        with pytest.raises(ValueError, match=r"queries would take 0\.\d GB"):
            explore.attention(look, "all")
