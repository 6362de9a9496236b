"""Pages found by what they show, as ColPali (arXiv 2407.01449): a vector for each patch, one for each word of a query.

The last hidden states go through a layer of their own and are scaled to length 1. The score of a
page is a sum over the words of the query: of each, the similarity to the patch that is most similar to it. The masks
are stated, since implementations differ in them: a page sees all of itself, a query is causal, as in transformers.

python examples/colpali.py vidore/colpali-v1.2 QUERY PAGE PAGE ...
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paligemma

PAGE, QUERY, DIM = "Describe the image.\n", "Query: {}", 128


def load(name: str, width: int = 2048, **options) -> paligemma.PaliGemma:
    """A checkpoint or adapter with `custom_text_proj`; one that has none keeps random weights there."""
    return paligemma.load(name, extra={"custom_text_proj": nn.Linear(width, DIM)}, **options)


def vectors(pg, rows: list[list[int]], causal: bool, pixels: Tensor | None = None) -> Tensor:
    """Ids of each row -> [B, S, 128], zero where a shorter row is padded on its right."""
    model, pad = pg.model, pg.processor.tokenizer.pad_token_id
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad).to(model.device)
    valid = torch.arange(ids.shape[1], device=ids.device) < ids.new_tensor([[len(row)] for row in rows])
    types = torch.full_like(ids, int(causal))  # 0: prefix, which sees itself; 1: suffix, which is causal
    hidden = model.read(ids, pixels, attention_mask=valid, token_type_ids=types)
    return F.normalize(model.custom_text_proj(hidden), dim=-1) * valid[..., None]


def pages(pg, images, batch: int = 1) -> Tensor:
    token, P = pg.processor.tokenizer, pg.processor.num_image_tokens
    # The second <bos> is the published processor's: it puts one before the prompt, which begins with one.
    row = [pg.model.config.image_token_index] * P + 2 * [token.bos_token_id] + token.encode(PAGE)
    pixels = pg.processor(text=[""] * len(images), images=images)["pixel_values"].to(pg.model.device)
    return torch.cat([vectors(pg, [row] * len(some), False, some) for some in pixels.split(batch)])


def queries(pg, texts: list[str]) -> Tensor:
    token = pg.processor.tokenizer
    room = [token.pad_token_id] * 10 + token.encode("\n")  # ten more vectors, for what the words do not say
    return vectors(pg, [[token.bos_token_id, *token.encode(QUERY.format(t)), *room] for t in texts], causal=True)


def scores(of_queries: Tensor, of_pages: Tensor) -> Tensor:
    """MaxSim: [Q, S, 128], [N, T, 128] -> [Q, N]."""
    return torch.einsum("qsd,ntd->qnst", of_queries, of_pages).amax(-1).sum(-1)


if __name__ == "__main__":
    name, query, *names = sys.argv[1:]
    pg = load(name, 256 if name == "tiny" else 2048)
    with torch.inference_mode():
        found = scores(queries(pg, [query]), pages(pg, names))[0].tolist()
    print(*(f"{score:7.3f}  {page}" for score, page in sorted(zip(found, names), reverse=True)), sep="\n")
