"""ColPali and pi0 over the public face alone: they compute what they are named after, and fit on a page."""

import ast
import copy
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_tokenizer import build_tokenizer
from reference import make_theirs, randomize, tiny_config
from torch import nn
from torch.testing import assert_close

import paligemma
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration, apply_rotary, explicit_attention, rotary_tables

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = {"gemma": {"num_key_value_heads": 1}, "gemma2": {"sliding_window": 400}}


def opened(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


colpali, pi0 = opened("colpali"), opened("pi0")


@pytest.mark.parametrize("name", ["colpali", "pi0"])
def test_an_example_is_a_page_over_public_names(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "paligemma"
        elif isinstance(node, ast.Import):
            assert all(alias.name == "paligemma" or "paligemma" not in alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__init__"
            if isinstance(node.value, ast.Name) and node.value.id == "paligemma":
                assert node.attr in paligemma.__all__


# ---------------------------------------------------------------------------------------------- ColPali


@pytest.fixture(scope="module", params=FAMILIES)
def pg(request, tmp_path_factory):
    """A small random model with `custom_text_proj`, through a checkpoint as it is published."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = paligemma.load_tokenizer(build_tokenizer(folder))
    rows = (len(tokenizer) + 63) // 64 * 64
    sizes = {"vocab_size": rows, "image_token_index": tokenizer.image_token_id, **FAMILIES[request.param]}
    model = paligemma.PaliGemmaForConditionalGeneration(tiny_config(request.param, **sizes)).eval()
    randomize(model)
    torch.manual_seed(1)
    model.custom_text_proj = nn.Linear(32, colpali.DIM)
    processor = paligemma.PaliGemmaProcessor(tokenizer, 4, 28)
    paligemma.save_pretrained(model, folder / "base", processor, extra=["custom_text_proj"])
    return colpali.load(folder / "base", 32, device="cpu", dtype="float32")


class Reference(nn.Module):
    """The published class, from its description: transformers' model, its last hidden states, a layer, length 1."""

    def __init__(self, model, custom_text_proj):
        super().__init__()
        self.model, self.custom_text_proj = model, custom_text_proj

    @torch.no_grad()
    def forward(self, input_ids, attention_mask, token_type_ids, pixel_values=None):
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            pixel_values=pixel_values,
        ).last_hidden_state
        vectors = self.custom_text_proj(hidden)
        return vectors / vectors.norm(dim=-1, keepdim=True) * attention_mask[..., None]


@pytest.fixture(scope="module")
def reference(pg):
    own = PaliGemmaForConditionalGeneration(pg.model.config).eval()
    own.load_state_dict({name: x for name, x in pg.model.state_dict().items() if "custom" not in name})
    return Reference(make_theirs(own).model, pg.model.custom_text_proj)


@pytest.fixture
def pictures():
    return [np.random.default_rng(n).integers(0, 256, (40, 30, 3), dtype=np.uint8) for n in range(2)]


def test_pages_equal_the_reference(pg, reference, pictures):
    found = colpali.pages(pg, pictures)
    token = pg.processor.tokenizer
    row = [token.image_token_id] * 4 + [token.bos_token_id] * 2 + token.encode("Describe the image.\n")
    ids = torch.tensor([row, row])
    pixels = pg.processor(text=["", ""], images=pictures)["pixel_values"]
    expected = reference(ids, torch.ones_like(ids), torch.zeros_like(ids), pixels)
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_padded_queries_equal_the_reference(pg, reference):
    texts = ["a red car", "two dogs and a very small house ?"]
    found = colpali.queries(pg, texts)
    token = pg.processor.tokenizer
    rows = [[token.bos_token_id, *token.encode(f"Query: {text}"), *[token.pad_token_id] * 10, *token.encode("\n")]
            for text in texts]  # fmt: skip
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    expected = reference(ids, mask, torch.ones_like(ids))  # causal: everything is suffix
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found[0, len(rows[0]) :] == 0).all() and len(rows[0]) < longest


def test_the_most_similar_patch_of_every_word_counts():
    q, p = F.normalize(torch.randn(2, 5, 8), dim=-1), F.normalize(torch.randn(3, 7, 8), dim=-1)
    expected = torch.tensor([[sum(max(float(a @ b) for b in page) for a in query) for page in p] for query in q])
    assert_close(colpali.scores(q, p), expected)


@pytest.mark.slow
def test_an_adapter_in_the_published_layout_equals_pefts_merge(pg, reference, pictures, tmp_path):
    """LoRA on the language model and on `custom_text_proj`, as the published adapters have it, folded in at loading."""
    peft = pytest.importorskip("peft")
    names = ["q_proj", "v_proj", "down_proj", "custom_text_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        target_modules=f".*(language_model.*({'|'.join(names[:3])})|{names[3]})",
    )
    tuned = peft.get_peft_model(copy.deepcopy(reference), config)
    torch.manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    tuned.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    paligemma.save_pretrained(pg.model, tmp_path / "base", pg.processor, extra=["custom_text_proj"])
    pg.processor.save_pretrained(tmp_path / "adapter")
    loaded = colpali.load(tmp_path / "adapter", 32, device="cpu", dtype="float32")
    merged = tuned.merge_and_unload()
    token = pg.processor.tokenizer
    row = [token.image_token_id] * 4 + [token.bos_token_id] * 2 + token.encode("Describe the image.\n")
    ids = torch.tensor([row])
    pixels = pg.processor(text=[""], images=pictures[:1])["pixel_values"]
    expected = merged(ids, torch.ones_like(ids), torch.zeros_like(ids), pixels)
    found = colpali.pages(loaded, pictures[:1])
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - colpali.pages(pg, pictures[:1])).abs().max() > 1e-3  # the adapter changes something


