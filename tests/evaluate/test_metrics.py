"""Every metric against something that does not share its code: a plain second way to compute it on a few hundred random
cases, or results of the official script, which are written down here with their origin."""

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.answers.mask_codec import MaskCodec
from paligemma.evaluate.average_precision import average_precision, coco_metrics, mean_area, rank
from paligemma.evaluate.captions import bleu, cider_d, tokenize
from paligemma.evaluate.intervals import bootstrap, ratio_interval, wilson
from paligemma.evaluate.refcoco import refcoco_ious
from paligemma.evaluate.regions import Region, box_iou, instance_ious, mask_iou, match_by_score
from paligemma.evaluate.text import anls, character_errors, edit_distance, exact_match, relaxed_match, word_errors
from paligemma.evaluate.vqa import CONTRACTIONS, normalize, vqa_accuracy
from paligemma.evaluate.yes_no import pope_counts, reads_as_yes


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the convolutions here are so small that threads cost more than they save
    yield
    torch.set_num_threads(before)


def random_text(rng: random.Random, alphabet: str = "ab c", longest: int = 8) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, longest)))


# --- short answers --------------------------------------------------------------------------------


def test_exact_match_ignores_white_space_around_and_nothing_else():
    assert exact_match(" yes\n", ["no", "yes"]) == 1
    assert exact_match("Yes", ["yes"]) == 0
    assert exact_match("yes .", ["yes"]) == 0
    assert exact_match("", []) == 0


