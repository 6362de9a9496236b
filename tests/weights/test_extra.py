"""Parts that are not PaliGemma's own: saved and opened again, trained or new, in the place of a part or beside."""

import runpy
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same_weights, logits_of, make_model
from torch import nn

import paligemma
from paligemma.weights.extra import put_extra
from paligemma.weights.loading import load_model
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained

PROJECTOR = "multi_modal_projector"


def two_layers(config):
    widths = config.vision_config.hidden_size, config.text_config.hidden_size
    return nn.Sequential(nn.Linear(widths[0], 24), nn.GELU(), nn.Linear(24, widths[1]))


def test_another_projector_is_trained_saved_and_opened_again(gemma, folder, tmp_path):
    new = two_layers(gemma.config)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    model = load_model(folder, extra={PROJECTOR: new})
    assert model.multi_modal_projector is new
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())  # the file has none
    with torch.no_grad():
        new[0].weight += 1
    save_pretrained(model, tmp_path / "mine", extra=[PROJECTOR])
    again = load_model(tmp_path / "mine", extra={PROJECTOR: two_layers(gemma.config)})
    assert_same_weights(again, model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_without_extra_the_way_is_told(gemma, folder, tmp_path):
    model = load_model(folder, extra={PROJECTOR: two_layers(gemma.config)})
    with pytest.raises(ValueError, match=r"name a part that was changed: extra="):
        save_pretrained(model, tmp_path / "mine")
    save_pretrained(model, tmp_path / "mine", extra=[PROJECTOR])
    with pytest.raises(ValueError, match=r"4 unexpected: multi_modal_projector.0.[\s\S]*extra={name: module}"):
        open_checkpoint(tmp_path / "mine")


def test_the_weights_of_a_part_are_strict(gemma, folder, tmp_path):
    save_pretrained(load_model(folder, extra={PROJECTOR: two_layers(gemma.config)}), tmp_path, extra=[PROJECTOR])
    with pytest.raises(ValueError, match=r"2 missing: multi_modal_projector.3.weight"):
        load_model(tmp_path, extra={PROJECTOR: two_layers(gemma.config).append(nn.LayerNorm(32))})


def test_another_vision_tower_at_another_resolution(gemma, folder, tmp_path):
    """It has its own idea of positions: there is no table to resample."""
    tower = nn.ModuleDict({"vision_model": nn.Linear(3, gemma.config.vision_config.hidden_size)})
    save_pretrained(load_model(folder, extra={"vision_tower": tower}), tmp_path / "mine", extra=["vision_tower"])
    loaded = load_model(tmp_path / "mine", image_size=56, extra={"vision_tower": tower})
    assert loaded.vision_tower is tower and loaded.config.vision_config.image_size == 56


def test_a_part_beside_the_model(gemma, tmp_path):
    put_extra(gemma, {"custom_text_proj": (head := nn.Sequential(nn.Linear(32, 8)))}, "cpu", torch.float32)
    save_pretrained(gemma, tmp_path, extra=["custom_text_proj"])
    new = nn.Sequential(nn.Linear(32, 8))
    loaded = load_model(tmp_path, dtype="bfloat16", extra={"custom_text_proj": new})
    assert loaded.custom_text_proj is new and new[0].weight.dtype == torch.bfloat16
    assert torch.equal(new[0].weight, head[0].weight.bfloat16())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"config": nn.Linear(1, 1)}, "'config' is no name for a part"),
        ({"nowhere.head": nn.Linear(1, 1)}, "the model has no part 'nowhere'"),
        ({"head": torch.zeros(1)}, "is Tensor, expected a torch.nn.Module"),
    ],
)
def test_what_is_no_part(folder, extra, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder, extra=extra)


def test_rounding_and_changed_parts_exclude_each_other():
    """But for a model that was loaded whole: its new parts are rounded with the rest, as the message says."""
    with pytest.raises(ValueError, match=r"cannot be combined with extra: .*paligemma\.quantize\(pg\.model, 'int8'\)"):
        paligemma.load("tiny", device="cpu", quantize="int8", extra={"head": nn.Linear(8, 8)})
    pg = paligemma.load("tiny", device="cpu", extra={"head": nn.Linear(8, 8)})
    assert type(paligemma.quantize(pg.model, "int8").head).__name__ == "Int8Linear"


def test_the_worked_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "other_projector.py"))
    assert (tmp_path / "runs" / "other_projector" / "model.safetensors").is_file()
    assert "loss" in capsys.readouterr().out


def test_a_part_that_was_not_changed_may_be_named(tmp_path):
    model = make_model("gemma2")
    save_pretrained(model, tmp_path, extra=[PROJECTOR])
    assert_same_weights(load_model(tmp_path), model)
