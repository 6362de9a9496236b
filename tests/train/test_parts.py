"""Which weights learn and how: frozen parts, LoRA where it was asked for, dropout in its place, recomputed layers."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import make_inputs, make_pair

from paligemma.engine import generate
from paligemma.fast.swap import quantize
from paligemma.kv_cache import KVCache
from paligemma.train.loop import TrainConfig, train
from paligemma.train.loss import suffix_loss
from paligemma.train.parts import add_lora, checkpoint_gradients, freeze, set_dropout, suit_cpu
from paligemma.weights.expected import empty_model
from paligemma.weights.published import published_config

KINDS = ("gemma", "gemma2")


def make_model(kind="gemma"):
    return make_pair(kind)[0].train()


def make_batch(model):
    return make_inputs(model.config, prefix=[5, 3], suffix=[2, 4], side="right", labels=True)


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def loss_and_gradients(model, seed=0):
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    total, _, _ = suffix_loss()(model, make_batch(model))
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ freezing

OF_PART = {
    "vision": "vision_tower.",
    "projector": "multi_modal_projector.",
    "decoder": "language_model.",
    "embedding": "language_model.model.embed_tokens.",
}


@pytest.mark.parametrize(
    "parts", [["vision"], ["projector"], ["decoder"], ["embedding"], ["vision", "projector"], ["vision", "embedding"]]
)
def test_frozen_parts_stay_and_the_others_learn(parts, tmp_path):
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze(model, parts)
    batch = make_batch(model)
    config = TrainConfig(steps=1, lr=1e-3, warmup=0.0, weight_decay=0.1, autocast=None)
    train(model, lambda step, part, parts: batch, config, tmp_path)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(tuple(OF_PART[part] for part in parts))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_the_parts_are_the_whole_model():
    """Those of PaliGemma 1 at 224 pixels, whose sizes are known."""
    sizes = {}
    for part in OF_PART:
        model = empty_model(published_config("paligemma-3b", 224))
        everything = count(model)
        freeze(model, part)
        sizes[part] = everything - count(model)
    assert everything == sizes["vision"] + sizes["projector"] + sizes["decoder"] == 2_923_466_480
    assert sizes["vision"] == 412_442_352 and sizes["embedding"] == 257_216 * 2048


def test_something_must_be_left_to_learn():
    model = make_model()
    with pytest.raises(ValueError, match="vision, projector, decoder frozen nothing is left"):
        freeze(model, ["vision", "projector", "decoder"])
    assert len(learning(model)) == len(list(model.parameters())), "and after the error all is as before"
    freeze(model, ["vision"])
    freeze(model, ["projector"])
    with pytest.raises(ValueError, match="nothing is left"):
        freeze(model, ["decoder"])


def test_a_name_that_is_no_part():
    with pytest.raises(ValueError, match=r"no part 'eye'.*choose of vision, projector, decoder, embedding"):
        freeze(make_model(), ["vision", "eye"])
    with pytest.raises(ValueError, match=r"no part 'embedding'.*choose of vision, projector, decoder$"):
        add_lora(make_model(), ["embedding"])


# ------------------------------------------------------------------------------------------------ LoRA


def test_lora_in_the_decoder_leaves_the_eye_alone():
    """The usual list of names finds the queries, keys and values of SigLIP too: 11,298,816 numbers learn, as in the
    known notebook. The decoder's own are 9,805,824."""
    import peft

    usual = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    model = empty_model(published_config("paligemma-3b", 224))
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=usual), model)
    assert count(model) == 11_298_816 and any("vision_tower" in name for name in learning(model))

    model = add_lora(empty_model(published_config("paligemma-3b", 224)), ["decoder"], rank=8)
    of_a_layer = 2 * 8 * (2048 + 2048) + 2 * 8 * (2048 + 256) + 3 * 8 * (2048 + 16384)  # q o, k v, gate up down
    assert count(model) == 18 * of_a_layer == 9_805_824
    assert all(name.startswith("language_model.") for name in learning(model))


