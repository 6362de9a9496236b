"""Every published layout of names gives the same model; transformers reads what we write, and we what it writes."""

import json

import pytest
import torch
import transformers
from checkpoint_files import EMBEDDING, LAYOUTS, assert_same_weights, logits_of, write
from reference import make_inputs, make_theirs

from paligemma.weights.layouts import our_name
from paligemma.weights.loading import load_model
from paligemma.weights.saving import save_pretrained

# ------------------------------------------------------------------------------------------------ transformers


@torch.no_grad()
def test_transformers_loads_what_we_save(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_size=40_000)
    loaded, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, nothing unexpected
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    logits = loaded(**inputs).logits
    assert torch.equal(logits, make_theirs(model)(**inputs).logits)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model)[valid], logits[valid], atol=1e-4, rtol=0)  # see test_parity.py


def test_transformers_finds_the_dtype_we_saved(gemma, tmp_path):
    save_pretrained(gemma.bfloat16(), tmp_path)
    assert transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_we_load_what_transformers_saves(model, tmp_path):
    make_theirs(model).save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = load_model(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names(model, tmp_path, layout):
    renamed = {LAYOUTS[layout](name): tensor for name, tensor in model.state_dict().items()}
    assert [our_name(name) for name in renamed] == list(model.state_dict())
    write(tmp_path, model.config, renamed)
    assert_same_weights(load_model(tmp_path), model)


def test_the_names_of_a_transformers_model_are_layout_n(model):
    names = [name for name in make_theirs(model).state_dict() if name != "lm_head.weight"]
    assert {our_name(name) for name in names} == set(model.state_dict())
    assert len(names) == len(model.state_dict())


HEADS = ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_the_embedding_is_dropped(gemma, tmp_path, name):
    state = gemma.state_dict()
    write(tmp_path, gemma.config, {**state, name: state[EMBEDDING].clone()})
    assert_same_weights(load_model(tmp_path), gemma)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_is_an_error(gemma, tmp_path, name):
    head = gemma.state_dict()[EMBEDDING].clone()
    head[300, 5] += 1e-3
    write(tmp_path, gemma.config, {**gemma.state_dict(), name: head})
    with pytest.raises(ValueError, match=rf"{name} differs from {EMBEDDING}.*trained apart"):
        load_model(tmp_path)


def test_a_head_in_whole_numbers_is_named_with_the_rest(gemma, tmp_path):
    whole = gemma.state_dict()[EMBEDDING].long()
    write(tmp_path, gemma.config, {**gemma.state_dict(), EMBEDDING: whole, "lm_head.weight": whole.clone()})
    with pytest.raises(ValueError, match=rf"not floating point.*{EMBEDDING} is I64"):
        load_model(tmp_path)


@pytest.mark.parametrize(("dtype", "code"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_head_of_a_dtype_that_is_not_read_is_not_dropped(gemma, tmp_path, dtype, code):
    """Nobody can tell whether it is the embedding."""
    state = gemma.state_dict()
    write(tmp_path, gemma.config, {**state, "lm_head.weight": state[EMBEDDING].to(dtype)})
    with pytest.raises(ValueError, match=rf"1 not floating point: language_model.lm_head.weight is {code}\n"):
        load_model(tmp_path)


def test_a_file_that_holds_the_tied_matrix_under_the_heads_name_only(gemma, tmp_path):
    state = gemma.state_dict()
    write(tmp_path, gemma.config, {"lm_head.weight": state.pop(EMBEDDING), **state})
    assert_same_weights(load_model(tmp_path), gemma)


def test_one_parameter_under_two_names_is_an_error(gemma, tmp_path):
    state = gemma.state_dict()
    bias = "multi_modal_projector.linear.bias"
    write(tmp_path, gemma.config, {**state, "model." + bias: state[bias].clone()})
    with pytest.raises(ValueError, match=rf"{bias} twice"):
        load_model(tmp_path)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "base_model.model.",
    "model.paligemma_with_expert.paligemma.",
    "vlm.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_common_prefix_is_left_out(gemma, tmp_path, prefix, layout):
    """What wrappers and models built around PaliGemma put before every name."""
    state = {prefix + LAYOUTS[layout](name): tensor for name, tensor in gemma.state_dict().items()}
    state[prefix + "lm_head.weight"] = gemma.state_dict()[EMBEDDING].clone()
    write(tmp_path, gemma.config, state)
    with pytest.warns(UserWarning, match="begin with .*, which is left out"):
        loaded = load_model(tmp_path)
    assert_same_weights(loaded, gemma)


def test_a_prefix_does_not_make_another_model_fit(gemma, tmp_path):
    state = {"vlm." + name: tensor for name, tensor in gemma.state_dict().items()}
    write(tmp_path, gemma.config, {**state, "custom_text_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"1 unexpected: custom_text_proj.weight\n.*extra={name: module}"):
        load_model(tmp_path)


@pytest.mark.parametrize("head", ["equal", "none"])
def test_untied_in_the_settings_alone(gemma, tmp_path, head):
    """Some trainers write `tie_word_embeddings: false` and train a tied model all the same."""
    state = gemma.state_dict()
    if head == "equal":
        state["lm_head.weight"] = state[EMBEDDING].clone()
    write(tmp_path, gemma.config, state)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_weights(load_model(tmp_path), gemma)
