"""The weights against transformers' own, which computes attention written out, on the same random weights."""

import pytest
import torch
from reference import make_theirs
from torch.testing import assert_close

from paligemma import explore
from paligemma.images import preprocess

ANSWER = "a dog <loc0017><loc0500> and more"


@pytest.fixture
def look(random_pg, picture):
    return explore.look(random_pg, picture, "caption en", ANSWER)


@torch.no_grad()
def test_decoder_weights_equal_those_of_transformers(look):
    """Soft-cap, sliding window and grouped heads included; rows sum to 1, and what is masked is exactly 0."""
    theirs = make_theirs(look.pg.model)
    out = theirs(
        input_ids=look.input_ids[None],
        pixel_values=preprocess(look.picture, 28)[None],
        attention_mask=torch.ones_like(look.input_ids)[None],
        token_type_ids=look.token_type_ids[None],
        output_attentions=True,
    )
    weights = explore.attention(look, "all").weights
    expected = torch.stack([layer[0] for layer in out.attentions])
    assert_close(weights, expected, atol=1e-5, rtol=0)
    assert_close(weights.sum(-1), torch.ones(weights.shape[:3]), atol=1e-5, rtol=0)
    assert (weights[expected == 0] == 0).all() and (expected == 0).any()


@torch.no_grad()
def test_vision_weights_equal_those_of_transformers(look):
    theirs = make_theirs(look.pg.model)
    out = theirs.model.vision_tower(preprocess(look.picture, 28)[None], output_attentions=True)
    weights = explore.vision_attention(look, [3, 0]).weights
    assert_close(weights, torch.stack([layer[0][:, [3, 0]] for layer in out.attentions]), atol=1e-5, rtol=0)


def test_of_takes_the_query_that_predicts(look):
    everything, answer = explore.attention(look, "all"), explore.attention(look, "answer")
    for token in range(len(look.answer_ids)):
        assert_close(answer.of(token), everything.weights[:, :, look.first_answer - 1 + token])
    with pytest.raises(ValueError, match="not among the queries"):
        explore.attention(look, [0]).of(2)


def test_shares_are_of_groups_and_sum_to_one(look):
    attention = explore.attention(look, "text")
    share = attention.share()
    assert share.shape == (*attention.weights.shape[:3], 5)
    assert_close(share.sum(-1), torch.ones(share.shape[:-1]), atol=1e-5, rtol=0)
    assert_close(share[..., 0], attention.on_image().flatten(-3).sum(-1))
    assert (share[:, :, 0, 4] == 0).all()  # bos is prefix: it never sees the answer


def test_queries_are_named_or_numbered(look):
    S = len(look.input_ids)
    assert explore.attention(look, "text").queries.tolist() == list(range(look.first_text, S))
    assert explore.attention(look, [2, 0]).queries.tolist() == [2, 0]
    with pytest.raises(ValueError, match="queries is 'texts', expected"):
        explore.attention(look, "texts")
    for columns, strange in (([S], S), ([-1, 5], -1)):
        with pytest.raises(ValueError, match=f"queries has column {strange}, expected columns from 0 to {S - 1}"):
            explore.attention(look, columns)
    with pytest.raises(ValueError, match=f"queries has column 2.7, expected whole columns from 0 to {S - 1}"):
        explore.attention(look, [2.7])
    assert explore.attention(look, torch.tensor([2, 0])).queries.tolist() == [2, 0]


def test_more_than_half_a_gigabyte_is_refused_with_the_figure(look, monkeypatch):
    monkeypatch.setattr("paligemma.explore.attending.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"queries would take 0\.0 GB.* ask for 'text', 'answer' or a few columns"):
        explore.attention(look, "all")
    with pytest.raises(ValueError, match="ask for a few columns, or give a shorter answer"):
        explore.page(look, "unwritten.html", knock_out=True, progress=lambda *_: pytest.fail("knock-outs before it"))
    monkeypatch.setattr("paligemma.explore.attending.MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"the weights of 4 queries would take 0\.0 GB.* ask for fewer patches"):
        explore.vision_attention(look, range(4))


def test_patches_of_two_pictures_do_not_see_each_other(random_pg, picture):
    look = explore.look(random_pg, (picture, picture), "caption en", ANSWER)
    assert_close(explore.vision_attention(look, [5]).weights, explore.vision_attention(look, [1]).weights)
    with pytest.raises(ValueError, match="several images"):
        explore.vision_attention(look, [1, 5])
    with pytest.raises(ValueError, match="expected numbers from 0 to 7"):
        explore.vision_attention(look, [8])
    with pytest.raises(ValueError, match="patches is empty, expected numbers from 0 to 7"):
        explore.vision_attention(look, [])
