"""What is to be seen in the embedded model is true: scenes whose content is known, and what must follow from it.

The figures beside the bounds were measured on the checkpoint that ships; another one is measured anew.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma import explore
from paligemma.tiny.renderer import render
from paligemma.tiny.world import Scene, SceneObject

GRID = math.isqrt(paligemma.load("tiny", device="cpu").processor.num_image_tokens)
SIZE = 32 * GRID  # of the scenes: two pixels for each of the model's


def scenes(count: int) -> Iterator[tuple[Scene, Image.Image]]:
    for seed in range(count):
        scene = render(seed, "test", SIZE)
        yield scene, Image.fromarray(scene.image)


def cells(scene: Scene, thing: SceneObject, share: float = 0.0) -> set[int]:
    """The patches of which more than `share` is this thing."""
    side = scene.size // GRID
    parts = thing.mask.reshape(GRID, side, GRID, side).mean((1, 3))
    return {int(cell) for cell in np.flatnonzero(parts > share)}


def with_neighbours(patches: set[int]) -> set[int]:
    around = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    places = {(patch // GRID + row, patch % GRID + column) for patch in patches for row, column in around}
    return {row * GRID + column for row, column in places if 0 <= row < GRID and 0 <= column < GRID}


def unique(scene: Scene) -> list[SceneObject]:
    """Pictograms whose label no other has."""
    labels = [thing.label for thing in scene.objects]
    return [thing for thing in scene.objects if thing.label != "sign" and labels.count(thing.label) == 1]


# ---------------------------------------------------------------------------------------------- patches and words


def removals(pg, count: int, seeds: int) -> tuple[int, int, int, int]:
    """Of `count` scenes one object's patches are replaced: (tried, its word gone, the others kept, gone by chance)."""
    tried = gone = kept = by_chance = 0
    random = np.random.default_rng(0)
    for scene, picture in scenes(seeds):
        look = explore.look(pg, picture, "caption en")
        named = [thing for thing in unique(scene) if thing.label in look.answer]
        if not named or tried == count:
            continue

        def hidden_by(thing, scene=scene):
            return set().union(*(cells(scene, other) for other in scene.objects if other is not thing))

        thing = min(named, key=lambda one: len(cells(scene, one) & hidden_by(one)) / len(cells(scene, one)))
        own, others = cells(scene, thing), hidden_by(thing)
        patches = sorted((with_neighbours(own) - others) | own)
        answer = explore.without(look, patches).text
        tried += 1
        gone += thing.label not in answer
        kept += all(
            other.label in answer for other in scene.objects if other is not thing and other.label in look.answer
        )
        elsewhere = sorted(set(range(GRID**2)) - with_neighbours(own) - others)
        some = random.permutation(elsewhere)[: len(patches)].tolist()
        by_chance += thing.label not in explore.without(look, some).text
    return tried, gone, kept, by_chance


def test_without_its_patches_an_object_is_not_named(tiny):
    assert removals(tiny, 4, 8) == (4, 4, 4, 0)


@pytest.mark.slow
def test_in_forty_scenes_without_its_patches_an_object_is_not_named(tiny):
    tried, gone, kept, by_chance = removals(tiny, 40, 80)
    assert tried == 40 and gone >= 38 and kept >= 37 and by_chance <= 2  # measured: 40, 40, 0


