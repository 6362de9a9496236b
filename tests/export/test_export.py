"""The exported files compute what the model computes, under every shape that a caller may give them."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tokenizer import build_tokenizer
from reference import make_inputs, randomize, tiny_config
from torch.testing import assert_close
from typer.testing import CliRunner

import paligemma
from paligemma.answers.scores import IDENTITY
from paligemma.bench.shapes import write_random_checkpoint
from paligemma.cli.main import app
from paligemma.compiled import check_can_be_compiled
from paligemma.generation import decode_one_token, prefill
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.train.parts import add_lora
from paligemma.weights.adapters import save_adapter
from paligemma.weights.finding import TINY, open_model
from paligemma.weights.loading import load_model
from paligemma.weights.published import published_config
from paligemma.weights.saving import save_pretrained

ir = pytest.importorskip("onnx_ir", reason="needs the extra `export`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")

from paligemma.export import checking, exporting, runtime, storing  # noqa: E402
from paligemma.export.graphs import Decoder, TokenEmbedding, VisionEncoder  # noqa: E402
from paligemma.export.runtime import ExportedModel, load_exported  # noqa: E402

FAMILIES = {
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 4, "num_hidden_layers": 3},
}
STEPS = 20


def make_model(family, vocab_size=320, **sizes) -> PaliGemmaForConditionalGeneration:
    model = PaliGemmaForConditionalGeneration(
        tiny_config(family, vocab_size=vocab_size, **FAMILIES[family], **sizes)
    ).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """(model, folder of its files)"""
    tokenizer = load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    rows = (len(tokenizer) + 63) // 64 * 64
    model = make_model(request.param, rows, image_token_index=tokenizer.image_token_id)
    source, target = (tmp_path_factory.mktemp(request.param) / name for name in ("model", "exported"))
    save_pretrained(model, source, PaliGemmaProcessor(tokenizer, 4, 28))
    files = exporting.export(source, target, ["fp32", "q8"])
    assert all(file.is_file() for file in files)
    return model, target


# ---------------------------------------------------------------------------------------------- before it is traced


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_wrapped_modules_are_the_model(family):
    """Without ONNX: what is traced equals the model, with padding, and in steps that continue a past."""
    model = make_model(family)
    inputs = make_inputs(model.config, [5, 2, 7])
    cache = KVCache(model.config.text_config, 3, 30)
    expected = model(**inputs, cache=cache).logits
    features = VisionEncoder(model)(inputs["pixel_values"])
    assert_close(features, model.encode_image(inputs["pixel_values"]))
    is_image = (inputs["input_ids"] == model.config.image_token_index)[..., None]
    x = TokenEmbedding(model)(inputs["input_ids"]).masked_scatter(is_image, features)
    mask = inputs["attention_mask"]
    text = model.config.text_config
    past = [torch.empty(3, text.num_key_value_heads, 0, text.head_dim)] * (2 * text.num_hidden_layers)
    logits, *past = Decoder(model)(x, mask, mask.cumsum(-1).clamp(min=1), past)
    assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    for count in (1, 1, 2, 1, 3):  # tokens at once; beyond the window of 4
        tokens = logits[:, -1].argmax(-1, keepdim=True) + torch.arange(count)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        logits, *past = Decoder(model)(TokenEmbedding(model)(tokens), mask, mask.cumsum(-1)[:, -count:], past)
        assert_close(logits, model(tokens, cache=cache).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_near_and_the_largest_is_kept(bits):
    weight = torch.randn(5, 80)  # two and a half groups of 32
    stored, scale = storing.rounded(weight, bits)
    assert stored.shape == (5, 3, 32 * bits // 8) and scale.shape == (5, 3)
    n = torch.from_numpy(stored)
    if bits == 4:
        n = torch.stack([n & 15, n >> 4], dim=-1).flatten(-2)
    back = ((n.float() - 2 ** (bits - 1)) * torch.from_numpy(scale)[..., None]).flatten(1)[:, :80]
    assert (back - weight).abs().max() <= np.abs(scale).max() * 1.001  # a step where the opposite of the largest is cut
    largest = weight.abs().argmax()
    assert_close(back.flatten()[largest], weight.flatten()[largest])
    assert_close(torch.from_numpy(storing.rounded(torch.zeros(2, 32), bits)[1]), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ("q8", float("nan"), "embed_tokens.weight has numbers that are not finite"),
        ("fp32", float("inf"), "embed_tokens.weight has numbers that are not finite"),
        ("fp16", 1e5, "embed_tokens.weight has values beyond 65504"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(tmp_path, weights, value, message):
    tokenizer = load_tokenizer(TINY)
    model = make_model("gemma", 64 * -(-len(tokenizer) // 64), image_token_index=tokenizer.image_token_id)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[3, 5] = value
    save_pretrained(model, tmp_path / "model", PaliGemmaProcessor(tokenizer, 4, 28))
    with pytest.raises(ValueError, match=message):
        exporting.export(tmp_path / "model", tmp_path / "exported", [weights])
    assert not (tmp_path / "exported").exists()


def test_wrong_usage_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "resolve", lambda *_: pytest.fail("it is downloaded"))
    done = CliRunner().invoke(app, ["export", "tiny", str(tmp_path / "out"), "--weights", "fp32,int8"])
    assert done.exit_code == 2 and "'int8' is none of them" in done.stderr
    done = CliRunner().invoke(app, ["export", "tiny", str(tmp_path / "out"), "--format", "gguf"])
    assert done.exit_code == 2 and "expected onnx" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        exporting.export("tiny", tmp_path / "full")
    with pytest.raises(ValueError, match="weights are int8, expected fp32, fp16, q8, q4"):
        exporting.export("tiny", tmp_path / "out", ["int8"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="weights is 'int8', expected one of fp32, fp16, q8, q4"):
        load_exported(tmp_path / "out", "int8")


def test_a_mistyped_model_leaves_no_folder_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        exporting.export(tmp_path / "gone", tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["hub id", "adapter"])
@pytest.mark.parametrize("weights, branch", [("q8", "bfloat16"), ("q8,fp32", None)])
def test_what_is_checked_is_what_was_exported(tmp_path, monkeypatch, kind, weights, branch):
    """A PaliGemma 1 has two branches on the hub: neither is downloaded for the check alone."""
    asked, checked = [], []
    source = "google/paligemma-3b-pt-224"
    if kind == "adapter":
        save_adapter(add_lora(load_model(TINY), ("decoder",)), tmp_path / "adapter", source)
        source = str(tmp_path / "adapter")

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append(revision)
        return str(TINY)

    def differences(pg, folder, name):
        checked.append(pg.model.dtype)
        return checking.Difference(name, 0.0, 0.0, 0.0, 1, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(exporting, "GRAPHS", {})  # there is nothing to trace
    monkeypatch.setattr(checking, "differences", differences)
    done = CliRunner().invoke(app, ["export", source, "out", "--weights", weights, "--check"])
    assert done.exit_code == 0, done.output
    assert set(asked) == {branch} and set(checked) == {torch.float32}


def test_a_model_that_onnxruntime_runs_is_not_compiled():
    with pytest.raises(ValueError, match="this model is ExportedModel: leave it out"):
        check_can_be_compiled(runtime.ExportedModel.__new__(runtime.ExportedModel))


def test_codes_of_masks_are_decoded_by_the_codec_of_the_checkpoint(tmp_path, monkeypatch):
    """It goes along, and is found again."""
    checkpoint, folders = open_model(TINY)
    exporting._write_processor(checkpoint, folders, tmp_path)
    pg = paligemma.load("tiny")
    monkeypatch.setattr(runtime, "ExportedModel", lambda *_: pg.model)
    codec, codes = load_exported(tmp_path).loaded_codec, torch.arange(16)[None]
    assert torch.equal(codec.decode(codes), pg.codec.decode(codes))


def test_the_tokenizer_is_that_of_the_first_folder_that_has_one(tmp_path):
    """An adapter may lie beside the settings of a tokenizer alone."""
    adapter, base, out = (tmp_path / name for name in ("adapter", "base", "out"))
    for folder in (adapter, base, out):
        folder.mkdir()
    shutil.copyfile(TINY / "tokenizer_config.json", adapter / "tokenizer_config.json")
    shutil.copyfile(TINY / "tokenizer.json", base / "tokenizer.json")
    exporting._write_processor(open_model(TINY)[0], [adapter, base], out)
    processor = PaliGemmaProcessor.from_pretrained(out)
    assert processor.tokenizer.encode("a red circle") == load_tokenizer(TINY).encode("a red circle")


def test_a_check_finds_logits_that_are_no_numbers(monkeypatch):
    """Also where they come late: Python's max(0.0, nan) is 0.0."""
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    monkeypatch.setattr(checking, "load_exported", lambda folder, weights: pg)  # the model beside itself
    found = checking.differences(pg, "", "fp32")
    assert (found.features, found.prompt, found.steps, found.same) == (0, 0, 0, found.tokens)
    checking.check(found)

    calls, decode = [], checking.decode_one_token

    def fails_late(*arguments):
        calls.append(1)
        return decode(*arguments) * (math.nan if len(calls) == 30 else 1)

    monkeypatch.setattr(checking, "decode_one_token", fails_late)
    found = checking.differences(pg, "", "fp32")
    assert math.isnan(found.steps)
    with pytest.raises(RuntimeError, match=r"compute something else: .* of 20 steps by nan"):
        checking.check(found)


