"""LoRA adapters on disk: ours in peft beside transformers' model, peft's in ours, and folded into one checkpoint."""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from make_tokenizer import build_sentencepiece, build_tokenizer
from reference import make_inputs, make_theirs, randomize, tiny_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import paligemma
from paligemma.answers.scores import CALIBRATION_FILE, Calibration
from paligemma.cli.main import app
from paligemma.data.checkpoint import processor_of
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.train.loop import TrainConfig, train
from paligemma.train.parts import add_lora, freeze
from paligemma.utils import load_hf_model
from paligemma.weights.adapters import CONFIG, TENSORS, is_adapter, open_adapter, save_adapter
from paligemma.weights.converting import convert, merge
from paligemma.weights.finding import find_base
from paligemma.weights.info import describe, in_units
from paligemma.weights.loading import load_model
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.published import TINY
from paligemma.weights.quantized import quantize_checkpoint
from paligemma.weights.saving import save_pretrained

EVERYWHERE = ("vision", "projector", "decoder")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def base(request, processor, tmp_path_factory):
    """A folder with a tiny random model and its processor, as `save_pretrained` writes it."""
    return make_base(request.param, processor, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(processor, tmp_path_factory):
    """The same, of one kind: for what has nothing to do with the kind."""
    return make_base("gemma", processor, tmp_path_factory.mktemp("gemma"))


def make_base(kind, processor, folder):
    tokenizer = processor.tokenizer
    vocabulary = 64 * math.ceil(len(tokenizer) / 64)
    config = tiny_config(kind, vocab_size=vocabulary, image_token_index=tokenizer.image_token_id)
    model = PaliGemmaForConditionalGeneration(config)
    randomize(model)
    save_pretrained(model, folder, processor)
    return folder


def batch_for(model, labels=False):
    return make_inputs(model.config, prefix=[5, 3], suffix=[2, 4], labels=labels)


def with_lora(base, parts=("decoder",), **settings):
    """Our model with LoRA that has moved away from zero."""
    torch.manual_seed(0)
    model = add_lora(load_model(base), parts, **settings)
    shake(model)
    return model.eval()


def shake(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def their_base(base):
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def assert_same(here, there):
    torch.testing.assert_close(here, there, atol=2e-4, rtol=0)


def assert_changed(model, base):
    """That there is something to be equal to."""
    batch = batch_for(load_model(base))
    assert (logits(model, batch) - logits(load_model(base), batch)).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ ours, in peft


@pytest.mark.parametrize("parts", [("decoder",), EVERYWHERE], ids=["decoder", "everywhere"])
def test_an_adapter_of_ours_loads_through_peft_beside_transformers(base, parts, tmp_path):
    ours = with_lora(base, parts, rank=4, alpha=6)
    save_adapter(ours, tmp_path / "adapter", base)
    assert_changed(ours, base)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # how peft says that a tensor found no place, or a place no tensor
        theirs = peft.PeftModel.from_pretrained(their_base(base), tmp_path / "adapter").eval()
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(theirs, batch))

    on_ours = sum(p.numel() for name, p in ours.named_parameters() if "lora_" in name)
    on_theirs = sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    assert on_ours == on_theirs, "and nothing more, such as layers of the eye that nobody has asked for"
    theirs.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / folder / TENSORS)) for folder in ("adapter", "theirs")]
    assert names[0] == names[1], "peft would find older names too; these are its own"


def test_transformers_finds_the_base_of_an_adapter_by_itself(gemma, tmp_path):
    ours = with_lora(gemma)
    save_adapter(ours, tmp_path, gemma)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(theirs.eval(), batch))


# ------------------------------------------------------------------------------------------------ ours, in ours


def test_an_adapter_folder_is_a_model_to_load(base, tmp_path):
    ours = with_lora(base, EVERYWHERE, rank=4, alpha=6)
    save_adapter(ours, tmp_path, base)
    loaded, tokenizer = load_hf_model(tmp_path)
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(loaded, batch))
    assert set(loaded.state_dict()) == set(load_model(base).state_dict()), "a plain model, without peft in it"
    assert len(tokenizer) == len(load_tokenizer(base))


