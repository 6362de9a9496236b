"""Every pair of options of loading: device, dtype, quantize, device map, and what the files hold.

Each combination works, or is refused in one line before a weight is read.
"""

import itertools
import sys

import pytest
import torch
from make_tokenizer import build_tokenizer
from reference import make_inputs
from ways import make_model

import paligemma
from paligemma.fast import library
from paligemma.utils import load_hf_model
from paligemma.weights.quantized import quantize_checkpoint
from paligemma.weights.safetensors_file import MappedFile
from paligemma.weights.saving import save_pretrained

DTYPES = (None, "bfloat16", "float16", "float32")
MODES = (None, "bf16", "int8", "int4", "bnb-int8", "nf4")
MAPS = (None, "auto")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by what they hold, each with a tokenizer that fits."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        tokenizer = paligemma.load_tokenizer(build_tokenizer(root / name))
        model = make_model(dtype=dtype, vocab_size=len(tokenizer), image_token_index=tokenizer.image_token_id)
        save_pretrained(model, root / name)
    for mode in ("int8", "int4"):
        quantize_checkpoint(root / "bfloat16", root / mode, mode)
    return root


@pytest.fixture
def read(monkeypatch):
    """The names of the weights that were read. bitsandbytes is not there."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    names, real = [], MappedFile.read
    monkeypatch.setattr(MappedFile, "read", lambda file, name, **how: names.append(name) or real(file, name, **how))
    return names


def refusal(read, *given, **options) -> str | None:
    """Why loading is refused; None if it works and the model writes tokens."""
    read.clear()
    try:
        model, _ = load_hf_model(*given, **options)
    except (ValueError, ImportError) as error:
        assert not read, f"{given} {options}: refused after {len(read)} weights were read: {error}"
        message = str(error)
        assert "\n" not in message and ": " in message, message
        return message
    inputs = make_inputs(model.config, prefix=[3])
    (answer,) = paligemma.generate(model, inputs, max_new_tokens=2)
    assert len(answer.token_ids) <= 2 and all(torch.isfinite(torch.tensor(answer.token_logprobs)))
    return None


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("kernels", ["1", "0"])
def test_every_combination_on_a_cpu(kernels, folders, read, stored, monkeypatch):
    monkeypatch.setattr(library, "REQUESTED", kernels)
    for dtype, quantize, device_map in itertools.product(DTYPES, MODES, MAPS):
        message = refusal(read, folders / stored, "cpu", dtype, quantize, device_map=device_map)
        combination = f"{stored}: {dtype}, {quantize}, {device_map}: {message}"
        rounded = stored if stored in ("int8", "int4") else quantize if quantize in ("int8", "int4") else None
        half = (dtype or stored) == "float16"
        bnb = quantize in ("bnb-int8", "nf4")
        works = (
            not (device_map and (quantize or rounded))
            and not (rounded and half)
            and not bnb
            and not (stored in ("int8", "int4") and quantize not in (None, stored))
        )
        assert (message is None) == works, combination
        if rounded and half and not device_map and not bnb and quantize in (None, rounded):
            assert "float16" in message and "bfloat16 or float32" in message, combination


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("stored", ["bfloat16", "int8", "int4"])
def test_every_combination_on_a_device_that_is_no_cpu(folders, read, device, stored, monkeypatch):
    """Up to the first weight that would go there."""

    class Reached(Exception):
        pass

    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr("paligemma.utils.load_model", reached)
    monkeypatch.setattr("paligemma.weights.quantized._assemble", reached)
    for dtype, quantize, device_map in itertools.product(DTYPES, MODES, MAPS):
        try:
            message = refusal(read, folders / stored, device, dtype, quantize, device_map=device_map)
        except Reached:
            message = None
        works = stored == "bfloat16" and quantize is None
        assert (message is None) == works, f"{dtype}, {quantize}, {device_map}: {message}"


def test_the_way_out_is_named(folders, read, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "choose the device cpu" in refusal(read, folders / "int8", "cuda")
    assert "bnb-int8 or nf4" in refusal(read, folders / "bfloat16", "cuda", quantize="int8")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_what_is_written_can_be_loaded_as_it_is(folders, tmp_path, mode, read):
    """A rounded checkpoint in float16 could be computed with by no CPU."""
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        quantize_checkpoint(folders / "bfloat16", tmp_path / "small", mode, dtype="float16")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        quantize_checkpoint(folders / "float16", tmp_path / "small", mode)
    assert not (tmp_path / "small").exists()
    quantize_checkpoint(folders / "float16", tmp_path / "small", mode, dtype="bfloat16")
    assert refusal(read, tmp_path / "small", "cpu") is None


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_built_model_in_float16_is_refused_as_it_is(mode):
    model = make_model(dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        paligemma.quantize(model, mode)
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj, torch.nn.Linear)