# ---------------------------------------------------------------------------------------------- onnxruntime


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [[6], [11], [6, 2, 11]], ids=["one row", "a longer one", "three rows, padded"])
@torch.inference_mode()
def test_logits_equal_pytorch(exported, prefix):
    """With lengths and batches that the graphs were not traced with: they knew two rows of five tokens after three."""
    model, folder = exported
    other = ExportedModel(folder)
    inputs = make_inputs(model.config, prefix)
    pixels = inputs["pixel_values"]
    assert_close(other.encode_image(pixels), model.encode_image(pixels), rtol=0, atol=5e-5)
    logits, cache = prefill(model, inputs, STEPS)
    logits_too, cache_too = prefill(other, inputs, STEPS)
    for step in range(STEPS + 1):
        assert_close(logits_too, logits, rtol=0, atol=5e-5)
        assert torch.equal(logits_too.argmax(-1), logits.argmax(-1))
        if step < STEPS:
            tokens = logits.argmax(-1)
            logits, logits_too = decode_one_token(model, tokens, cache), decode_one_token(other, tokens, cache_too)


@pytest.mark.slow
def test_files_inputs_and_outputs_have_the_names_that_transformers_js_looks_for(exported):
    model, folder = exported
    names = {path.name for path in (folder / "onnx").iterdir()}
    stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    assert names == {f"{stem}{suffix}.onnx" for stem in stems for suffix in ("", "_quantized")}
    others = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"} <= others
    sessions = ExportedModel(folder).sessions
    text = model.config.text_config
    K, E, side, P = text.num_key_value_heads, text.head_dim, 28, 4

    def shapes(values):
        return {value.name: value.shape for value in values}

    vision, embed, decoder = sessions.values()
    assert shapes(vision.get_inputs()) == {"pixel_values": ["batch_size", 3, side, side]}
    assert shapes(vision.get_outputs()) == {"image_features": ["batch_size", P, text.hidden_size]}
    assert shapes(embed.get_inputs()) == {"input_ids": ["batch_size", "sequence_length"]}
    assert shapes(embed.get_outputs()) == {"inputs_embeds": ["batch_size", "sequence_length", text.hidden_size]}
    inputs, outputs = shapes(decoder.get_inputs()), shapes(decoder.get_outputs())
    for layer in range(text.num_hidden_layers):
        for part in ("key", "value"):
            past = inputs.pop(f"past_key_values.{layer}.{part}")
            assert past == ["batch_size", K, "past_sequence_length", E]
            assert outputs.pop(f"present.{layer}.{part}") == ["batch_size", K, "total_sequence_length", E]
    assert inputs == {
        "inputs_embeds": ["batch_size", "sequence_length", text.hidden_size],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    assert outputs == {"logits": ["batch_size", "num_logits", text.vocab_size]}


@pytest.mark.slow
def test_the_number_of_logits_may_be_chosen_or_left_out(exported):
    model, folder = exported
    other = ExportedModel(folder)
    text, S = model.config.text_config, 7
    (optional,) = other.sessions["decoder_model_merged"].get_overridable_initializers()
    assert (optional.name, optional.type, optional.shape) == ("num_logits_to_keep", "tensor(int64)", [])
    empty = torch.empty(1, text.num_key_value_heads, 0, text.head_dim)
    given = {
        "inputs_embeds": torch.randn(1, S, text.hidden_size),
        "attention_mask": torch.ones(1, S, dtype=torch.int64),
        "position_ids": torch.arange(1, S + 1)[None],
    }
    given |= {f"past_key_values.{i}.{part}": empty for i in range(text.num_hidden_layers) for part in ("key", "value")}
    every = other.run("decoder_model_merged", **given)[0]
    assert every.shape[1] == S
    for count in (0, 1, 3):
        some = other.run("decoder_model_merged", **given, num_logits_to_keep=torch.tensor(count))[0]
        assert_close(some, every[:, -count:] if count else every, rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.inference_mode()
def test_eight_bits_are_near(exported):
    model, folder = exported
    inputs = make_inputs(model.config, [6, 2])
    logits, other = prefill(model, inputs, 1)[0], prefill(ExportedModel(folder, "q8"), inputs, 1)[0]
    assert 1e-5 < (logits - other).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["gemma"], indirect=True)
@torch.inference_mode()
def test_large_weights_lie_beside_the_graph(exported, tmp_path, monkeypatch):
    """Under the name that transformers.js looks for, and only if the configuration says so."""
    model, folder = exported
    monkeypatch.setattr(exporting, "LARGEST_FILE", 1000)
    save_pretrained(model, tmp_path / "model", None)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / name).read_bytes())
    exporting.export(tmp_path / "model", tmp_path / "out", ["fp32", "q4"])
    external = {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    external |= {f"{name.removesuffix('.onnx')}_q4.onnx" for name in external}
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == external | {f"{n}_data" for n in external}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": dict.fromkeys(external, 1)}
    inputs = make_inputs(model.config, [6])
    assert_close(
        prefill(ExportedModel(tmp_path / "out"), inputs, 1)[0], prefill(model, inputs, 1)[0], rtol=0, atol=5e-5
    )


@pytest.mark.slow
def test_openvino_reads_the_same_files(exported):
    """Picture, embeddings, and a prompt of two rows, one of them padded: what PyTorch gives."""
    openvino = pytest.importorskip("openvino")
    model, folder = exported
    # By itself it computes in bfloat16 where the CPU has instructions for it.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}

    def run(name, feed):
        compiled = openvino.Core().compile_model(folder / "onnx" / f"{name}.onnx", "CPU", precise)
        return torch.from_numpy(compiled({key: value.numpy() for key, value in feed.items()})[0])

    inputs = make_inputs(model.config, [6, 4])
    with torch.no_grad():
        features = model.encode_image(inputs["pixel_values"])
        expected = model(**inputs).logits
    assert_close(run("vision_encoder", {"pixel_values": inputs["pixel_values"]}), features, rtol=0, atol=5e-5)
    ids, text = inputs["input_ids"], model.config.text_config
    is_image = ids == model.config.image_token_index
    embeds = run("embed_tokens", {"input_ids": ids})
    embeds = embeds.masked_scatter(is_image[..., None], features)
    mask = inputs["attention_mask"]
    empty = torch.zeros(2, text.num_key_value_heads, 0, text.head_dim)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(text.num_hidden_layers) for kind in ("key", "value")}
    feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": mask.cumsum(1), **past}
    logits = run("decoder_model_merged", feed)  # it takes the optional num_logits_to_keep for a constant
    assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=5e-5)


