"""The reference beside ours: transformers' PaliGemma and this project's, tiny, with the same random weights.

    ours, theirs = make_pair("gemma2", sliding_window=4)      # float32, eval mode, transformers in eager attention
    inputs = make_inputs(ours.config, prefix=[5, 3], suffix=[2, 4])   # a ragged batch, padded on the left
    ours(**inputs).logits - theirs(**inputs).logits            # zero up to rounding

A wrong switch must show in the result, so the weights are larger than an initialisation's: attention is far from
uniform, soft-capping bends, and logits spread over several units.
"""

import dataclasses

import torch
from torch import Tensor

from paligemma.configuration import alternating_layers
from paligemma.generation import Generated
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig

torch.set_num_threads(1)  # these models are so small that threads would only wait for each other

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GEMMA2 = {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
IMAGE_TOKEN = 300


def tiny_config(kind: str, **overrides) -> PaliGemmaConfig:
    """A configuration of kind "gemma" or "gemma2" with 4 image tokens, vocabulary 320 and <image> = 300.

    Overrides go where their name belongs: `head_dim=8` to the text model, `image_size=42` to the vision tower,
    `image_token_index=17` to the top; what both have goes to the text model, `vision_hidden_size=24` to the
    vision tower.
    """
    if kind not in ("gemma", "gemma2"):
        raise ValueError(f"kind is {kind!r}, expected 'gemma' or 'gemma2'")
    text, vision = {**TEXT, **(GEMMA2 if kind == "gemma2" else {})}, dict(VISION)
    top = {"image_token_index": IMAGE_TOKEN}
    text_names, vision_names, top_names = (
        {field.name for field in dataclasses.fields(cls)} for cls in (GemmaConfig, SiglipVisionConfig, PaliGemmaConfig)
    )
    for name, value in overrides.items():
        if name in text_names:
            text[name] = value
        elif name.removeprefix("vision_") in vision_names:
            vision[name.removeprefix("vision_")] = value
        elif name in top_names:
            top[name] = value
        else:
            raise ValueError(f"no part of the configuration has {name!r}")
    if kind == "gemma2":
        text.setdefault("layer_types", alternating_layers(text["num_hidden_layers"]))
    return PaliGemmaConfig(GemmaConfig(**text), SiglipVisionConfig(**vision), **top)


def make_pair(kind: str, seed: int = 0, **overrides):
    """`(ours, theirs)`: the same random weights in both, float32, eval mode, transformers with eager attention."""
    config = tiny_config(kind, **overrides)
    ours = PaliGemmaForConditionalGeneration(config).eval()
    randomize(ours, seed)
    return ours, make_theirs(ours)


def make_theirs(ours: PaliGemmaForConditionalGeneration):
    """transformers' `PaliGemmaForConditionalGeneration` with the weights of ours."""
    import transformers  # seconds, and not every test that wants a tiny model wants this one

    config = transformers.PaliGemmaConfig.from_dict(ours.config.to_dict())
    config._attn_implementation = "eager"
    theirs = transformers.PaliGemmaForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():  # not theirs.to(dtype): that would round the rotary frequencies as well
        parameter.data = parameter.data.to(ours.dtype)
    theirs.load_state_dict({their_name(name): tensor for name, tensor in ours.state_dict().items()}, strict=False)
    theirs.tie_weights()
    # strict=False because the tied head is a key of its own there; that nothing else is left over is seen here.
    assert {their_name(name) for name in ours.state_dict()} == set(theirs.state_dict()) - {"lm_head.weight"}
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    return theirs


def their_name(name: str) -> str:
    """The name of one of our parameters (those of the published files) in transformers' model."""
    if name.startswith("vision_tower.vision_model."):
        return "model.vision_tower." + name.removeprefix("vision_tower.vision_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name


@torch.no_grad()
def randomize(model: PaliGemmaForConditionalGeneration, seed: int = 0) -> None:
    """Random weights under which every part of the model leaves its mark on the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if "embed_tokens" in name:
            parameter *= 2 * parameter.shape[-1] ** -0.5  # logits of a few units
        elif parameter.ndim == 2 and "position" not in name:
            parameter *= parameter.shape[-1] ** -0.5  # what comes out is as large as what goes in
            if "q_proj" in name or "k_proj" in name:
                parameter *= 2  # attention that chooses
        elif name.startswith("vision_tower") and "norm" in name and name.endswith("weight"):
            parameter.mul_(0.3).add_(1)  # SigLIP's LayerNorm multiplies by weight, Gemma's RMSNorm by 1 + weight
        else:
            parameter *= 0.3


def make_inputs(
    config: PaliGemmaConfig,
    prefix: list[int],
    suffix: list[int] | None = None,
    images: int = 1,
    side: str = "left",
    labels: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A batch laid out as the processor does it: one row per entry of `prefix`, which is its number of text tokens.

    `suffix` is each row's number of answer tokens, `images` the number of images in every row, `side` where the
    padding goes. Returns input_ids, attention_mask, token_type_ids [B, S], pixel_values [B * images, 3, S, S]
    and, on request, labels [B, S].
    """
    generator = torch.Generator().manual_seed(seed)
    suffix = suffix or [0] * len(prefix)
    image_tokens = images * config.vision_config.num_patches
    length = image_tokens + max(p + s for p, s in zip(prefix, suffix))
    words_below = min(config.image_token_index, config.text_config.vocab_size)
    batch: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    for p, s in zip(prefix, suffix):
        real = image_tokens + p + s
        words = torch.randint(3, words_below, (p + s,), generator=generator)
        ids = torch.cat([torch.full((image_tokens,), config.image_token_index), words])
        types = torch.cat([torch.zeros(image_tokens + p), torch.ones(s)]).long()
        pads = (length - real, 0) if side == "left" else (0, length - real)
        pad = torch.nn.functional.pad
        batch["input_ids"].append(pad(ids, pads, value=config.pad_token_id))
        batch["attention_mask"].append(pad(torch.ones(real, dtype=torch.int64), pads))
        batch["token_type_ids"].append(pad(types, pads))
    inputs = {name: torch.stack(rows) for name, rows in batch.items()}
    if labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    size = config.vision_config.image_size
    inputs["pixel_values"] = torch.rand(len(prefix) * images, 3, size, size, generator=generator) * 2 - 1
    return inputs


def means_and_spreads(answer: Generated) -> Tensor:
    """Of the watched ids of an answer, [tokens, 2]: the numbers of `distributions` that vary little with rounding."""
    return torch.tensor([(each.mean, each.spread) for each in answer.distributions])