@pytest.mark.parametrize(
    "parts, expected",
    [
        ("vision", 27 * 8 * (4 * (1152 + 1152) + 2 * (1152 + 4304))),  # q k v out, fc1 fc2
        ("projector", 8 * (1152 + 2304)),
        ("decoder", 26 * 8 * (2 * (2304 + 2048) + 2 * (2304 + 1024) + 3 * (2304 + 9216))),
    ],
)
def test_lora_goes_to_all_linear_layers_of_a_part_and_nowhere_else(parts, expected):
    model = add_lora(empty_model(published_config("paligemma2-3b", 224)), parts, rank=8)
    assert count(model) == expected
    assert all(name.startswith(OF_PART[parts]) and "lora_" in name for name in learning(model))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_begins_as_the_model_and_then_learns_alone(kind, tmp_path):
    model = make_model(kind)
    batch = make_batch(model)
    before = model(**batch).logits.detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    returned = add_lora(model, ["decoder", "projector"], rank=4)
    assert returned is model
    assert torch.equal(model(**batch).logits, before)

    last = train(
        model, lambda *_: batch, TrainConfig(steps=20, lr=1e-2, autocast=None, log_every=1), tmp_path, resume=False
    )
    assert last["loss"] < 0.5 * float(model_loss(before, batch))
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), name
        else:
            assert parameter.abs().sum() > 0, name


def model_loss(logits, batch):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_the_factor_is_alpha_over_rank():
    model = add_lora(make_model(), "projector", rank=4, alpha=6)
    layer = model.multi_modal_projector.linear
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 1.5 * x @ change.T)
    assert add_lora(make_model(), rank=16).peft_config["default"].lora_alpha == 16


def test_lora_learns_in_float32_beside_a_model_in_bfloat16():
    model = add_lora(make_model().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.dtype == torch.bfloat16
    total, gradients = loss_and_gradients(model)
    assert total.isfinite() and len(gradients) == len(learning(model))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"parts": []}])
def test_numbers_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"expected a rank|no part is named"):
        add_lora(make_model(), **settings)


def test_lora_is_added_once():
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(add_lora(make_model()))


def test_layers_that_let_no_gradient_through_are_refused():
    model = quantize(make_model().bfloat16().eval(), "int8")
    with pytest.raises(ValueError, match=r"q_proj is Int8Linear, which is for answering alone: load .* without"):
        add_lora(model)
    assert not hasattr(model, "peft_config")


@pytest.mark.filterwarnings("ignore")  # bitsandbytes without a GPU has a lot to say
def test_lora_beside_four_bits_learns_as_beside_the_rounded_weights():
    """QLoRA on a CPU: the gradients of a model whose weights are those four bits, written out."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vision_hidden_size": 64, "vision_intermediate_size": 64}
    rounded = quantize(make_pair("gemma", **sizes)[0], "nf4")
    plain = make_pair("gemma", **sizes)[0]
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            four_bits = rounded.get_submodule(name).weight
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(four_bits.data, four_bits.quant_state)
    gradients = []
    for model in (rounded, plain):
        torch.manual_seed(0)
        add_lora(model)
        checkpoint_gradients(model.train())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        gradients.append(loss_and_gradients(model)[1])
    assert gradients[0].keys() == gradients[1].keys() == learning(rounded)
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-3 * gradient.norm(), name


# ------------------------------------------------------------------------------------------------ dropout


def layer_inputs(model, layer):
    """What a decoder layer is called with on the batch, kept by a hook."""
    kept = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs))
    with torch.no_grad():
        model(**make_batch(model))
    handle.remove()
    return kept[0]


def test_dropout_stands_where_the_reference_has_it_in_gemma():
    model = make_model("gemma")
    set_dropout(model, 0.5)
    layer = model.language_model.model.layers[1]
    x, mask, cos, sin, *_ = layer_inputs(model, layer)
    torch.manual_seed(3)
    got = layer(x, mask, cos, sin)

    set_dropout(model, 0.0)
    torch.manual_seed(3)
    x = x + F.dropout(layer.self_attn(layer.input_layernorm(x), mask, cos, sin), 0.5)
    x = x + F.dropout(layer.mlp(layer.post_attention_layernorm(x)), 0.5)
    assert torch.equal(got, x)


def test_dropout_stands_behind_one_norm_and_before_the_other_in_gemma2():
    model = make_model("gemma2")
    set_dropout(model, 0.5)
    layer = model.language_model.model.layers[1]
    x, mask, cos, sin, *_ = layer_inputs(model, layer)
    torch.manual_seed(3)
    got = layer(x, mask, cos, sin)

    set_dropout(model, 0.0)
    torch.manual_seed(3)
    x = x + F.dropout(layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(x), mask, cos, sin)), 0.5)
    x = x + layer.post_feedforward_layernorm(F.dropout(layer.mlp(layer.pre_feedforward_layernorm(x)), 0.5))
    assert torch.equal(got, x)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_evaluation_and_never_in_the_eye(kind):
    model = make_model(kind)
    batch = make_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
        set_dropout(model, 0.3)
        assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model.encode_image(batch["pixel_values"]), model.encode_image(batch["pixel_values"]))
        assert torch.equal(model.eval()(**batch).logits, before)
        model.train()
        set_dropout(model, 0.0)
        assert torch.equal(model(**batch).logits, before)


def test_dropout_is_a_share():
    with pytest.raises(ValueError, match=r"dropout is 1.5, expected a share"):
        set_dropout(make_model(), 1.5)


# ------------------------------------------------------------------------------------------------ recomputed layers


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_give_the_same_loss_and_gradients(kind, with_lora):
    """Dropout included: another mask the second time would give another gradient."""
    model = make_model(kind)
    if with_lora:
        torch.manual_seed(1)
        add_lora(model, ["decoder", "vision"], dropout=0.2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    set_dropout(model, 0.3)
    loss, gradients = loss_and_gradients(model)
    checkpoint_gradients(model)
    loss_again, gradients_again = loss_and_gradients(model)
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys() == learning(model)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert not torch.equal(loss, loss_and_gradients(model, seed=1)[0]), "dropout was on"


def kept_for_the_gradient(model):
    """Bytes that autograd holds between the two passes, each tensor once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        suffix_loss()(model, make_batch(model))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_keep_little(kind):
    model = make_pair(kind, num_hidden_layers=6)[0].train()
    plain = kept_for_the_gradient(model)
    checkpoint_gradients(model)
    assert kept_for_the_gradient(model) < 0.4 * plain


