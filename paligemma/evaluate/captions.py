"""CIDEr-D and BLEU-1..4, as COCO captions are scored, without Java.

    score = cider_d(["a dog runs"], [["a dog running", "the dog runs"]])       # corpus figure, figure of every caption

Definitions: CIDEr-D, arXiv 1411.5726; BLEU, Papineni et al. 2002; both as in https://github.com/tylin/coco-caption, the
code behind every published COCO figure. That code first runs Stanford's PTBTokenizer, a Java program; `tokenize`
replaces it. CIDEr-D is ten times a similarity, so a corpus figure of 1.4 is the "140" of the papers. The weight of a
word depends on all reference captions of the corpus: figures of corpora of different size cannot be compared, and the
figure of a single caption is 0.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

NGram = tuple[str, ...]

_MARKS = str.maketrans({
    "“": '"', "”": '"', "‘": "'", "’": "'", "`": "'", "–": "-", "—": "-", "…": "...",
    "½": "1/2", "¼": "1/4", "¾": "3/4",
})  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|prof|inc|co|corp|ltd|mt|ave|blvd|rd|ft|etc|al|cf"
_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+
    | (?<!\w)[-+]?\d+(?:[.,:/]\d+)*(?![\w-])   # 3.5  1,000  10:30  1/2  -1
    | (?:[a-z]\.){{2,}} | \b(?-i:[A-Z])\.(?!\w)        # u.s.  J. Smith
    | \b(?:{_ABBREVIATIONS})\.(?!\w)          # st.
    | \bno\.(?=\s*\d)
    | \w+(?=n't\b) | n't\b                    # do n't
    | '(?:s|m|d|ll|re|ve)\b
    | \b(?:can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b))
    | '\d0s\b | \b[od]'\w+ | \bma'am\b | '?\bn'(?=\W|r)
    | \w+(?:[-_./&@]\w+)*                     # t-shirt stays whole
    | !!+ | \?\?+ | [!?]{{2,}}                  # a single one is punctuation, several are a word
    | ---+
    | [][(){{}}$#%&@+=*/<>\\^|~£€°]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """Words in lower case without punctuation; clitics are split off: "the dog's" -> the, dog, 's; "don't" -> do, n't.

    Follows PTBTokenizer 3.4.1 with `-lowerCase`, and coco-caption, which removes . , : ; ? ! - -- ... and quotes.
    Brackets stay, as "-lrb-" and so on: coco-caption means to remove them, but looks for "-LRB-" in lower-case text.

    31 of 6,000 English sentences are tokenized differently by the original. Known causes: a single letter before a full
    stop (which PTB takes for an initial in some places only), smileys, "£" (PTB: "#"), "2.5K", "'tis", "<tag>", "**".
    """
    words = _TOKEN.findall(caption.translate(_MARKS))
    return [_BRACKETS.get(word, word.lower()) for word in words]


def _ngrams(words: Sequence[str], n: int) -> Counter[NGram]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions and references for {len(references)}: they go in pairs")
    if not all(references):
        raise ValueError(f"caption {list(map(bool, references)).index(False)} has no reference to be compared with")
    return [tokenize(caption) for caption in captions], [[tokenize(r) for r in group] for group in references]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], max_n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-n of a corpus, each in [0, 1]. Caption i is compared with all of references[i].

    The geometric mean of the clipped n-gram precisions over the whole corpus, times the brevity penalty. The penalty
    uses, among several references, the length nearest to the caption's (the shorter of two equally near).
    """
    words, right = _tokenized(captions, references)
    matched, total = [0] * max_n, [0] * max_n
    length = right_length = 0
    for caption, group in zip(words, right):
        length += len(caption)
        right_length += min((abs(len(r) - len(caption)), len(r)) for r in group)[1]
        for n in range(max_n):
            most: Counter[NGram] = Counter()  # each n-gram with its highest count in one reference
            for reference in group:
                most |= _ngrams(reference, n + 1)
            matched[n] += (_ngrams(caption, n + 1) & most).total()
            total[n] += max(len(caption) - n, 0)
    # Both tiny numbers come from coco-caption. Without any match they give a figure of 1e-3 to 1e-5 instead of 0.
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (right_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    figures, product = [], 1.0
    for n in range(max_n):
        product *= (matched[n] + tiny) / (total[n] + small)
        figures.append(product ** (1 / (n + 1)) * penalty)
    return figures


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr-D of a corpus and of each caption, in [0, 10]. Caption i is compared with all of references[i].

    The cosine similarity of n-grams weighted by tf-idf, n = 1 to 4, the weights of the caption clipped to those of the
    reference; times a Gaussian of the difference in length (sigma 6); the mean over n and references, times 10.
    """
    words, right = _tokenized(captions, references)
    documents: Counter[NGram] = Counter()  # the number of pictures whose references have an n-gram
    for group in right:
        documents.update({gram for reference in group for n in range(1, 5) for gram in _ngrams(reference, n)})

    def weights(sentence: list[str], n: int) -> tuple[dict[NGram, float], float]:
        idf = math.log(max(len(right), 1))
        vector = {gram: tf * (idf - math.log(max(documents[gram], 1))) for gram, tf in _ngrams(sentence, n).items()}
        return vector, math.sqrt(sum(w * w for w in vector.values()))

    def similarity(caption: list[str], reference: list[str]) -> float:
        # coco-caption means the number of words but counts bigrams: one less, and 0 both for no word and for one.
        shift = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
        total = 0.0
        for n in range(1, 5):
            (vector, norm), (right_vector, right_norm) = weights(caption, n), weights(reference, n)
            shared = sum(min(w, right_vector.get(g, 0.0)) * right_vector.get(g, 0.0) for g, w in vector.items())
            total += shared / (norm * right_norm) if norm and right_norm else 0.0
        return 10 * total / 4 * math.exp(-(shift**2) / (2 * 6.0**2))

    figures = [
        sum(similarity(caption, reference) for reference in group) / len(group) for caption, group in zip(words, right)
    ]
    return sum(figures) / max(len(figures), 1), figures
