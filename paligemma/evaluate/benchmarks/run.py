"""A model measured on a published benchmark.

    report = evaluate_benchmark(pg, "textvqa", "data/textvqa", out_folder="runs/textvqa")

Prompt, decoding and metric are not options; see `table.py`. Data are read as they were published (`questions.py`,
`captions.py`, `objects.py`); nothing is downloaded.

Known differences from the reference:
- Pictures are resized as in transformers (bicubic); the reference uses TensorFlow's bilinear for most tasks.
- A prompt is never cut. The reference cuts prompt and separator to `max_new_tokens` tokens, which shortens a few.
- Beam search follows transformers' rules, without a penalty for length. In the reference every beam may end at every
  step; here an end counts if it is among the likeliest extensions.
- Captions are tokenized by our own version of PTBTokenizer (see `evaluate/captions.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.evaluate.benchmarks.files import Source
from paligemma.evaluate.benchmarks.metrics import NOTHING
from paligemma.evaluate.benchmarks.table import BENCHMARKS
from paligemma.evaluate.examples import Example
from paligemma.evaluate.metrics import refcoco
from paligemma.evaluate.runner import evaluate
from paligemma.weights.published import published_name

if TYPE_CHECKING:
    from paligemma.evaluate.report import Report
    from paligemma.inference import PaliGemma


def benchmark_examples(
    task: str, folder: str | os.PathLike[str], split: str | None = None, side: int = 224
) -> Iterator[Example]:
    """The examples of a benchmark, read from the folder where its published files were unpacked.

    split: default the first of `BENCHMARKS[task].splits`. side: of the picture that the model sees. ValueError for an
    unknown task or split and for files that are not in the published format; FileNotFoundError names a missing file.
    """
    split = resolved_split(task, split)
    benchmark, folder = BENCHMARKS[task], Path(folder)
    if not folder.is_dir():
        what = "a file, no folder; expected one" if folder.exists() else "no such folder; expected one"
        raise FileNotFoundError(f"{folder}: {what} with the published files of {task}")
    try:
        yield from benchmark.read(Source(folder, task, split, side))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder} is not {task} as it is published ({what}): {benchmark.read.__doc__}") from error


def check_benchmark(task: str, folder: str | os.PathLike[str], split: str | None = None) -> None:
    """Reads the first row, to find a wrong folder before a model is loaded. Raises what `benchmark_examples` raises."""
    next(benchmark_examples(task, folder, split), None)


def evaluate_benchmark(
    pg: PaliGemma,
    task: str,
    folder: str | os.PathLike[str],
    split: str | None = None,
    *,
    count: int | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Measures a model on a benchmark. count: only the first rows. about, options: as for `runner.evaluate`, without
    those for decoding, which the benchmark decides.

    The report shows the published figure beside ours if model, resolution and split are the same.
    """
    split = resolved_split(task, split)
    benchmark = BENCHMARKS[task]
    metric = benchmark.metric
    if split in benchmark.hidden:
        metric = NOTHING
    elif metric is None:
        metric = refcoco(pg.codec)
    rows = benchmark_examples(task, folder, split, pg.processor.image_size)
    return evaluate(
        pg,
        rows if count is None else islice(rows, count),
        {task: metric},
        about={**(about or {}), "task": task, "split": split},
        constrained=False,
        max_new_tokens=benchmark.max_new_tokens,
        beams=benchmark.beams,
        published={(task, name): value for name, value in published(task, split, pg).items()},
        total=count,
        **options,
    )


def published(task: str, split: str, pg: PaliGemma) -> Mapping[str, float]:
    """Name -> figure of the same model at the same resolution, fine-tuned for this task; {} if there is none."""
    size = published_name(pg.model.config) or ""
    return BENCHMARKS[task].published.get(split, {}).get((size, pg.processor.image_size), {})


def resolved_split(task: str, split: str | None) -> str:
    """The split, or the default one. ValueError for an unknown benchmark or split."""
    if task not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {task!r}; there are: {', '.join(BENCHMARKS)}")
    splits = BENCHMARKS[task].splits
    if split is not None and split not in splits:
        raise ValueError(f"{task} has no split {split!r}; it has {', '.join(splits)}")
    return split or splits[0]
