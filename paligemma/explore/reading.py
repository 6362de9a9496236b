"""Reading the model's numbers as words and places: the lens, the distributions of locations, and two tables.

The *lens* asks a hidden state in the middle of the model: if the model stopped here, which word would it say? It puts
the state through the final norm and the head, as the last one is. At layer 0 a token says itself, because the head is
the embedding table. Patches begin to say the word for what they show. (Known as the logit lens.)

Letters: L layers, S tokens, C columns, k words, D hidden, V vocabulary, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.explore.attending import columns_of
from paligemma.explore.watching import Look, run
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

MOST_LOGITS = 2**24  # float32 numbers of a vocabulary held at once: 64 MB


@dataclass(repr=False)
class Lens:
    """columns: int64 [C]. ids, logprobs: [L + 1, C, k], the k likeliest words, likeliest first: 0 is the embedding, L
    what the model says. ranks: int64 [L + 1, C], the place (from 0) of the token that comes next; -1 in the last
    column."""

    columns: Tensor
    ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def __repr__(self) -> str:
        return f"Lens({len(self.ids)} states, {len(self.columns)} columns, {self.ids.shape[-1]} words each)"


@torch.no_grad()
def lens(look: Look, k: int = 5, columns: str | Sequence[int] | None = None) -> Lens:
    """What each column would say after each layer. columns: as in `attention`; default from bos to the end.

    Raises ValueError for columns that do not exist, or a k below 1 or above the vocabulary.
    """
    model = look.pg.model
    V = model.config.text_config.vocab_size
    if not 1 <= k <= V:
        raise ValueError(f"k is {k}, expected from 1 to {V} words")
    chosen = columns_of(look, "text" if columns is None else columns)
    ids, logprobs, ranks = [], [], []
    for state in look.hidden_states:
        parts = []
        for some in chosen.split(max(1, MOST_LOGITS // V)):
            x = state[some].to(model.device, model.dtype)
            words = model.logits(model.language_model.model.norm(x)).float().log_softmax(-1)  # [c, V]
            best = words.topk(k, dim=-1)
            own = words.gather(-1, look.input_ids.roll(-1)[some].to(x.device)[:, None])  # of the token that comes next
            parts.append((best.indices.cpu(), best.values.cpu(), (words > own).sum(-1).cpu()))
        of_state = [torch.cat(part) for part in zip(*parts)] if parts else [torch.empty(0, k)] * 2 + [torch.empty(0)]
        ids.append(of_state[0])
        logprobs.append(of_state[1])
        ranks.append(of_state[2].masked_fill(chosen == len(look.input_ids) - 1, -1))
    return Lens(chosen, torch.stack(ids).long(), torch.stack(logprobs), torch.stack(ranks).long())


# ---------------------------------------------------------------------------------------------- locations


@dataclass(repr=False)
class Edge:
    """One edge of a box, as a distribution over the 1,024 bins of a location.

    token: number in the answer. name: "y0", "x0", "y1" or "x1". mass: float32 [1024], sums to 1; other tokens of the
    vocabulary are left out of it. mean, spread (standard deviation): in bins. pixels, pixel_spread: in the picture.
    """

    token: int
    name: str
    mass: Tensor
    mean: float
    spread: float
    pixels: float
    pixel_spread: float

    def __repr__(self) -> str:
        return f"Edge({self.name}, {self.pixels:.1f} +- {self.pixel_spread:.1f} px)"


@torch.no_grad()
def locations(look: Look) -> list[Edge]:
    """Where the model sees the edges of boxes, and how sure it is: four edges for each box of the answer.

    Location tokens that make no whole boxes (they stand in a row of three, say) are left out: nobody knows which edges
    they are.
    """
    pg = look.pg
    first = pg.processor.tokenizer.first_loc_id
    picture = look.pictures[0]
    hidden = run(look)[0]
    bins = torch.arange(1024, dtype=torch.float32)
    edges: list[Edge] = []
    for token, name in _edges_of_boxes([first <= id < first + 1024 for id in look.answer_ids.tolist()]):
        logits = pg.model.logits(hidden[look.query_of(token)]).float().cpu()
        mass = logits[first : first + 1024].softmax(-1)
        mean = float((mass * bins).sum())
        spread = float((mass * (bins - mean).square()).sum().sqrt())
        scale = (picture.height if name[0] == "y" else picture.width) / pg.loc_scale
        edges.append(Edge(token, name, mass, mean, spread, mean * scale, spread * scale))
    return edges


def _edges_of_boxes(is_location: Sequence[bool]) -> Iterator[tuple[int, str]]:
    """The tokens that are edges of whole boxes, and which edges: four location tokens in a row, eight for two boxes."""
    for location, run_of_tokens in groupby(range(len(is_location)), key=is_location.__getitem__):
        tokens = list(run_of_tokens)
        if location and len(tokens) % 4 == 0:
            yield from zip(tokens, cycle(("y0", "x0", "y1", "x1")))


# ---------------------------------------------------------------------------------------------- tables


@dataclass(repr=False)
class Similarity:
    """Of the rows of a table. ids: int64 [n], which rows. cosine: float32 [n, n]. components: [n, 3], the rows seen
    from their three principal axes. explained: [3], the share of the variance along each axis."""

    ids: Tensor
    cosine: Tensor
    components: Tensor
    explained: Tensor

    def __repr__(self) -> str:
        return f"Similarity({len(self.ids)} rows, three axes explain {float(self.explained.sum()):.0%})"


@torch.no_grad()
def loc_similarity(model: PaliGemmaForConditionalGeneration, first_loc_id: int | None = None) -> Similarity:
    """How alike the embeddings of the location tokens are: neighbours in the picture are neighbours here.

    Rows that were never trained are left out. They are recognised by being copies of each other (cosine above .999):
    all they ever learned is what every unused token learns. first_loc_id: default 1,152 before <image>, as published.
    """
    table = model.language_model.model.embed_tokens
    first = model.config.image_token_index - 1152 if first_loc_id is None else first_loc_id
    rows = table(torch.arange(first, first + 1024, device=model.device)).float().cpu()  # [1024, D]
    cosine = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T
    trained = (cosine.fill_diagonal_(0) < 0.999).all(-1)
    return _similarity(rows[trained], trained.nonzero()[:, 0])


@torch.no_grad()
def position_similarity(model: PaliGemmaForConditionalGeneration) -> Similarity:
    """How alike the learned positions of the patches are: the grid, found by the model itself. n = P."""
    rows = model.vision_tower.vision_model.embeddings.position_embedding.weight.float().cpu()
    return _similarity(rows, torch.arange(len(rows)))


def _similarity(rows: Tensor, ids: Tensor) -> Similarity:
    unit = F.normalize(rows, dim=-1)
    centred = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return Similarity(ids, unit @ unit.T, u[:, :3] * s[:3], (s.square() / s.square().sum())[:3])
