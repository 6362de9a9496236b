"""Numbers that do not come from this code: worked by hand, or by transformers 5.23 with weights from a formula.

They hold without transformers installed, and they say which part is wrong when something is.
"""

import math

import pytest
import torch
from reference import tiny_config
from torch.testing import assert_close

from paligemma.attention_mask import prefix_lm_mask
from paligemma.modeling_gemma import (
    GemmaForCausalLM,
    GemmaMLP,
    GemmaModel,
    GemmaRMSNorm,
    PaliGemmaForConditionalGeneration,
    apply_rotary,
    explicit_attention,
    rotary_tables,
)
from paligemma.modeling_siglip import SiglipMLP

# ---------------------------------------------------------------------------------------------- parts


def test_rotary_positions_turn_halves():
    """Position 3, head size 8: the pairs are (1, 5), (2, 6), (3, 7), (4, 8), turned by 3, 0.3, 0.03, 0.003."""
    q = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    cos, sin = rotary_tables(torch.tensor([[3]]), head_dim=8, theta=10000.0, dtype=torch.float32)
    expected = [-1.695593, 0.137552, 2.788682, 3.975982, -4.808843, 6.323059, 7.086837, 8.011964]
    assert_close(apply_rotary(q, cos, sin).flatten(), torch.tensor(expected), atol=2e-6, rtol=0)


def test_rotary_frequencies_of_the_published_head_size():
    cos, sin = rotary_tables(torch.tensor([[1]]), head_dim=256, theta=10000.0, dtype=torch.float32)
    angles = torch.atan2(sin, cos).flatten()  # at position 1 the angles are the frequencies
    assert angles.shape == (128,)
    expected = torch.tensor([1.0, 0.9305720, 1.0746078e-4])
    assert_close(angles[[0, 1, 127]], expected, atol=0, rtol=1e-6)