def test_layers_are_computed_twice_only_where_there_is_a_gradient():
    model = make_model()
    checkpoint_gradients(model)
    checkpoint_gradients(model)  # once more changes nothing
    calls = []
    for layer in (model.language_model.model.layers[0], model.vision_tower.vision_model.encoder.layers[0]):
        layer.mlp.register_forward_pre_hook(lambda module, inputs: calls.append(type(module).__name__))

    def calls_of(run):
        calls.clear()
        run()
        return sorted(calls)

    batch = make_batch(model)
    assert calls_of(lambda: model(**batch).loss.backward()) == ["GemmaMLP"] * 2 + ["SiglipMLP"] * 2
    with torch.no_grad():
        assert calls_of(lambda: model(**batch)) == ["GemmaMLP", "SiglipMLP"]
    freeze(model, "vision")
    assert calls_of(lambda: model(**batch).loss.backward()) == ["GemmaMLP"] * 2 + ["SiglipMLP"]
    model.eval()
    assert calls_of(lambda: model(**batch).loss.backward()) == ["GemmaMLP", "SiglipMLP"]


def test_a_cache_is_filled_once():
    """In evaluation mode with gradients, as for looking inside: a layer run twice would write its keys twice."""
    model = make_model()
    checkpoint_gradients(model)
    model.eval()
    batch = make_batch(model)
    del batch["labels"]
    B, S = batch["input_ids"].shape
    cache = KVCache(model.config.text_config, B, S)
    torch.testing.assert_close(model(**batch, cache=cache).logits, model(**batch).logits)


def test_generation_is_as_before():
    """With everything on at once."""
    model = make_pair("gemma2")[0]
    inputs = make_inputs(model.config, prefix=[5, 3])
    before = [row.token_ids for row in generate(model, inputs, max_new_tokens=5)]
    add_lora(model, ["vision", "projector", "decoder"], dropout=0.5)
    set_dropout(model, 0.5)
    checkpoint_gradients(model)
    assert [row.token_ids for row in generate(model.eval(), inputs, max_new_tokens=5)] == before


def test_a_copy_is_a_model_of_its_own():
    model = make_model()
    set_dropout(model, 0.1)
    checkpoint_gradients(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    logits = twin.eval()(**make_batch(model)).logits
    assert not logits.any() and model.eval()(**make_batch(model)).logits.any()


# ------------------------------------------------------------------------------------------------ on a CPU


def written_out(model):
    return {module.explicit for module in model.modules() if hasattr(module, "explicit")}


def test_on_a_cpu_a_small_model_trains_with_attention_written_out_and_has_the_same_gradients():
    model = make_model()
    _, fused = loss_and_gradients(model)
    suit_cpu(model)
    assert written_out(model) == {True}
    _, explicit = loss_and_gradients(model)
    whole = torch.stack([gradient.norm() for gradient in fused.values()]).norm()
    for name, gradient in fused.items():
        assert (explicit[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


def test_large_models_and_long_rows_keep_the_fused_attention():
    small = make_model().config
    many_patches = replace(
        small, vision_config=replace(small.vision_config, image_size=17 * small.vision_config.patch_size)
    )
    for config in (published_config("paligemma-3b", 224), many_patches):
        model = empty_model(config)
        suit_cpu(model)
        assert written_out(model) == {False}