def distance_by_definition(a, b) -> int:
    """The recursion of the definition, from the front (ours goes row by row)."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    rng = random.Random(0)
    for _ in range(300):
        a, b = random_text(rng), random_text(rng)
        assert edit_distance(a, b) == distance_by_definition(a, b)
    assert edit_distance(["one", "two"], ["one", "2", "two"]) == 1


def test_character_and_word_error_rates_are_ratios_of_sums():
    # jiwer 4.0: cer(["STOP", "EXIT 12"], ["STOP ", "EXT 1 2"]) and wer of the same
    pairs = [("STOP ", "STOP"), ("EXT 1 2", "EXIT 12")]
    for errors, expected in ((character_errors, 2 / 11), (word_errors, 3 / 3)):
        edits, lengths = zip(*(errors(text, answer) for text, answer in pairs))
        assert sum(edits) / sum(lengths) == pytest.approx(expected)
    rng = random.Random(1)
    for _ in range(200):
        text, answer = random_text(rng), random_text(rng)
        assert character_errors(text, answer) == (
            distance_by_definition(text.strip(), answer.strip()),
            len(answer.strip()),
        )
        assert word_errors(text, answer) == (
            distance_by_definition(tuple(text.split()), tuple(answer.split())),
            len(answer.split()),
        )


def test_anls():
    assert anls("Room B12", ["room b12"]) == 1
    assert anls("Room B12", ["room b12"], case_sensitive=True) == pytest.approx(1 - 2 / 8)
    assert anls("ab", ["cb"]) == 0, "half of it is wrong: the threshold itself gives nothing"
    assert anls("abc", ["cbc"]) == pytest.approx(2 / 3)
    assert anls("48.2", ["1490", "48.2"]) == 1, "the nearest answer counts"
    assert anls("", [""]) == 1
    rng = random.Random(2)
    for _ in range(300):
        text, answers = random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 3))]
        best = 0.0
        for answer in answers:
            a, b = text.strip(), answer.strip()
            share = distance_by_definition(a, b) / (max(len(a), len(b)) or 1)
            if share < 0.5:
                best = max(best, 1 - share)
        assert anls(text, answers) == pytest.approx(best)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("0.0", "0", False),  # a right answer of 0 needs the same text
        ("0", "0", True),
        ("Blue", "blue", False),
        ("blue", "blue", True),
        ("1,000", "1000", False),  # not a number to Python, as in the reference
        ("", "5", False),
        ("nan", "5", False),
        ("nan", "nan", True),  # no number, so the same text is right
        ("inf", "inf", True),
        ("inf%", "inf", False),
        ("5", "inf", False),
        ("five", "5", False),
    ],
)
def test_relaxed_match(text: str, answer: str, right: bool):
    assert relaxed_match(text, answer) == right


def test_relaxed_match_is_five_percent_of_the_right_answer():
    rng = random.Random(3)
    seen = Counter()
    for _ in range(300):
        answer = rng.choice([-1, 1]) * rng.randint(1, 10_000)
        text = answer + rng.randint(-abs(answer) // 10 - 1, abs(answer) // 10 + 1)
        within = 20 * abs(text - answer) <= abs(answer)  # in whole numbers: nothing is rounded
        assert relaxed_match(str(text), str(answer)) == within
        seen[within] += 1
    assert min(seen.values()) > 50


# --- VQA ------------------------------------------------------------------------------------------

# Outputs of processDigitArticle(processPunctuation(text)), vqaEval.py of GT-Vision-Lab/VQA at c4e6a0e.
OFFICIAL_NORMALIZATION = {
    "The Dog": "dog",
    "a red car.": "red car",
    "two": "2",
    "None": "0",
    "dont": "don't",
    "DONT": "don't",
    "couldnt've": "couldn't've",
    "youd've": "you'd've",
    "what's up?": "what's up",
    "what is this ?": "what is this",
    "yes, it is": "yes it is",
    "yes,it is": "yes it is",
    "blue/green": "blue green",
    "blue / green": "blue green",
    "1,000": "1000",
    "1,000/2": "10002",
    "3.5": "3.5",
    "3.": "3",
    "No. 5": "no 5",
    "u.s.a.": "usa",
    "50%": "50%",
    "it's a trap!": "it's trap",
    "black-and-white": "black and white",
    "somebody'd": "somebodyd",
    "12:30": "12:30",
    "(left)": "left",
    "a an the": "",
    "ten (10)": "10 10",
    "$5": "$5",
    "let's": "let's",
    "Im": "im",
    "": "",
    "  lots   of space  ": "lots of space",
    "ice cream; cake": "ice cream cake",
    "<b>bold</b>": "b bold b",
    "o'clock": "o'clock",
    "good-bye !": "good bye",
    "x -y-z": "x yz",
    "x- y-z": "x yz",
}


@pytest.mark.parametrize("text", OFFICIAL_NORMALIZATION)
def test_vqa_normalization_is_the_official_one(text: str):
    assert normalize(text) == OFFICIAL_NORMALIZATION[text]


def test_vqa_contractions_are_the_official_ones():
    # Of the official table without the entries that can do nothing: "let's" and "she's" (give themselves) and four with
    # a capital letter (looked up in lower case). Two more follow from our rule and are not in it.
    table = {word: right for word, right in CONTRACTIONS.items() if word not in ("lets", "shes")}
    digest = hashlib.sha256(json.dumps(sorted(table.items())).encode()).hexdigest()
    assert len(table) == 114
    assert digest == "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"
    assert normalize("lets see") == "lets see"


def test_vqa_accuracy_averages_over_leaving_one_person_out():
    rng = random.Random(4)
    for _ in range(300):
        given = [rng.choice("wxyz") for _ in range(rng.choice([10, 10, 10, 3]))]
        text = rng.choice("vwxyz")
        all_but_one = list(itertools.combinations(given, len(given) - 1))
        expected = sum(min(1, Counter(others)[text] / 3) for others in all_but_one) / len(all_but_one)
        assert vqa_accuracy(text, given) == pytest.approx(expected)


def test_vqa_accuracy_of_one_two_three_and_four_people():
    # The values that the authors name: 0.3, 0.6, 0.9 and 1 (github.com/GT-Vision-Lab/VQA, issue 1).
    for agreeing, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa_accuracy("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(expected)


def test_vqa_normalizes_only_where_people_disagree():
    assert vqa_accuracy("the dog", ["dog"] * 9 + ["cat"]) == 1
    assert vqa_accuracy("the dog", ["dog"] * 10) == 0
    assert vqa_accuracy("2\n", ["two"] * 5 + ["2"] * 5) == 1
    with pytest.raises(ValueError, match="answers that people gave"):
        vqa_accuracy("dog", [])


# --- POPE -----------------------------------------------------------------------------------------


def ratios_of_sums(rows) -> dict[str, float]:
    """The figures of many answers; 0 for a ratio without a denominator (nobody said yes)."""
    rows = list(rows)
    sums = {name: [sum(part) for part in zip(*(row[name] for row in rows))] for name in rows[0]}
    return {name: top / bottom if bottom else 0.0 for name, (top, bottom) in sums.items()}


def test_pope_is_the_confusion_matrix_of_its_reading():
    rng = random.Random(5)
    for _ in range(200):
        texts = [rng.choice(["yes", "no", "Yes", "maybe", "No, it is not.", ""]) for _ in range(rng.randint(1, 20))]
        answers = [rng.choice(["yes", "no"]) for _ in texts]
        cells = Counter((text not in ("no", "No, it is not."), answer == "yes") for text, answer in zip(texts, answers))
        tp, fp, fn, tn = cells[True, True], cells[True, False], cells[False, True], cells[False, False]
        figures = ratios_of_sums(map(pope_counts, texts, answers))
        assert figures["accuracy"] == pytest.approx((tp + tn) / len(texts))
        assert figures["precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0)
        assert figures["recall"] == pytest.approx(tp / (tp + fn) if tp + fn else 0)
        assert figures["F1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)
        assert figures["yes ratio"] == pytest.approx((tp + fp) / len(texts))
        assert figures["valid"] == pytest.approx(sum(text in ("yes", "no", "Yes") for text in texts) / len(texts))


def test_pope_reads_the_first_sentence():
    assert reads_as_yes("Yes, there is. There are no cats, though.")
    assert not reads_as_yes("no")
    assert not reads_as_yes("There is not a dog")
    assert reads_as_yes("nothing"), "only whole words deny"


# --- captions -------------------------------------------------------------------------------------

# Stanford CoreNLP 3.4.1, PTBTokenizer -preserveLines -lowerCase, less coco-caption's punctuation.
OFFICIAL_TOKENS = {
    "A man's dog isn't happy, is it?": "a man 's dog is n't happy is it",
    "Two people don't know what they're doing - really!": "two people do n't know what they 're doing really",
    "A t-shirt and a black-and-white cat (sitting).": "a t-shirt and a black-and-white cat -lrb- sitting -rrb-",
    "There are 1,000 birds at 3.5 feet at 10:30 a.m. today.": "there are 1,000 birds at 3.5 feet at 10:30 a.m. today",
    "He cannot go; she's gonna \"run\" 'away' now.": "he can not go she 's gon na run away now",
    "A 5-year-old boy w/ a ball & bat costs $5.00 or 50%.": "a 5-year-old boy w / a ball & bat costs $ 5.00 or 50 %",
    "The U.S. flag... on a pole.": "the u.s. flag on a pole",
    "Mr. Smith and Dr. Jones vs. the St. Bernard dog.": "mr. smith and dr. jones vs. the st. bernard dog",
    "a red car, two dogs and an apple on a blue background": "a red car two dogs and an apple on a blue background",
    "an orange/white cat on top of a car/truck.": "an orange/white cat on top of a car/truck",
    "the dogs' bowl and the boys' toys": "the dogs bowl and the boys toys",
    "A man riding a horse.A dog follows.": "a man riding a horse.a dog follows",
    "a cat_dog e-mail me@x.com http://a.com/b": "a cat_dog e-mail me@x.com http://a.com/b",
    "“quoted” ‘single’ text…": "quoted single text",
    "café naïve – dash — long": "café naïve dash long",
    "90's music; the '60s; rock 'n' roll": "90 's music the '60s rock 'n' roll",
    "ain't can't won't shan't": "ai n't ca n't wo n't sha n't",
    "o'clock ma'am O'Brien": "o'clock ma'am o'brien",
    "Stop!!! What?? Stop!": "stop !!! what ?? stop",
    "1/2 of a pizza at Elm St.": "1/2 of a pizza at elm st.",
    "[box] {curly}": "-lsb- box -rsb- -lcb- curly -rcb-",
    "  Two  spaces  ": "two spaces",
    "": "",
}


@pytest.mark.parametrize("caption", OFFICIAL_TOKENS)
def test_tokens_are_those_of_the_official_tokenizer(caption: str):
    assert tokenize(caption) == OFFICIAL_TOKENS[caption].split()


CAPTIONS = [
    "a red car and two dogs on a blue background",
    "A dog is running through the grass.",
    "two people ride their bikes",
    "a plate with food",
    "an old man's hat",
]
REFERENCES = [
    ["a red car, two dogs and an apple on a blue background", "a car and dogs"],
    [
        "A dog runs through tall grass.",
        "The dog is running through the grass",
        "a brown dog in a field of grass",
    ],
    ["Two people riding bikes down the street.", "two men on bikes", "People ride their bikes to work"],
    ["A white plate with food on a table.", "some food on a plate"],
    ["an old man wearing a hat", "a hat"],
]


def test_bleu_and_cider_of_the_official_scorers():
    # pycocoevalcap 1.2 (PTBTokenizer, Bleu(4), Cider()) on the captions above.
    expected = [0.878478349563211, 0.8214401921679244, 0.6845926988681716, 0.5492620306496404]
    assert bleu(CAPTIONS, REFERENCES) == pytest.approx(expected, abs=1e-12)
    corpus, each = cider_d(CAPTIONS, REFERENCES)
    assert corpus == pytest.approx(2.9326655277034113, abs=1e-12)
    assert each == pytest.approx(
        [2.9708294066891567, 3.7207626790006216, 2.874395173084605, 2.719136376104378, 2.3782040036382925], abs=1e-12
    )


def test_bleu_of_papineni():
    # Papineni et al. 2002, section 2.1: a modified unigram precision of 2/7.
    references = [["The cat is on the mat.", "There is a cat on the mat."]]
    assert bleu(["the the the the the the the"], references, max_n=1) == pytest.approx([2 / 7])


def random_captions(rng: random.Random) -> tuple[list[str], list[list[str]]]:
    words = "a dog cat red car two on the table".split()
    references = [
        [" ".join(rng.choice(words) for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(1, 3))]
        for _ in range(rng.randint(1, 5))
    ]
    captions = [
        " ".join(word if rng.random() < 0.7 else rng.choice(words) for word in rng.choice(group).split())
        for group in references
    ]
    return captions, references


def test_bleu_by_counting():
    rng = random.Random(6)
    for _ in range(200):
        captions, references = random_captions(rng)
        logs, length, nearest = [], 0, 0
        for caption, group in zip(captions, references):
            size = len(caption.split())
            length += size
            nearest += min((len(r.split()) for r in group), key=lambda n: (abs(n - size), n))
        penalty = 1 if length >= nearest else math.exp(1 - nearest / length)
        for n in range(1, 5):
            matched = total = 0
            for caption, group in zip(captions, references):
                words = caption.split()
                grams = [words[i : i + n] for i in range(len(words) - n + 1)]
                total += len(grams)
                for gram in {tuple(g) for g in grams}:
                    in_references = (
                        sum(r.split()[i : i + n] == list(gram) for i in range(len(r.split()))) for r in group
                    )
                    matched += min(grams.count(list(gram)), max(in_references))
            if not matched:
                break  # without a match the figure is coco-caption's tiny number
            logs.append(math.log(matched / total))
            assert bleu(captions, references)[n - 1] == pytest.approx(penalty * math.exp(sum(logs) / n), rel=1e-6)


def test_cider_by_vectors():
    """The formula of the paper (equations 4 and 5) with dense vectors over all n-grams that occur."""
    rng = random.Random(7)
    for _ in range(200):
        captions, references = random_captions(rng)
        expected = np.zeros(len(captions))
        for n in range(1, 5):

            def grams(text: str, n: int = n) -> list[str]:
                words = text.split()
                return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

            vocabulary = sorted({g for text in itertools.chain(captions, *references) for g in grams(text)})
            if not vocabulary:
                continue
            document = np.array([sum(any(g in grams(r) for r in group) for group in references) for g in vocabulary])
            idf = np.log(len(references) / np.maximum(document, 1))
            for i, (caption, group) in enumerate(zip(captions, references)):
                h = np.array([grams(caption).count(g) for g in vocabulary]) * idf
                for reference in group:
                    r = np.array([grams(reference).count(g) for g in vocabulary]) * idf
                    norms = np.linalg.norm(h) * np.linalg.norm(r)
                    cosine = np.minimum(h, r) @ r / norms if norms else 0.0
                    shift = len(caption.split()) - len(reference.split())
                    expected[i] += 10 / 4 / len(group) * cosine * np.exp(-(shift**2) / (2 * 6**2))
        corpus, each = cider_d(captions, references)
        assert each == pytest.approx(expected.tolist(), abs=1e-9)
        assert corpus == pytest.approx(expected.mean(), abs=1e-9)


def test_captions_and_references_go_in_pairs():
    with pytest.raises(ValueError, match="1 captions and references for 2"):
        bleu(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])


# --- boxes and masks ------------------------------------------------------------------------------


def box_mask(box: tuple[int, int, int, int], size: int = 12) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def random_box(rng: random.Random, size: int = 12) -> tuple[int, int, int, int]:
    (x0, x1), (y0, y1) = (sorted(rng.sample(range(size + 1), 2)) for _ in range(2))
    return x0, y0, x1, y1


def test_box_iou_is_the_pixels_in_both_over_the_pixels_in_either():
    rng = random.Random(8)
    for _ in range(100):
        a, b = [random_box(rng) for _ in range(2)], [random_box(rng) for _ in range(3)]
        iou = box_iou(a, b)
        for i, j in itertools.product(range(2), range(3)):
            pixels = [{(x, y) for x in range(q[0], q[2]) for y in range(q[1], q[3])} for q in (a[i], b[j])]
            assert iou[i, j] == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))
            assert mask_iou(box_mask(a[i]), box_mask(b[j])) == pytest.approx(iou[i, j])


def test_iou_of_nothing_is_zero():
    assert box_iou([(1, 1, 1, 1)], [(1, 1, 1, 1)])[0, 0] == 0
    assert box_iou([(5, 5, 1, 1)], [(0, 0, 9, 9)])[0, 0] == 0, "an inverted box is empty"
    assert box_iou([], [(0, 0, 1, 1)]).shape == (0, 1)
    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0
    with pytest.raises(ValueError, match="different pictures"):
        mask_iou(np.zeros((2, 2), bool), np.zeros((2, 3), bool))


def test_the_surest_prediction_chooses_first():
    truth = [Region("dog", (0, 0, 10, 10))]
    good, better = Region("dog", (0, 0, 10, 8), score=0.9), Region("dog", (0, 0, 10, 9), score=0.5)
    assert match_by_score(truth, [better, good]) == [(1, 0, pytest.approx(0.8))]
    assert match_by_score(truth, [better, good], scores=[1, 0]) == [(0, 0, pytest.approx(0.9))]
    assert match_by_score(truth, [Region("cat", (0, 0, 10, 10))]) == [], "another label"
    assert match_by_score(truth, [Region("dog", (0, 0, 10, 4.9))]) == [], "below the threshold"
    assert match_by_score(truth, [Region("dog", (0, 0, 10, 5))]) == [(0, 0, 0.5)]
    assert match_by_score([], [good]) == [] == match_by_score(truth, [])


def test_instances_missed_count_zero_and_none_is_found_twice():
    def region(box: tuple[int, int, int, int], label: str = "dog") -> Region:
        return Region(label, box, box_mask(box))

    two = [region((0, 0, 4, 4)), region((6, 0, 10, 4))]
    assert instance_ious(two, two[::-1]) == [1, 1], "whatever the order"
    assert instance_ious(two, [region((0, 0, 4, 2))]) == [0.5, 0]
    assert instance_ious(two, [region((0, 0, 4, 4), "cat")]) == [0, 0]
    assert instance_ious(two, [two[0], two[0]]) == [1, 0]
    assert instance_ious(two, [Region("dog", (0, 0, 4, 4))]) == [0, 0], "a box is no mask"
    # The best pair goes first, even where the second object would have liked its prediction.
    near = [region((0, 0, 4, 4)), region((1, 0, 5, 4))]
    assert instance_ious(near, [region((1, 0, 5, 4))]) == [0, 1]
    with pytest.raises(ValueError, match="no mask"):
        instance_ious([Region("dog", (0, 0, 1, 1))], [])


# --- average precision ----------------------------------------------------------------------------


def random_pictures(rng: random.Random, count: int, masks: bool = False):
    """Rows of true and predicted regions in pictures of 200 x 160, predictions being shifted truths and strays."""

    def region(box, label: str, score: float | None = None) -> Region:
        x0, y0, x1, y1 = (round(edge) for edge in box)
        x0, y0 = min(max(x0, 0), 195), min(max(y0, 0), 155)
        box = (x0, y0, min(max(x1, x0 + 3), 200), min(max(y1, y0 + 3), 160))
        mask = None
        if masks:
            mask = np.zeros((160, 200), bool)
            mask[box[1] : box[3], box[0] : box[2]] = True
            mask[(box[1] + box[3]) // 2 :, : (box[0] + box[2]) // 2] = False
        return Region(label, box, mask, score)

    def anywhere() -> list[float]:
        x, y, w, h = rng.uniform(0, 150), rng.uniform(0, 120), rng.uniform(5, 120), rng.uniform(5, 100)
        return [x, y, x + w, y + h]

    rows = []
    for _ in range(count):
        truth = [region(anywhere(), rng.choice("abc")) for _ in range(rng.randint(0, 4))]
        found = [t for t in truth if rng.random() < 0.8]
        predicted = [region([edge + rng.gauss(0, 5) for edge in t.box], t.label, round(rng.random(), 2)) for t in found]
        predicted += [region(anywhere(), rng.choice("abc"), round(rng.random(), 2)) for _ in range(rng.randint(0, 2))]
        rows.append((truth, predicted))
    return rows


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_cocos_ap50(masks: bool):
    rng = random.Random(9)
    compared = 0
    for _ in range(200):
        rows = random_pictures(rng, rng.randint(1, 5), masks)
        if any(truth for truth, _ in rows):
            assert average_precision(rows, masks=masks) == pytest.approx(coco_metrics(rows, masks)["AP50"])
            compared += 1
    assert compared > 150


# pycocotools 2.0.11 on random_pictures(random.Random(0), 60, masks): AP, AP50, AP75, by size; AR 1, 10, 100, by size.
# Results with masks were given to it without boxes, as COCO's result files are, so sizes are those of the masks.
PYCOCOTOOLS = {
    False: [0.2191471833201786, 0.437701314534182, 0.20846354575132542, 0.03768662580543768, 0.29272924697074876, 1.0,
            0.2984762621859397, 0.4265699717312621, 0.4265699717312621, 0.14166666666666666, 0.47921146953405014, 1.0],
    True: [0.1762171944074896, 0.3798881527361825, 0.14874854981037672, 0.05766601934918766, 0.2538615475890485, -1.0,
           0.2543274946500753, 0.3639804760772503, 0.3639804760772503, 0.14686868686868687, 0.42255244755244764, -1.0],
}  # fmt: skip


@pytest.mark.parametrize("masks", [False, True])
def test_coco_figures_are_those_of_pycocotools(masks: bool):
    rows = random_pictures(random.Random(0), 60, masks)
    figures = coco_metrics(rows, masks)
    assert list(figures.values()) == pytest.approx(PYCOCOTOOLS[masks], abs=1e-9)


def test_coco_figures_of_nothing():
    dog = Region("dog", (0, 0, 10, 10))
    assert coco_metrics([([], [dog])])["AP"] == -1
    unanswered = coco_metrics([([dog], [])])
    assert unanswered["AP"] == unanswered["AP_small"] == unanswered["AR_small"] == 0
    assert [unanswered[f"{kind}_{size}"] for kind in ("AP", "AR") for size in ("medium", "large")] == [-1] * 4, (
        "there was no such object to be found"
    )
    assert math.isnan(average_precision([([], [dog])]))
    assert average_precision([([dog], [])]) == 0
    assert average_precision([([dog], [dog]), ([], [Region("cat", (0, 0, 5, 5))])]) == 1, "no picture has a cat"


def test_a_score_that_knows_beats_random_order_and_one_that_errs_loses():
    rng = random.Random(10)
    rows = []
    for _ in range(100):
        right = rng.random() < 0.6
        box = (0, 0, 10, 10) if right else (50, 50, 60, 60)
        rows.append(([Region("dog", (0, 0, 10, 10))], [Region("dog", box, score=rng.random() / 2 + right / 2)]))
    upside_down = [(truth, [Region("dog", p.box, score=1 - p.score) for p in predicted]) for truth, predicted in rows]
    constant = np.mean([average_precision(rows, shuffle=np.random.default_rng(seed)) for seed in range(20)])
    share = np.mean([bool(match_by_score(*row)) for row in rows])
    assert average_precision(rows) == pytest.approx(share, abs=0.01), (
        "all right ones first: precision 1 up to the recall"
    )
    assert constant == pytest.approx(share**2, abs=0.04), "precision and recall both end at the share"
    assert average_precision(upside_down) < constant - 0.02


def test_weights_are_repetitions():
    """A bootstrap sample by weights is the average precision of the repeated rows."""
    rng = random.Random(11)
    rows = [  # without ties, the order of which would be another one
        (truth, [Region(p.label, p.box, score=rng.random()) for p in predicted])
        for truth, predicted in random_pictures(rng, 12)
    ]
    for seed in range(20):
        weights = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
        repeated = [row for row, weight in zip(rows, weights) for _ in range(weight)]
        assert mean_area(rank(rows), weights.astype(float)) == pytest.approx(average_precision(repeated), abs=1e-9)


# --- RefCOCO --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec() -> MaskCodec:
    """Random weights, shifted so that half of the pixels of a mask are inside."""
    torch.manual_seed(0)
    codec = MaskCodec(num_codes=128, embedding_dim=8, encoder_widths=(2, 2, 2, 2), decoder_widths=(8, 8, 4, 4, 4))
    with torch.no_grad():
        codec.decoder[-1].bias -= codec.decode(torch.randint(0, 128, (50, 16))).median()
    return codec


def answer_text(box: tuple[int, int, int, int], codes: list[int]) -> str:
    y0, x0, y1, x1 = box
    return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>" + "".join(f"<seg{code:03d}>" for code in codes)


def test_refcoco_by_the_steps_of_big_vision(codec: MaskCodec):
    """transfers/segmentation.py: locations / 1023, corners cut to whole pixels, mask stretched bilinearly, > 0."""
    codes = torch.randint(0, 128, (200, 16))
    decoded = codec.decode(codes).detach().numpy()
    rng = random.Random(12)
    positive = 0
    for i in range(200):
        height, width = rng.randint(20, 80), rng.randint(20, 80)
        truth = np.zeros((height, width), bool)
        gx0, gy0 = rng.randint(0, width - 10), rng.randint(0, height - 10)
        truth[gy0 : gy0 + 9, gx0 : gx0 + 9] = True
        box = (gx0, gy0, gx0 + 9, gy0 + 9)
        y0, x0, y1, x1 = (rng.randint(0, 1023) for _ in range(4))
        if i % 5:  # every fifth is left as it is, and most often no box
            (y0, y1), (x0, x1) = sorted((y0, y1)), sorted((x0, x1))
        mask, overlap, valid = refcoco_ious(
            answer_text((y0, x0, y1, x1), codes[i].tolist()) + rng.choice(["", " dog", " ; <loc0001>"]),
            box,
            truth,
            codec,
        )
        if y1 <= y0 or x1 <= x0:
            assert (mask, overlap, valid) == (0, 0, False)
            continue
        top, left, bottom, right = (
            int(v) for v in (y0 / 1023 * height, x0 / 1023 * width, y1 / 1023 * height, x1 / 1023 * width)
        )
        expected = 0.0
        if bottom > top and right > left:
            image = Image.fromarray(decoded[i]).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            inside = np.asarray(image) > 0
            both = np.count_nonzero(truth[top:bottom, left:right] & inside)
            expected = both / (truth.sum() + inside.sum() - both)
        assert mask == pytest.approx(expected, abs=1e-9)
        assert valid == (bottom > top and right > left), "a box of no whole pixel is counted as invalid"
        positive += expected > 0
        a, b = (x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height), box
        both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        assert overlap == pytest.approx(both / ((a[2] - a[0]) * (a[3] - a[1]) + 81 - both))
    assert positive > 50


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dog",
        answer_text((0, 0, 1023, 1023), [5] * 15),  # a code is missing
        "dog " + answer_text((0, 0, 1023, 1023), [5] * 16),  # does not begin with it
        answer_text((500, 0, 500, 1023), [5] * 16),  # no height
        answer_text((0, 0, 1023, 1023), [5] * 15) + "<seg128>",
        answer_text((0, 0, 1023, 1024), [5] * 16),
    ],
)
def test_an_invalid_refcoco_answer_counts_zero(text: str, codec: MaskCodec):
    assert refcoco_ious(text, (0, 0, 10, 10), np.ones((10, 10), bool), codec) == (0, 0, False)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_of_newcombe(right: int, n: int, low: float, high: float):
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    low, high = bootstrap(lambda weights: float(weights @ values / weights.sum()), range(400), samples=2000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_rows_of_one_picture_are_not_independent():
    """Ten copies of every row tell no more than one, if they are known to be of one group."""
    right = [1, 0, 1, 1, 0, 1, 0, 1] * 5
    alone = bootstrap(lambda w: float(w @ np.array(right) / w.sum()), range(40))
    copies = np.repeat(right, 10).tolist()
    grouped = ratio_interval(copies, [1] * 400, np.repeat(range(40), 10).tolist())
    fooled = ratio_interval(copies, [1] * 400, list(range(400)))
    assert grouped == pytest.approx(alone, abs=0.02)
    assert fooled[1] - fooled[0] < 0.5 * (grouped[1] - grouped[0])


def test_a_perfect_ratio_is_not_certain():
    low, high = ratio_interval([2, 1, 3], [2, 1, 3], ["a", "b", "c"])  # three pictures, all objects found
    assert (low, high) == wilson(3, 3)
    assert ratio_interval([0, 0], [2, 3], ["a", "b"]) == wilson(0, 2)
