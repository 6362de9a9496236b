"""New tokens: a vocabulary and an embedding that grow together.

    ids = add_tokens(pg.model, pg.processor.tokenizer, ["<part_a>", "<part_b>"])

The embedding table of a published model has 63 rows more than there are tokens, since its size is rounded up to a
multiple of 64. New tokens take these rows first, and the table grows when they are used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tokenizers
import torch

from paligemma.modeling_gemma import GemmaEmbedding, PaliGemmaForConditionalGeneration
from paligemma.tokenizer import Tokenizer

MULTIPLE = 64  # of rows, as in the published tables: sizes that the kernels of GPUs like


@torch.no_grad()
def add_tokens(model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    """Adds tokens to the tokenizer and rows to the embedding, in place; returns the ids of the tokens.

    A new row starts as the mean of the rows of all tokens that were there (as transformers does it), so that a new
    token is neither likely nor impossible at first. Tokens that exist already keep their ids and rows. The parameter
    may be a new one: make the optimizer afterwards.

    Raises TypeError for a bare text, ValueError for an empty token and for a model whose embedding is quantised.
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens is the text {tokens!r}, expected a list of tokens: [{tokens!r}]")
    if not all(isinstance(token, str) and token for token in tokens):
        raise ValueError("a token is a text of at least one character")
    table = model.language_model.model.embed_tokens
    if not isinstance(table, GemmaEmbedding) or not isinstance(getattr(table, "weight", None), torch.nn.Parameter):
        raise ValueError("the embedding is quantised and cannot grow: load the model without `quantize`")
    old, rows = len(tokenizer), table.num_embeddings
    tokenizer.backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
    if len(tokenizer) > old:
        mean = table.weight[: min(old, rows)].float().mean(0).to(table.weight.dtype)
        if len(tokenizer) > rows:
            grown = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
            weight = torch.cat([table.weight, mean.expand(grown - rows, -1)])
            table.weight = torch.nn.Parameter(weight, requires_grad=table.weight.requires_grad)
            table.num_embeddings = grown
            text = replace(model.config.text_config, vocab_size=grown)
            model.config = replace(model.config, text_config=text)
            model.language_model.config = model.language_model.model.config = text
        table.weight[old : len(tokenizer)] = mean
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return [vocabulary[token] for token in tokens]
