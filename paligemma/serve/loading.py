"""Opens the model that a server answers with, and what else would be downloaded in the middle of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paligemma.inference import PaliGemma, load


def load_for_serving(model: str, say: Callable[[str], object], **options: Any) -> PaliGemma:
    """`paligemma.load` with these options, and the mask codec: masks of segments are made with one that is there
    already. say: is told where there is none."""
    pg = load(model, **options)
    try:
        _ = pg.codec  # an official checkpoint's is downloaded
    except (OSError, ValueError, ImportError) as error:
        say(f"note: segments will have no masks: {error}")
    return pg
