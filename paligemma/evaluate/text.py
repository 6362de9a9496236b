"""Short answers: exact match, edit distance, ANLS, relaxed accuracy, character and word error rate.

Every function scores one answer. The figure of a corpus is the mean of the scores or, for error rates, the ratio of the
sums. Text is normalised only as the definition of the metric says.
"""

import math
from collections.abc import Sequence


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 if the text is one of the answers, else 0.0. White space at both ends is ignored, case is not.

    As in big_vision, `transfers/vqa.py` ("acc_any"), which does not strip white space; but a tokenizer that decodes to
    " yes" should not lose for it.
    """
    return float(text.strip() in {answer.strip() for answer in answers})


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """The fewest insertions, deletions and replacements that turn a into b (Levenshtein). Strings or lists of words."""
    row = list(range(len(b) + 1))  # distances between the part of a read so far and every prefix of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_errors(text: str, answer: str) -> tuple[int, int]:
    """(edits, characters of the answer). CER of a corpus = sum of edits / sum of characters; it can exceed 1.

    White space at both ends is dropped, white space inside counts: as `jiwer.cer`.
    """
    text, answer = text.strip(), answer.strip()
    return edit_distance(text, answer), len(answer)


def word_errors(text: str, answer: str) -> tuple[int, int]:
    """(edits, words of the answer); white space separates words. WER = ratio of the sums: as `jiwer.wer`."""
    words, right = text.split(), answer.split()
    return edit_distance(words, right), len(right)


def anls(text: str, answers: Sequence[str], threshold: float = 0.5, case_sensitive: bool = False) -> float:
    """Normalised Levenshtein similarity to the nearest answer, in [0, 1]; 0 where half or more has to be changed.

    Scene Text VQA, arXiv 1905.13648, equation 1; the metric of DocVQA, InfographicVQA and ST-VQA, whose papers ignore
    upper and lower case. White space at both ends is dropped, white space inside counts. A distance of exactly the
    threshold gives 0, as in the paper and in big_vision (`anls_metric`); the script of the challenges gives 0.5.
    """

    def similarity(answer: str) -> float:
        a, b = (s.strip() if case_sensitive else s.strip().lower() for s in (text, answer))
        distance = edit_distance(a, b) / max(len(a), len(b), 1)
        return 1 - distance if distance < threshold else 0.0

    return max(map(similarity, answers), default=0.0)


def relaxed_match(text: str, answer: str) -> float:
    """1.0 if a number is within 5% of the right one, or if a text is the right one; else 0.0.

    ChartQA, arXiv 2203.10244, section 5.1, as big_vision implements it (`transfers/chartqa.py`): "12%" is 0.12. A right
    answer of 0, and anything that is not a number, needs an exact match, including upper and lower case.
    """
    number, right = _number(text), _number(answer)
    if number is not None and right:
        return float(abs(number - right) / abs(right) <= 0.05)
    return float(text == answer)


def relaxed_accuracy(text: str, answers: Sequence[str]) -> float:
    """`relaxed_match` with the best of several right answers."""
    return max(relaxed_match(text, answer) for answer in answers)


def _number(text: str) -> float | None:
    """None for what is no number, such as "nan" and "inf"."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
