"""Memory, dtypes and resolutions: a tensor stays in its file or has memory of its own."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same_weights, digests, linux, logits_of
from reference import make_inputs, tiny_config

from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.weights.converting import convert
from paligemma.weights.loading import load_model, resample_positions
from paligemma.weights.safetensors_file import MappedFile
from paligemma.weights.saving import save_pretrained

# ------------------------------------------------------------------------------------------------ memory and dtype


def maps_of(folder: Path) -> list[range]:
    """Where in memory the files of a folder are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors") and str(folder) in line]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


@linux
def test_tensors_of_the_files_dtype_stay_in_the_file(folder):
    loaded = load_model(folder)
    (mapped,) = maps_of(folder)  # one map for all
    assert all(parameter.data_ptr() in mapped for parameter in loaded.parameters())


@linux
def test_a_file_larger_than_the_machine_can_be_mapped(tmp_path):
    """A header, a number, and a hole. Of the map every page may be written to, which changes no file."""
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    size = 2 * 1024 * int(total.split()[1])
    header = {
        "one": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
        "large": {"dtype": "U8", "shape": [size], "data_offsets": [4, 4 + size]},
        "last": {"dtype": "F32", "shape": [], "data_offsets": [4 + size, 8 + size]},
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"\x80\x3f\x00\xc0")
        file.truncate(8 + len(text) + 8 + size)
    file = MappedFile(path)
    assert file.tensors == {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    assert torch.equal(file.read("one"), torch.tensor([[1.0, -2.0]]).bfloat16())
    assert file.read("none").shape == (0, 3) and file.read("last") == 0
    large = file.read("large")
    large[-1] = 7
    assert len(large) == size and file.read("large")[-1] == 7 and MappedFile(path).read("large")[-1] == 0


@linux
def test_tensors_of_another_dtype_keep_nothing_of_the_file(folder):
    loaded = load_model(folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert maps_of(folder) == []


def test_training_in_place_leaves_the_file_alone(folder):
    before = digests(folder)
    loaded = load_model(folder)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(**make_inputs(loaded.config, prefix=[5], suffix=[3], labels=True)).loss.backward()
    optimizer.step()
    norm = "language_model.model.norm.weight"
    assert not torch.equal(loaded.state_dict()[norm], load_model(folder).state_dict()[norm])
    assert digests(folder) == before


def test_the_dtype_is_the_files_own_unless_asked_for(gemma, tmp_path):
    save_pretrained(gemma.bfloat16(), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    for dtype in ("float32", torch.float32):
        loaded = load_model(tmp_path, dtype=dtype)
        assert_same_weights(loaded, gemma.float())


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int64, torch.float64])
def test_an_unknown_dtype(folder, dtype):
    with pytest.raises(ValueError, match="expected one of bfloat16, float16, float32"):
        load_model(folder, dtype=dtype)


def test_values_that_do_not_fit_into_float16(gemma, tmp_path):
    with torch.no_grad():
        gemma.language_model.model.norm.weight[0] = 70_000
    save_pretrained(gemma, tmp_path / "a")
    with pytest.raises(ValueError, match=r"norm.weight has values beyond 65504"):
        load_model(tmp_path / "a", dtype="float16")
    with pytest.raises(ValueError, match=r"norm.weight has values beyond 65504"):
        convert(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


MEASURE = """
import sys, torch
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.loading import load_model
from paligemma.weights.saving import save_pretrained

def most():  # the most memory that this process ever held, touched maps of files included
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
empty_model(__import__("paligemma").PaliGemmaConfig())  # what building a model imports
start = most()
exec(sys.argv[1])
print(most() - start)
"""


@linux
@pytest.mark.slow
def test_nothing_is_held_twice(tmp_path):
    """Each step in a process of its own: memory over that of the imports, in parts of the checkpoint's size."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64}
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma", **sizes))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 1e8
    save_pretrained(model, tmp_path / "a")
    del model

    def taken(code: str) -> float:
        code = code.replace("$", str(tmp_path))
        result = subprocess.run([sys.executable, "-c", MEASURE, code], capture_output=True, text=True, check=True)
        return int(result.stdout) / size

    # The model is small, so the slack of the allocator shows (up to 0.2); a second copy would add 0.5 or 1.
    assert taken("convert('$/a', '$/b/x.npz', dtype='bfloat16'); convert('$/b/x.npz', '$/c', dtype='float32')") < 0.3
    assert taken("model = load_model('$/a', dtype='bfloat16')") < 0.8  # half the bytes
    assert taken("model = load_model('$/b/x.npz'); save_pretrained(model, '$/d')") < 0.8
    assert taken("model = load_model('$/a'); save_pretrained(model, '$/e')") < 1.3


# ------------------------------------------------------------------------------------------------ another resolution


def zoom(table: np.ndarray, new: int) -> np.ndarray:
    """scipy.ndimage.zoom(grid, order=1), written out: corners on corners, linear in between. [old, old, D]"""
    old = table.shape[0]
    result = np.empty((new, new, table.shape[2]))
    for row in range(new):
        for column in range(new):
            y, x = row * (old - 1) / (new - 1), column * (old - 1) / (new - 1)
            y0, x0 = min(int(y), old - 2), min(int(x), old - 2)
            b, a = y - y0, x - x0
            top = table[y0, x0] * (1 - a) + table[y0, x0 + 1] * a
            bottom = table[y0 + 1, x0] * (1 - a) + table[y0 + 1, x0 + 1] * a
            result[row, column] = top * (1 - b) + bottom * b
    return result


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (3, 7), (16, 16)])
def test_positions_are_resampled_as_big_vision_does(old, new):
    table = torch.randn(old * old, 5)
    expected = zoom(table.reshape(old, old, 5).double().numpy(), new)
    resampled = resample_positions(table, new * new)
    np.testing.assert_allclose(resampled.reshape(new, new, 5).numpy(), expected, atol=1e-6)
    with contextlib.suppress(ImportError):
        from scipy import ndimage

        theirs = ndimage.zoom(table.reshape(old, old, 5).numpy(), (new / old, new / old, 1), order=1)
        np.testing.assert_allclose(resampled.reshape(new, new, 5).numpy(), theirs, atol=1e-5)


def test_a_checkpoint_at_another_resolution(folder, gemma, tmp_path):
    loaded = load_model(folder, image_size=56)
    positions = "vision_tower.vision_model.embeddings.position_embedding.weight"
    assert loaded.config.vision_config.image_size == 56
    assert torch.equal(loaded.state_dict()[positions], resample_positions(gemma.state_dict()[positions], 16))
    assert logits_of(loaded).isfinite().all()
    save_pretrained(loaded, tmp_path / "b")
    assert load_model(tmp_path / "b").config.vision_config.num_patches == 16
    assert_same_weights(load_model(folder, image_size=28), gemma)
    with pytest.raises(ValueError, match=r"image_size 14,000,000 makes 1,000,000,000,000 image tokens, .* positions"):
        load_model(folder, image_size=14_000_000)  # told before any memory is asked for
    with pytest.raises(ValueError, match="image_size 57 is not a multiple of patch_size 14"):
        load_model(folder, image_size=57)
    for wrong in (0, -14, "28", 28.0, True):
        with pytest.raises(ValueError, match=f"image_size is {wrong!r}, expected a positive whole number of pixels"):
            load_model(folder, image_size=wrong)
