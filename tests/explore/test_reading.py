"""The lens at the last layer is the model; locations are its distributions; tables find the grid."""

import math

import pytest
import torch
from torch.testing import assert_close

from paligemma import explore


def test_the_lens_at_the_last_layer_is_the_model(random_pg, picture):
    look = explore.look(random_pg, picture, "caption en", "a dog <loc0017> and more")
    lens = explore.lens(look, k=3)
    A = len(look.answer_ids)
    assert lens.ids.shape == lens.logprobs.shape == (look.num_layers + 1, len(lens.columns), 3)
    assert lens.ranks[:, -1].tolist() == [-1] * (look.num_layers + 1)
    with torch.no_grad():
        logits = random_pg.model(
            look.input_ids[None], image_features=look.features, token_type_ids=look.token_type_ids[None]
        ).logits[0]
    best = logits.log_softmax(-1)[lens.columns].topk(3)
    assert_close(lens.logprobs[-1], best.values, atol=1e-5, rtol=0)
    assert torch.equal(lens.ids[-1], best.indices)
    ranks = [int((logits[look.query_of(t)] > logits[look.query_of(t), look.answer_ids[t]]).sum()) for t in range(A)]
    assert lens.ranks[-1, -A - 1 : -1].tolist() == ranks
    with pytest.raises(ValueError, match="k is 0, expected from 1"):
        explore.lens(look, k=0)


def test_many_columns_are_read_in_parts(random_pg, picture, monkeypatch):
    look = explore.look(random_pg, picture, "caption en", "a dog")
    whole = explore.lens(look, columns="all")
    monkeypatch.setattr("paligemma.explore.reading.MOST_LOGITS", 2 * random_pg.model.config.text_config.vocab_size)
    parts = explore.lens(look, columns="all")
    assert torch.equal(parts.ids, whole.ids) and torch.equal(parts.ranks, whole.ranks)


def test_locations_are_edges_in_pixels(tiny):
    look = explore.look(tiny, "examples/scene.png", "detect book")
    edges = explore.locations(look)
    (found,) = tiny.detect("examples/scene.png", ["book"])
    assert [edge.name for edge in edges] == ["y0", "x0", "y1", "x1"]
    order = [1, 0, 3, 2]  # `Detection.edges` is in the order x0 y0 x1 y1
    for edge, row in zip(edges, found.edges[order]):
        assert float(edge.mass.sum()) == pytest.approx(1, abs=1e-5)
        # The grammar takes away a few bins that could not follow, so the two differ by a hair.
        assert (edge.pixels, edge.pixel_spread) == pytest.approx(tuple(map(float, row)), abs=1.0)


def test_only_whole_boxes_have_edges(random_pg, picture):
    """Location tokens that stand alone shift the names of no edge behind them."""
    box = "<loc0100><loc0200><loc0300><loc0400>"
    look = explore.look(random_pg, picture, "detect cat", f"<loc0100> a ; {box} cat ; {box}<loc0500> dog ; {box}{box}")
    edges = explore.locations(look)
    assert [edge.name for edge in edges] == ["y0", "x0", "y1", "x1"] * 3
    first = random_pg.processor.tokenizer.first_loc_id
    assert [int(look.answer_ids[edge.token]) - first for edge in edges] == [100, 200, 300, 400] * 3
    height, width = picture.shape[:2]
    for edge in edges:
        side = height if edge.name[0] == "y" else width
        assert edge.pixels == pytest.approx(edge.mean * side / 1024)


def test_tables_find_the_grid(tiny):
    P, g = tiny.processor.num_image_tokens, math.isqrt(tiny.processor.num_image_tokens)
    places = explore.position_similarity(tiny.model)
    assert places.cosine.shape == (P, P) and places.components.shape == (P, 3)
    assert_close(places.cosine.diagonal(), torch.ones(P), atol=1e-5, rtol=0)
    nearest = places.cosine.fill_diagonal_(-1).argmax(-1)
    rows, columns = torch.arange(P) // g - nearest // g, torch.arange(P) % g - nearest % g
    assert ((rows.abs() + columns.abs()) == 1).float().mean() > 0.9  # most like each patch is one beside it

    locations = explore.loc_similarity(tiny.model)
    assert locations.ids.tolist() == list(range(0, 1024, 8))  # others were never trained
    assert 0 < float(locations.explained.sum()) <= 1


def test_the_flow_of_two_pictures_has_the_tokens_of_both(random_pg, picture):
    look = explore.look(random_pg, (picture, picture[:20]), "caption en", "a dog")
    assert [one.size for one in look.pictures] == [(60, 40), (60, 20)]
    one, two = (explore.flow(random_pg, given, "caption en") for given in (look.pictures[0], look.picture))
    assert [stage.name for stage in two] == [stage.name for stage in one]
    shapes = {name: shape for stage in two for name, shape in stage.shapes.items()}
    assert (shapes["picture_1"], shapes["picture_2"]) == ((40, 60, 3), (20, 60, 3))
    S, P = look.first_answer, random_pg.processor.num_image_tokens
    assert shapes["pixel_values"][0] == 2 and shapes["image_features"][:2] == (2, P)
    assert shapes["input_ids"] == (1, S) and shapes["inputs_embeds"][:2] == (1, S) and shapes["mask"][-1] == S
    assert "picture" in one[0].shapes and explore.look(random_pg, (picture,), "ocr", "a").pictures[0].size == (60, 40)


def test_flow_lists_every_tensor_with_the_code_that_makes_it(tiny):
    stages = explore.flow(tiny, "examples/scene.png", "caption en")
    shapes = {name: shape for stage in stages for name, shape in stage.shapes.items()}
    side, tokens = tiny.processor.image_size, tiny.processor.num_image_tokens
    assert shapes["pixel_values"] == (1, 3, side, side) and shapes["image_features"] == (1, tokens, 256)
    assert shapes["logits"] == (1, tiny.model.config.text_config.vocab_size)
    folder = explore.stages.ROOT
    for stage in stages:
        path, line = stage.file.split(":")
        source = (folder / path).read_text(encoding="utf-8").splitlines()
        assert f"def {stage.calls[0].split('.')[-1]}(" in "\n".join(source[int(line) - 1 : int(line) + 3])
        assert stage.ms >= 0
