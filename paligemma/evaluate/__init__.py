"""Measuring: metrics under their standard names, and a runner that takes a model over rows.

    from paligemma.evaluate import Example, evaluate

    examples = [Example("1", "photo.jpg", "answer en what is this ?", "vqa", answers=["dog"] * 10)]
    report = evaluate(pg, examples, out_folder="runs/measured")

Metrics are functions of plain values, one idea a file: `text`, `vqa`, `yes_no`, `captions`, `regions`,
`average_precision`, `refcoco`. `measures` says which of them a task is measured by, `runner` runs, `report` shows.
"""

from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.metrics import METRICS, Metric
from paligemma.evaluate.regions import Region
from paligemma.evaluate.report import Figure, Report
from paligemma.evaluate.runner import evaluate

__all__ = ["METRICS", "Example", "Figure", "Metric", "Prediction", "Region", "Report", "evaluate"]
