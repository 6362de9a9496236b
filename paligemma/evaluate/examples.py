"""What is asked of the model, and what it answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paligemma.answers.formats import rle_decode, rle_encode
from paligemma.evaluate.regions import Region


@dataclass(frozen=True)
class Example:
    """One row of a data set. What must be given depends on how its task is measured: see `metrics.py`.

    id:      unique among the rows; the key under which the prediction is saved.
    image:   what `PaliGemma.generate` takes: a path, a PIL image, uint8 [H, W, 3], a tuple of these, or None.
    task:    selects the metric.
    answers: the right answers, or the answers of several people; of a caption, its references.
    regions: the objects that a `detect` or `segment` answer should list, in pixels of the image.
    group:   rows of one group (for example about one picture) are not independent; "" stands for a group of its own.
    kind:    the part of the data set, where parts are reported separately ("yes/no", "simple").
    """

    id: str
    image: Any
    prompt: str
    task: str
    answers: Sequence[str] = ()
    regions: Sequence[Region] = ()
    group: str = ""
    kind: str = ""

    @property
    def images(self) -> tuple[Any, ...]:
        """One by one: none, one or several."""
        return self.image if isinstance(self.image, tuple) else () if self.image is None else (self.image,)


@dataclass(frozen=True)
class Prediction:
    """The part of a `results.Answer` that metrics need."""

    text: str
    score: float = 0.0
    finished: bool = True
    regions: Sequence[Region] = ()
    invalid: Sequence[str] = ()  # why parts of the text could not be read

    @classmethod
    def of(cls, answer: Any) -> "Prediction":
        """From a `results.Answer`."""
        items = [*answer.detections, *answer.segments]
        regions = [Region(item.label, tuple(item.box), getattr(item, "mask", None), item.score) for item in items]
        return cls(
            answer.text, float(answer.score), bool(answer.finished), regions, [reason for _, reason in answer.invalid]
        )

    def to_dict(self) -> dict[str, Any]:
        regions = [
            {
                "label": region.label,
                "box": [float(edge) for edge in region.box],
                "score": region.score,
                **({"mask": rle_encode(region.mask)} if region.mask is not None else {}),
            }
            for region in self.regions
        ]
        return {
            "text": self.text,
            "score": self.score,
            "finished": self.finished,
            "regions": regions,
            "invalid": list(self.invalid),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Prediction":
        regions = [
            Region(r["label"], tuple(r["box"]), rle_decode(r["mask"]) if "mask" in r else None, r["score"])
            for r in saved["regions"]
        ]
        return cls(saved["text"], saved["score"], saved["finished"], regions, saved["invalid"])
