"""The small world's tokenizer: byte-pair encoding like Gemma's, in which every word of the world is one token.

Ids: 0 <pad>, 1 <eos>, 2 <bos>, 3 <unk>, "\\n", 256 bytes, characters, learned pieces, 1,024 <loc>, 128 <seg>, <image>
(the last). Other words are split into pieces, letters, or at worst bytes.
"""

from __future__ import annotations

import json
import string

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from paligemma.tiny import rows, world
from paligemma.tokenizer import IMAGE, LOCATIONS, SEGMENTS, Tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = ["▁", *(c for c in string.printable if not c.isspace())]


def world_words(world_number: int = 1) -> tuple[list[str], list[str]]:
    """(words that may begin a text, words that may follow a space)."""
    colors = [*world.TINTS, *world.BACKGROUNDS]
    names = [*world.LABELS, *colors, *rows.NUMBERS, "yes", "no", "left", "right", "a", "an"]
    begin = [*names, "caption", "answer", "detect", "segment", "ocr"]
    questions = " ".join(q for wordings in rows.QUESTIONS.values() for q in wordings)
    if world_number == 2:
        questions = " ".join([questions, *rows.READING])
    inside = [word for word in questions.replace("?", " ").split() if "{" not in word]
    many = [rows.plural(label) for label in world.LABELS]
    return begin, [*names, *many, *inside, "en", "and", "on", "background", "objects", "things", "both", ";", "?"]


def build_tokenizer(world_number: int = 1) -> Tokenizer:
    """Built from the words of the world only, so it is the same on every machine."""
    begin, inside = (sorted(set(words)) for words in world_words(world_number))
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    # Every word four times, so that every pair of its pieces is frequent enough to be merged until it is one.
    learner.train_from_iterator(
        [*begin, *(" " + word for word in inside)] * 4,
        trainers.BpeTrainer(vocab_size=10_000, min_frequency=2, initial_alphabet=CHARACTERS, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, "\n", *BYTES, *pieces, *LOCATIONS, *SEGMENTS])}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken("\n", normalized=False, special=False)])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in LOCATIONS + SEGMENTS])
    backend.add_special_tokens([AddedToken(IMAGE, normalized=False, special=True)])
    return Tokenizer(backend)
