"""Routes and patching: what is true whatever the weights are."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from paligemma import explore
from paligemma.explore.tracing import _replacing
from paligemma.explore.watching import run


@pytest.fixture
def looks(random_pg, picture):
    other = np.random.default_rng(4).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return [
        explore.look(random_pg, one, "caption en", answer) for one, answer in ((picture, "a dog"), (other, "a cat"))
    ]


def test_each_route_is_a_cut(looks):
    look, token = explore.look(looks[0].pg, looks[0].picture, "caption en", "a dog and a cat"), 2
    found = explore.routes(look, token, window=1)
    assert len(found.names) == len(found.change) and found.change.shape[1] == look.num_layers
    groups = look.groups(token)
    for name, queries, keys in (
        ("image->prompt", groups["prompt"], groups["image"]),
        ("answer->last", groups["last"], groups["answer so far"][:-1]),
        ("prompt->last", groups["last"], groups["prompt"]),
        ("bos->newline", groups["newline"], groups["bos"]),
    ):
        for layer in range(look.num_layers):
            cut = explore.cut(look, queries, keys, [layer])
            expected = 1 - (cut.logprobs[token] - look.logprobs[token]).exp()
            assert_close(found.change[found.names.index(name), layer], expected, atol=1e-4, rtol=1e-4)
    assert {"image->prompt", "image->last", "prompt->last", "bos->last", "newline->last"} <= set(found.names)
    # Before token 0 the newline is the last column, and there is no answer yet.
    assert not any("newline" in name or "answer" in name for name in explore.routes(look, 0).names)


def test_a_window_covers_the_layers_around(looks):
    look = looks[0]
    every = explore.routes(look, 0, window=2 * look.num_layers + 1)
    assert_close(every.change, every.change[:, :1].expand_as(every.change), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="window is 0"):
        explore.routes(look, 0, window=0)


def test_a_row_patched_into_itself_and_everything_into_another(looks):
    a, b = looks
    token = next(t for t in range(len(a.answer_ids)) if a.answer_ids[t] != b.answer_ids[t])
    S = len(a.input_ids)
    # The answer so far differs as well, so all columns: before layer 0 that is the whole first run.
    found = explore.patch(a, b, token, groups={"all": range(S), "none": []}, patches=True)
    assert found.names == ["all"] and found.per_patch.shape == (a.num_layers, 4)
    assert found.restored[0, 0] == pytest.approx(1.0, abs=1e-3)
    changes = {layer: _replacing(b, layer, [(range(S), layer)]) for layer in range(b.num_layers)}
    assert_close(run(b, layers=changes), run(b), atol=1e-5, rtol=0)


def test_pictures_that_say_the_same_are_refused(looks):
    a, b = looks
    with pytest.raises(ValueError, match="equally likely: there is nothing to restore"):
        explore.patch(a, explore.look(a.pg, a.picture, a.prompt, b.answer), 1)


def test_what_cannot_be_patched_is_refused(looks):
    a, b = looks
    with pytest.raises(ValueError, match="in both: there is nothing to restore"):
        explore.patch(a, a, 0)
    longer = explore.look(a.pg, a.picture, a.prompt, "a dog and a dog and a dog")
    with pytest.raises(ValueError, match="patching needs equal"):
        explore.patch(longer, b, 0)


@torch.no_grad()
def test_one_patch_at_a_time_is_what_a_group_of_one_gives(looks):
    a, b = looks
    token = next(t for t in range(len(a.answer_ids)) if a.answer_ids[t] != b.answer_ids[t])
    found = explore.patch(a, b, token, groups={"patch 2": [2]}, patches=True)
    assert_close(found.per_patch[:, 2], found.restored[0], atol=1e-4, rtol=1e-4)


def test_groups_are_of_columns_that_exist(looks):
    a, b = looks
    S = len(a.input_ids)
    for columns, strange in (([-1], "-1"), ([S], str(S)), ([1.5], "1.5")):
        with pytest.raises(ValueError, match=f"group 'a' has {strange}, expected .*columns from 0 to {S - 1}"):
            explore.patch(a, b, 1, groups={"a": columns})
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="no group has any column"):
            explore.patch(a, b, 1, groups=nothing)
    given, expected = (explore.patch(a, b, 1, groups={"a": columns}) for columns in (torch.arange(4), range(4)))
    assert torch.equal(given.restored, expected.restored)


def test_only_looks_of_one_model_and_prompt_are_compared(looks, make_pg, picture):
    a = looks[0]
    other = explore.look(a.pg, picture, "caption de", "a cat")
    assert len(other.input_ids) == len(a.input_ids)
    with pytest.raises(ValueError, match=r"'caption en' \(1 pictures\) and 'caption de' .* the same prompt"):
        explore.patch(a, other, 1)
    with pytest.raises(ValueError, match="of different models"):
        explore.patch(a, explore.look(make_pg("gemma"), picture, "caption en", "a cat"), 1)
