"""Changing nothing changes nothing; what is changed is what was asked for."""

import pytest
import torch
from torch.testing import assert_close

from paligemma import explore
from paligemma.explore.changing import background_patches, nearest_background

ANSWER = "a dog and more"


@pytest.fixture
def look(random_pg, picture):
    return explore.look(random_pg, picture, "caption en", ANSWER)


def test_no_patch_and_no_edge_change_nothing(look):
    layers = range(look.num_layers)
    for queries, keys, where in (([], [0], layers), ([5], [], layers), ([5], [0], [])):
        assert explore.cut(look, queries, keys, where).drop.abs().max() == 0
    assert explore.without(look, []).text == look.pg.generate(look.picture, "caption en").text


@torch.no_grad()
def test_a_cut_edge_carries_nothing(look):
    """With every edge to a patch cut, in every layer, its feature may be anything."""
    S, layers = len(look.input_ids), range(look.num_layers)
    others = [column for column in range(S) if column != 2]
    change = explore.changing.cutting(explore.changing.edges_between(look, others, [2]))
    results = []
    for value in (0.0, 9.0):
        features = look.features.flatten(0, 1).clone()
        features[2] = value
        hidden = explore.watching.run(look, features=features[None], layers=dict.fromkeys(layers, change))
        results.append(explore.watching.logprobs_of_answer(look, hidden)[0])
    assert torch.equal(*results)
    cut = explore.cut(look, others, [2], layers)
    assert_close(cut.logprobs, results[0], atol=1e-5, rtol=0)
    assert cut.drop.abs().max() > 0


def test_a_query_keeps_a_key(look):
    everything = range(len(look.input_ids))
    with pytest.raises(ValueError, match="the query at column 3 would be left without any key"):
        explore.cut(look, [3], everything, [0])
    with pytest.raises(ValueError, match="layers has 7, expected numbers from 0 to"):
        explore.cut(look, [3], [0], [7])


def test_each_row_of_knock_out_is_a_pass_without_that_window(look):
    found = explore.knock_out(look, window=1, fill="zero")
    assert found.drop.shape == (4, len(look.answer_ids)) and torch.equal(found.base, look.logprobs)
    for patch in range(4):
        features = look.features.flatten(0, 1).clone()
        features[patch] = 0
        hidden = explore.watching.run(look, features=features[None])
        alone = explore.watching.logprobs_of_answer(look, hidden)[0]
        assert_close(found.drop[patch], look.logprobs - alone, atol=1e-5, rtol=0)


def test_windows_end_at_the_edge_of_their_picture(random_pg, picture):
    look = explore.look(random_pg, (picture, picture), "caption en", ANSWER)
    found = explore.knock_out(look, window=3, fill="mean")
    assert found.drop.shape[0] == 8
    # On a grid of 2 x 2 a window of 3 around any patch is the whole picture, and nothing of the other.
    assert_close(found.drop[:4], found.drop[:1].expand(4, -1), atol=1e-5, rtol=0)
    assert (found.drop[0] - found.drop[4]).abs().max() > 1e-3


def test_a_coarse_grid_replaces_whole_blocks(tiny):
    look = explore.look(tiny, "examples/scene.png", "caption en")
    g = look.grid
    done = []
    found = explore.knock_out(look, window=1, fill="zero", grid=4, progress=lambda *counts: done.append(counts))
    assert done == [(16, 16)] and found.drop.shape == (g * g, len(look.answer_ids))
    middle = [at for at in range(g) if at * 4 // g == 1]
    block = [row * g + column for row in middle for column in middle]  # row 1 and column 1 of 4 x 4 blocks
    assert len(block) in (4, 9)
    features = look.features.flatten(0, 1).clone()
    features[block] = 0
    alone = explore.watching.logprobs_of_answer(look, explore.watching.run(look, features=features[None]))[0]
    for patch in block:
        assert_close(found.drop[patch], look.logprobs - alone, atol=1e-4, rtol=0)
    assert (found.drop[block[-1] + 1] - found.drop[block[0]]).abs().max() > 0
    with pytest.raises(ValueError, match=f"grid is {g + 1}, expected 1 to {g}:"):
        explore.knock_out(look, grid=g + 1)


def test_background_is_where_pixels_are_even(tiny):
    look = explore.look(tiny, "examples/scene.png", "caption en")
    patches = background_patches(look)
    assert len(patches) == look.grid**2 // 8 and torch.equal(patches, background_patches(look))
    gone = patches[:3]
    assert not torch.isin(nearest_background(look, gone, patches), gone).any()  # never filled with what is gone itself
    for fill, where in (("grey", "features"), ("grey", "pixels")):
        with pytest.raises(ValueError, match="fill is 'grey', expected one of background, mean, zero"):
            explore.without(look, [0], fill=fill, where=where)


@pytest.mark.parametrize("where", ["features", "pixels"])
def test_without_everything_the_picture_is_gone(tiny, where):
    look = explore.look(tiny, "examples/scene.png", "caption en")
    blind = explore.without(look, range(look.grid**2), fill="mean", where=where)
    assert not any(word in blind.text for word in ("book", "umbrella", "house"))
    with pytest.raises(ValueError, match=f"expected numbers from 0 to {look.grid**2 - 1}"):
        explore.without(look, [look.grid**2])


@pytest.mark.parametrize("where", ["features", "pixels"])
def test_of_a_picture_that_is_seen_twice_one_place_is_changed(random_pg, picture, where):
    """What the second picture showed does not matter once all of it is gone: here it was the same as the first."""
    other = picture[::-1].copy()
    for twice, different, gone in (
        ((picture, picture), (picture, other), range(4, 8)),
        ((picture, picture), (other, picture), range(4)),
    ):
        looks = [explore.look(random_pg, pair, "caption en", ANSWER) for pair in (twice, different)]
        found, expected = (explore.without(look, gone, fill="zero", where=where) for look in looks)
        assert found.token_ids == expected.token_ids
        assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)


def test_columns_layers_and_patches_are_whole_numbers(look):
    """3.9 is not patch 3."""
    for patches in ([3.9], torch.tensor([2.0])):
        with pytest.raises(ValueError, match=r"patches has .*, expected whole numbers from 0 to 3"):
            explore.without(look, patches)
    for name, given in (("queries", ([4.0], [0], [0])), ("keys", ([4], [0.5], [0])), ("layers", ([4], [0], [0.0]))):
        with pytest.raises(ValueError, match=f"{name} has .*, expected whole numbers from 0 to"):
            explore.cut(look, *given)
    as_tensors = explore.cut(look, torch.tensor([4]), torch.tensor([0]), torch.arange(1))
    assert torch.equal(as_tensors.drop, explore.cut(look, [4], [0], [0]).drop)
