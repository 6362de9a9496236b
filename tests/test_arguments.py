"""An argument of a wrong type is one error that names the argument and says what was expected."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

PICTURE = Image.new("RGB", (32, 32), "white")


@pytest.fixture(scope="module")
def pg():
    return paligemma.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def inputs(pg):
    return pg.processor(text=["ocr"], images=[PICTURE])


def told(error: pytest.ExceptionInfo, *words: str) -> None:
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new_tokens": "3"}, ["max_new_tokens is '3'", "a whole number"]),
        ({"max_new_tokens": None}, ["max_new_tokens is None", "a whole number"]),
        ({"batch_size": "3"}, ["batch_size is '3'", "a whole number"]),
        ({"suppress_tokens": 5}, ["suppress_tokens is 5", "a list of token ids"]),
        ({"suppress_tokens": "ab"}, ["suppress_tokens is 'ab'", "a list of token ids"]),
        ({"suppress_tokens": [1.5]}, ["suppress_tokens is [1.5]", "a list of token ids"]),
        ({"do_sample": "no"}, ["do_sample is 'no'", "True or False"]),
        ({"do_sample": True, "seed": "x"}, ["seed is ", "'x'", "a whole number"]),
        ({"do_sample": True, "seed": 1.5}, ["seed is 1.5", "a whole number"]),
        ({"do_sample": True, "seed": 2**80}, ["seed is", "64 bits"]),
        ({"do_sample": True, "temperature": "x"}, ["temperature is 'x'", "a number"]),
        ({"do_sample": True, "top_p": "x"}, ["top_p is 'x'", "a number"]),
        ({"num_beams": 2, "length_penalty": "x"}, ["length_penalty is 'x'", "a number"]),
        ({"num_beams": 2, "length_penalty": None}, ["length_penalty is None", "a number"]),
        ({"num_beams": 2, "length_penalty": -2000.0}, ["length_penalty is -2000.0", "from -50 to 50"]),
        ({"num_beams": 2, "length_penalty": math.nan}, ["length_penalty is nan", "from -50 to 50"]),
        ({"constraint": 5}, ["constraint is int", "a function"]),
    ],
)
def test_options_of_generation(pg, inputs, options, words):
    """Told before the picture is opened: this one does not exist."""
    with pytest.raises((TypeError, ValueError)) as error:
        pg.generate("missing.png", "ocr", **options)
    told(error, *words)
    if "batch_size" not in options:
        with pytest.raises((TypeError, ValueError)) as error:
            paligemma.generate(pg.model, inputs, **options)
        told(error, *words)


def test_numbers_of_numpy_are_numbers():
    options = paligemma.Options(np.int64(3), True, np.float32(0.5), seed=np.int64(7), suppress_tokens=np.array([1, 2]))
    assert options.max_new_tokens == 3 and options.seed == 7


CALLS = {
    "load(None)": (lambda pg, inputs: paligemma.load(None), ["the model is NoneType", "a hub id"]),
    "load(3)": (lambda pg, inputs: paligemma.load(3), ["the model is int", "a hub id"]),
    "load(extra=3)": (lambda pg, inputs: paligemma.load("tiny", extra=3), ["extra is int", "{'name': module}"]),
    "load(max_memory)": (
        lambda pg, inputs: paligemma.load("tiny", device_map="auto", max_memory=3),
        ["max_memory is 3", "by device"],
    ),
    "load_tokenizer(3)": (lambda pg, inputs: paligemma.load_tokenizer(3), ["folder is 3", "path"]),
    "encode": (lambda pg, inputs: pg.processor.tokenizer.encode(5), ["text is int", "a string"]),
    "decode": (lambda pg, inputs: pg.processor.tokenizer.decode(5), ["ids is int", "a list of token ids"]),
    "stream([...])": (lambda pg, inputs: list(pg.stream([PICTURE], "ocr")), ["one image", "use generate"]),
    "ask(choices)": (lambda pg, inputs: pg.ask(PICTURE, "q", choices=5), ["choices must be a list", "got 5"]),
    "ask(empty)": (lambda pg, inputs: pg.ask(PICTURE, "q", choices=["a", ""]), ["choices has an empty string"]),
    "draw([1])": (lambda pg, inputs: pg.draw(PICTURE, [1]), ["items has int", "detections or segments"]),
    "draw(1)": (lambda pg, inputs: pg.draw(PICTURE, 1), ["items is int", "a list of detections"]),
    "draw(scale)": (lambda pg, inputs: pg.draw(PICTURE, [], scale="x"), ["scale is 'x'", "a number"]),
    "parse(None)": (lambda pg, inputs: paligemma.parse(None, (3, 4)), ["text is NoneType", "string"]),
    "parse(size)": (lambda pg, inputs: paligemma.parse("a", None), ["image_size must be (width, height)", "got None"]),
    "parse(picture)": (lambda pg, inputs: paligemma.parse("a", PICTURE), ["(width, height)", "pass its .size"]),
    "parse(codec)": (lambda pg, inputs: paligemma.parse("a", (3, 4), codec="x"), ["codec is str", "a MaskCodec"]),
    "save(pg)": (lambda pg, inputs: paligemma.save_pretrained(pg, "new"), ["model is PaliGemma", "pass its `.model`"]),
    "save(None)": (
        lambda pg, inputs: paligemma.save_pretrained(None, "new"),
        ["model is None", "a PaliGemma"],
    ),
    "save(folder)": (lambda pg, inputs: paligemma.save_pretrained(pg.model, None), ["folder is None", "path"]),
    "save(processor)": (
        lambda pg, inputs: paligemma.save_pretrained(pg.model, "new", pg),
        ["processor is PaliGemma", "pass its `.processor`"],
    ),
    "quantize(pg)": (lambda pg, inputs: paligemma.quantize(pg, "int8"), ["model is PaliGemma", "pass its `.model`"]),
    "convert(None)": (lambda pg, inputs: paligemma.convert("tiny", None), ["target is None", "path"]),
    "merge(None)": (lambda pg, inputs: paligemma.merge(None, "new"), ["the model is NoneType"]),
    "prefill(pg)": (lambda pg, inputs: paligemma.prefill(pg, inputs, 5), ["model is PaliGemma", "pass its `.model`"]),
    "prefill(None)": (lambda pg, inputs: paligemma.prefill(pg.model, None, 5), ["inputs is NoneType", "the processor"]),
    "prefill(budget)": (lambda pg, inputs: paligemma.prefill(pg.model, inputs, "5"), ["max_new_tokens is '5'"]),
    "generate(pg)": (lambda pg, inputs: paligemma.generate(pg, inputs), ["model is PaliGemma", "pass its `.model`"]),
    "generate({})": (lambda pg, inputs: paligemma.generate(pg.model, {}), ["input_ids", "what the processor returns"]),
    "processor(None)": (lambda pg, inputs: pg.processor(None, None), ["text is NoneType", "a prompt"]),
    "processor(suffix)": (lambda pg, inputs: pg.processor(["ocr"], None, 5), ["suffix is int", "an answer"]),
    "codec": (lambda pg, inputs: paligemma.MaskCodec.load(5), ["path is 5", ".npz"]),
    "configuration": (lambda pg, inputs: paligemma.PaliGemmaConfig.from_pretrained(5), ["folder is 5", "path"]),
    "model(5)": (lambda pg, inputs: pg.model(5), ["input_ids is int", "a tensor of token ids [B, S]", "the processor"]),
    "encode_image": (
        lambda pg, inputs: pg.model.encode_image(PICTURE),
        ["pixel_values is Image", "a tensor [n, 3, side, side]", "the processor"],
    ),
    "KVCache(config)": (
        lambda pg, inputs: KVCache(pg.model.config, 1, 5),
        ["config is PaliGemmaConfig", "expected a GemmaConfig", "pass its `.text_config`"],
    ),
    "the model of a dict": (
        lambda pg, inputs: PaliGemmaForConditionalGeneration({}),
        ["config is dict", "expected a PaliGemmaConfig", "`from_dict`"],
    ),
    "look(model)": (lambda pg, inputs: paligemma.explore.look(pg.model, PICTURE, "ocr"), ["pg is", "paligemma.load"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_public_functions(pg, inputs, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, words = CALLS[call]
    with pytest.raises((TypeError, ValueError)) as error:
        function(pg, inputs)
    told(error, *words)
    assert not list(tmp_path.iterdir())  # and nothing was written


@pytest.mark.parametrize(
    "tokens, words",
    [
        (torch.ones(1, 1, dtype=torch.long), ["torch.int64 [1, 1]", "int64 [rows]", "pass tokens[:, 0]"]),
        (torch.ones(1), ["torch.float32 [1]", "int64 [rows]"]),
        ([1], ["tokens is list", "int64 [rows]"]),
    ],
)
def test_decode_one_token_takes_one_token_for_each_row(pg, inputs, tokens, words):
    _, cache = paligemma.prefill(pg.model, inputs, 5)
    with pytest.raises(ValueError) as error:
        paligemma.decode_one_token(pg.model, tokens, cache)
    told(error, *words)
