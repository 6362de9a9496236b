"""VQA accuracy: an answer is right if three of the ten people who were asked gave it. (arXiv 1505.00468; VQAv2, OK-VQA)

The figure is defined by its script, https://github.com/GT-Vision-Lab/VQA (`vqaEval.py`). This file does what the script
does, oddities included. The rules and the list of contractions come from there:

    Copyright (c) 2014, Aishwarya Agrawal. All rights reserved. Simplified BSD license: redistribution in source and
    binary forms, with or without modification, is permitted provided that this notice, the list of conditions and the
    disclaimer are retained. The software is provided "as is", without any warranty or liability.

Answers are normalised only if the ten people disagree. The script has changed here over the years; this is its last
version, and what big_vision does (`transfers/vqav2.py`), hence what PaliGemma's published figures mean.
"""

import re
from collections.abc import Sequence

# The script adds a missing apostrophe to the words in this list: dont -> don't, couldnt've -> couldn't've.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # sic

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the script means to keep one after a digit, too, but its pattern does not


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, digits for number words, apostrophes in contractions.

    A punctuation mark becomes a space; it is removed if it stands next to a space anywhere in the text. All marks are
    removed if a number has a comma in it ("1,000/2" -> "10002"). Apostrophes and colons stay.
    """
    glue = bool(_COMMA_IN_NUMBER.search(text))
    cleaned = text
    for mark in PUNCTUATION:
        cleaned = cleaned.replace(mark, "" if glue or f"{mark} " in text or f" {mark}" in text else " ")
    cleaned = _PERIOD.sub("", cleaned, count=int(re.UNICODE))  # the script passes this flag as the count: 32
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """min(1, people who gave this answer / 3), averaged over all ways to leave one of the people out; in [0, 1].

    answers: what each person said, with repetitions; ten in the published data sets, any number here. ValueError if
    there are none.
    """
    if not answers:
        raise ValueError("VQA accuracy needs the answers that people gave (ten in the published data), got none")
    text, *given = (re.sub("[\n\t]", " ", s).strip() for s in (text, *answers))
    if len(set(given)) > 1:
        text, *given = map(normalize, (text, *given))
    same = [answer == text for answer in given]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same)


def agreement(text: str, answers: Sequence[str]) -> float:
    """min(1, people who gave exactly this answer / 3), in [0, 1]: the simple VQA accuracy.

    No person is left out and nothing is normalised. big_vision (`transfers/vqa.py`) measures OK-VQA, A-OKVQA and VizWiz
    in this way, and so does A-OKVQA's own script. White space at both ends of the text is ignored.
    """
    return min(1.0, sum(text.strip() == answer.strip() for answer in answers) / 3)
