"""Writing the answer, token by token: the plain loop, and the parts of which `engine.py` makes the real one.

    prompt --prefill--> logits of the first token, cache     one pass over images and prompt, in both directions
    token  --decode---> logits of the next token             one pass over one token per row, reads the cache
    ...                                                      until eos, or until the budget is spent

`generate_greedily` is this loop for one row, in ten lines. All that follows are the parts of a useful one: the options,
the two passes through the model, choosing a token, and beam search. `engine.py` puts them together: `generate`,
`stream`, and rows that come and go.

What to know before reading the rest:
- Rows of a batch have prompts of different length and end at different times. Padding is moved to the left first, so
  that the last column is every row's last token.
- The same image can serve many prompts: encode it once and pass `image_features`. That is all that rows can share. The
  keys and values of the image can't be shared: the prefix looks in both directions, so they depend on the prompt.
- What may come next at all is decided in `answers/constraints.py`, before a token is chosen or sampled. What is
  reported about a token is its probability among the allowed ones.

Letters: B rows of the batch, N rows (or beams) still running, S prompt length, P image patches, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paligemma.answers.constraints import (
    Constraint,
    NothingAllowed,
    allowed_next,
    contains,
    masked_logits,
    never_produced,
    nothing_allowed,
    one_per_row,
)
from paligemma.answers.scores import Distribution
from paligemma.arguments import check_model, check_number, check_whole_numbers, is_whole
from paligemma.attention_mask import SUFFIX
from paligemma.kv_cache import KVCache

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration


@torch.inference_mode()
def generate_greedily(
    model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], max_new_tokens: int = 128
) -> list[int]:
    """The whole idea, for one row: the ids of the likeliest answer, without eos.

    `generate` gives the same, except where an id that was never trained is the likeliest: it chooses the next one.
    """
    logits, cache = prefill(model, inputs, max_new_tokens)  # [1, V]
    answer: list[int] = []
    for _ in range(max_new_tokens):
        token = logits.argmax(-1)  # [1]
        if token == model.config.eos_token_id:
            break
        answer.append(int(token))
        logits = decode_one_token(model, token, cache)
    return answer


# ---------------------------------------------------------------------------------------------- options and result

MOST_BEAMS = 1_000  # more is a slip: their caches would fill any machine
QUANTILES = 12  # of a distribution over watched ids


@dataclass(frozen=True)
class Options:
    """How to write an answer: the keyword arguments of `generate` and `stream`.

    max_new_tokens: the budget of a row, its eos included.
    do_sample: False takes the likeliest token each time, and temperature, top_k, top_p and seed have no effect.
    temperature, top_k, top_p: see `warp`.
    num_beams: 2 or more follows that many answers at once and returns the best one (see `beam_search`).
    length_penalty: of beams; an answer's score is its log-probability / length ** length_penalty. Above 0 it favours
        longer answers.
    seed: each row has a random generator of its own with this seed, so its answer does not depend on its neighbours. A
        list gives each row its own seed. None draws from torch's global state.
    suppress_tokens: ids that are never produced, beside <image> and what lies beyond the tokenizer.
    constraint: which ids may come next; one function for all rows, or a list with one (or None) per row. It is called
        with what a row has generated and the tokens left in its budget, and returns the sorted ids, int64 [n], or None
        for any. See `answers/constraints.py`.
    watch: (first id, count). For each token in this range `Generated.distributions` gets the distribution among the
        allowed tokens of the range, counted from its first id. Over the 1,024 location tokens: where a box's edge is,
        and how sure the model was.
    eos_token_id: default: the configuration's.
    num_tokens: `len(tokenizer)`. Pass it where <image> may not be the last token, see `never_produced`.
    compile: of `generate`; decode with one compiled graph, see `compiled.py`. For GPUs.

    Raises ValueError for values out of range and for options that do not go together.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int | Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    constraint: Constraint | Sequence[Constraint | None] | None = None
    watch: tuple[int, int] | None = None
    eos_token_id: int | None = None
    num_tokens: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("suppress_tokens", "watch"):  # tuples, since rows are grouped by them
            if (ids := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(int, ids)))
        if self.num_beams > MOST_BEAMS:
            raise ValueError(
                f"num_beams is {self.num_beams:,}, expected at most {MOST_BEAMS:,}: each has its own cache"
            )
        if not 0 < self.temperature < math.inf:
            hint = "; leave it out for greedy" if self.temperature == 0 else ""
            raise ValueError(f"temperature is {self.temperature!r}, expected a number above 0{hint}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}, expected a number above 0 and at most 1 (1 keeps every token)")
        if not -50 <= self.length_penalty <= 50:  # beyond, no float holds a length to this power
            raise ValueError(
                f"length_penalty is {self.length_penalty!r}, expected a number from -50 to 50 (0 for none)"
            )
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                "sampling with beams is not offered: use do_sample=True or num_beams > 1, not both "
                "(several samples: repeat the row with a seed each)"
            )

        if self.compile and self.num_beams > 1:
            raise ValueError("beams are not compiled: their cache is reordered in every step. Leave out one of them")

    def _check_types(self) -> None:
        for name in ("max_new_tokens", "num_beams", "top_k", "num_tokens"):
            value = getattr(self, name)
            if not is_whole(value, least=1) and not (value is None and name in ("top_k", "num_tokens")):
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        for name in ("temperature", "top_p", "length_penalty"):
            if not (name == "top_p" and self.top_p is None):
                check_number(name, getattr(self, name))
        for name in ("do_sample", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.seed is not None:
            seeds = [self.seed] if isinstance(self.seed, (int, Integral)) else self.seed
            check_whole_numbers("seed", seeds, "a whole number, or a list with one for each row")
            if not all(-(2**63) <= seed < 2**64 for seed in seeds):
                raise ValueError(f"seed is {self.seed!r}, expected numbers of at most 64 bits")
        if self.suppress_tokens is not None:
            check_whole_numbers("suppress_tokens", self.suppress_tokens, "a list of token ids")
        if self.eos_token_id is not None and not is_whole(self.eos_token_id):
            raise TypeError(f"eos_token_id is {self.eos_token_id!r}, expected a token id")
        if self.watch is not None and not (isinstance(self.watch, (tuple, list)) and len(self.watch) == 2):
            raise TypeError(f"watch is {self.watch!r}, expected (first id, count)")
        check_whole_numbers("watch", self.watch or (), "(first id, count)")
        if not (self.constraint is None or callable(self.constraint)):
            given = self.constraint
            if not isinstance(given, Sequence) or not all(one is None or callable(one) for one in given):
                raise TypeError(
                    f"constraint is {type(given).__name__}, expected a function (see answers/grammar.py), or a list "
                    "with a function or None for each row"
                )


NOT_WATCHED = Distribution(math.nan, math.nan, math.nan, ())  # in the place of a token outside the watched range


@dataclass
class Generated:
    """The answer of one row.

    token_ids: without eos. token_logprobs: of each token, among the tokens that were allowed in its place (before
    temperature, top-k and top-p). finished: ended with eos; False when the budget ended it, also where a constraint
    closed the answer and the model would have gone on (`answers/constraints.py`). eos_logprob: of the eos, where there
    is one. distributions: with `watch` one per token, `NOT_WATCHED` for a token outside the range; else empty.
    """

    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    eos_logprob: float | None = None
    distributions: list[Distribution] = field(default_factory=list, repr=False)

    def copy(self) -> Generated:
        seen = [*self.distributions]
        return Generated([*self.token_ids], [*self.token_logprobs], self.finished, self.eos_logprob, seen)


# ---------------------------------------------------------------------------------------------- through the model


def prefill(
    model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """Reads images and prompt: the logits of each row's first token [B, V], and the cache of what was read.

    inputs: what the processor returns. With pixel_values the images are encoded on the way, with image_features they
    already are. The cache has room for `max_new_tokens` more.
    """
    if not is_whole(max_new_tokens, least=0):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}, expected a whole number")
    logits, cache = read_prompt(model, prepare(model, inputs), max_new_tokens)
    if not logits.isfinite().all():
        raise not_finite(model.dtype)
    return logits, cache


def read_prompt(
    model: PaliGemmaForConditionalGeneration, prompt: Mapping[str, Tensor], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """`prefill` for inputs that `prepare` has made, and without a look at the logits."""
    B, S = prompt["input_ids"].shape
    cache = KVCache(model.config.text_config, B, S + max_new_tokens, model.dtype, model.device)
    # Of the last column only: the head is a quarter of a million wide. At 896 pixels the logits of all columns would be
    # 2 GB for each row in bfloat16.
    return model(**prompt, cache=cache, logits_to_keep=1).logits[:, -1], cache


def why_no_token(
    scores: Tensor, constrained: bool, generated: Sequence[int], remaining: int, dtype: torch.dtype
) -> NothingAllowed | FloatingPointError:
    """Why a row with these scores, float32 [V], has no next token: its constraint leaves none, or its logits are no
    finite numbers."""
    nothing = constrained and bool((scores == -math.inf).all())
    return nothing_allowed(generated, remaining) if nothing else not_finite(dtype)


def not_finite(dtype: torch.dtype) -> FloatingPointError:
    """What a row ends with whose logits are NaN or infinite."""
    return FloatingPointError(
        f"the model's logits are not finite numbers in {dtype}"
        + (": its activations overflow float16, use bfloat16" if dtype == torch.float16 else "")
    )


def decode_one_token(model: PaliGemmaForConditionalGeneration, tokens: Tensor, cache: KVCache) -> Tensor:
    """Reads one more token per row, int64 [N], into the cache: the logits of the token after it, [N, V]."""
    check_model(model)
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype not in (torch.int64, torch.int32):
        is_tensor = isinstance(tokens, Tensor)
        given = f"{tokens.dtype} {list(tokens.shape)}" if is_tensor else type(tokens).__name__
        hint = ": pass tokens[:, 0]" if is_tensor and tokens.ndim == 2 and tokens.shape[1] == 1 else ""
        raise ValueError(f"tokens is {given}, expected int64 [rows], one token for each row{hint}")
    return model(tokens[:, None], cache=cache, logits_to_keep=1).logits[:, -1]


def decode(
    model: PaliGemmaForConditionalGeneration,
    tokens: Tensor,
    cache: KVCache,
    only: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Reads the next k tokens of each row, int64 [N, k]: the logits of the token after them, [N, V].

    only: int64 [n], the ids that may come next. The head is computed for these alone, and all other logits are -inf.
    Where a location follows, that saves a fifth of the weights that PaliGemma 1 reads for a token.
    valid: bool [N, k], False for padding; it stands on the left of a row's tokens. None: there is none.
    """
    if only is None:
        return model(tokens, attention_mask=valid, cache=cache, logits_to_keep=1).logits[:, -1]
    hidden = model.read(tokens, attention_mask=valid, cache=cache, num_outputs=1)[:, -1]
    logits = model.logits(hidden, only)  # [N, n]
    return logits.new_full((len(tokens), model.config.text_config.vocab_size), -math.inf).index_copy_(1, only, logits)


FEW = 16  # up to V / 16 ids: to gather more rows of the head takes longer than to compute all of them


def few_ids(allowed: Sequence[Tensor | None], vocab_size: int) -> Tensor | None:
    """The ids that any of the rows allows, for `decode(only=...)`; None where they are too many for that."""
    given = [ids for ids in allowed if ids is not None and ids.numel()]
    if len(given) < len(allowed):
        return None
    together = torch.cat(given).unique()
    return together if FEW * together.numel() <= vocab_size else None


def forced_ids(allowed: Sequence[Tensor | None]) -> Tensor | None:
    """The only id that each row allows, int64 [N, 1]; None where a row has a choice.

    Where all are forced there is nothing to ask the model: these tokens are read together with the next ones.
    """
    given = [ids for ids in allowed if ids is not None and ids.numel() == 1]
    return torch.stack(given) if len(given) == len(allowed) else None


def prepare(model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The processor's dict, complete, padded on the left only, on the model's device.

    Moving the padding changes nothing in the answer (positions count real tokens only, nobody sees padding) and puts
    every row's last token, the one that predicts, into the last column. Raises ValueError on inputs that do not fit
    together.
    """
    check_model(model)
    if not isinstance(inputs, Mapping):  # BatchFeature of transformers is one
        raise TypeError(f"inputs is {type(inputs).__name__}, expected the dict that the processor returns")
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError("inputs['input_ids'] is not a tensor [rows, tokens]: pass what the processor returns")
    mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    types = torch.zeros_like(input_ids) if types is None else types
    for name, tensor in (("attention_mask", mask), ("token_type_ids", types)):
        if tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, input_ids {list(input_ids.shape)}")
    lengths = mask.sum(-1)
    if lengths.numel() and not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} of the inputs is all padding: there is nothing to continue")

    order = mask.argsort(dim=-1, stable=True)  # padding first, then the tokens in their order
    longest = int(lengths.max()) if lengths.numel() else 0
    order = order[:, order.shape[1] - longest :]  # columns that are padding in every row would only cost time
    columns = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
    prompt = {name: tensor.gather(1, order) for name, tensor in columns.items()}

    images = {name: inputs[name] for name in ("pixel_values", "image_features") if inputs.get(name) is not None}
    if len(images) > 1:
        raise ValueError("inputs has pixel_values and image_features: leave out one of them")
    return {name: tensor.to(model.device) for name, tensor in {**prompt, **images}.items()}


class TooLong(ValueError):
    """Prompt and answer together have more tokens than there is room for."""


def check_length(config: PaliGemmaConfig, attention_mask: Tensor, max_new_tokens: int) -> None:
    """TooLong if the longest prompt and the answer together have more tokens than the model has positions.

    attention_mask: [B, S]. `generate` calls it before any work; call it before encoding images by hand.
    """
    longest, limit = int(attention_mask.sum(-1).max()), config.text_config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise TooLong(
            f"the prompt has {longest} tokens (image included) and the answer may have {max_new_tokens}: "
            f"{longest + max_new_tokens} together, and the model has {limit} positions. "
            + (
                f"Set max_new_tokens to at most {limit - longest} (on the command line: --max-new-tokens)."
                if longest < limit
                else "Shorten the prompt."
            )
        )


# ---------------------------------------------------------------------------------------------- choosing a token


def choose(scores: Tensor, options: Options, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: scores [N, V], -inf where a token is not allowed -> int64 [N].

    generators: one per row, for sampling; none for greedy.
    """
    if not options.do_sample:
        return scores.argmax(-1)
    probs = warp(scores, options.temperature, options.top_k, options.top_p).softmax(-1)
    # Row by row, each with its own random numbers: its neighbours in the batch can't change its answer.
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)])


def warp(scores: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Scores [N, V] -> scores to sample from, -inf for tokens that are excluded. In this order, as in transformers:

    temperature: below 1 the likely tokens gain, above 1 they lose.
    top_k: keeps the k likeliest tokens.
    top_p: keeps the likeliest tokens that together reach the probability p; at least one.

    What ties with the last token kept is kept too: in bfloat16 many do, and no sort order should decide.
    """
    # Relative to the best: a tiny temperature must not push the best score itself to infinity. A huge one is infinite
    # in float32, and -inf / inf is no number.
    scores = (scores - scores.amax(-1, keepdim=True)) / min(max(temperature, 1e-6), 1e30)
    if top_k is not None and top_k < scores.shape[-1]:
        last = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < last, -math.inf)
    if top_p is not None and top_p < 1:
        probs = scores.softmax(-1)
        # A token of probability (1 - p) / V or less is out for sure: all such tokens together have no more than 1 - p.
        # That usually leaves a few thousand to sort instead of a quarter of a million.
        count = int((probs > (1 - top_p) / probs.shape[-1]).sum(-1).amax())
        ordered = probs.topk(max(count, 1)).values  # descending
        likelier = ordered.cumsum(-1) - ordered  # what stands before a token: 0 for the first, which always stays
        out = (likelier >= top_p) & (likelier > 0)  # the first one stays, though a tiny p is 0 in float32
        last = ordered.masked_fill(out, math.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(probs < last, -math.inf)
    return scores


def seeds_of(options: Options, rows: int) -> list[int]:
    """A seed for each row. ValueError for a list of another length."""
    if options.seed is None:
        return torch.randint(2**62, (rows,)).tolist()  # from the global state: torch.manual_seed still decides
    if isinstance(options.seed, (int, Integral)):
        return [int(options.seed)] * rows
    if len(options.seed) != rows:
        raise ValueError(f"{len(options.seed)} seeds for {rows} rows: pass one for all, or one per row")
    return [int(seed) for seed in options.seed]


def watched_distributions(scores: Tensor, watch: tuple[int, int] | None) -> list[Distribution]:
    """Each row's distribution over the watched ids alone."""
    if watch is None:
        return [NOT_WATCHED] * len(scores)
    first, count = watch
    watched = scores[:, first : first + count]
    probs = watched.softmax(-1)  # [N, count]; nan where none of them is allowed
    numbers = torch.arange(count, dtype=probs.dtype, device=probs.device)
    mean = (probs * numbers).sum(-1, keepdim=True)
    spread = (probs * (numbers - mean).square()).sum(-1).sqrt()
    share = (watched.logsumexp(-1) - scores.logsumexp(-1)).exp()
    middles = (torch.arange(QUANTILES, dtype=probs.dtype, device=probs.device) + 0.5) / QUANTILES
    places = torch.searchsorted(probs.cumsum(-1), middles.expand(len(probs), -1).contiguous()).clamp(max=count - 1)
    columns = (mean[:, 0].tolist(), spread.tolist(), share.tolist(), map(tuple, places.tolist()))
    return [Distribution(*values) for values in zip(*columns)]


# ---------------------------------------------------------------------------------------------- what is checked first


class Rules:
    """Options made ready for a model: what stays the same for every token of a row."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, options: Options):
        check_model(model)
        config = model.config
        self.watch = options.watch
        self.eos = config.eos_token_id if options.eos_token_id is None else options.eos_token_id
        self.never = never_produced(config, options.num_tokens, options.suppress_tokens).to(model.device)  # bool [V]
        if not 0 <= self.eos < len(self.never):
            raise ValueError(f"eos_token_id is {self.eos}, expected an id from 0 to {len(self.never) - 1}")
        if self.watch is not None:
            first, count = self.watch
            if not 0 <= first < first + count <= len(self.never):
                raise ValueError(f"watch is {self.watch}, expected (first id, count) within {len(self.never)} ids")

    def record(self, answer: Generated, token: int, logprob: float, watched: Distribution) -> None:
        """Adds a chosen token to an answer; `watched` is the row's distribution over the watched range."""
        if token == self.eos:
            answer.finished, answer.eos_logprob = True, logprob
            return
        answer.token_logprobs.append(logprob)
        if self.watch is not None:
            first, count = self.watch
            answer.distributions.append(watched if 0 <= token - first < count else NOT_WATCHED)
        answer.token_ids.append(token)  # last: who follows an answer from another thread counts these


def check_prompts(config: PaliGemmaConfig, prompt: Mapping[str, Tensor], max_new_tokens: int, eos: int) -> None:
    """ValueError for prompts that cannot be answered. prompt: from `prepare`, at least one row."""
    check_length(config, prompt["attention_mask"], max_new_tokens)
    # Rows made for training. Answering after their answer is never what was meant.
    ended = (prompt["input_ids"][:, -1] == eos) & (prompt["token_type_ids"][:, -1] == SUFFIX)
    if ended.any():
        row = int(ended.long().argmax())
        raise ValueError(f"row {row} already ends in eos: leave the suffix out of the processor's call")


# ---------------------------------------------------------------------------------------------- beams


@dataclass
class _Beam:
    """An unfinished answer. total: its log-probability. parent: the row of the cache that it continues."""

    row: int
    answer: Generated
    total: float = 0.0
    parent: int = 0


def beam_search(
    model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Any], options: Options
) -> list[Generated]:
    """Keeps the `num_beams` likeliest beginnings of each row and returns the best answer found.

    The rules are those of transformers (`_beam_search` with early_stopping=False), so that the sequences are equal:
    - every beam is extended by every token, and the 2 * num_beams likeliest extensions are looked at: even if all of
      the best ones end, enough are left to go on with;
    - an extension ends with eos, with the last token of the budget, or with a token that does not fit into the budget
      and is left out; it counts if it is among the num_beams likeliest;
    - it is scored log-probability / length ** length_penalty, where eos counts in both, and the best num_beams stay;
    - a row is done when it has num_beams answers and its best beam, scored as if it ended now, does not beat the worst
      of them.

    Probabilities here are those over the whole vocabulary, not among the allowed tokens: they add up to the model's own
    probability of the answer, also under a constraint. What `Generated` reports is among the allowed ones, as always.
    """
    prompt, rules, width = prepare(model, inputs), Rules(model, options), options.num_beams
    rows, vocab_size = len(prompt["input_ids"]), model.config.text_config.vocab_size
    of_rows = one_per_row(options.constraint, rows)
    if not rows:
        return []
    check_prompts(model.config, prompt, options.max_new_tokens, rules.eos)
    answers: list[list[tuple[float, Generated]]] = [[] for _ in range(rows)]  # per row (score, answer), best first
    beams = [_Beam(row, Generated()) for row in range(rows)]  # one per row at first, grouped by row
    logits, cache = read_prompt(model, prompt, options.max_new_tokens)
    for length in range(1, options.max_new_tokens + 1):
        remaining = options.max_new_tokens + 1 - length
        generated = [beam.answer.token_ids for beam in beams]
        constraints = [of_rows[beam.row] for beam in beams]
        may_follow, fitting = allowed_next(constraints, generated, remaining, vocab_size, rules.eos)
        scores = masked_logits(logits, rules.never, may_follow)
        values, ids = (t.tolist() for t in scores.topk(min(2 * width, scores.shape[-1])))  # each N lists of 2 * width
        whole, allowed = logits.float().logsumexp(-1).tolist(), scores.logsumexp(-1).tolist()
        for n in range(len(beams)):
            if allowed[n] == -math.inf and may_follow[n] is not None:
                raise nothing_allowed(generated[n], remaining)
            if not math.isfinite(whole[n]) or not math.isfinite(allowed[n]):
                raise not_finite(model.dtype)
        watched = watched_distributions(scores, options.watch)

        survivors: list[_Beam] = []
        for row, group in groupby(range(len(beams)), key=lambda n: beams[n].row):
            candidates = [
                (beams[n].total + value - whole[n], n, token, value - allowed[n])
                for n in group
                for value, token in zip(values[n], ids[n])
                if value > -math.inf
            ]
            ended, going = _extend(beams, candidates, fitting, watched, rules, width, last=remaining == 1)
            scored = [(total / length**options.length_penalty, answer) for total, answer in ended]
            answers[row] = sorted(answers[row] + scored, key=lambda each: -each[0])[:width]
            if going and (len(answers[row]) < width or _can_improve(going[0], length, answers[row], options)):
                survivors += going

        if not survivors:
            break
        parents = [beam.parent for beam in survivors]
        if parents != list(range(len(beams))):
            cache.select(torch.tensor(parents, device=logits.device))
        beams = survivors
        tokens = [beam.answer.token_ids[-1] for beam in beams]
        logits = decode_one_token(model, torch.tensor(tokens, device=logits.device), cache)
    return [best[0][1] for best in answers]


def _extend(
    beams: list[_Beam],
    candidates: list[tuple[float, int, int, float]],
    fitting: Mapping[int, Tensor],
    watched: list[Distribution],
    rules: Rules,
    width: int,
    last: bool,
) -> tuple[list[tuple[float, Generated]], list[_Beam]]:
    """Chooses among the extensions of one row: the answers that end now, as (log-probability, answer), and the beams
    that go on, likeliest first.

    candidates: (log-probability of the answer, beam, token, log-probability to report). fitting: see `allowed_next`.
    last: no token is left in the budget after this one.
    """
    ended: list[tuple[float, Generated]] = []
    going: list[_Beam] = []
    best_first = sorted(candidates, key=lambda candidate: -candidate[0])
    for rank, (total, n, token, logprob) in enumerate(best_first[: 2 * width]):
        fits = n not in fitting or contains(fitting[n], token)
        ends = token == rules.eos or last or not fits
        if (ends and rank >= width) or (not ends and len(going) == width):
            continue
        answer = beams[n].answer.copy()
        if fits:
            rules.record(answer, token, logprob, watched[n])
        if ends:
            ended.append((total, answer))
        else:
            going.append(_Beam(beams[n].row, answer, total, parent=n))
    return ended, going


def _can_improve(beam: _Beam, length: int, answers: list[tuple[float, Generated]], options: Options) -> bool:
    return beam.total / length**options.length_penalty > answers[-1][0]