def test_an_adapter_beside_the_model_that_ships(tmp_path):
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    shake(add_lora(pg.model, ["decoder"]))
    save_adapter(pg.model, tmp_path, "tiny", pg.processor)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == str(TINY)
    loaded = paligemma.load(str(tmp_path), device="cpu", dtype="float32")
    said = pg.generate(image, "caption en", max_new_tokens=12)
    assert loaded.generate(image, "caption en", max_new_tokens=12).token_ids == said.token_ids
    assert loaded.codec.decode(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 64, 64), "its codec is the base's"


@pytest.mark.parametrize("beside", ["a processor", "nothing", "half a processor"])
def test_data_for_an_adapter_have_the_codec_and_the_sizes_of_its_base(tmp_path, beside):
    """Without its codec, masks would be written in the codes of the official one. peft saves no processor."""
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    add_lora(pg.model, ["decoder"])
    save_adapter(pg.model, tmp_path, "tiny", pg.processor)
    if beside != "a processor":
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "mask_codec.npz"):
            (tmp_path / name).unlink(missing_ok=True)
    if beside == "half a processor":  # without image_seq_length, which config.json tells
        (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 224, "width": 224}}')
    processor, codec = processor_of(str(tmp_path), kind="coco-segment")
    assert (processor.image_size, processor.num_image_tokens) == (192, 144)
    assert processor.tokenizer.encode("a dog") == pg.processor.tokenizer.encode("a dog")
    masks = torch.rand(2, 64, 64) > 0.5
    assert torch.equal(codec.encode(masks), pg.codec.encode(masks))


def test_info_tells_of_an_adapter_and_its_base(base, tmp_path, monkeypatch):
    """The facts are those of the base, which is what runs; `adapter` is what was added."""
    monkeypatch.chdir(base.parent)
    save_adapter(with_lora(base, ("decoder", "projector"), rank=3), tmp_path / "mine", base)
    facts, alone = describe(tmp_path / "mine"), describe(base)
    size = (tmp_path / "mine" / TENSORS).stat().st_size
    learned = load_file(tmp_path / "mine" / TENSORS)
    assert facts["adapter"] == {
        "base": str(base),
        "ranks": [3],
        "parts": ["projector", "decoder"],
        "layers": len(learned) // 2,
        "parameters": sum(tensor.numel() for tensor in learned.values()),
        "stored_bytes": size,
    }
    assert {**facts, "adapter": None} == {**alone, "source": str(tmp_path / "mine")}
    assert json.loads(json.dumps(facts)) == facts
    text = CliRunner().invoke(app, ["info", str(tmp_path / "mine")]).stdout
    said = f"LoRA of rank 3 in projector, decoder; {len(learned) // 2} layers, {facts['adapter']['parameters']:,} param"
    assert f"of {base}: " in text and said in text and in_units(size) in text


def test_info_needs_no_files_of_a_published_base(gemma, tmp_path):
    save_adapter(with_lora(gemma), tmp_path, "google/paligemma2-3b-pt-448")
    save_file({UP + "A.weight": torch.zeros(2, 2304), UP + "B.weight": torch.zeros(9216, 2)}, tmp_path / TENSORS)
    facts = describe(tmp_path)
    assert (facts["variant"], facts["adapter"]["ranks"]) == ("paligemma2-3b-448", [2])


def test_the_sum_is_rounded_once(gemma, tmp_path):
    ours = with_lora(gemma)
    save_adapter(ours, tmp_path, gemma)
    loaded, _ = load_hf_model(tmp_path, dtype="bfloat16")
    layer = ours.language_model.model.layers[0].mlp.up_proj
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    exact = (layer.base_layer.weight + change).bfloat16()
    assert torch.equal(loaded.language_model.model.layers[0].mlp.up_proj.weight, exact)


def test_another_resolution(gemma, tmp_path):
    save_adapter(with_lora(gemma), tmp_path, gemma)
    model, _ = load_hf_model(tmp_path, image_size=56)
    assert model.config.vision_config.num_patches == 16


def test_a_tokenizer_beside_the_adapter_is_taken(gemma, processor, tmp_path):
    """Here one in which two words have changed places."""
    save_adapter(with_lora(gemma), tmp_path, gemma, processor)
    text = (tmp_path / "tokenizer.json").read_text()
    swapped = text.replace('"▁dog"', '"swap"').replace('"▁cat"', '"▁dog"').replace('"swap"', '"▁cat"')
    (tmp_path / "tokenizer.json").write_text(swapped)
    _, tokenizer = load_hf_model(tmp_path)
    assert tokenizer.encode(" dog") == processor.tokenizer.encode(" cat") != tokenizer.encode(" cat")


