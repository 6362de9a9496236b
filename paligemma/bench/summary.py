"""The figures of a record: medians with minimum and maximum, shares of the machine's limits, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from paligemma.bench.worker import TRANSFORMERS


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """min, median and max of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": round(min(known), 4), "median": round(statistics.median(known), 4), "max": round(max(known), 4)}


def summarise(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of a record: the machine's limits, those of every model ("contestants"), and how the cost grows.

    Of a model: load_s; first_answer_s (to the first token in a fresh process, which reads the weights from disk for the
    first time); vision_s, prefill_s, first_token_s, decode_tokens_s; peak_bytes (without what importing torch takes);
    weight_bytes (in memory); token_bytes (what is read for each token). From the medians: peak_of_weights; the limits
    and the shares of them that are reached (share_of_reading, share_of_multiplying); and the ratios to transformers
    (decode_ratio, first_token_ratio; above 1 is better).
    """
    rounds = record["rounds"]
    limits = {name: spread(done["limits"][name] for done in rounds) for name in (rounds[0]["limits"] if rounds else ())}
    facts: dict[str, list[dict[str, Any]]] = {}
    for done in rounds:
        for one in done["contestants"]:
            facts.setdefault(one["spec"]["name"], []).append(one)
    contestants = {name: _figures_of(name, of_it, record["work"], limits) for name, of_it in facts.items()}
    if (theirs := contestants.get(TRANSFORMERS)) is not None:
        for figures in contestants.values():
            figures["decode_ratio"] = _ratio(figures["decode_tokens_s"], theirs["decode_tokens_s"])
            figures["first_token_ratio"] = _ratio(theirs["first_token_s"], figures["first_token_s"])
    return {"limits": limits, "contestants": contestants, "grow": _growth(record["grow"])}


def _figures_of(name: str, facts: list[dict[str, Any]], work: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    runs = [run for one in facts for run in one["runs"]]
    precision = name.removesuffix("-torch")
    figures: dict[str, Any] = {
        "load_s": spread(one["load_s"] for one in facts),
        "first_answer_s": spread(one["first_answer"]["first_token_s"] for one in facts),
        "vision_s": spread(run["vision_s"] for run in runs),
        "prefill_s": spread(run["prefill_s"] for run in runs),
        "first_token_s": spread(run["first_token_s"] for run in runs),
        "decode_tokens_s": spread(_tokens_per_second(run) for run in runs),
        "peak_bytes": spread(one["peak_bytes"] - one["torch_bytes"] for one in facts if "peak_bytes" in one),
    }
    figures |= {name: facts[0][name] for name in ("weight_bytes", "token_bytes")}
    if figures["peak_bytes"] is not None:
        figures["peak_of_weights"] = round(figures["peak_bytes"]["median"] / figures["weight_bytes"], 3)
    multiply = limits["int8_gop_s" if precision in ("int8", "int4") else "bf16_gflop_s"]
    if multiply is not None:
        figures["first_token_limit_s"] = round(work["first_token_flops"] / multiply["median"] / 1e9, 4)
        share = figures["first_token_limit_s"] / figures["first_token_s"]["median"]
        figures["share_of_multiplying"] = round(share, 3)
    figures["decode_limit_tokens_s"] = round(limits["read_gb_s"]["median"] * 1e9 / figures["token_bytes"], 4)
    if figures["decode_tokens_s"] is not None:
        share = figures["decode_tokens_s"]["median"] / figures["decode_limit_tokens_s"]
        figures["share_of_reading"] = round(share, 3)
    return figures


def _tokens_per_second(run: dict[str, Any]) -> float | None:
    """All rows together, after the first token."""
    return run["rows"] * len(run["decode_s"]) / sum(run["decode_s"]) if run["decode_s"] else None


def _ratio(one: dict[str, float] | None, other: dict[str, float] | None) -> float | None:
    return round(one["median"] / other["median"], 2) if one and other else None


def _growth(grow: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """length: milliseconds for each token at the beginning and at the end. batch: for each size, tokens a second of all
    rows together, and seconds to the first tokens of N questions about one image. Others: as for a model."""
    figures: dict[str, Any] = {}
    for name, facts in grow.items():
        runs = [run for one in facts for run in one["runs"]]
        if name == "length" and runs:
            steps = runs[0]["decode_s"]
            part = max(1, len(steps) // 16)  # a single step is mostly noise
            first, last = statistics.median(steps[:part]), statistics.median(steps[-part:])
            figures[name] = {
                "tokens": len(steps) + 1,
                "first_ms": round(1000 * first, 2),
                "last_ms": round(1000 * last, 2),
                "growth": round(last / first - 1, 4),
            }
        elif name == "batch" and runs:
            alone = _tokens_per_second(runs[0])
            figures[name] = {
                str(run["rows"]): {
                    "first_tokens_s": round(run["prefill_s"], 3),
                    "decode_tokens_s": round(rate, 2),
                    "times_one": round(rate / alone, 2),
                }
                for run in runs
                if (rate := _tokens_per_second(run)) and alone
            }
        else:
            figures[name] = {
                one["spec"]["name"]: {
                    "vision_s": spread(run["vision_s"] for run in one["runs"]),
                    "prefill_s": spread(run["prefill_s"] for run in one["runs"]),
                    "first_token_s": spread(run["first_token_s"] for run in one["runs"]),
                    "decode_tokens_s": spread(_tokens_per_second(run) for run in one["runs"]),
                }
                for one in facts
            }
    return figures
