"""big_vision's `.npz`: the same model, sizes that follow from the shapes, damage that is named."""

import contextlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import EMBEDDING, as_void, assert_same_weights, bigvision_arrays, logits_of, make_model, write_npz

from paligemma.weights import npz
from paligemma.weights.layouts import bigvision_layout
from paligemma.weights.loading import load_model
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.published import PUBLISHED, config_of_arrays, published_config, published_name


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_an_npz_is_the_same_model(model, tmp_path, prefix):
    arrays = {prefix + key: np.ascontiguousarray(array) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.npz", model.config, arrays)
    loaded = load_model(path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    for name, parameter in loaded.named_parameters():  # memory of its own, in its own order
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert_same_weights(load_model(tmp_path), model)  # by its folder


def test_bfloat16_comes_as_void(model, tmp_path):
    arrays = {key: as_void(torch.tensor(array)) for key, array in bigvision_arrays(model).items()}
    loaded = load_model(write_npz(tmp_path / "a.b16.npz", model.config, arrays))
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model.bfloat16())


def test_float16(model, tmp_path):
    arrays = {key: array.astype(np.float16) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.f16.npz", model.config, arrays)
    assert_same_weights(load_model(path), model.half())
    assert_same_weights(load_model(path, dtype="float32"), model.half().float())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_fortrans_order_and_compressed_ones(model, tmp_path, save):
    arrays = {key: np.asfortranarray(array) for key, array in bigvision_arrays(model).items()}
    path = write_npz(tmp_path / "a.npz", model.config, arrays, save)
    assert_same_weights(load_model(path), model)


@pytest.mark.parametrize("pieces", [2, 12])
@pytest.mark.parametrize("digits", [1, 3])
def test_parts_are_read_as_one_file(model, tmp_path, pieces, digits):
    path = write_npz(tmp_path / "a.npz", model.config, bigvision_arrays(model))
    content = path.read_bytes()
    path.unlink()
    length = len(content) // pieces + 1
    for n in range(pieces):  # part10 comes after part9
        (tmp_path / f"a.npz.part{n:0{digits}d}").write_bytes(content[n * length : (n + 1) * length])
    for name in ("a.npz", f"a.npz.part{0:0{digits}d}", "."):
        assert_same_weights(load_model(tmp_path / name), model)


def test_a_missing_part(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    content = path.read_bytes()
    path.unlink()
    for n in (0, 2):
        (tmp_path / f"a.npz.part{n}").write_bytes(content[n * 1000 : n * 1000 + 1000])
    with pytest.raises(FileNotFoundError, match=r"a.npz has only its parts \[0, 2\]"):
        load_model(tmp_path / "a.npz")
    (tmp_path / "a.npz.part2").unlink()
    with pytest.raises(ValueError, match=r"a.npz.part0 is truncated or damaged"):
        load_model(tmp_path / "a.npz")


def test_the_rows_that_big_vision_lacks_are_zeros(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:300]  # <image> is 300, of 320
    loaded = load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))
    embedding = loaded.state_dict()[EMBEDDING]
    assert torch.equal(embedding[:300], gemma.state_dict()[EMBEDDING][:300])
    assert embedding.shape == (320, 32) and not embedding[300:].any()


def test_an_embedding_too_short_for_the_configuration(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:299]
    with pytest.raises(ValueError, match=r"input_embedding is \[299, 32\], expected \[320, 32\]"):
        load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))


@pytest.mark.parametrize("image_size", [224, 448, 896])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_of_every_published_npz_follows_from_its_shapes(name, image_size):
    config = published_config(name, image_size)
    shapes = {array.key: array.shape for array in bigvision_layout(config, 257152)}
    assert config_of_arrays(Path("a.npz"), shapes) == config
    assert published_name(config) == name


def test_a_size_of_its_own_is_not_published():
    config = published_config("paligemma2-3b", 448)
    assert published_name(replace(config, text_config=replace(config.text_config, num_key_value_heads=2))) is None
    assert published_name(replace(config, vision_config=replace(config.vision_config, num_hidden_layers=26))) is None


def test_an_npz_without_a_configuration_beside_it(tmp_path):
    model = make_model("gemma2", vocab_size=257216, image_token_index=257152, hidden_size=8, sliding_window=4096)
    arrays = bigvision_arrays(model)
    arrays["llm/embedder/input_embedding"] = arrays["llm/embedder/input_embedding"][:257152]
    loaded = load_model(write_npz(tmp_path / "a.npz", None, arrays))
    assert loaded.config.text_config.query_pre_attn_scalar == 16  # the head size, as in all published ones but one
    assert loaded.config.text_config.sliding_window == 4096
    assert (loaded.config.vision_config.image_size, loaded.config.vision_config.patch_size) == (28, 14)
    state = model.state_dict()
    state[EMBEDDING][257152:] = 0
    for tensor, expected in zip(loaded.state_dict().values(), state.values()):
        assert torch.equal(tensor, expected)


def test_an_unknown_vocabulary_needs_a_configuration(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", None, bigvision_arrays(gemma))
    with pytest.raises(ValueError, match=r"embedding of 320 rows.*Put its config.json beside it"):
        load_model(path)


QUERY = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (QUERY, (10**9, 0, 2, 4), "num_hidden_layers"),
        (QUERY, (1, 8, 0, 4), "num_attention_heads"),
        ("img/embedding/kernel", (0, 14, 3, 8), "patch_size"),
        ("img/pos_embedding", (1, 0, 8), "image_size"),
        ("llm/layers/attn/q_einsum/w", (10**9, 0, 8, 4), "num_hidden_layers"),
        ("llm/layers/attn/q_einsum/w", (1, 0, 4608, 4), "num_attention_heads"),
        ("llm/layers/attn/kv_einsum/w", (1, 2, 0, 8, 4), "num_key_value_heads"),
    ],
)
def test_shapes_of_no_model_are_refused_before_a_model_is_built(key, shape, message, monkeypatch):
    """An array without elements takes no bytes, whatever number of layers it claims."""
    monkeypatch.setattr("paligemma.weights.expected.empty_model", None)
    shapes = {array.key: array.shape for array in bigvision_layout(published_config("paligemma2-3b", 224), 257152)}
    with pytest.raises(ValueError, match=rf"^a\.npz: .* no model: \w+\.{message} is "):
        config_of_arrays(Path("a.npz"), shapes | {key: shape})


