"""Checkpoints with rounded weights: written, opened, loaded, refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.fast import swap
from paligemma.fast.rounding import GROUP, round_rows
from paligemma.fast.swap import quantize
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tiny.renderer import render
from paligemma.utils import load_hf_model
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.finding import TINY
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.quantized import load_quantizing, open_quantized, quantize_checkpoint, stored_mode
from paligemma.weights.saving import save_pretrained


def make_model(kind: str = "gemma", dtype: torch.dtype = torch.float32, **sizes) -> PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **sizes}
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **sizes)).eval()
    randomize(model)
    return model.to(dtype)


@pytest.fixture(params=["int8", "int4"])
def mode(request):
    return request.param


@pytest.fixture
def source(tmp_path):
    """A checkpoint in bfloat16, in several files."""
    save_pretrained(make_model("gemma2", torch.bfloat16), tmp_path / "source", max_shard_size=200_000)
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    return tmp_path / "source"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_at_load_and_in_place_are_the_same_model(source, mode, tmp_path):
    quantize_checkpoint(source, tmp_path / "small", mode, max_shard_size=150_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert stored_mode(tmp_path / "small") == mode and stored_mode(source) is None
    saved = open_quantized(tmp_path / "small").load()
    at_load = load_quantizing(open_checkpoint(source), mode)
    in_place = quantize(paligemma.weights.loading.load_model(source), mode)
    states = [model.state_dict() for model in (saved, at_load, in_place)]
    assert len({tuple(state) for state in map(sorted, states)}) == 1
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype for state in states), name
    inputs = make_inputs(saved.config, prefix=[4, 6])
    logits = [model(**inputs).logits for model in (saved, at_load, in_place)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not saved.training and saved.config == at_load.config


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_is_rounded_at_load_holds_one_file_open(source, mode):
    """And not one for each tensor that stays as it is. (A file in several parts is open several times.)"""
    files, before = len(list(source.glob("model-*.safetensors"))), set(os.listdir("/proc/self/fd"))
    model = load_quantizing(open_checkpoint(source), mode)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= files + 1, model.dtype


def test_it_is_as_small_as_it_says(tmp_path):
    size = {"whole": TINY}
    for mode in ("int8", "int4"):
        size[mode] = tmp_path / mode
        quantize_checkpoint(TINY, size[mode], mode)
    bytes_of = {name: (folder / "model.safetensors").stat().st_size for name, folder in size.items()}
    assert bytes_of["int8"] < 0.53 * bytes_of["whole"] and bytes_of["int4"] < 0.41 * bytes_of["whole"]
    assert (tmp_path / "int8" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_a_saved_one_is_loaded_by_its_path_and_stays_in_the_file(tmp_path, mode):
    quantize_checkpoint(TINY, tmp_path, mode)
    pg = paligemma.load(tmp_path, device="cpu")
    image = render(3, "test", 256).image
    assert pg.caption(image).text == paligemma.load("tiny", device="cpu", quantize=mode).caption(image).text
    weight = pg.model.language_model.model.layers[0].mlp.up_proj.weight
    if sys.platform == "linux":
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        places = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1].startswith(str(tmp_path))]
        assert any(start <= weight.data_ptr() < end for start, end in places)


def test_other_sizes_and_dtypes_of_a_saved_one(tmp_path):
    quantize_checkpoint(TINY, tmp_path, "int8")
    model, _ = load_hf_model(tmp_path, "cpu", dtype="float32", image_size=160)
    assert model.dtype == torch.float32 and model.config.vision_config.num_patches == 100
    reference, _ = load_hf_model("tiny", "cpu", dtype="float32", quantize="int8", image_size=160)
    inputs = make_inputs(model.config, prefix=[3])
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    for wrong, message in {0: "image_size is 0, expected a positive whole", 16_000_000: "choose a smaller one"}.items():
        with pytest.raises(ValueError, match=message):
            load_hf_model(tmp_path, "cpu", image_size=wrong)


def test_from_big_visions_file(source, tmp_path):
    convert(source, tmp_path / "big" / "model.npz")
    quantize_checkpoint(tmp_path / "big" / "model.npz", tmp_path / "from_npz", "int8")
    quantize_checkpoint(source, tmp_path / "direct", "int8")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("from_npz", "direct"))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_failure_leaves_everything_as_it_was(source, tmp_path, monkeypatch):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int8")
    before = files(target)
    calls = []

    def fails_later(weight):
        calls.append(weight.shape)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return round_rows(weight)

    monkeypatch.setattr(swap, "round_rows", fails_later)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, target, "int8")
    assert files(target) == before
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


def test_another_checkpoint_is_not_replaced(source, tmp_path):
    convert(source, tmp_path / "there")
    before = files(tmp_path / "there")
    with pytest.raises(ValueError, match=r"there holds config.json of other content, which would be lost"):
        quantize_checkpoint(source, tmp_path / "there", "int8")
    assert files(tmp_path / "there") == before
    for _ in range(2):  # its own work may be done again
        written = quantize_checkpoint(source, tmp_path / "small", "int8")
        assert [path.name for path in written] == sorted(files(tmp_path / "small"))


def test_one_matrix_at_a_time(source, tmp_path, monkeypatch):
    """Each is read once, and none is kept when the next is read. What is rounded is in no map that stays."""
    checkpoint = open_checkpoint(source)
    rounded = {f"{name}.weight" for name in swap.rounded_kinds(empty_model(checkpoint.config), "int4")}
    real, alive, read = checkpoint.read, [], []

    def watched(name, mapped=False):
        import weakref

        assert sum(reference() is not None for reference in alive) <= 1
        assert not (mapped and name in rounded)
        tensor = real(name, mapped).clone()
        alive.append(weakref.ref(tensor))
        read.append(name)
        return tensor

    checkpoint.read = watched
    quantize_checkpoint(checkpoint, tmp_path / "small", "int4")
    assert sorted(read) == sorted(checkpoint.tensors)


def test_unknown_modes(source, tmp_path):
    for call in (lambda: quantize(make_model(), "int3"), lambda: load_hf_model("tiny", "cpu", quantize="int3")):
        with pytest.raises(ValueError, match="quantize is 'int3', expected one of bf16, int8, int4, bnb-int8, nf4"):
            call()
    for mode in ("bf16", "nf4", "int3"):
        with pytest.raises(ValueError, match=f"mode is '{mode}', expected int8 or int4"):
            quantize_checkpoint(source, tmp_path / "small", mode)
    assert not (tmp_path / "small").exists()


def test_twice(source, tmp_path, mode):
    model = quantize(make_model(), mode)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int8")
    quantize_checkpoint(source, tmp_path / "small", mode)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(open_quantized(tmp_path / "small"), tmp_path / "smaller", "int4")
    with pytest.raises(ValueError, match="quantised"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "smaller", "int4")
    with pytest.raises(ValueError, match="choose another folder"):
        quantize_checkpoint(source, source, mode)


def test_a_rounded_model_is_neither_saved_nor_converted(source, tmp_path, mode):
    with pytest.raises(ValueError, match="the model is quantised and is not saved"):
        save_pretrained(quantize(make_model(), mode), tmp_path / "saved")
    quantize_checkpoint(source, tmp_path / "small", mode)
    with pytest.raises(ValueError, match="holds quantised weights, which can be run but not changed"):
        convert(tmp_path / "small", tmp_path / "converted")
    assert not (tmp_path / "saved").exists() and not (tmp_path / "converted").exists()


def test_files_that_do_not_fit(source, tmp_path):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int8")
    layer = "language_model.model.layers.0.mlp.up_proj"
    tensors = load_file(target / "model.safetensors")

    def refused(match, **changes):
        changed = {**tensors, **{name.replace("/", "."): value for name, value in changes.items()}}
        save_file({n: t for n, t in changed.items() if t is not None}, target / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            open_quantized(target)

    refused(r"1 missing: .*up_proj\.scale", **{f"{layer}.scale": None})
    refused(r"1 unexpected: strange", strange=torch.zeros(1))
    refused(
        r"1 of another shape: .*up_proj\.weight is \[1, 128\]", **{f"{layer}.weight": tensors[f"{layer}.weight"][:1]}
    )
    refused(
        r"up_proj\.weight is torch\.uint8, expected torch\.int8",
        **{f"{layer}.weight": tensors[f"{layer}.weight"].byte()},
    )
    refused(r"up_proj\.scale is torch\.float64, expected", **{f"{layer}.scale": tensors[f"{layer}.scale"].double()})
    refused(r"not floating point|I64", **{f"{layer}.scale": tensors[f"{layer}.scale"].long()})
    (target / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_quantized(target)
    (target / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_hf_model(target, "cpu")


def test_settings_that_do_not_fit(source, tmp_path):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int4")
    settings = json.loads((target / "config.json").read_text())
    assert settings["quantization_config"] == {"quant_method": "paligemma", "mode": "int4", "group_size": GROUP}

    def refused(match, **changes):
        changed = {**settings, "quantization_config": {**settings["quantization_config"], **changes}}
        (target / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            load_hf_model(target, "cpu")

    refused("quantised by 'bitsandbytes', whose format is not read here", quant_method="bitsandbytes")
    refused("mode 'int2'", mode="int2")
    refused("group_size 32", group_size=32)
    refused("mode .'int4'.", mode=["int4"])
    refused("of another shape: language_model", mode="int8")  # the files hold 4 bits
    (target / "config.json").write_text(json.dumps({**settings, "quantization_config": "int8"}))
    with pytest.raises(ValueError, match="quantised by 'int8'"):
        load_hf_model(target, "cpu")
    (target / "config.json").write_text(json.dumps({**settings, "hidden_size_of_text": 3, "model_type": "llava"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llava'"):
        load_hf_model(target, "cpu")


def test_another_mode_than_the_files_hold(tmp_path):
    quantize_checkpoint(TINY, tmp_path, "int8")
    assert load_hf_model(tmp_path, "cpu", quantize="int8")[0].dtype == torch.bfloat16
    for other in ("int4", "nf4", "bf16"):
        with pytest.raises(ValueError, match=f"holds int8 weights, not {other}: leave out `quantize`"):
            load_hf_model(tmp_path, "cpu", quantize=other)


def test_the_command(tmp_path):
    runner = CliRunner()
    for options in ([], ["--int8", "--int4"]):
        result = runner.invoke(app, ["quantize", "tiny", str(tmp_path / "small"), *options])
        assert result.exit_code == 2 and "choose one of --int8 and --int4" in result.output
    result = runner.invoke(app, ["quantize", "tiny", str(tmp_path / "small"), "--int4"])
    assert result.exit_code == 0 and result.stdout == ""
    assert stored_mode(tmp_path / "small") == "int4"
    render_to = tmp_path / "scene.png"
    paligemma.load_image(render(5, "test", 256).image).save(render_to)
    result = runner.invoke(app, ["run", "caption en", str(render_to), "-m", str(tmp_path / "small")])
    assert result.exit_code == 0 and result.stdout.endswith("background\n")
