"""What data need of a checkpoint: its processor, and the codec that turns masks into tokens. Weights are not read."""

from __future__ import annotations

from paligemma.answers.mask_codec import MaskCodec
from paligemma.inference import own_codec
from paligemma.processing_paligemma import PaliGemmaProcessor, image_settings
from paligemma.weights.finding import find_settings, first_with, tokenizer_in


def processor_of(
    model: str, revision: str | None = None, kind: str | None = None
) -> tuple[PaliGemmaProcessor, MaskCodec | None]:
    """The processor of a checkpoint, and its mask codec. A checkpoint without one takes the official codec, which is
    downloaded, for data of a kind that has masks ("coco-segment"), and None for others."""
    _, folders = find_settings(model, revision)
    codec = own_codec(folders) or (MaskCodec.load() if has_masks(kind) else None)
    # Those of an adapter's base, with which the model runs.
    sizes = first_with(folders[::-1], "preprocessor_config.json", "processor_config.json", "config.json") or folders[-1]
    return PaliGemmaProcessor(tokenizer_in(folders), *image_settings(sizes)), codec


def codec_of(model: str, revision: str | None, kind: str | None) -> MaskCodec | None:
    """The mask codec that `processor_of` finds; None for data of other kinds, which have no masks."""
    if not has_masks(kind):
        return None
    return own_codec(find_settings(model, revision)[1]) or MaskCodec.load()


def has_masks(kind: str | None) -> bool:
    return kind is not None and kind.endswith("-segment")