# ---------------------------------------------------------------------------------------------- pi0


@pytest.fixture(scope="module")
def policy():
    model = paligemma.PaliGemmaForConditionalGeneration(tiny_config("gemma", num_key_value_heads=1)).eval()
    randomize(model)
    torch.manual_seed(3)
    return pi0.Pi0(model, width=16, numbers=5, horizon=6).eval()


@pytest.fixture
def prefix(policy):
    """Two rows, one of them padded, whose images stand first."""
    ids = torch.tensor([[300] * 4 + [2, 11, 12, 13, 14], [300] * 4 + [2, 15, 16, 0, 0]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 7:] = False
    return ids, policy.model.encode_image(torch.rand(2, 3, 28, 28) * 2 - 1), valid


def joint_velocity(policy, prefix, state, actions, time):
    """pi0 in one pass over prefix, state and actions, without any cache: in each layer two sets of weights, and one
    attention over all. Written from the paper's appendix B and the description of its release."""
    ids, features, valid = prefix
    half = policy.width // 2
    period = torch.tensor([4e-3 * (4.0 / 4e-3) ** (i / (half - 1)) for i in range(half)])
    angle = 2 * torch.pi * time / period
    of_time = torch.cat([angle.sin(), angle.cos()]).expand(*actions.shape[:2], -1)
    suffix = policy.with_time(torch.cat([policy.action_in(actions), of_time], -1))
    streams = [policy.model.embed(ids, features), torch.cat([policy.state(state)[:, None], suffix], 1)]
    S, N = streams[0].shape[1], streams[1].shape[1]
    real = torch.cat([valid, torch.ones(len(ids), N, dtype=torch.bool)], 1)
    block = torch.tensor([0] * S + [1] + [2] * (N - 1))  # a block sees itself and the blocks before it
    mask = (block[None, :] <= block[:, None]) & real[:, None, :]
    mask = (mask | torch.diag_embed(~real))[:, None]
    places = (real.cumsum(-1) - 1).clamp(min=0)
    text = policy.text
    cos, sin = rotary_tables(places, text.head_dim, text.rope_theta, torch.float32)
    models = [policy.model.language_model.model, policy.expert]
    for layers in zip(*(model.layers for model in models)):
        normed = [layer.input_layernorm(x) for layer, x in zip(layers, streams)]
        q, k, v = (
            torch.cat([getattr(layer.self_attn, name)(x) for layer, x in zip(layers, normed)], 1)
            .unflatten(-1, (-1, text.head_dim))
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = explicit_attention(
            apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask, text.head_dim**-0.5, None
        )
        parts = out.transpose(1, 2).flatten(-2).split([S, N], 1)
        streams = [x + layer.self_attn.o_proj(part) for layer, x, part in zip(layers, streams, parts)]
        streams = [x + layer.mlp(layer.post_attention_layernorm(x)) for layer, x in zip(layers, streams)]
    return policy.action_out(policy.expert.norm(streams[1])[:, 1:])


@torch.no_grad()
def test_the_cached_velocity_equals_one_joint_pass(policy, prefix):
    state, actions = torch.randn(2, 5), torch.randn(2, 6, 5)
    for time in (1.0, 0.3):
        found = policy.velocity(policy.read(*prefix), state, actions, time)
        assert_close(found, joint_velocity(policy, prefix, state, actions, time), rtol=0, atol=1e-5)


@torch.no_grad()
def test_ten_steps_read_one_prefix_that_stays_as_it_is(policy, prefix):
    state, noise = torch.randn(2, 5), torch.randn(2, 6, 5)
    cache, reads = policy.read(*prefix), []
    used = cache.used
    before = [tensor[:, :, :used].clone() for tensor in (*cache.keys, *cache.values)]
    lengths = cache.lengths.clone()
    actions = noise
    for step in range(10):
        actions = actions - policy.velocity(cache, state, actions, 1 - step / 10) / 10
    after = [tensor[:, :, :used] for tensor in (*cache.keys, *cache.values)]
    assert cache.used == used and torch.equal(cache.lengths, lengths)
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    hook = policy.model.language_model.model.layers[0].register_forward_pre_hook(lambda *_: reads.append(1))
    found = policy.act(*prefix, state, noise)
    hook.remove()
    assert_close(found, actions, rtol=0, atol=0)
    assert len(reads) == 1  # PaliGemma ran once


@torch.no_grad()
def test_the_state_does_not_see_the_actions(policy, prefix):
    """Actions that change must change nothing in what the state's column computes."""
    cache, state = policy.read(*prefix), torch.randn(2, 5)
    seen = []
    hook = policy.expert.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for _ in range(2):
        policy.velocity(cache, state, torch.randn(2, 6, 5), 0.5)
    hook.remove()
    assert_close(seen[0][:, 0], seen[1][:, 0], rtol=0, atol=0)
    assert (seen[0][:, 1:] - seen[1][:, 1:]).abs().max() > 0.01


def commands(page: str) -> list[str]:
    (block,) = re.findall(r"```sh\n(.*?)```", (EXAMPLES.parent / "docs" / page).read_text(encoding="utf-8"), re.S)
    return block.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("building_on_top.md"))
def test_a_command_of_the_page_runs(command):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
