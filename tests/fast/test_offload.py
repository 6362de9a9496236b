"""A model larger than its device, on a machine without one: the CPU is the device, what does not fit lies on disk."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import paligemma
from paligemma.cli.main import app
from paligemma.evaluate.output_folder import fingerprint
from paligemma.fast.offload import KEPT, device_map_of
from paligemma.tiny.renderer import render
from paligemma.utils import load_hf_model

pytest.importorskip("accelerate")

IMAGES = [render(seed, "test", 128).image for seed in (31, 32)]


@pytest.fixture(scope="module")
def whole():
    return paligemma.load("tiny", device="cpu")


def bytes_of(model, name):
    return sum(parameter.nbytes for parameter in model.get_submodule(name).parameters())


def limit(model, layers):
    """Memory for the parts that always stay, so many layers of the decoder, and one that visits."""
    layer = bytes_of(model, "language_model.model.layers.0")
    return sum(bytes_of(model, name) for name in KEPT) + (layers + 1) * layer + 500_000


def answers(pg):
    texts = [pg.generate(IMAGES, prompt, 40, constrained=True) for prompt in ("caption en", "detect car ; dog")]
    return [answer.token_ids for found in texts for answer in found]


def test_layers_on_disk_write_the_same_tokens(whole):
    pg = paligemma.load("tiny", device="cpu", device_map="auto", max_memory={"cpu": limit(whole.model, 1)})
    layers = pg.model.language_model.model.layers
    away = [layer.mlp.up_proj.weight.device.type == "meta" for layer in layers]
    assert away.count(True) >= 4 and not away[0]
    assert pg.model.device.type == "cpu" and pg.model.dtype == whole.model.dtype
    expected = answers(whole)
    assert answers(pg) == expected and sum(map(len, expected)) > 20
    assert "".join(pg.stream(IMAGES[0], "caption en")) == whole.caption(IMAGES[0]).text
    assert [layer.mlp.up_proj.weight.device.type == "meta" for layer in layers] == away  # they left again


def test_a_model_that_is_spread_can_be_measured_and_is_not_saved(whole, tmp_path):
    heads = {"head": torch.nn.Linear(4, 4), "language_model.value_head": torch.nn.Linear(4, 4)}
    pg = paligemma.load("tiny", "cpu", device_map="auto", max_memory={"cpu": limit(whole.model, 1)}, extra=heads)
    assert pg.model.head.weight.device.type == pg.model.language_model.value_head.weight.device.type == "cpu"
    spread = paligemma.load("tiny", "cpu", device_map="auto", max_memory={"cpu": limit(whole.model, 1)})
    assert fingerprint(spread) == fingerprint(whole) != fingerprint(pg)
    with pytest.raises(ValueError, match="spread over devices and is not saved: load it without `device_map`"):
        paligemma.save_pretrained(pg.model, tmp_path / "new", pg.processor, extra=list(heads))
    assert not (tmp_path / "new").exists()


def test_the_copies_on_disk_go_with_the_model(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, _ = load_hf_model("tiny", "cpu", device_map="auto", max_memory={"cpu": limit(whole.model, 1)})
    (folder,) = tmp_path.iterdir()
    assert any(folder.glob("*.dat"))
    del model
    gc.collect()
    assert not folder.exists()


def test_what_fits_is_left_alone(whole):
    model, _ = load_hf_model("tiny", "cpu", device_map="auto")
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_the_fastest_place_goes_to_what_is_read_for_every_token(whole):
    """For a device that is not here: only the plan."""
    model, device = whole.model, torch.device("cuda", 0)
    places = device_map_of(
        model, device, {"cuda:0": limit(model, 3), "cpu": bytes_of(model, "language_model.model.layers.0") * 2}
    )
    decoder = [places[f"language_model.model.layers.{n}"] for n in range(6)]
    assert decoder[0] == "cuda:0" and decoder == sorted(decoder, key=["cuda:0", "cpu", "disk"].index)
    assert {places[name] for name in KEPT} == {"cuda:0"}
    assert places["vision_tower.vision_model.encoder.layers.5"] == "disk"
    covered = {name for name, _ in model.named_parameters() if any(name.startswith(f"{place}.") for place in places)}
    assert covered == {name for name, _ in model.named_parameters()}


def test_errors_say_what_to_do(whole, monkeypatch):
    with pytest.raises(ValueError, match="device_map is 'balanced', expected 'auto'"):
        load_hf_model("tiny", "cpu", device_map="balanced")
    with pytest.raises(ValueError, match="quantize='int8' rounds them: choose one"):
        load_hf_model("tiny", "cpu", device_map="auto", quantize="int8")
    with pytest.raises(ValueError, match="max_memory is for device_map='auto'"):
        load_hf_model("tiny", "cpu", max_memory={"cpu": 10})
    with pytest.raises(ValueError, match="max_memory has 'cuda', expected cpu"):
        load_hf_model("tiny", "cpu", device_map="auto", max_memory={"cuda": 10})
    with pytest.raises(ValueError, match=r"cpu may hold 0.00 GB, and the embedding with one layer .* allow more"):
        load_hf_model("tiny", "cpu", device_map="auto", max_memory={"cpu": "1MB"})
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="needs accelerate: pip install accelerate"):
        load_hf_model("tiny", "cpu", device_map="auto")


def test_the_command(tmp_path):
    picture = tmp_path / "scene.png"
    Image.fromarray(IMAGES[0]).save(picture)
    run = ["run", "caption en", str(picture), "--device", "cpu"]
    plain, mapped = (CliRunner().invoke(app, [*run, *more]) for more in ([], ["--device-map", "auto"]))
    assert plain.exit_code == mapped.exit_code == 0 and plain.stdout == mapped.stdout


def test_the_model_files_know_nothing_of_it():
    for path in Path(paligemma.__file__).parent.glob("modeling_*.py"):
        assert "accelerate" not in path.read_text(encoding="utf-8")
