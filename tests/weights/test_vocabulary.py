"""New tokens: the tokenizer and the embedding grow together, and both come back."""

import pytest
import torch

import paligemma
from paligemma.answers.grammar import DetectionGrammar
from paligemma.weights.vocabulary import add_tokens


@pytest.fixture
def pg():
    return paligemma.load("tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("count", [1, 100])
def test_new_tokens_come_back(pg, tmp_path, count):
    tokenizer, model = pg.processor.tokenizer, pg.model
    old, rows = len(tokenizer), model.config.text_config.vocab_size
    before = model.language_model.model.embed_tokens.weight.detach().clone()
    tokens = [f"<part_{n}>" for n in range(count)]
    ids = add_tokens(model, tokenizer, tokens)
    assert ids == list(range(old, old + count)) and len(tokenizer) == old + count
    table = model.language_model.model.embed_tokens.weight
    assert torch.equal(table[:old], before[:old])
    torch.testing.assert_close(table[ids], before[:old].mean(0).expand(count, -1))
    assert len(table) == model.config.text_config.vocab_size >= len(tokenizer)
    assert len(table) % 64 == 0 and len(table) - max(rows, len(tokenizer)) < 64
    assert tokenizer.encode("a <part_0> b").count(old) == 1
    assert add_tokens(model, tokenizer, tokens[:1]) == ids[:1]  # a second time changes nothing
    assert len(tokenizer) == old + count

    paligemma.save_pretrained(model, tmp_path, pg.processor)
    loaded = paligemma.load(tmp_path, device="cpu", dtype="float32")
    assert loaded.processor.tokenizer.encode("<part_0>") == [old]
    inputs = pg.processor(text=["caption en <part_0>"], suffix=["<part_0>"], images=None)
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, model(**inputs).logits)


def test_a_new_token_is_learned_and_said(pg):
    (new,) = add_tokens(pg.model, pg.processor.tokenizer, ["<part_0>"])
    inputs = pg.processor(text=["which part?"], suffix=["<part_0>"], images=None)
    optimizer = torch.optim.Adam(pg.model.language_model.model.embed_tokens.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        pg.model(**inputs).loss.backward()
        optimizer.step()
    assert pg.generate(None, "which part?", max_new_tokens=2).token_ids[:1] == [new]


def test_a_grammar_knows_tokens_that_were_added_after_another_one(pg):
    tokenizer = pg.processor.tokenizer
    begun = tokenizer.encode("<loc0000>" * 4 + " dog")

    def words():
        return set(DetectionGrammar(tokenizer, labels=None)(begun, 50).tolist())

    before = words()
    (new,) = add_tokens(pg.model, tokenizer, ["unicorn"])
    assert words() == before | {new}


def test_what_cannot_be_added(pg):
    with pytest.raises(ValueError, match="at least one character"):
        add_tokens(pg.model, pg.processor.tokenizer, [""])
    with pytest.raises(TypeError, match=r"tokens is the text 'dog', expected a list of tokens: \['dog'\]"):
        add_tokens(pg.model, pg.processor.tokenizer, "dog")
    rounded = paligemma.load("tiny", device="cpu", quantize="int8")
    with pytest.raises(ValueError, match="the embedding is quantised and cannot grow"):
        add_tokens(rounded.model, rounded.processor.tokenizer, ["<a>"])