@pytest.mark.slow
def test_the_command_of_the_page_writes_and_checks_the_embedded_model(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\npaligemma (.*)\n```", page)
    folder = tmp_path / "exported"
    words = shlex.split(command.replace("fp32,q8", "q8,fp32,fp16,q4").replace("exported/", str(folder)))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["q8", "fp32", "fp16", "q4"]
    assert lines[1].endswith("the likeliest token is the same in 42 of 42")
    assert load_exported(folder, "q8").calibration == paligemma.load("tiny").calibration != IDENTITY
    assert "dtype" not in json.loads((folder / "config.json").read_text())["transformers.js_config"]
    # The sizes that the page gives, by the ends of file names.
    for name, size in re.findall(r"\| `(\w+)` \| .* \| (\d+) MB \|", page):
        files = (
            folder.glob(f"onnx/*[a-z]{storing.SUFFIXES[name]}.onnx")
            if name != "fp32"
            else [file for file in folder.glob("onnx/*.onnx") if not file.stem.endswith(("_fp16", "_quantized", "_q4"))]
        )
        assert sum(file.stat().st_size for file in files) / 1e6 == pytest.approx(int(size), abs=0.6), name


# In a process of its own. RssAnon is memory that is no page of a file.
EXPORT = """
import json, sys, threading, time
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
most = [0]
def watch():
    while True:
        most[0] = max(most[0], own())
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
from paligemma.export.exporting import export
files = export(sys.argv[1], sys.argv[2], ["fp32"])
print(json.dumps({"most": most[0], "bytes": sum(file.stat().st_size for file in files)}))
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_an_official_size_is_written_tensor_by_tensor(tmp_path):
    """PaliGemma 1 3b in float32: 14 GB of files, since the embedding is in two of them. (20 GB of disk.)"""
    config = published_config("paligemma-3b", 224)
    write_random_checkpoint(config, tmp_path / "model")
    PaliGemmaProcessor(load_tokenizer(build_tokenizer(tmp_path / "tokenizer")), 256, 224).save_pretrained(
        tmp_path / "model"
    )
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    weights = 4 * 2_923_466_480
    print(f"\nweights {weights / 1e9:.1f} GB, files {facts['bytes'] / 1e9:.1f}, most memory {facts['most'] / 1e9:.2f}")
    external = {path.name for path in (tmp_path / "out" / "onnx").glob("*_data")}
    assert {"decoder_model_merged.onnx_data", "embed_tokens.onnx_data"} <= external
    assert facts["most"] <= 1.5 * weights
