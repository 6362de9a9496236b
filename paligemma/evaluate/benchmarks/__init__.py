"""Published benchmarks: what PaliGemma was asked, how it decoded, how it was scored.

table.py        every benchmark: splits, metric, decoding, published figures
questions.py captions.py objects.py     published files -> examples
files.py        finding the published files in a folder
metrics.py      metrics that only a benchmark has
run.py          a model measured on a benchmark
"""

from paligemma.evaluate.benchmarks.run import (
    benchmark_examples,
    check_benchmark,
    evaluate_benchmark,
    published,
    resolved_split,
)
from paligemma.evaluate.benchmarks.table import BENCHMARKS, Benchmark

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "benchmark_examples",
    "check_benchmark",
    "evaluate_benchmark",
    "published",
    "resolved_split",
]
