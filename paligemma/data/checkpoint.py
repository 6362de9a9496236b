"""What data need of a checkpoint: its processor, and the codec that turns masks into tokens. Weights are not read."""

from __future__ import annotations

from pathlib import Path

from paligemma.answers.mask_codec import MaskCodec
from paligemma.inference import CODEC_FILE
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.weights.finding import resolve


def processor_of(
    model: str, revision: str | None = None, kind: str | None = None
) -> tuple[PaliGemmaProcessor, MaskCodec | None]:
    """The processor of a checkpoint, and its mask codec. A checkpoint without one takes the official codec, which is
    downloaded, for data of a kind that has masks ("coco-segment"), and None for others."""
    path = resolve(model, revision=revision, weights=False)
    folder: Path = path if path.is_dir() else path.parent
    codec = None
    if (folder / CODEC_FILE).is_file():
        codec = MaskCodec.load(folder / CODEC_FILE)
    elif has_masks(kind):
        codec = MaskCodec.load()
    return PaliGemmaProcessor.from_pretrained(folder), codec


def codec_of(model: str, revision: str | None, kind: str | None) -> MaskCodec | None:
    """The mask codec that `processor_of` finds; None for data of other kinds, which have no masks."""
    return processor_of(model, revision, kind)[1] if has_masks(kind) else None


def has_masks(kind: str | None) -> bool:
    return kind is not None and kind.endswith("-segment")
