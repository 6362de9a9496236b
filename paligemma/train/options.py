"""The options of `paligemma train`: their defaults, and what is refused before anything is read.

    TrainOptions(model="tiny", data="my.jsonl", out="runs/mine", lora=("decoder",), lr=1e-4)

The command takes its defaults from here, and its `--help` must not wait for torch: nothing here imports it until
options are checked. `paligemma train --help` says what each option means.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from paligemma.data.options import DataOptions
from paligemma.files import MAX_PIXELS
from paligemma.train.schedule import SCHEDULES

OPTIMIZERS = ("adamw", "muon")
QUANTIZED = ("nf4", "bnb-int8")  # the modes of `paligemma.load` that gradients pass through

# Options that do nothing without another one.
NEEDS = {
    "lora": ("rank", "alpha", "lora_dropout"),
    "validation": (
        "validation_split",
        "validation_annotations",
        "metric",
        "validate_every",
        "validation_rows",
    ),
}


@dataclass(frozen=True)
class TrainOptions:
    """ValueError for values out of range and for options that contradict each other; ImportError where a metric needs
    a package that is missing."""

    model: str
    data: str
    out: str
    # The data: see `DataOptions`.
    kind: str | None = None
    images: str | None = None
    annotations: str | None = None
    image_name: str | None = None
    split: str | None = None
    language: str = DataOptions.language
    every_label: bool = DataOptions.every_label
    max_length: int | None = None  # None: as many tokens as the model has positions
    max_pixels: float = MAX_PIXELS // 10**6  # millions, of a picture
    # Validation.
    validation: str | None = None
    validation_split: str | None = None
    validation_annotations: str | None = None
    metric: str = "auto"
    validate_every: int = 0  # 0: only at the end
    validation_rows: int = 256
    # How long: one epoch, if nothing is given.
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    # Batches.
    batch: int = 32
    accumulate: int = 1
    keep_together: bool = False
    seed: int = 0
    # Optimisation.
    lr: float | None = None  # None: 1e-5, with LoRA 1e-4
    vision_lr: float = 1.0
    warmup: float = 0.05
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    # What is trained.
    freeze: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    rank: int = 8
    alpha: float | None = None  # None: the rank
    lora_dropout: float = 0.0
    image_size: int | None = None
    # Memory and hardware.
    quantize: str | None = None
    checkpoint_gradients: bool = False
    shard: bool = False
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    # Interruptions and bad rows.
    resume: bool = True
    longer: bool = False
    save_every: float = 120.0  # seconds
    strict: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        self._check_combinations()
        self._check_effects()

    def _check_numbers(self) -> None:
        """Comparisons are written so that NaN is refused: with it every comparison is false."""
        at_least = {"batch": 1, "accumulate": 1, "validation_rows": 1, "validate_every": 0, "steps": 1, "max_length": 1}
        at_least |= {"rank": 1, "image_size": 1}
        for name, bound in at_least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, expected at least {bound}")
        if abs(self.seed) > 10**12:  # batches multiply it by a million, and it must stay an int64
            raise ValueError(f"seed is {self.seed:,}, expected a whole number from -10^12 to 10^12")
        for name in ("epochs", "minutes", "lr", "clip", "alpha", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}, expected a number above 0")
        for name in ("weight_decay", "save_every"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value:g}, expected a number from 0 on")
        for name in ("warmup", "label_smoothing", "dropout", "ema", "lora_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value:g}, expected a share in [0, 1)")
        if not 0 < self.vision_lr <= 1:
            raise ValueError(f"vision_lr is {self.vision_lr:g}, expected a share in (0, 1]; 0 is --freeze vision")

    def _check_names(self) -> None:
        from paligemma.evaluate.own_rows import metric_of_prompt
        from paligemma.weights.loading import parse_dtype

        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, expected {' or '.join(OPTIMIZERS)}")
        if self.quantize not in (None, *QUANTIZED):
            raise ValueError(
                f"quantize is {self.quantize!r}, expected {' or '.join(QUANTIZED)}: gradients do not pass through "
                "weights that are rounded in other ways"
            )
        if str(parse_dtype(self.dtype)) == "torch.float16":
            raise ValueError("gradients underflow in float16: train in bfloat16 or float32")
        metric_of_prompt("", self.metric)

    def _check_combinations(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say how long to train: give one of them")
        if self.longer and not self.resume:
            raise ValueError("--longer keeps the run in the folder, and --no-resume removes it: give one of them")
        if self.optimizer == "muon" and self.shard:
            raise ValueError("muon needs whole matrices, and sharding cuts them up: choose adamw")
        if self.freeze and self.lora:
            raise ValueError("LoRA freezes everything but its own weights: leave out --freeze")
        if self.lora and self.image_size is not None:
            raise ValueError("an adapter's base keeps its resolution: leave out --image-size, or train the whole model")
        if self.quantize and not self.lora:
            raise ValueError("rounded weights cannot learn, LoRA beside them can: add --lora, or leave out --quantize")
        if self.quantize and self.shard:
            raise ValueError("rounded weights cannot be split among processes: leave out --shard")

    def _check_effects(self) -> None:
        """Options that would do nothing are mistakes too."""
        learns = set(self.lora) or {"vision", "projector", "decoder"}.difference(self.freeze)
        if self.vision_lr != 1 and "vision" not in learns:
            raise ValueError("vision_lr is for a vision tower that learns, and here it doesn't: leave out --vision-lr")
        if self.weight_decay and not learns & {"vision", "projector"}:
            raise ValueError(
                "weight_decay applies, as in the reference, to the vision tower and the projector only, and here "
                "neither learns: leave out --weight-decay"
            )
        for needed, names in NEEDS.items():
            given = [name for name in names if getattr(self, name) != getattr(TrainOptions, name)]
            if given and not getattr(self, needed):
                raise ValueError(
                    f"{' and '.join(given)} would do nothing without --{needed}: add it, or leave them out"
                )

    @property
    def most_pixels(self) -> int:
        return round(self.max_pixels * 1e6)

    @property
    def training_data(self) -> DataOptions:
        return DataOptions(**{field.name: getattr(self, field.name) for field in fields(DataOptions)})

    @property
    def validation_data(self) -> DataOptions | None:
        """Validation rows are made in the same way as those to train on."""
        if self.validation is None:
            return None
        own: dict[str, Any] = {"split": self.validation_split, "annotations": self.validation_annotations}
        return replace(self.training_data, data=self.validation, **own)

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 1e-4 if self.lora else 1e-5

    @property
    def peak_lr_beside_muon(self) -> float:
        """For what AdamW trains in a run with Muon: embedding, norms and biases."""
        return self.peak_lr / 3


def defaults() -> dict[str, Any]:
    """The options that a run has if they are not given. A run of an older version, which had fewer options, did what is
    now the default of the others."""
    return {one.name: one.default for one in fields(TrainOptions) if one.default is not MISSING}