def test_rotary_tables_are_computed_in_float32_and_rounded_last():
    """In bfloat16 the position 4097 itself would already be 4096."""
    exact, _ = rotary_tables(torch.tensor([[4097]]), head_dim=256, theta=10000.0, dtype=torch.float32)
    rounded, _ = rotary_tables(torch.tensor([[4097]]), head_dim=256, theta=10000.0, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_rms_norm_multiplies_by_one_plus_weight():
    norm = GemmaRMSNorm(4, eps=1e-6)
    norm.weight.data = torch.tensor([0.0, 0.5, -0.5, 1.0])
    expected = torch.tensor([0.365148, -1.095445, 0.547723, -2.921187])
    assert_close(norm(torch.tensor([1.0, -2.0, 3.0, -4.0])), expected, atol=1e-6, rtol=0)


def test_rms_norm_rounds_once():
    """In bfloat16 1 + 0.003 would be 1 again, and the weight gone: everything is float32 up to the last step."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.full((64,), 0.003).bfloat16()
    norm = GemmaRMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data = weight
    unit = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), (unit * (1 + weight.double())).bfloat16())
    assert not torch.equal(norm(x), unit.bfloat16() * (1 + weight))  # what rounding on the way would give


def test_logits_are_capped_at_30():
    head = GemmaForCausalLM(tiny_config("gemma2").text_config)
    head.model.embed_tokens.weight.data = torch.zeros(320, 32).index_fill_(1, torch.tensor([0]), 1.0)
    hidden = torch.zeros(1, 32)
    hidden[0, 0] = 10.0
    assert_close(head.logits(hidden)[0, 0].item(), 9.645383, atol=2e-6, rtol=0)


def test_attention_scores_are_capped_at_50_before_the_mask():
    """Scores 100 and 52 are capped to 48.2 and 38.9; a third key, of score 100, is masked and stays so.

    Only the second key has the value 1, so what comes out is its weight.
    """
    q = torch.tensor([100.0]).view(1, 1, 1, 1)
    k = torch.tensor([1.0, 0.52, 1.0]).view(1, 1, 3, 1)
    v = torch.tensor([0.0, 1.0, 7.0]).view(1, 1, 3, 1)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    weight = explicit_attention(q, k, v, mask, scale=1.0, softcap=50.0).item()
    difference = 48.201378 - 50 * math.tanh(52 / 50)
    assert_close(weight, 1 / (1 + math.exp(difference)), atol=0, rtol=1e-4)


def test_gelu_is_the_tanh_approximation():
    """-1, 0.5 and 2 through both kinds of MLP with identity weights."""
    x, expected = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([-0.158808, 0.345714, 1.954598])
    config = tiny_config("gemma", hidden_size=3, intermediate_size=3)
    gated = GemmaMLP(config.text_config)
    gated.gate_proj.weight.data = gated.down_proj.weight.data = torch.eye(3)
    gated.up_proj.weight.data = torch.diag(1 / x)  # opens every gate to 1
    assert_close(gated(x), expected, atol=1e-6, rtol=0)

    config = tiny_config("gemma", vision_hidden_size=3, vision_intermediate_size=3, vision_num_attention_heads=1)
    plain = SiglipMLP(config.vision_config)
    for linear in (plain.fc1, plain.fc2):
        linear.weight.data, linear.bias.data = torch.eye(3), torch.zeros(3)
    assert_close(plain(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width, scale", [(2048, 45.25), (2304, 48.0), (3584, 59.75), (4608, 68.0)])
def test_text_embeddings_are_scaled_by_the_rounded_root_of_the_width(width, scale):
    """In bfloat16, as in training. In float32 the four are 45.2548, 48, 59.8665 and 67.8823."""
    text = tiny_config("gemma", hidden_size=width, vocab_size=1, num_hidden_layers=1, intermediate_size=1).text_config
    model = GemmaModel(text).bfloat16()
    table, row = model.embed_tokens.weight.data.double(), torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(model.embed(row)[0], (table * scale).bfloat16())
    if scale != math.sqrt(width):
        assert not torch.equal(model.embed(row)[0], (table * math.sqrt(width)).bfloat16())
    assert_close(model.float().embed(row)[0].double(), table * math.sqrt(width))


def test_mask_rows():
    """Four image tokens, bos, two words, newline; then three of the answer."""
    types = torch.tensor([[0] * 8 + [1] * 3])
    valid = torch.ones(1, 11, dtype=torch.bool)

    def seen(window):
        return [row.nonzero().flatten().tolist() for row in prefix_lm_mask(types, valid, window)[0, 0]]

    prefix = list(range(8))
    assert seen(None) == [prefix] * 8 + [list(range(9)), list(range(10)), list(range(11))]
    assert seen(4) == [prefix] * 8 + [[5, 6, 7, 8], [6, 7, 8, 9], [7, 8, 9, 10]]


# ---------------------------------------------------------------------------------------------- the whole model

IDS = torch.tensor([[300] * 4 + [2, 5, 6, 108, 7, 8, 1]])
TYPES = torch.tensor([[0] * 8 + [1] * 3])
LABELS = IDS.masked_fill(TYPES == 0, -100)
PIXELS = torch.sin(0.01 * torch.arange(3 * 28 * 28, dtype=torch.float64)).float().view(1, 3, 28, 28)


def model_of_sines(kind, **overrides):
    """Parameter number k in the order of its name, element number i: 0.3 sin(k + 0.37 i + 0.0013 i^2)."""
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **overrides)).eval()
    parameters = dict(model.named_parameters())
    for k, name in enumerate(sorted(parameters)):
        i = torch.arange(parameters[name].numel(), dtype=torch.float64)
        values = 0.3 * torch.sin(k + 0.37 * i + 0.0013 * i * i)
        parameters[name].data = values.float().view(parameters[name].shape)
    return model


def assert_near(tensor, expected, tolerance=1e-4):
    assert_close(tensor.detach().flatten(), torch.tensor(expected), atol=tolerance, rtol=0)


@torch.no_grad()
def test_gemma_end_to_end():
    model = model_of_sines("gemma")
    assert len(model.state_dict()) == 59
    assert sum(p.numel() for p in model.parameters()) == 49_488

    assert_near(model.vision_tower(PIXELS)[0, 0, :3], [-0.064121, 0.163458, 0.230413], 1e-5)
    features = model.encode_image(PIXELS)
    assert_near(features[0, 0, :3], [0.181847, 0.023629, -0.431831], 1e-5)
    assert_near(features.sum(), [-3.176926], 1e-5)

    out = model(IDS, PIXELS, token_type_ids=TYPES, labels=LABELS)
    assert_near(out.logits[0, 0, :4], [-2.8060, 0.7640, -1.4409, -2.0055])
    assert_near(out.logits[0, 7, :4], [-0.1746, 1.1426, -1.0155, -0.5319])
    assert_near(out.logits[0, 10, :4], [-2.6995, 1.7688, -0.2238, -0.7293])
    assert out.logits[0, [7, 10]].argmax(-1).tolist() == [93, 39]
    assert_near(out.loss, [6.740128], 1e-5)


@torch.no_grad()
def test_gemma2_end_to_end():
    model = model_of_sines("gemma2")
    assert len(model.state_dict()) == 63
    assert sum(p.numel() for p in model.parameters()) == 49_616

    assert_near(model.vision_tower(PIXELS)[0, 0, :3], [-0.174821, -0.282988, -0.268230], 1e-5)
    features = model.encode_image(PIXELS)
    assert_near(features[0, 0, :3], [-0.237877, -0.386190, -0.890218], 1e-5)
    assert_near(features.sum(), [-5.884649], 1e-5)

    out = model(IDS, PIXELS, token_type_ids=TYPES, labels=LABELS)
    assert_near(out.logits[0, 0, :4], [-0.4018, -1.1478, 0.6785, -0.7663])
    assert_near(out.logits[0, 7, :4], [0.7659, -0.9199, -0.3744, 0.1841])
    assert_near(out.logits[0, 10, :4], [-0.6042, 2.6664, 1.2047, 2.3050])
    assert out.logits[0, [7, 10]].argmax(-1).tolist() == [184, 146]
    assert_near(out.loss, [7.797540], 1e-5)


@torch.no_grad()
def test_a_causal_prefix_would_show():
    """The wrong answer is known as well: with every token causal, the last position reads otherwise."""
    out = model_of_sines("gemma")(IDS, PIXELS, token_type_ids=torch.ones_like(TYPES))
    assert_near(out.logits[0, 10, :4], [-2.4151, 1.9427, -0.1894, -0.8035])


@torch.no_grad()
def test_a_missing_window_would_show():
    out = model_of_sines("gemma2", sliding_window=4096)(IDS, PIXELS, token_type_ids=TYPES)
    assert_near(out.logits[0, 10, :4], [-0.4247, 2.9065, 2.3766, 2.3843])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_bfloat16_stays_near(kind):
    exact = model_of_sines(kind)(IDS, PIXELS, token_type_ids=TYPES).logits
    rounded = model_of_sines(kind).bfloat16()(IDS, PIXELS, token_type_ids=TYPES).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).square().mean().sqrt() < 0.05  # of logits that are 1.25 in the same measure
