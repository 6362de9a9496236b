"""Small tokenizers of Gemma's kind, built in a tenth of a second, for every test that needs one.

    folder = build_tokenizer(tmp_path)                      # writes tmp_path/tokenizer.json
    tokenizer = paligemma.load_tokenizer(folder)

`build_sentencepiece` writes the same kind of vocabulary as a `tokenizer.model`, the form big_vision uses.

What makes a tokenizer "of Gemma's kind": byte fallback instead of an unknown token, one normalisation (" " -> U+2581),
no dummy space in front, digits one by one, runs of newlines and of spaces as single tokens, and the ids in this order:

    0 <pad>   1 <eos>   2 <bos>   3 <unk>   4 <mask>   newline runs   space runs   256 bytes   characters   pieces
    ... <loc0000> x 1024   <seg000> x 128   <image>          (the last 1153, contiguous, <image> is the very last)
"""

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
NEWLINE_RUNS = ["\n" * n for n in range(1, 32)]
SPACE_RUNS = ["▁" * n for n in range(2, 32)]  # one space is an ordinary character
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CHARACTERS = ["▁", "\t", *(c for c in string.printable if not c.isspace()), *"äöüéèñç"]
LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(128)]

WORDS = """
a an and answer apple are at background ball bird black blue bread bus cake caption car cat color cow cup de describe
detect dog duck en es fish five flower four fr gift green hat heart horse how in is it kite left lemon many moon no ocr
of on one orange pear pig pink pizza purple question red right segment sheep shirt sign star the there three to train
tree two what where which white yellow yes zero standing wearing between largest smallest object objects person people
street house window umbrella elephant butterfly strawberry airplane
""".split()


def build_tokenizer(
    folder: str | Path,
    words: Iterable[str] = WORDS,
    vocab_size: int = 2000,
    locations: bool = True,
    image_token: bool = True,
) -> Path:
    """Write `folder/tokenizer.json`, a BPE tokenizer in which each of `words` is one token with and without a space
    before it (as far as `vocab_size` allows, which counts everything; fewer tokens come out when the words need fewer).

    `locations=False` leaves out `<locNNNN>` and `<segNNN>`, `image_token=False` leaves out `<image>`: what a plain
    Gemma tokenizer looks like. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = [*SPECIAL, *NEWLINE_RUNS, *SPACE_RUNS, *BYTES]
    last = (LOCATIONS + SEGMENTS) if locations else []

    # Learn the merges on words alone: training splits before every space and around every digit, so that no piece spans
    # two words and digits stay single. The finished tokenizer does not split at all, like Gemma's.
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("▁"), "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    learner.train_from_iterator(
        [form for word in words for form in (word, " " + word) for _ in range(2)] + [" ;"] * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(fixed) - len(last) - 1, initial_alphabet=CHARACTERS, show_progress=False
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*fixed, *pieces, *last])}
    merges = [tuple(pair) for pair in learned["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    # Not "special": decoding keeps them. Matched before BPE sees the text, the longest run first.
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in NEWLINE_RUNS + SPACE_RUNS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in last])
    if image_token:
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def build_sentencepiece(folder: str | Path, words: Iterable[str] = WORDS, locations: bool = True) -> Path:
    """Train `folder/tokenizer.model` with sentencepiece (a second). With `locations` it is like PaliGemma's own, which
    has `<loc>` and `<seg>` inside but not `<image>`; without like Gemma's. Returns the folder."""
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([form for word in words for form in (word, "the " + word)] + ["dog ; cat"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=3000,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        required_chars="".join(c for c in CHARACTERS if c.isprintable() and c != "▁"),
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", *NEWLINE_RUNS, *SPACE_RUNS, *((LOCATIONS + SEGMENTS) if locations else [])],
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
