"""95% confidence intervals.

A figure is a ratio of sums over the rows: recall is objects found / objects, accuracy is right rows / rows.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Z = 1.959963984540054  # 95% of a normal distribution lie within this many standard deviations


def wilson(right: float, n: int) -> tuple[float, float]:
    """Interval of a share of n independent rows (Wilson 1927). Unlike mean +- 2 standard errors, it stays within [0, 1]
    and has a width even if all rows are right."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(
    figure: Callable[[np.ndarray], float], groups: Sequence[Hashable], samples: int = 1000
) -> tuple[float, float]:
    """Bootstrap percentile interval: resample as many groups as there are, with replacement, `samples` times.

    figure: weights, float [rows], how often each row was drawn -> the figure; NaN (nothing to divide by) is left out.
    groups: one key per row. Rows about one picture are not independent, so they are drawn together. One group alone has
    no interval: (NaN, NaN).
    """
    keys = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    if len(keys) < 2:
        return float("nan"), float("nan")
    of_row = np.array([keys[key] for key in groups], int)
    rng = np.random.default_rng(0)
    shares = np.full(len(keys), 1 / len(keys))
    values = [figure(rng.multinomial(len(keys), shares)[of_row].astype(float)) for _ in range(samples)]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """The interval (low, high) of sum(numerators) / sum(denominators).

    Wilson's interval if every row is right or wrong and a group of its own, otherwise the bootstrap over groups. If all
    groups are perfect (or all are wrong), a bootstrap sees no variation: then Wilson's interval with each group as one
    trial, which is rather too wide than too narrow."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if np.isin(top, (0, 1)).all() and (bottom == 1).all() and len(set(groups)) == len(groups):
        return wilson(float(top.sum()), len(top))

    def figure(weights: np.ndarray) -> float:
        total = float(weights @ bottom)
        return float(weights @ top) / total if total else float("nan")

    value = figure(np.ones(len(top)))
    if value in (0.0, 1.0) and (top == value * bottom).all():
        trials = len({group for group, size in zip(groups, bottom) if size})
        return wilson(value * trials, trials)
    return bootstrap(figure, groups)
