"""POPE: does the model report objects that are not there? (arXiv 2305.10355)

Questions like "is there a dog in the image?"; half of the right answers are "yes", the positive class.
"""


def reads_as_yes(text: str) -> bool:
    """The rule of POPE's own script: "no" if the first sentence has the word No, no or not; anything else is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_counts(text: str, answer: str) -> dict[str, tuple[float, float]]:
    """What one answer adds to each figure: (numerator, denominator). The figure is the ratio of the sums.

    accuracy, precision, recall, F1, yes ratio; and valid: texts that are exactly "yes" or "no". POPE's script takes
    every text that does not deny for a yes, so look at `valid` first. big_vision's "acc" (`transfers/pope.py`) is the
    exact match, which equals `accuracy` if all answers are valid.
    """
    said, right = reads_as_yes(text), answer == "yes"
    both = said and right
    return {
        "accuracy": (said == right, 1),
        "precision": (both, said),
        "recall": (both, right),
        "F1": (2 * both, said + right),
        "yes ratio": (said, 1),
        "valid": (text.strip().lower() in ("yes", "no"), 1),
    }
