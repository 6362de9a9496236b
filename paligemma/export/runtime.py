"""Exported files behind the face of a model, run by onnxruntime: for `--check`, and to evaluate what was rounded.

    pg = load_exported("exported/", "q8")
    pg.caption("photo.jpg").text

It is not there for speed: keys and values are copied in and out for every token.

Letters: B rows, S tokens, T tokens with those of the cache, n images, P patches, D hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paligemma.answers.mask_codec import MaskCodec
from paligemma.export.graphs import GRAPHS
from paligemma.export.storing import SUFFIXES
from paligemma.files import read_json
from paligemma.inference import PaliGemma, processor_for
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaOutput
from paligemma.tokenizer import load_tokenizer


def load_exported(
    folder: str | Path, weights: str = "fp32", threads: int | None = None, codec: MaskCodec | None = None
) -> PaliGemma:
    """The exported model, with the methods of `paligemma.load`'s.

    weights: "fp32", "fp16", "q8" or "q4", as they were exported.
    threads: of onnxruntime; as many as PyTorch has by default.
    codec:   for masks, in place of the folder's own. An official checkpoint has none: without `codec` it is downloaded.

    Raises ValueError for weights of another name, FileNotFoundError where the folder lacks a file.
    """
    model = ExportedModel(Path(folder), weights, threads)
    processor = processor_for(load_tokenizer(folder), model.config, [Path(folder)])
    return PaliGemma(model, processor, codec)  # type: ignore[arg-type]


class ExportedModel(nn.Module):
    """Takes and returns what `PaliGemmaForConditionalGeneration` does, as far as generation asks for it."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, folder: Path, weights: str = "fp32", threads: int | None = None):
        super().__init__()
        if weights not in SUFFIXES:
            raise ValueError(f"weights is {weights!r}, expected one of {', '.join(SUFFIXES)}")
        import onnxruntime  # here, since importing it writes files into the user's cache

        onnxruntime.disable_telemetry_events()  # it reports its use to its maker otherwise
        settings = read_json(folder / "config.json")
        settings.pop("transformers.js_config", None)
        self.config = PaliGemmaConfig.from_dict(settings)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.sessions = {}
        for graph in GRAPHS:
            path = folder / "onnx" / f"{graph}{SUFFIXES[weights]}.onnx"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: `paligemma export ... --weights {weights}` writes it")
            self.sessions[graph] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, graph: str, **inputs: Any) -> list[Tensor]:
        """All outputs of one graph, for tensors or arrays by name."""
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        return [torch.from_numpy(array) for array in self.sessions[graph].run(None, arrays)]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, side, side] -> [n, P, D]"""
        return self.run("vision_encoder", pixel_values=pixel_values.float())[0]

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """[B, S] -> [B, S, D], with image features in the place of <image>."""
        x = self.run("embed_tokens", input_ids=input_ids)[0]
        if image_features is None:
            return x
        is_image = input_ids == self.config.image_token_index
        return x.masked_scatter(is_image[..., None], image_features.float())

    def read(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        cache: KVCache | None = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """Logits where the model returns hidden states: the head is a part of the graph. [B, num_outputs or S, V]

        A row without a cache is read into one that is dropped. Tokens of type 1 are taken for prefix like all others,
        unless the cache holds a prefix already: the graph knows no types.
        """
        B, S = input_ids.shape
        text = self.config.text_config
        cache = KVCache(text, B, S) if cache is None else cache
        before = cache.used
        features = image_features if pixel_values is None else self.encode_image(pixel_values)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -S:]
        places = cache.extend(valid.bool())
        past = {}
        for layer in range(text.num_hidden_layers):
            past[f"past_key_values.{layer}.key"] = cache.keys[layer][:, :, :before]
            past[f"past_key_values.{layer}.value"] = cache.values[layer][:, :, :before]
        logits, *present = self.run(
            "decoder_model_merged",
            inputs_embeds=self.embed(input_ids, features),
            attention_mask=cache.valid[:, : cache.used].long(),
            position_ids=places + 1,
            num_logits_to_keep=torch.tensor(num_outputs or 0),
            **past,
        )
        for layer in range(text.num_hidden_layers):
            cache.update(layer, *(all_of_them[:, :, -S:] for all_of_them in present[2 * layer :][:2]))
        return logits

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """What `read` returned, or the columns `ids` of it."""
        return hidden if ids is None else hidden[..., ids]

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **given: Any) -> PaliGemmaOutput:
        return PaliGemmaOutput(self.read(input_ids, num_outputs=logits_to_keep or None, **given))
