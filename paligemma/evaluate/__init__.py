"""Evaluation: how good are a model's answers?

    from paligemma.evaluate import Example, evaluate

    examples = [Example("1", "photo.jpg", "answer en what is this ?", "vqa", answers=["dog"] * 10)]
    report = evaluate(pg, examples, out_folder="runs/measured")

examples.py             what is asked, what was answered
calibration.py          are scores of boxes and masks probabilities?
regions.py text.py vqa.py yes_no.py captions.py average_precision.py refcoco.py     one metric a file, plain functions
metrics.py              the metric of each task, by name
intervals.py            95% intervals
runner.py               a model answers examples and is measured
output_folder.py        what a run writes, and how it is continued
summary.py report.py    scored rows -> figures -> table and JSON
worst.py comparison.py  the worst rows, drawn
own_rows.py             the user's own data
benchmarks/             published data sets
"""

from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.metrics import METRICS, Metric
from paligemma.evaluate.regions import Region
from paligemma.evaluate.report import Figure, Report
from paligemma.evaluate.runner import evaluate

__all__ = ["METRICS", "Example", "Figure", "Metric", "Prediction", "Region", "Report", "evaluate"]
