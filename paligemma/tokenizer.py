"""Text <-> token ids, in the vocabulary of a PaliGemma checkpoint.

The vocabulary is Gemma's, read from `tokenizer.json` or from a sentencepiece `tokenizer.model`, with three additions at
its end, in this order:

    <loc0000> ... <loc1023>   coordinates of boxes, in 1024 steps from the top or the left edge of the picture
    <seg000>  ... <seg127>    codes of a mask, which `answers/mask_codec.py` decodes
    <image>                   stands for one patch of a picture; never written by the model

What is unusual: a tokenizer with a token missing or out of place is refused by name. A model would still answer with
such a tokenizer, but its boxes would mean something else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

import tokenizers

from paligemma.arguments import check_path
from paligemma.files import LARGEST_JSON, library_errors, read_bytes, write_texts

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaConfig

# The files that a tokenizer may lie in, the first first. The last is how big_vision publishes its own.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "paligemma_tokenizer.model")

IMAGE = "<image>"
LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(128)]

# The ids of the published vocabulary. All of it is Gemma's, but for 1,024 + 128 + 1 tokens at the end.
OFFICIAL_SIZE = 257153
OFFICIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "\n": 108,
    "<loc0000>": 256000,
    "<seg000>": 257024,
    IMAGE: 257152,
}


class Tokenizer:
    """Text <-> ids, for a vocabulary of Gemma's kind: BPE with byte fallback, a space is a U+2581, nothing is added.

    `backend` is a `tokenizers.Tokenizer`; it is checked, not copied. `load_tokenizer` reads one from a folder.
    Raises ValueError when a token that PaliGemma needs is missing or out of place.
    """

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    image_token_id: int
    newline_token_id: int
    first_loc_id: int  # <loc0000>; the 1024 follow each other
    first_seg_id: int  # <seg000>; the 128 follow each other

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # In some files <loc> and <seg> are in the vocabulary without being marked as whole tokens, and would be spelt
        # out letter by letter. Marking them adds no ids.
        answer_tokens = LOCATIONS + SEGMENTS
        known = [backend.token_to_id(token) for token in answer_tokens]
        if None not in known and self.encode("".join(answer_tokens)) != known:
            backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in answer_tokens])

        problems = self._problems()
        if problems:
            raise ValueError(_does_not_fit(problems))

        ids: dict[str, Any] = {token: backend.token_to_id(token) for token in OFFICIAL_IDS}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["<bos>"], ids["<eos>"], ids["<pad>"]
        self.image_token_id, self.newline_token_id = ids[IMAGE], ids["\n"]
        self.first_loc_id, self.first_seg_id = ids["<loc0000>"], ids["<seg000>"]

        # What decoding leaves out: all that is marked special, and never the answer's own tokens.
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        special |= {self.bos_token_id, self.eos_token_id, self.pad_token_id, self.image_token_id}
        self._dropped = frozenset(special.difference(known))
        self._bytes = frozenset(backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else: no `<bos>`, no `<eos>`. What looks like a token ("<loc0001>", but also
        "<bos>" typed by a user) becomes that token, as in transformers."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected a string")
        self.backend.no_truncation()  # a transformers tokenizer shares its backend with us and leaves these on
        self.backend.no_padding()
        with library_errors("the tokenizer cannot encode this text"):
            try:
                return self.backend.encode(text, add_special_tokens=False).ids
            except TypeError:
                raise ValueError(f"expected text in Unicode, got {text[:100]!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list, an array or a tensor of one row). `<locNNNN>` and `<segNNN>` are kept as text;
        `<bos>`, `<eos>`, `<pad>`, `<image>` and ids outside the vocabulary are dropped. Bytes that are not UTF-8 give
        one U+FFFD each."""
        return self._decoded(self._kept(ids))

    def decode_stable(self, ids: Iterable[int]) -> str:
        """The part of `decode(ids)` that no later token can change: for streaming, since text that was shown cannot be
        taken back. A character outside the vocabulary is several byte tokens, and whether these are a character is
        known when the run of them ends. So a run at the end is held back."""
        kept = self._kept(ids)
        while kept and kept[-1] in self._bytes:
            kept.pop()
        return self._decoded(kept)

    def token_to_id(self, token: str) -> int | None:
        """The id of one entry of the vocabulary, written as it stands there ("▁cat"); None if there is none."""
        return self.backend.token_to_id(token)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` with which transformers loads it unchanged."""
        write_texts(Path(folder), self.files())

    def __len__(self) -> int:
        """How many tokens there are. The model's embedding has more rows (a multiple of 64); those were never
        trained."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self):,} tokens)"

    def _kept(self, ids: Iterable[int]) -> list[int]:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TypeError(f"ids is {type(ids).__name__}, expected a list of token ids")
        return [i for i in map(int, ids) if i >= 0 and i not in self._dropped]

    def _decoded(self, ids: list[int]) -> str:
        with library_errors("the tokenizer cannot decode these ids"):
            return self.backend.decode(ids, skip_special_tokens=False)

    def files(self) -> dict[str, str]:
        """What `save` writes: the text of each file by its name."""
        self.backend.no_truncation()
        self.backend.no_padding()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
            "processor_class": "PaliGemmaProcessor",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            **({"unk_token": "<unk>"} if self.token_to_id("<unk>") is not None else {}),
            "extra_special_tokens": {"image_token": IMAGE},
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": 10**30,
        }
        return {
            "tokenizer.json": self.backend.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def _problems(self) -> list[str]:
        """What stands between this vocabulary and PaliGemma, in words."""
        expected = OFFICIAL_IDS if len(self) >= OFFICIAL_SIZE - 1 else {}
        problems = []
        for token in OFFICIAL_IDS:
            found = self.token_to_id(token)
            if found is None:
                problems.append(f"{token!r} is missing")
            elif found != expected.get(token, found):
                problems.append(f"{token!r} has id {found}, expected {expected[token]}")
            elif self.encode(token) != [found]:
                problems.append(f"{token!r} is split into {len(self.encode(token))} tokens")
            elif found >= len(self):
                problems.append(f"{token!r} has id {found}, beyond the {len(self)} tokens of the vocabulary")
        for family in (LOCATIONS, SEGMENTS):
            first = self.token_to_id(family[0])
            if first is None:
                continue  # said above
            for i, token in enumerate(family):
                found = self.token_to_id(token)
                if found != first + i:
                    was = "is missing" if found is None else f"has id {found}"
                    problems.append(f"{token!r} {was}, expected {first + i} ({len(family)} in a row from {family[0]})")
                    break
        return problems


def _does_not_fit(problems: list[str]) -> str:
    hint = "Use the tokenizer of the checkpoint itself."
    of_first = [problem for problem in problems if problem.startswith("'<loc0000>'")]
    if any("missing" not in problem for problem in of_first):
        hint = (
            "This is what becomes of a plain Gemma tokenizer when <image> is added before <loc> and <seg>. "
            "Use the tokenizer of the checkpoint itself."
        )
    elif of_first:
        hint = "A plain Gemma tokenizer lacks what PaliGemma answers with. Use the tokenizer of the checkpoint itself."
    return f"the tokenizer does not fit PaliGemma: {'; '.join(problems)}. {hint}"


def check_tokenizer(tokenizer: Tokenizer, config: PaliGemmaConfig) -> None:
    """Raise one ValueError that names every token whose id is not what the model was trained with.

    (Whether the tokens are there, contiguous, and at the official ids in a vocabulary of the official size has been
    checked when the tokenizer was made.)
    """
    problems = []
    for token, found, expected in (
        (IMAGE, tokenizer.image_token_id, config.image_token_index),
        ("<pad>", tokenizer.pad_token_id, config.pad_token_id),
        ("<bos>", tokenizer.bos_token_id, config.bos_token_id),
        ("<eos>", tokenizer.eos_token_id, config.eos_token_id),
    ):
        if expected is not None and found != expected:
            problems.append(f"{token!r} has id {found}, expected {expected}")
    rows = config.text_config.vocab_size
    # <image> itself is never looked up, so a table that ends just before it (big_vision's) is whole.
    image_is_last = tokenizer.image_token_id == len(tokenizer) - 1
    if len(tokenizer) - image_is_last > rows:
        problems.append(f"it has {len(tokenizer)} tokens, the model's embedding only {rows} rows")
    if problems:
        raise ValueError(_does_not_fit(problems))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `folder` (or the file itself): `tokenizer.json`, else a sentencepiece model (`TOKENIZERS`).

    A sentencepiece model is read into the same `Tokenizer`. PaliGemma's own holds `<loc>` and `<seg>`, and `<image>`
    is added behind them; Gemma's own, which big_vision extends at run time, holds none of them, and all are added in
    big_vision's order: loc, seg, image. Any other mixture is an error.

    Raises FileNotFoundError, ValueError (unreadable, or not PaliGemma's: see `Tokenizer`), and ImportError when
    sentencepiece is needed and missing.
    """
    path = check_path("folder", folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        found = [path / name for name in TOKENIZERS if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no tokenizer: expected tokenizer.json or tokenizer.model")
        path = found[0]
    backend = _read_sentencepiece(path) if path.suffix == ".model" else _read_json(path)
    try:
        with library_errors("it cannot be used"):
            return Tokenizer(backend)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path) -> tokenizers.Tokenizer:
    try:
        content = read_bytes(path, LARGEST_JSON)
        with library_errors("not understood"):
            return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json that can be read: {error}") from None


def _read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A sentencepiece BPE model of Gemma's kind, rebuilt with `tokenizers`.

    Sentencepiece keeps a score for every piece and joins the neighbours whose union scores best; `tokenizers` wants
    that as a ranked list of pairs. So every piece is cut at every place, and the pairs are ranked by the piece's score.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ImportError(
            f"reading {path.name} needs sentencepiece: pip install 'paligemma[bigvision]' (tokenizer.json does not)"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path, LARGEST_JSON))
    except Exception as error:  # RuntimeError, OSError or TypeError, by version
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None

    pieces, score, whole = _pieces_of(model)
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    pairs.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))

    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[model.unk_id()]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=True) for piece in whole])

    probe = "answer en how  many dogs?\n\n\t12 Ünï 象 🦒 <loc> ; " + " ".join(list(score)[-200:])
    if backend.encode(probe, add_special_tokens=False).ids != model.encode(probe):
        raise ValueError(f"{path} splits text in another way than Gemma's tokenizers do (BPE, no dummy space in front)")

    special = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in special])
    if not any(token in vocab for token in ("<loc0000>", "<seg000>", IMAGE)):
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in LOCATIONS + SEGMENTS])
    if IMAGE not in vocab:
        backend.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False)])
    return backend


def _pieces_of(model: Any) -> tuple[list[str], dict[str, float], list[str]]:
    """What a `SentencePieceProcessor` holds: all pieces by id; the score of those that BPE may build; and the "user
    defined" ones, which are matched as a whole before BPE begins."""
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    answer_tokens = {*LOCATIONS, *SEGMENTS, IMAGE}
    score: dict[str, float] = {}
    whole: list[str] = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i):
            continue
        # The Python binding does not tell the type. User-defined pieces score +0.0, the first learned one -0.0.
        user_defined = model.get_score(i) == 0 and math.copysign(1, model.get_score(i)) > 0
        if user_defined or piece in answer_tokens:
            whole.append(piece)
        else:
            score[piece] = model.get_score(i)
    if "\t" not in pieces and "<0x09>" in pieces:
        # Gemma's model knows runs of tabs, but one tab only as a byte; pairs need it under its name.
        pieces[pieces.index("<0x09>")] = "\t"
        score["\t"] = 0.0
    return pieces, score, whole


# --------------------------------------------------------------------------------------- characters, for streaming


def start_of_last_character(text: str) -> int:
    """Where the last character, as people see it, begins: what comes next may still become a part of it."""
    start = max(len(text) - 1, 0)
    while start > 0 and (_joins(text[start]) or text[start - 1] == "\u200d"):
        start -= 1
    return start


def _joins(code_point: str) -> bool:
    """Whether it continues the character before it: marks, zero-width joiner, skin tones, flags, Hangul vowels."""
    return (
        category(code_point).startswith("M")
        or code_point == "\u200d"
        or "\U0001f3fb" <= code_point <= "\U0001f3ff"
        or "\U0001f1e6" <= code_point <= "\U0001f1ff"  # a flag is two of these, so a run of them is held together
        or "\u1160" <= code_point <= "\u11ff"
    )
