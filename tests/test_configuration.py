"""Reading and writing `config.json`: every published kind, what transformers writes, and what must be refused."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from reference import make_inputs, make_theirs, randomize, tiny_config

from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.weights.info import describe

# As published on the hub (google/paligemma-3b-pt-224), with all that it leaves out.
PALIGEMMA_1 = {
    "_name_or_path": "final-hf/paligemma-3b-pt-224-main",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
    "vocab_size": 257216,
}

# google/paligemma2-3b-pt-224: no hidden_size at the top, eos is a list inside text_config.
PALIGEMMA_2 = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2304,
    "text_config": {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_image_tokens": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 257216,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "num_positions": 256,
        "patch_size": 14,
        "projection_dim": 2304,
        "torch_dtype": "bfloat16",
        "vision_use_head": False,
    },
}
# The largest one: heads of 128, but a query scale of (4608 / 32)^-0.5.
PALIGEMMA_2_28B = copy.deepcopy(PALIGEMMA_2)
PALIGEMMA_2_28B["projection_dim"] = PALIGEMMA_2_28B["vision_config"]["projection_dim"] = 4608
PALIGEMMA_2_28B["text_config"] |= {
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
}
SO400M = SiglipVisionConfig(1152, 4304, 27, 16, image_size=224, patch_size=14, layer_norm_eps=1e-6)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def edited(config, part=None, drop=(), **changes):
    """A copy of a `config.json` with changes at the top or in a part ("text_config")."""
    config = copy.deepcopy(config)
    place = config if part is None else config[part]
    place |= changes
    for key in drop:
        del place[key]
    return config


# ---------------------------------------------------------------------------------------------- published files


def test_paligemma_1_as_published():
    config = PaliGemmaConfig.from_dict(PALIGEMMA_1)
    assert config.vision_config == SO400M
    assert config.text_config == GemmaConfig(
        model_type="gemma",
        vocab_size=257216,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=8192,
        position_offset=1,
        query_pre_attn_scalar=None,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        sliding_window=None,
        layer_types=None,
    )
    assert config.text_config.query_scale == 256**-0.5
    assert {config.text_config.window(layer) for layer in range(18)} == {None}
    ids = (config.image_token_index, config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert ids == (257152, 0, 2, 1)


def test_paligemma_2_as_published():
    config = PaliGemmaConfig.from_dict(PALIGEMMA_2)
    assert config.vision_config == SO400M
    text = config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (2304, 8, 4)
    assert text.head_dim == 256  # not 2304 / 8
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (50.0, 30.0)
    assert text.query_scale == 256**-0.5
    assert [text.window(layer) for layer in range(26)] == [4096, None] * 13
    # Not Gemma's end of a chat turn, 107, even if the list is all there is.
    assert config.eos_token_id == 1
    assert PaliGemmaConfig.from_dict(edited(PALIGEMMA_2, drop=["eos_token_id"])).eos_token_id == 1


def test_paligemma_2_28b_scales_its_queries_by_a_number_of_its_own():
    text = PaliGemmaConfig.from_dict(PALIGEMMA_2_28B).text_config
    assert text.head_dim == 128
    assert text.query_scale == 144**-0.5


def test_what_gemma_2_leaves_out():
    omitted = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "query_pre_attn_scalar")
    bare = edited(PALIGEMMA_2, "text_config", drop=omitted)
    assert PaliGemmaConfig.from_dict(bare) == PaliGemmaConfig.from_dict(PALIGEMMA_2)


@pytest.mark.parametrize("size, tokens", [(224, 256), (448, 1024), (896, 4096)])
def test_image_size_makes_the_number_of_image_tokens(size, tokens):
    """Whatever num_image_tokens says: that key is decorative."""
    config = PaliGemmaConfig.from_dict(edited(PALIGEMMA_1, "vision_config", image_size=size))
    assert config.vision_config.num_patches == tokens


# ---------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("published", [PALIGEMMA_1, PALIGEMMA_2, PALIGEMMA_2_28B])
def test_what_transformers_makes_of_published_files(published, tmp_path):
    """Rewritten by transformers, short and in full, a file means the same as before."""
    theirs = transformers.PaliGemmaConfig.from_dict(copy.deepcopy(published))
    theirs.save_pretrained(tmp_path)
    expected = PaliGemmaConfig.from_dict(published)
    assert PaliGemmaConfig.from_dict(theirs.to_dict()) == expected
    assert PaliGemmaConfig.from_dict(theirs.to_diff_dict()) == expected
    assert PaliGemmaConfig.from_pretrained(tmp_path) == expected


@pytest.mark.parametrize("text_config", [{"model_type": "gemma"}, {"model_type": "gemma2"}])
def test_what_transformers_writes_for_its_own_defaults(text_config):
    theirs = transformers.PaliGemmaConfig(text_config=text_config, image_token_index=257152)
    ours = PaliGemmaConfig.from_dict(theirs.to_dict())
    assert ours.text_config.hidden_size == theirs.text_config.hidden_size
    assert ours.vision_config.intermediate_size == theirs.vision_config.intermediate_size == 4096


def test_another_base_of_the_positions_as_transformers_writes_it():
    text = {"model_type": "gemma", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    theirs = transformers.PaliGemmaConfig(text_config=text, image_token_index=257152)
    assert PaliGemmaConfig.from_dict(theirs.to_dict()).text_config.rope_theta == 500.0


@pytest.mark.parametrize("published", [PALIGEMMA_1, PALIGEMMA_2, PALIGEMMA_2_28B])
def test_transformers_reads_what_we_write(published):
    ours = PaliGemmaConfig.from_dict(published)
    written = json.loads(json.dumps(ours.to_dict()))
    theirs = transformers.PaliGemmaConfig.from_dict(written)
    reference = transformers.PaliGemmaConfig.from_dict(copy.deepcopy(published))
    assert type(theirs.text_config) is type(reference.text_config)
    for part in ("text_config", "vision_config"):
        here, there = getattr(theirs, part).to_dict(), getattr(reference, part).to_dict()
        for key in ("dtype", "architectures", "cache_implementation", "_name_or_path"):
            here.pop(key, None), there.pop(key, None)
        decorative = {"eos_token_id", "projector_hidden_act", "num_positions", "rope_theta", "hidden_act"}
        differing = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
        assert differing <= decorative
    for name in ("image_token_index", "pad_token_id", "bos_token_id", "eos_token_id", "projection_dim"):
        assert getattr(theirs, name) == getattr(reference, name), name


# ---------------------------------------------------------------------------------------------- there and back

VARIANTS = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "positions from 0": ("gemma", {"position_offset": 0}),
    "ids": ("gemma2", {"image_token_index": 7, "pad_token_id": 8, "bos_token_id": 9, "eos_token_id": 10}),
    "another theta": ("gemma", {"rope_theta": 500.0, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5}),
    "every layer slides": ("gemma2", {"layer_types": ("sliding_attention",) * 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant):
    kind, overrides = VARIANTS[variant]
    config = tiny_config(kind, **overrides)
    assert PaliGemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_pretrained_reads_a_folder(tmp_path):
    config = tiny_config("gemma2")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert PaliGemmaConfig.from_pretrained(tmp_path) == config
    assert PaliGemmaConfig.from_pretrained(str(tmp_path)) == config


# ---------------------------------------------------------------------------------------------- the switches


def logits(config):
    """The same weights under another configuration."""
    model = PaliGemmaForConditionalGeneration(config).eval()
    randomize(model)
    inputs = make_inputs(config, prefix=[5, 3], suffix=[4, 6])
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def switched(kind, **text):
    """A tiny configuration with switches set where a user sets them: in `text_config` of the file."""
    return PaliGemmaConfig.from_dict(edited(tiny_config(kind).to_dict(), "text_config", **text))


def test_without_a_sliding_window_every_layer_sees_everything():
    off = logits(switched("gemma2", sliding_window=None))
    assert torch.equal(off, logits(switched("gemma2", sliding_window=4096)))  # longer than the row
    assert (off - logits(switched("gemma2"))).abs().max() > 0.1


def test_without_final_softcapping_logits_are_raw():
    raw = logits(switched("gemma2", final_logit_softcapping=None))
    capped = logits(switched("gemma2", final_logit_softcapping=3.0))
    assert raw.abs().max() > 3 > capped.abs().max()
    torch.testing.assert_close(3 * torch.tanh(raw / 3), capped)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_positions_from_0_change_rounding_only(kind):
    """Rotary positions are relative: shifting all of them by one turns queries and keys alike."""
    one, zero = logits(switched(kind)), logits(switched(kind, position_offset=0))
    assert not torch.equal(one, zero)
    assert (one - zero).abs().max() < 1e-4


@pytest.mark.parametrize("switch", ["sliding_window", "final_logit_softcapping", "attn_logit_softcapping"])
@torch.no_grad()
def test_transformers_runs_what_we_write_with_a_switch_off(switch):
    """It has no null for a window: we write what means the same there."""
    ours = PaliGemmaForConditionalGeneration(switched("gemma2", **{switch: None})).eval()
    randomize(ours)
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[4, 6])
    valid = inputs["attention_mask"].bool()
    theirs = make_theirs(ours)(**inputs).logits[valid]
    torch.testing.assert_close(ours(**inputs).logits[valid], theirs, atol=1e-4, rtol=0)
    again = PaliGemmaConfig.from_dict(ours.config.to_dict())
    assert torch.equal(logits(again), logits(ours.config))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "theirs", [transformers.GemmaConfig(), transformers.LlavaConfig(), transformers.SiglipVisionConfig()]
)
def test_another_model(theirs):
    with pytest.raises(ValueError, match=f"model_type is '{theirs.model_type}', expected 'paligemma'"):
        PaliGemmaConfig.from_dict(theirs.to_dict())


@pytest.mark.parametrize("name", ["Gemma2", "gemma3", "llama"])
def test_a_configuration_made_by_hand_is_of_gemma_1_or_2_too(name):
    with pytest.raises(ValueError, match=f"model_type is '{name}', expected 'gemma' or 'gemma2'"):
        GemmaConfig(model_type=name)


REFUSED = {
    # what is wrong: (part of the configuration, changes, keys to drop, what the message says)
    "another text model": ("text_config", {"model_type": "llama"}, (), "text_config.model_type is 'llama'"),
    "another eye": ("vision_config", {"model_type": "clip_vision_model"}, (), "model_type is 'clip_vision_model'"),
    "no text model": (None, {}, ("text_config",), "text_config is missing"),
    "no eye": (None, {}, ("vision_config",), "vision_config is missing"),
    "no object": (None, {"vision_config": "so400m"}, (), "vision_config is str, expected an object"),
    "no id of <image>": (None, {}, ("image_token_index",), "image_token_index is None"),
    "no sizes": (
        "text_config",
        {},
        ("hidden_size", "num_hidden_layers"),
        "text_config lacks hidden_size, num_hidden_layers",
    ),
    "no vision sizes": ("vision_config", {}, ("patch_size",), "vision_config lacks patch_size"),
    "a size of 0": ("text_config", {"hidden_size": 0}, (), "text_config.hidden_size is 0"),
    "a size in words": ("vision_config", {"hidden_size": "big"}, (), "vision_config.hidden_size is 'big'"),
    "a head size in words": ("text_config", {"head_dim": "256"}, (), "text_config.head_dim is '256'"),
    "an image size of half a pixel": ("vision_config", {"image_size": 0.5}, (), "vision_config.image_size is 0.5"),
    "an epsilon that is no number": ("text_config", {"rms_norm_eps": float("nan")}, (), "rms_norm_eps is nan"),
    "a base below zero": ("text_config", {"rope_theta": -1}, (), "rope_theta is -1, expected a positive number"),
    "a base beyond any float": ("text_config", {"rope_theta": 10**400}, (), "rope_theta is 10+, expected a positive"),
    "no token": (None, {"eos_token_id": []}, (), r"eos_token_id is \[\], expected the id of a token"),
    "a token in words": (None, {"pad_token_id": "<pad>"}, (), "pad_token_id is '<pad>', expected the id"),
    "a million layers": ("text_config", {"num_hidden_layers": 10**6}, (), "is 1,000,000, expected at most 1,000"),
    "a vocabulary beyond int64": ("text_config", {"vocab_size": 10**30}, (), "vocab_size is .* at most 10,000,000"),
    "a wall of pixels": ("vision_config", {"image_size": 14 * 10**9}, (), "image_size is .* at most 10,000,000"),
    "an unknown key": ("text_config", {"query_norm": True}, (), "text_config has keys .*: query_norm"),
    "an unknown vision key": ("vision_config", {"rope": True}, (), "vision_config has keys .*: rope"),
    "layer types of another length": ("text_config", {"layer_types": ["full_attention"]}, (), "names 1 layers"),
    "a strange layer type": (
        "text_config",
        {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        (),
        "linear_attention",
    ),
    "a layer type that is a list": (
        "text_config",
        {"num_hidden_layers": 1, "layer_types": [["full_attention"]]},
        (),
        r"layer_types has \['full_attention'\]",
    ),
    "stretched positions": ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, (), "rope_scaling"),
    "stretched positions, as written today": (
        "text_config",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        (),
        "rope_parameters asks for 'linear'",
    ),
    "positions in words": (
        "text_config",
        {"rope_parameters": "default"},
        (),
        "rope_parameters is str, expected an object",
    ),
    "another activation": ("text_config", {"hidden_act": "silu"}, (), "text_config.hidden_act is 'silu'"),
    "the exact GELU in the eye": ("vision_config", {"hidden_act": "gelu"}, (), "vision_config.hidden_act is 'gelu'"),
    "biases": ("text_config", {"attention_bias": True}, (), "attention_bias is True"),
    "gray images": ("vision_config", {"num_channels": 1}, (), "num_channels is 1"),
    "a window of 0": ("text_config", {"sliding_window": 0}, (), "sliding_window is 0"),
    "a cap of 0": ("text_config", {"final_logit_softcapping": 0}, (), "final_logit_softcapping is 0"),
    "positions from 2": ("text_config", {"position_offset": 2}, (), "position_offset is 2"),
    "key heads that do not share out": ("text_config", {"num_key_value_heads": 3}, (), "does not divide"),
    "an odd head size": ("text_config", {"head_dim": 255}, (), "head_dim 255 is odd"),
    "half a patch": ("vision_config", {"image_size": 225}, (), "not a multiple of patch_size"),
    "heads that do not share out": ("vision_config", {"num_attention_heads": 7}, (), "does not divide"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refused(wrong, tmp_path):
    part, changes, drop, message = REFUSED[wrong]
    config = edited(PALIGEMMA_2, part, drop, **changes)
    with pytest.raises(ValueError, match=message):
        PaliGemmaConfig.from_dict(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):  # the file is named as well
        PaliGemmaConfig.from_pretrained(tmp_path)


def test_files_that_hold_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        PaliGemmaConfig.from_pretrained(tmp_path)
    contents = {
        "{": r"config\.json: ",
        "[1, 2]": "the configuration is list, expected an object",
        "[" * 100_000: r"config\.json: maximum recursion depth",
    }
    for content, message in contents.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            PaliGemmaConfig.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ValueError, match=message):  # nobody who looks into it before stumbles
            describe(tmp_path)


def test_an_unknown_key_at_the_top_is_a_warning():
    with pytest.warns(UserWarning, match="not used: my_notes"):
        config = PaliGemmaConfig.from_dict(edited(PALIGEMMA_1, my_notes="good at cats"))
    assert config == PaliGemmaConfig.from_dict(PALIGEMMA_1)


def test_the_old_name_of_an_activation():
    """Gemma's first files say "gelu" where the tanh approximation was always meant."""
    config = edited(PALIGEMMA_1, "text_config", hidden_act="gelu", hidden_activation=None)
    assert PaliGemmaConfig.from_dict(config) == PaliGemmaConfig.from_dict(PALIGEMMA_1)


def test_nulls_mean_the_default():
    config = edited(PALIGEMMA_1, "text_config", head_dim=None, rope_theta=None, rope_scaling=None)
    config = edited(config, "vision_config", image_size=None, layer_norm_eps=None)
    assert PaliGemmaConfig.from_dict(config) == PaliGemmaConfig.from_dict(PALIGEMMA_1)
