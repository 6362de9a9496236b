"""Checkpoints for the tests: tiny models, their files in every layout, and what is done with both."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from safetensors.torch import save_file

from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration

EMBEDDING = "language_model.model.embed_tokens.weight"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc or sets a limit on files")


def make_model(kind: str, **overrides) -> PaliGemmaForConditionalGeneration:
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **overrides)).eval()
    randomize(model)
    return model


@torch.no_grad()
def logits_of(model):
    inputs = make_inputs(model.config, prefix=[5, 3], suffix=[2, 4])
    return model(**inputs).logits


def assert_same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


LAYOUTS = {
    "H, the hub's": lambda name: name,
    "W, written by transformers 5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "N, in the memory of transformers 5": lambda name: (
        "model."
        + name.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "language_model.model.", "language_model."
        )
    ),
    "in the memory of transformers 4.52": lambda name: (
        "model." + name.replace("language_model.model.", "language_model.")
    ),
}


def write(folder: Path, config: PaliGemmaConfig, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors")


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let any file grow further: what a full disk does, without filling one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bigvision_arrays(model: PaliGemmaForConditionalGeneration) -> dict[str, np.ndarray]:
    """The arrays that big_vision would hold for a model, written down from its code: einsums over [in, out] kernels.
    (An account of the layout beside the one that is tested.)"""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    text, vision = model.config.text_config, model.config.vision_config
    H, K, E, D = text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.hidden_size
    d, heads = vision.hidden_size, vision.num_attention_heads

    def stack(template, layers, change=lambda w: w):
        return np.stack([change(state[template.format(i)]) for i in range(layers)])

    tower, L = "vision_tower.vision_model.", vision.num_hidden_layers
    layer = tower + "encoder.layers.{}."
    arrays = {
        "img/embedding/kernel": state[tower + "embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "img/embedding/bias": state[tower + "embeddings.patch_embedding.bias"],
        "img/pos_embedding": state[tower + "embeddings.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": state[tower + "post_layernorm.weight"],
        "img/Transformer/encoder_norm/bias": state[tower + "post_layernorm.bias"],
        "img/head/kernel": state["multi_modal_projector.linear.weight"].T,
        "img/head/bias": state["multi_modal_projector.linear.bias"],
    }
    block = "img/Transformer/encoderblock/"
    for n in (0, 1):
        arrays[f"{block}LayerNorm_{n}/scale"] = stack(f"{layer}layer_norm{n + 1}.weight", L)
        arrays[f"{block}LayerNorm_{n}/bias"] = stack(f"{layer}layer_norm{n + 1}.bias", L)
        arrays[f"{block}MlpBlock_0/Dense_{n}/kernel"] = stack(f"{layer}mlp.fc{n + 1}.weight", L, np.transpose)
        arrays[f"{block}MlpBlock_0/Dense_{n}/bias"] = stack(f"{layer}mlp.fc{n + 1}.bias", L)
    attention = block + "MultiHeadDotProductAttention_0/"
    for name in ("query", "key", "value"):
        proj = f"{layer}self_attn.{name[0]}_proj"
        arrays[f"{attention}{name}/kernel"] = stack(proj + ".weight", L, lambda w: w.T.reshape(d, heads, -1))
        arrays[f"{attention}{name}/bias"] = stack(proj + ".bias", L, lambda b: b.reshape(heads, -1))
    arrays[f"{attention}out/kernel"] = stack(
        f"{layer}self_attn.out_proj.weight", L, lambda w: w.T.reshape(heads, -1, d)
    )
    arrays[f"{attention}out/bias"] = stack(f"{layer}self_attn.out_proj.bias", L)

    layer, L = "language_model.model.layers.{}.", text.num_hidden_layers

    def einsum(name, n):  # "BTD,NDH->BTNH"
        return stack(f"{layer}self_attn.{name}.weight", L, lambda w: w.T.reshape(D, n, E).transpose(1, 0, 2))

    arrays["llm/embedder/input_embedding"] = state[EMBEDDING]
    arrays["llm/final_norm/scale"] = state["language_model.model.norm.weight"]
    arrays["llm/layers/attn/q_einsum/w"] = einsum("q_proj", H)
    arrays["llm/layers/attn/kv_einsum/w"] = np.stack([einsum("k_proj", K), einsum("v_proj", K)], axis=1)
    # "BTNH,NHD->BTD"
    arrays["llm/layers/attn/attn_vec_einsum/w"] = stack(
        f"{layer}self_attn.o_proj.weight", L, lambda w: w.T.reshape(H, E, D)
    )
    gate_up = [stack(f"{layer}mlp.{name}_proj.weight", L, np.transpose) for name in ("gate", "up")]
    arrays["llm/layers/mlp/gating_einsum"] = np.stack(gate_up, axis=1)
    arrays["llm/layers/mlp/linear"] = stack(f"{layer}mlp.down_proj.weight", L, np.transpose)
    arrays["llm/layers/pre_attention_norm/scale"] = stack(f"{layer}input_layernorm.weight", L)
    if text.model_type == "gemma":
        arrays["llm/layers/pre_ffw_norm/scale"] = stack(f"{layer}post_attention_layernorm.weight", L)
    else:
        arrays["llm/layers/post_attention_norm/scale"] = stack(f"{layer}post_attention_layernorm.weight", L)
        arrays["llm/layers/pre_ffw_norm/scale"] = stack(f"{layer}pre_feedforward_layernorm.weight", L)
        arrays["llm/layers/post_ffw_norm/scale"] = stack(f"{layer}post_feedforward_layernorm.weight", L)
    return arrays


def write_npz(path: Path, config: PaliGemmaConfig | None, arrays: dict[str, np.ndarray], save=np.savez) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        save(file, **arrays)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def as_void(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as NumPy keeps it when it does not know it: two nameless bytes."""
    return tensor.bfloat16().contiguous().view(torch.int16).numpy().view("V2")