def pointing_and_lens(pg, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """For every word of an object: whether the most attended patch of each layer is its own or beside it. For every
    patch that is mostly one object: whether it says the object's word after each layer."""
    points, says = [], []
    for scene, picture in scenes(seeds):
        look = explore.look(pg, picture, "caption en")
        attention = explore.attention(look, "answer")
        decode = pg.processor.tokenizer.decode
        for thing in unique(scene):
            near = with_neighbours(cells(scene, thing))
            for token in range(len(look.answer_ids)):
                if look.tokens[look.first_answer + token].strip() == thing.label:
                    weights = attention.of(token)[:, :, look.image_columns].mean(1)  # [L, P], mean of the heads
                    points.append([int(patch) in near for patch in weights.argmax(-1)])
            if mostly := sorted(cells(scene, thing, 0.5)):
                words = explore.lens(look, k=1, columns=mostly).ids[:, :, 0].tolist()
                says.append(
                    [np.mean([decode([word]).strip() in (thing.label, thing.tint) for word in row]) for row in words]
                )
    return np.mean(points, axis=0), np.mean(says, axis=0)


def test_attention_points_at_what_is_named_and_patches_say_their_word(tiny):
    points, says = pointing_and_lens(tiny, 10)
    assert points[-3:].mean() >= 0.9 and says[-2] >= 0.75


@pytest.mark.slow
def test_in_forty_scenes_attention_points_and_patches_say_their_word(tiny):
    points, says = pointing_and_lens(tiny, 40)
    assert points[-3:].mean() >= 0.95 and says[-2] >= 0.75  # measured: .974; .804


# ---------------------------------------------------------------------------------------------- routes


def mean_routes(pg, question, right, seeds: int) -> dict[str, np.ndarray]:
    """Of the questions answered right: what each cut changes, averaged, by route: [layers]."""
    found: dict[str, list[np.ndarray]] = {}
    for scene, picture in scenes(seeds):
        for thing in unique(scene)[:1]:
            if right(thing) is None:
                continue
            look = explore.look(pg, picture, question(thing))
            if look.answer == right(thing):
                routes = explore.routes(look, 0)
                for name, change in zip(routes.names, routes.change.numpy()):
                    found.setdefault(name, []).append(change)
    return {name: np.mean(changes, axis=0) for name, changes in found.items()}


@pytest.mark.slow
def test_two_questions_take_two_routes(tiny):
    """A colour is fetched from the picture late, by the last column, which learned from the prompt what to look for.
    Whether a thing is there, the prompt has asked the picture in its first layers."""
    color = mean_routes(
        tiny, lambda thing: f"answer en what color is the {thing.label} ?", lambda thing: thing.tint, 12
    )
    assert color["image->last"][4] >= 0.75 and color["image->last"][:3].max() < 0.1  # measured: .86; -.001
    assert color["prompt->last"][1:4].max() >= 0.8  # 1.0
    exists = mean_routes(tiny, lambda thing: f"answer en is there a {thing.label} ?", lambda thing: "yes", 12)
    assert exists["image->prompt"][0] >= 0.9 and abs(exists["image->last"]).max() < 0.02  # .99; .005
    # bos takes most of the first layers' attention, and nothing depends on it.
    assert abs(color["bos->last"]).max() < 0.02 and abs(exists["bos->last"]).max() < 0.02


def test_bos_takes_much_attention(tiny):
    _, picture = next(scenes(1))
    share = explore.attention(explore.look(tiny, picture, "caption en")).share()
    assert share[0, :, :, 1].mean() > 0.5


# ---------------------------------------------------------------------------------------------- patching


def test_a_colour_goes_from_its_patches_to_the_last_column(tiny):
    """Twins that differ in one tint: the object's patches carry it through the first layers, the last column in the
    end."""
    on_object, last = [], []
    for seed, label in enumerate(("car", "bus", "heart", "balloon", "umbrella", "bell")):
        twins = [render(seed, "val", SIZE, things=[(label, tint)], sign=0.0, sign_only=0.0) for tint in ("red", "blue")]
        if not np.array_equal(twins[0].objects[0].mask, twins[1].objects[0].mask):
            continue
        looks = [
            explore.look(tiny, Image.fromarray(twin.image), f"answer en what color is the {label} ?", tint)
            for twin, tint in zip(twins, ("red", "blue"))
        ]
        near = sorted(with_neighbours(cells(twins[0], twins[0].objects[0])))
        groups = {"object": near, "last": looks[0].groups(0)["last"], "all": range(len(looks[0].input_ids))}
        found = explore.patch(*looks, token=0, groups=groups)
        assert found.restored[2, 0] == pytest.approx(1.0, abs=1e-3)
        on_object.append(found.restored[0])
        last.append(found.restored[1])
    assert len(on_object) >= 3
    object_mean, last_mean = torch.stack(on_object).mean(0), torch.stack(last).mean(0)
    assert object_mean[:3].min() > 0.9 and last_mean[:3].abs().max() < 0.05  # measured: 1.0; .001
    assert last_mean[-1] > 0.2 and object_mean[-1] < object_mean[0]  # .33; .71