def test_what_does_not_fit_in_an_npz_is_named(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    del arrays["img/head/bias"]
    arrays["opt/count"] = np.zeros(1)
    arrays["llm/final_norm/scale"] = np.zeros(31, np.float32)
    arrays["llm/layers/mlp/linear"] = arrays["llm/layers/mlp/linear"].astype(np.int32)
    with pytest.raises(ValueError) as error:
        load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))
    assert str(error.value).splitlines()[1:-1] == [
        "  1 missing: img/head/bias",
        "  1 unexpected: opt/count",
        "  1 of another shape: llm/final_norm/scale is [31], expected [32]",
        "  1 not floating point: llm/layers/mlp/linear is <i4",
    ]


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_an_npz_stays_closed(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    arrays["img/head/bias"] = np.array([Evil(tmp_path / "opened")], dtype=object)
    path = write_npz(tmp_path / "a.npz", gemma.config, arrays)
    with pytest.raises(ValueError, match=r"not floating point: img/head/bias is \|O"):
        load_model(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("kept", [0, 100, 60_000, -1])
def test_a_truncated_npz(gemma, tmp_path, kept):
    path = write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a.npz is truncated or damaged"):
        load_model(path)


def test_an_array_of_another_size_than_it_says(gemma, tmp_path):
    path = write_npz(tmp_path / "a.npz", gemma.config, {})
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in bigvision_arrays(gemma).items():
            with archive.open(key + ".npy", "w") as file:
                np.lib.format.write_array(file, array)
                file.write(b"more" if key == "img/head/bias" else b"")
    with pytest.raises(ValueError, match=r"damaged \(img/head/bias has 260 bytes, expected 256\)"):
        load_model(path)


@pytest.mark.parametrize("header", ["{'shape': (1,), (", "{'shape': ((1,}", "{'descr': '<f4' 4}", "(" * 900, "\0"])
def test_a_header_of_an_array_that_nobody_can_read(header, tmp_path, monkeypatch):
    """It is a Python literal, and what Python says of a broken one is not said to the user."""
    text = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("llm/a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    real, opened = Path.open, []
    monkeypatch.setattr(Path, "open", lambda *args: opened.append(real(*args)) or opened[-1])
    with pytest.raises(ValueError, match=r"a\.npz is truncated or damaged"):
        open_checkpoint(tmp_path / "a.npz")
    assert all(file.closed for file in opened)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_members_of_other_compressions(gemma, tmp_path, method):
    """Their libraries have errors of their own."""
    path = write_npz(tmp_path / "a.npz", gemma.config, {})
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, array in bigvision_arrays(gemma).items():
            with archive.open(key + ".npy", "w") as file:
                np.lib.format.write_array(file, array)
    assert_same_weights(load_model(path), gemma)
    content = path.read_bytes()
    for at in range(40, len(content) // 2, 997):
        path.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])
        with contextlib.suppress(ValueError):  # nothing else
            load_model(path)


def test_a_flipped_bit_in_an_npz(gemma, tmp_path):
    arrays = bigvision_arrays(gemma)
    path = write_npz(tmp_path / "a.npz", gemma.config, arrays)
    content = bytearray(path.read_bytes())
    content[content.index(arrays["llm/layers/mlp/linear"].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz is truncated or damaged \(Bad CRC-32"):
        load_model(path)


def test_a_folder_with_other_archives(gemma, tmp_path):
    write_npz(tmp_path / "mask_codec.npz", None, {"decoder.0.weight": np.zeros(3)})
    write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma))
    assert_same_weights(load_model(tmp_path), gemma)
    write_npz(tmp_path / "a.bf16.npz", gemma.config, bigvision_arrays(gemma))
    with pytest.raises(ValueError, match=r"several checkpoints: name one of a.npz, a.bf16.npz"):
        load_model(tmp_path)
    assert_same_weights(load_model(tmp_path / "a.npz"), gemma)


def test_no_more_than_a_slice_of_an_array_is_read_at_a_time(gemma, tmp_path, monkeypatch):
    read = []
    fill = npz.NpzReader.fill

    def spy(self, key, out, index=None):
        read.append((key, index, out.numel()))
        return fill(self, key, out, index)

    monkeypatch.setattr(npz.NpzReader, "fill", spy)
    load_model(write_npz(tmp_path / "a.npz", gemma.config, bigvision_arrays(gemma)))
    assert ("llm/layers/mlp/gating_einsum", 1, 2 * 32 * 64) in read
    assert len(read) == len(set(read))  # and each once, though it holds two tensors


def test_the_state_of_training_is_left_out(gemma, tmp_path):
    arrays = {"params/" + key: array for key, array in bigvision_arrays(gemma).items()}
    arrays |= {"opt/0/mu/img/head/bias": np.zeros(3, np.float32), "chrono/accum_train_time": np.zeros(())}
    with pytest.warns(UserWarning, match="what else training has saved is left out"):
        loaded = load_model(write_npz(tmp_path / "a.npz", gemma.config, arrays))
    assert_same_weights(loaded, gemma)