def test_a_base_beside_the_adapter_moves_with_it(gemma, tmp_path):
    ours = with_lora(gemma)
    convert(gemma, tmp_path / "here" / "base")
    save_adapter(ours, tmp_path / "here" / "adapter", gemma)
    change_config(tmp_path / "here" / "adapter", base_model_name_or_path="../base")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded, _ = load_hf_model(tmp_path / "there" / "adapter")
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(loaded, batch))


# ------------------------------------------------------------------------------------------------ peft's, in ours

LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
SETTINGS = {
    "the usual names, which are in the eye too": {"target_modules": LINEAR},
    "all linear layers": {"target_modules": "all-linear"},
    "another alpha": {"target_modules": ["o_proj"], "lora_alpha": 5},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3},
    "ranks and alphas of their own": {
        "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"language_model.layers.0.self_attn.v_proj": 20, "gate_proj": 1},
    },
    "a projector trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    "norms trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "begun as gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "begun as orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


def peft_adapter(base, folder, **settings):
    """An adapter that peft trained (so to say) beside transformers' model, and that model."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(their_base(base), peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
    shake(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_peft_loads_in_ours(gemma, settings, tmp_path):
    theirs = peft_adapter(gemma, tmp_path, **SETTINGS[settings])
    ours, _ = load_hf_model(tmp_path)
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(theirs, batch))
    assert_changed(ours, gemma)


def test_an_adapter_of_peft_loads_in_ours_with_gemma2(processor, tmp_path):
    base = make_base("gemma2", processor, tmp_path / "base")
    theirs = peft_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    ours, _ = load_hf_model(tmp_path / "adapter")
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(theirs, batch))
    assert_changed(ours, base)


LAYOUTS = {
    "transformers before 4.52": ("vision_tower.vision_model.", "language_model.model.", "multi_modal_projector."),
    "transformers 4.52": ("model.vision_tower.vision_model.", "model.language_model.", "model.multi_modal_projector."),
    "transformers 5": ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_of_every_transformers(gemma, layout, tmp_path):
    ours = with_lora(gemma, EVERYWHERE)
    save_adapter(ours, tmp_path, gemma)
    rename = dict(zip(LAYOUTS["transformers 5"], LAYOUTS[layout]))
    tensors = {}
    for key, tensor in load_file(tmp_path / TENSORS).items():
        name = key.removeprefix("base_model.model.")
        now = next(start for start in rename if name.startswith(start))
        tensors["base_model.model." + rename[now] + name.removeprefix(now)] = tensor
    save_file(tensors, tmp_path / TENSORS)
    loaded, _ = load_hf_model(tmp_path)
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(loaded, batch))


# ------------------------------------------------------------------------------------------------ whole again


def test_a_merged_adapter_is_a_checkpoint_like_any_other(base, processor, tmp_path):
    ours = with_lora(base, EVERYWHERE)
    save_adapter(ours, tmp_path / "adapter", base)
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")])
    assert done.exit_code == 0, done.output
    assert done.stdout == "" and done.stderr.startswith(f"written: {tmp_path}/whole, ")
    batch = batch_for(ours)
    assert_same(logits(ours, batch), logits(their_base(tmp_path / "whole"), batch))
    assert_same(logits(ours, batch), logits(load_hf_model(tmp_path / "whole")[0], batch))
    published = set(open_checkpoint(base).tensors)
    assert set(load_file(tmp_path / "whole" / "model.safetensors")) == published
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("base_has_one", [False, True])
def test_the_tokenizer_of_a_merged_adapter_is_the_one_beside_it(gemma, base_has_one, tmp_path):
    """Here a sentencepiece model, as of big_vision. A file of the base in another format does not take its place."""
    pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(build_sentencepiece(tmp_path / "adapter"))
    vocabulary = 64 * math.ceil(len(tokenizer) / 64)
    model = PaliGemmaForConditionalGeneration(
        tiny_config("gemma", vocab_size=vocabulary, image_token_index=tokenizer.image_token_id)
    )
    save_pretrained(model, tmp_path / "base")
    save_adapter(with_lora(tmp_path / "base"), tmp_path / "adapter", tmp_path / "base")
    if base_has_one:
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copyfile(gemma / name, tmp_path / "base" / name)
    assert load_hf_model(tmp_path / "adapter")[1].encode(" dog") == tokenizer.encode(" dog")
    merge(tmp_path / "adapter", tmp_path / "whole")
    merged = load_tokenizer(tmp_path / "whole")
    assert merged.encode(" dog ; cat") == tokenizer.encode(" dog ; cat") and len(merged) == len(tokenizer)
    assert {"tokenizer.json", "preprocessor_config.json"} <= {path.name for path in (tmp_path / "whole").iterdir()}


def test_merging_into_another_dtype(gemma, tmp_path):
    save_adapter(with_lora(gemma), tmp_path / "adapter", gemma)
    merge(tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    merged = load_file(tmp_path / "half" / "model.safetensors")
    folded = load_hf_model(tmp_path / "adapter", dtype="bfloat16")[0].state_dict()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in merged.items())


def test_the_calibration_of_an_adapter_is_that_of_the_merged_model(gemma, tmp_path):
    """Scores are calibrated for the weights they come from: with the adapter, and not those of its base."""
    save_adapter(with_lora(gemma), tmp_path / "adapter", tmp_path / "base")
    shutil.copytree(gemma, tmp_path / "base")
    maps = {"base": Calibration(boxes=(0.5, 1.5)), "adapter": Calibration(boxes=(-0.5, 1.25), masks=(1.0, 0.75))}
    for name, calibration in maps.items():
        (tmp_path / name / CALIBRATION_FILE).write_text(json.dumps(calibration.to_dict()))
    merge(tmp_path / "adapter", tmp_path / "whole")
    assert Calibration.load(tmp_path / "whole" / CALIBRATION_FILE) == maps["adapter"]
    assert paligemma.load(tmp_path / "whole", device="cpu").calibration == maps["adapter"]

    (tmp_path / "adapter" / CALIBRATION_FILE).unlink()
    merge(tmp_path / "adapter", tmp_path / "none")
    assert not (tmp_path / "none" / CALIBRATION_FILE).exists()


def test_a_model_trained_whole_loads_in_transformers(base, tmp_path):
    """Three steps of `train` with the eye frozen, saved."""
    model = load_model(base)
    batch = batch_for(model, labels=True)
    before = model.state_dict()["multi_modal_projector.linear.weight"].clone()
    freeze(model, "vision")
    train(model, lambda *_: batch, TrainConfig(steps=3, lr=1e-3, autocast=None), tmp_path / "run")
    assert not torch.equal(before, model.multi_modal_projector.linear.weight)
    save_pretrained(model, tmp_path / "whole")
    theirs = their_base(tmp_path / "whole")
    assert_same(logits(model.eval(), batch), logits(theirs, batch))
    assert_same(logits(make_theirs(model), batch), logits(theirs, batch))


# ------------------------------------------------------------------------------------------------ refused


@pytest.fixture
def adapter(gemma, tmp_path):
    """A good adapter, to be spoilt."""
    folder = tmp_path / "adapter"
    save_adapter(with_lora(gemma), folder, gemma)
    return folder


def change_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


UP = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, r"asks for use_dora=True, which is not done here: merge it where it was trained"),
        ({"bias": "lora_only"}, r"asks for bias='lora_only'"),
        ({"layer_replication": [[0, 2]]}, r"asks for layer_replication=\[\[0, 2\]\]"),
        ({"trainable_token_indices": [5]}, r"asks for trainable_token_indices"),
        ({"something_new": {"a": 1}}, r"asks for something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, r"asks for init_lora_weights='pissa_niter_4'"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', expected 'LORA'"),
        ({"base_model_name_or_path": None}, r"base_model_name_or_path is None: write in which model"),
        ({"lora_alpha": "8"}, r"lora_alpha is '8', expected a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10+, expected a number"),
        ({"lora_alpha": math.nan}, r"lora_alpha is nan, expected a number"),
        ({"alpha_pattern": {"q_proj": None}}, r"q_proj is None, expected a number"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\], expected an object"),
        ({"alpha_pattern": {"q_proj(": 4}}, r"alpha_pattern: 'q_proj\(' is no pattern"),
    ],
)
def test_settings_that_are_not_honoured_are_refused(adapter, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf_model(adapter)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(UP + "B.weight"), r"up_proj.lora_A.weight cannot be folded"),
        (lambda t: t.update({UP + "A.weight": torch.ones(3, 32)}), r"up_proj.lora_A.weight, .*lora_B.weight cannot"),
        (lambda t: t.update({UP + "A.weight": torch.ones(8, 31)}), r"has no .*up_proj.weight \[64, 31\] \(there"),
        (lambda t: t.update({UP + "magnitude_vector": torch.ones(64)}), r"lora_magnitude_vector cannot be folded"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), r"lm_head.weight cannot be folded"),
        (lambda t: t.update({"base_model.model.model.layers.0": torch.ones(2)}), r"has no layers.0 \[2\]"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), r"has no x \[1\].*trained beside another model"),
    ],
)  # fmt: skip
def test_tensors_without_a_place_are_refused(adapter, change, message):
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=message):
        load_hf_model(adapter)


def test_a_trained_embedding_is_refused(gemma, tmp_path):
    """In peft's adapter the input is trained and the output layer is not, which in PaliGemma are one matrix."""
    peft_adapter(gemma, tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    peft_adapter(gemma, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    for folder in ("lora", "whole"):
        with pytest.raises(ValueError, match=r"embed_tokens.* cannot be folded"):
            load_hf_model(tmp_path / folder)


def test_files_that_are_missing_or_damaged(adapter):
    (adapter / TENSORS).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=TENSORS):
        load_hf_model(adapter)
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors; adapter_model.bin is a pickle"):
        load_hf_model(adapter)
    for text in ("{", "[" * 100_000):
        (adapter / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
            load_hf_model(adapter)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json does not exist"):
        open_adapter(adapter.parent)


def test_a_base_that_is_gone(adapter, tmp_path):
    change_config(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    for open_it in (load_hf_model, describe):
        with pytest.raises(FileNotFoundError, match=r"its base cannot be found: .*gone.*adapter_config.json"):
            open_it(adapter)


def test_info_names_what_does_not_fit(adapter, base):
    change_config(adapter, base_model_name_or_path="tiny")
    with pytest.raises(ValueError, match=r"does not fit its base"):
        describe(adapter)
    (adapter / TENSORS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        describe(adapter)


def test_an_adapter_beside_an_adapter(adapter, gemma, tmp_path):
    save_adapter(with_lora(gemma), tmp_path / "second", adapter)
    with pytest.raises(ValueError, match=r"beside another, .*merge that one first"):
        load_hf_model(tmp_path / "second")


def test_a_folder_that_holds_both(adapter, gemma):
    (adapter / "model.safetensors").write_bytes((gemma / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds an adapter .* and whole weights \(model.safetensors\): move one"):
        load_hf_model(adapter)


def test_saving_replaces_whatever_model_lies_there(adapter, gemma, tmp_path):
    """An adapter in the place of a whole model, of a quantised one (which its config.json tells), and the reverse."""
    ours, folder = with_lora(gemma), tmp_path / "mine"
    batch = batch_for(ours)
    save_pretrained(load_model(gemma), folder, max_shard_size=40_000)
    (folder / "notes.txt").write_text("mine")
    save_adapter(ours, folder, gemma)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS, "notes.txt"]
    assert_same(logits(ours, batch), logits(load_hf_model(folder)[0], batch))

    save_pretrained(load_model(gemma), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert torch.equal(logits(load_model(gemma), batch), logits(load_model(folder), batch))

    quantize_checkpoint(gemma, tmp_path / "small", "int8")
    save_adapter(ours, tmp_path / "small", gemma)
    assert_same(logits(ours, batch), logits(load_hf_model(tmp_path / "small")[0], batch))


def test_an_old_calibration_does_not_outlive_its_adapter(adapter, gemma):
    """It belongs to the weights it was fitted to: those of a run that is trained for longer are others."""
    (adapter / CALIBRATION_FILE).write_text(json.dumps(Calibration(boxes=(0.5, 1.5)).to_dict()))
    (adapter / "config.json").write_text("{}")  # other programs put the base's there
    save_adapter(with_lora(gemma), adapter, gemma)
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG, TENSORS, "config.json"]

    pg = paligemma.load(adapter.parent / "adapter", device="cpu")
    pg.calibration = Calibration(boxes=(-0.5, 1.25))
    save_adapter(with_lora(gemma), adapter, gemma, pg.processor)  # with one of its own
    assert Calibration.load(adapter / CALIBRATION_FILE) == pg.calibration


def test_an_adapter_never_replaces_its_own_base(gemma, tmp_path):
    shutil.copytree(gemma, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    for base in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        with pytest.raises(ValueError, match=r"base is where the source lies: choose another folder"):
            save_adapter(with_lora(gemma), tmp_path / "base", base)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_merging_over_an_adapter_loses_nothing(adapter, gemma, tmp_path):
    save_adapter(with_lora(gemma), tmp_path / "other", gemma)
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    with pytest.raises(ValueError, match=rf"holds {CONFIG}, {TENSORS} of other content, which would be lost"):
        merge(adapter, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_what_takes_no_adapter_says_what_does(adapter, gemma, tmp_path):
    with pytest.raises(ValueError, match=r"holds an adapter, no whole weights: `paligemma merge`"):
        open_checkpoint(adapter)
    with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config.json"):
        merge(gemma, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is where the source lies"):
        merge(adapter, adapter)
    assert is_adapter(adapter) and not is_adapter(gemma)


def test_a_model_without_lora_has_no_adapter_to_save(gemma, tmp_path):
    with pytest.raises(ValueError, match="no LoRA to save: `save_pretrained` writes all"):
        save_adapter(load_model(gemma), tmp_path, gemma)
    with pytest.raises(ValueError, match="Merge or take out"):
        save_pretrained(with_lora(gemma), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_adapter(adapter, gemma, monkeypatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.LoraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(with_lora(gemma, rank=2), adapter, gemma)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_the_base_is_written_so_that_it_is_found_from_everywhere(gemma, tmp_path, monkeypatch):
    monkeypatch.chdir(gemma.parent)
    save_adapter(with_lora(gemma), tmp_path / "local", Path(gemma.name))
    save_adapter(with_lora(gemma), tmp_path / "hub", "google/paligemma2-3b-pt-224")
    assert open_adapter(tmp_path / "local").base == str(gemma.resolve())
    assert open_adapter(tmp_path / "hub").base == "google/paligemma2-3b-pt-224"


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*.*.*x", "(.|.)" * 30 + "x", ".?" * 60 + "x", "(a|a)*b", "a{9}"])
def test_a_pattern_that_may_take_for_ever_is_refused(adapter, pattern):
    change_config(adapter, alpha_pattern={pattern: 4})
    with pytest.raises(ValueError, match=r"is a regular expression that may take very long: write the names"):
        load_hf_model(adapter)


@pytest.mark.parametrize("pattern", [r"layers\.\d+\.self_attn\.q_proj", ".*q_proj", "^.*(q|x)_proj", "q_proj"])
def test_a_simple_pattern_gives_an_alpha(adapter, pattern):
    change_config(adapter, alpha_pattern={pattern: 444})
    factors = open_adapter(adapter).factors
    assert {"q_proj" in name for name, factor in factors.items() if factor > 50} == {True}


@pytest.mark.parametrize("way", ["both are there", "peft has tied them"])
def test_an_embedding_that_stays_the_output_layer_is_folded(adapter, gemma, way):
    trained = load_hf_model(gemma)[0].language_model.model.embed_tokens.weight.detach() + 1

    def add(tensors):
        tensors["base_model.model.model.language_model.embed_tokens.weight"] = trained.clone()
        if way == "both are there":
            tensors["base_model.model.lm_head.weight"] = trained.clone()

    change_tensors(adapter, add)
    if way == "peft has tied them":
        change_config(adapter, ensure_weight_tying=True)
    assert torch.equal(load_hf_model(adapter)[0].language_model.model.embed_tokens.weight, trained)
    if way == "both are there":
        change_tensors(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
        with pytest.raises(ValueError, match="ensure_weight_tying=True"):
            load_hf_model(adapter)


def test_the_model_that_ships_is_found_where_this_installation_has_it(adapter):
    change_config(adapter, base_model_name_or_path="/elsewhere/site-packages/paligemma/assets/tiny")
    assert find_base(open_adapter(adapter)) == TINY
