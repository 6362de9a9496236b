"""Pictures on their way to the model: opened ahead of it, and encoded once, whoever shows them."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from reference import randomize, tiny_config

from paligemma import encoding
from paligemma.encoding import encode_ahead
from paligemma.images import load_image, preprocess
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration


@pytest.fixture
def model(monkeypatch):
    """Its list `encoded` holds how many pictures each pass of the vision tower had."""
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma")).eval()
    randomize(model)
    model.encoded, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: model.encoded.append(len(pixels)) or encode(pixels))
    return model


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), dtype=np.uint8)


def test_features_and_sizes_are_those_of_each_picture(model):
    groups = [[picture(0), picture(1)], [], [picture(2)]]
    found = list(encode_ahead(model, 28, groups))
    assert [len(group) for group in found] == [2, 0, 1] and model.encoded == [2, 1]
    for group, pictures in zip(found, groups):
        for (features, size), one in zip(group, pictures):
            assert size == (40, len(one))
            alone = model.encode_image(preprocess(load_image(one), 28)[None])[0]
            torch.testing.assert_close(features, alone)


def test_equal_pictures_are_encoded_once_in_whatever_form_they_come(model, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    again = [picture(0), Image.fromarray(picture(0)), path, path.read_bytes()]
    found = [
        one for group in encode_ahead(model, 28, [again[:2], again[2:], [picture(1), picture(0)]]) for one in group
    ]
    assert model.encoded == [1, 1]
    assert all(torch.equal(features, found[0][0]) for features, _ in (*found[:4], found[5]))


def test_features_are_kept_for_the_pictures_seen_last(model, monkeypatch):
    monkeypatch.setattr(encoding, "MOST_KEPT", 2)
    seen = [0, 1, 0, 2, 0, 1]  # 2 takes the place of 1, since 0 was seen after it
    list(encode_ahead(model, 28, [[picture(n)] for n in seen]))
    assert model.encoded == [1, 1, 1, 1]


def test_the_next_pictures_are_opened_meanwhile_and_no_others(model, monkeypatch):
    opened, all_of_two = [], threading.Event()

    def load(one):
        opened.append(int(one[0, 0, 0]))
        if len(opened) == 4:
            all_of_two.set()
        return load_image(one)

    monkeypatch.setattr(encoding, "load_image", load)
    pictures = [np.full((28, 28, 3), n, np.uint8) for n in range(8)]
    groups = encode_ahead(model, 28, [pictures[n : n + 2] for n in range(0, 8, 2)])
    assert opened == []
    next(groups)
    assert all_of_two.wait(10) and sorted(opened) == [0, 1, 2, 3]
    groups.close()
    assert len(opened) == 4


def test_one_picture_for_many_rows_is_opened_once_and_without_a_thread(model, monkeypatch):
    threads = []

    def load(one):
        threads.append(threading.current_thread())
        return load_image(one)

    monkeypatch.setattr(encoding, "load_image", load)
    one = picture(0)
    list(encode_ahead(model, 28, [[one, one], [one], [one]]))
    assert threads == [threading.main_thread()] and model.encoded == [1]


def test_a_picture_that_cannot_be_opened_is_an_error_when_its_turn_comes(model, tmp_path):
    for first in ([picture(0)], []):
        groups = encode_ahead(model, 28, [first, ["nowhere.png"]])
        assert len(next(groups)) == len(first)
        with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
            next(groups)
