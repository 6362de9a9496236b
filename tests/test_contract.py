"""The public face, name by name: outside programs rely on what is asserted here. Add to it, change nothing."""

import dataclasses
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from make_tokenizer import build_tokenizer
from PIL import Image
from reference import randomize, tiny_config

import paligemma
from paligemma.cli import main as cli
from paligemma.cli import output
from paligemma.cli import run as run_command
from paligemma.weights.converting import convert
from paligemma.weights.saving import save_pretrained

NONE_ELSE = inspect.Parameter.empty


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights with its codec, and two pictures of one name."""
    folder = tmp_path_factory.mktemp("contract")
    tokenizer = paligemma.load_tokenizer(build_tokenizer(folder / "tokenizer"))
    config = tiny_config(
        "gemma", vocab_size=(len(tokenizer) + 63) // 64 * 64, image_token_index=tokenizer.image_token_id
    )
    model = paligemma.PaliGemmaForConditionalGeneration(config)
    randomize(model)
    save_pretrained(model, folder / "model", processor=paligemma.PaliGemmaProcessor(tokenizer, 4, 28))
    torch.manual_seed(0)
    small = {"embedding_dim": 8, "encoder_widths": (4, 4, 4, 4), "decoder_widths": (4, 4, 4, 4, 4)}
    paligemma.MaskCodec(**small).save(folder / "model" / "mask_codec.npz")
    for name in ("a.png", "b.png"):
        (folder / name[0]).mkdir()
        Image.fromarray(picture(ord(name[0]))).save(folder / name)
        Image.fromarray(picture(ord(name[0]))).save(folder / name[0] / "same.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def pg(folder):
    return paligemma.load(str(folder / "model"))


def picture(seed: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`code, out, err = run("caption en", "a.png")`, in this process."""
    monkeypatch.chdir(folder)

    def command(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["paligemma", "run", "--model", "model", "--max-new-tokens", "9", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return command


# ------------------------------------------------------------------------------------------------ names


def defaults(function) -> dict[str, object]:
    """Parameter -> default, without self, *args and **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    return {p.name: p.default for p in named}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load", {"model": "tiny", "device": None, "dtype": None, "quantize": None, "revision": None}),
        ("load_hf_model", {"model_path": NONE_ELSE, "device": None, "dtype": None, "quantize": None}),
        ("load_tokenizer", {"folder": NONE_ELSE}),
        ("parse", {"text": NONE_ELSE, "image_size": NONE_ELSE, "loc_scale": 1024, "codec": None}),
        ("PaliGemma.caption", {"image": NONE_ELSE, "language": "en"}),
        ("PaliGemma.ask", {"image": NONE_ELSE, "question": NONE_ELSE, "choices": None}),
        ("PaliGemma.ocr", {"image": NONE_ELSE}),
        ("PaliGemma.detect", {"image": NONE_ELSE, "labels": NONE_ELSE, "constrained": True, "max_new_tokens": 512}),
        ("PaliGemma.segment", {"image": NONE_ELSE, "labels": None, "prompt": None, "max_new_tokens": 512}),
        ("PaliGemma.generate", {"image": NONE_ELSE, "prompt": NONE_ELSE, "max_new_tokens": 128, "constrained": False}),
        ("PaliGemma.stream", {"image": NONE_ELSE, "prompt": NONE_ELSE, "max_new_tokens": 128}),
        ("PaliGemma.draw", {"image": NONE_ELSE, "items": NONE_ELSE}),
        ("PaliGemmaProcessor", {"tokenizer": NONE_ELSE, "num_image_tokens": NONE_ELSE, "image_size": NONE_ELSE}),
        (
            "PaliGemmaProcessor.__call__",
            {"text": NONE_ELSE, "images": NONE_ELSE, "suffix": None, "padding_side": "left"},
        ),
        ("MaskCodec.encode", {"masks": NONE_ELSE}),
        ("MaskCodec.decode", {"codes": NONE_ELSE}),
        (
            "PaliGemmaForConditionalGeneration.forward",
            {"input_ids": None, "pixel_values": None, "attention_mask": None, "token_type_ids": None}
            | {"labels": None, "image_features": None, "position_ids": None, "cache": None, "logits_to_keep": 0},
        ),
        (
            "generate",
            {"model": NONE_ELSE, "inputs": NONE_ELSE, "do_sample": False, "temperature": 1.0, "top_k": None}
            | {"top_p": None, "num_beams": 1, "length_penalty": 1.0, "seed": None, "suppress_tokens": None},
        ),
    ],
)
def test_parameters_have_their_names_and_defaults(name, expected):
    function = paligemma
    for part in name.split("."):
        function = getattr(function, part)
    found = defaults(function)
    assert {key: found.get(key, "missing") for key in expected} == expected


def test_the_first_parameters_can_be_given_by_position():
    for function, first in (
        (paligemma.load, ["model", "device", "dtype", "quantize", "revision"]),
        (paligemma.load_hf_model, ["model_path", "device", "dtype", "quantize"]),
        (paligemma.parse, ["text", "image_size", "loc_scale", "codec"]),
        (paligemma.PaliGemma.ask, ["image", "question", "choices"]),
        (paligemma.PaliGemmaProcessor.__call__, ["text", "images", "suffix", "padding_side"]),
        (paligemma.generate, ["model", "inputs", "max_new_tokens"]),
    ):
        assert list(defaults(function))[: len(first)] == first


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Answer", "text token_ids token_logprobs score finished detections segments invalid"),
        ("Detection", "label box score edges"),
        ("Segment", "label box mask codes score edges"),
        ("Parsed", "detections segments invalid"),
        ("Generated", "token_ids token_logprobs finished"),
        ("PaliGemmaConfig", "text_config vision_config image_token_index pad_token_id bos_token_id eos_token_id"),
    ],
)
def test_results_have_their_fields_in_order(name, fields):
    names = [field.name for field in dataclasses.fields(getattr(paligemma, name))]
    assert [field for field in names if field in fields.split()] == fields.split()


def test_every_public_name_is_there_and_so_are_those_of_the_founding_document():
    for name in paligemma.__all__:
        assert getattr(paligemma, name) is not None
    from paligemma.inference import main  # noqa: F401
    from paligemma.modeling_gemma import GemmaAttention, GemmaMLP, PaliGemmaForConditionalGeneration  # noqa: F401
    from paligemma.modeling_siglip import SiglipVisionTransformer  # noqa: F401
    from paligemma.processing_paligemma import PaliGemmaProcessor  # noqa: F401


def test_tensors_have_their_types_and_shapes(pg, folder):
    model, tokenizer = paligemma.load_hf_model(folder / "model", "cpu", dtype="float32")
    inputs = pg.processor(text=["caption en", "ocr"], images=[picture(0), picture(1)])
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids", "pixel_values"]
    assert {inputs[key].dtype for key in list(inputs)[:3]} == {torch.int64}
    assert inputs["pixel_values"].dtype == torch.float32 and inputs["pixel_values"].shape == (2, 3, 28, 28)
    assert "labels" in pg.processor(text=["ocr"], images=[picture(0)], suffix=["no"])
    out = model(**inputs)
    assert out.logits.shape == (*inputs["input_ids"].shape, model.config.text_config.vocab_size)
    width = model.config.text_config.hidden_size
    assert model.encode_image(inputs["pixel_values"]).shape == (2, 4, width)
    assert tokenizer.decode(tokenizer.encode("<loc0007> a")) == "<loc0007> a"
    masks = pg.codec.decode(torch.zeros(3, 16, dtype=torch.int64))
    assert masks.shape == (3, 64, 64) and masks.dtype == torch.float32
    codes = pg.codec.encode((masks > 0).float())
    assert codes.shape == (3, 16) and codes.dtype == torch.int64


# ------------------------------------------------------------------------------------------------ the command line


def test_json_keys_are_exactly_these(run):
    code, out, _ = run("segment dog", "a.png", "--json", "--max-new-tokens", "50")
    answer = json.loads(out)
    assert code == 0
    assert list(answer) == ["image", "prompt", "text", "score", "finished", "detections", "segments", "invalid"]
    assert answer["segments"] and list(answer["segments"][0]) == ["label", "box", "score", "mask"]
    assert list(answer["segments"][0]["mask"]) == ["size", "counts"]
    detections = json.loads(run("detect dog", "b.png", "--json", "--max-new-tokens", "50")[1])["detections"]
    assert detections and list(detections[0]) == ["label", "box", "score"]


def test_a_picture_that_cannot_be_read_costs_no_other_its_answer(run):
    code, out, err = run("ocr", "a.png", "broken.png", "missing.png", "b.png", "--json")
    assert code == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["a.png", "b.png"]
    assert "broken.png is not a picture" in err and "missing.png: no such file" in err
    assert "2 of 4 pictures" in err
    code, out, err = run("ocr", "broken.png", "missing.png")
    assert (code, out) == (1, "") and "loading" not in err


def test_more_pictures_than_a_batch_are_answered_in_order(run, monkeypatch):
    together = run("ocr", "a.png", "b.png", "a.png")[1]
    monkeypatch.setattr(run_command, "BATCH", 2)
    assert run("ocr", "a.png", "b.png", "a.png")[1] == together


def test_drawings_replace_neither_each_other_nor_a_picture(run, folder, tmp_path):
    assert run("detect dog", "a/same.png", "b/same.png", "a.png", "--save", str(tmp_path / "all"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["a.png", "same-2.png", "same.png"]
    before = (folder / "a.png").read_bytes()
    code, out, err = run("detect dog", "a.png", "--save", "a.png")
    assert (code, out) == (2, "") and "would replace the picture itself" in " ".join(err.split())
    assert run("detect dog", "a.png", "--save", ".")[0] == 0
    assert (folder / "a.png").read_bytes() == before and (folder / "a-2.png").is_file()
    assert output.drawing_paths(tmp_path / "out", ["-"]) == [tmp_path / "out" / "stdin.png"]


def test_a_drawing_replaces_an_earlier_one_and_no_other_file(run, folder):
    """A folder may hold pictures that this command does not read."""
    (folder / "a/same.jpg").write_bytes((folder / "b/same.png").read_bytes())
    others = {path: path.read_bytes() for path in (folder / "a").iterdir()}
    for _ in range(2):  # the second call replaces the drawing of the first one
        assert run("detect dog", "a/same.jpg", "--save", "a")[0] == 0
        assert {path.name for path in (folder / "a").iterdir()} == {path.name for path in others} | {"same-2.png"}
        assert all(path.read_bytes() == before for path, before in others.items())


@pytest.mark.parametrize("name", ["out.xyz", "out.txt"])
def test_a_kind_of_file_that_is_no_picture_is_refused_before_any_work(run, name):
    code, out, err = run("detect dog", "missing.png", "--save", name)
    assert (code, out) == (2, "") and "try .png, or make a folder of that name" in " ".join(err.split())


@pytest.mark.parametrize("save", ["afile", "afile/more", "afile/out.png"])
def test_a_file_where_a_folder_should_be_is_told_before_any_work(run, folder, save):
    (folder / "afile").write_text("no folder")
    code, out, err = run("detect dog", "missing.png", "b.png", "--save", save)
    assert (code, out) == (2, "") and "afile is a file, expected a folder" in " ".join(err.split())


def test_a_drawing_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    class Full:
        def save(self, path, **_):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "out.png").write_bytes(b"old")
    with pytest.raises(OSError, match=r"out\.png could not be written: No space left"):
        output.save_picture(Full(), tmp_path / "out.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out.png", b"old")]


def test_names_are_no_markup_and_long_notes_are_one_line(run, folder):
    name = "[bold]" + "x" * 120 + " ü.png"
    (folder / name).write_bytes((folder / "a.png").read_bytes())
    code, _, err = run("ocr", name)
    assert code == 0 and f"note: {name}: stopped after 9 tokens; --max-new-tokens allows more\n" in err


def test_json_that_stdout_cannot_hold_is_escaped(monkeypatch, capsys):
    output.echo_json({"image": "ü\udcff.png"})
    assert capsys.readouterr().out == '{"image": "\\u00fc\\udcff.png"}\n'
    output.echo_json({"image": "ü.png"})
    assert capsys.readouterr().out == '{"image": "ü.png"}\n'


def test_closed_stdout_and_a_second_stdin_are_no_accidents(run, monkeypatch):
    code, _, err = run("ocr", "-", "-")
    assert code == 2 and "stdin holds one picture" in " ".join(err.split())
    monkeypatch.setattr(sys, "stdout", None)  # `paligemma ... >&-`
    assert run("ocr", "a.png")[0] == 0


def test_debug_may_stand_anywhere(run):
    with pytest.raises(FileNotFoundError):
        run("ocr", "missing.png", "--debug")


def test_beams_follow_the_grammar_too(run):
    answer = json.loads(run("detect dog", "a.png", "--beams", "3", "--json")[1])
    assert answer["finished"] and not answer["invalid"]
    assert all(found["label"] == "dog" for found in answer["detections"])


# ------------------------------------------------------------------------------------------------ lists and batches


def test_no_questions_give_no_answers(pg):
    assert pg.ask(picture(0), []) == []


def test_a_seed_for_each_row_reaches_its_row_beyond_the_first_batch(pg):
    pictures = [picture(seed) for seed in range(3)]
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    together = pg.generate(pictures, "ocr", seed=[5, 6, 7], batch_size=2, **options)
    alone = [pg.generate(image, "ocr", seed=seed, **options) for image, seed in zip(pictures, [5, 6, 7])]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    array = pg.generate(pictures, "ocr", seed=np.array([5, 6, 7]), batch_size=2, **options)
    assert [a.token_ids for a in array] == [a.token_ids for a in alone]
    for too_few in ([1, 2], np.array([1, 2])):
        with pytest.raises(ValueError, match="2 seeds for 3 rows"):
            pg.generate(pictures, "ocr", seed=too_few, **options)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pg.generate(pictures, "ocr", batch_size=0)


def test_every_form_of_a_picture_gives_the_same_answer(pg, folder):
    array, path = picture(ord("a")), folder / "a.png"
    forms = [path, str(path), Image.open(path), array, path.read_bytes()]
    answers = pg.generate(forms, "detect dog", 30, constrained=True)
    assert len({tuple(a.token_ids) for a in answers}) == 1
    assert answers[0].detections and len({str(a.detections) for a in answers[1:]}) == 1


def test_prompts_without_a_grammar_are_free_beside_those_with_one(pg):
    together = pg.generate(picture(1), ["caption en", "detect dog", "segment dog"], 40, constrained=True)
    assert together[0].token_ids == pg.generate(picture(1), "caption en", 40).token_ids
    assert not together[1].invalid and not together[2].invalid


def test_choices_hold_in_every_row_of_a_batch(pg):
    answers = pg.ask([picture(seed) for seed in range(4)], ["what?", "who?", "why?", "how?"], choices=["yes", "no"])
    assert len(answers) == 4 and {a.text for a in answers} <= {"yes", "no"}


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_the_thinnest_pictures_have_boxes_inside_and_can_be_drawn(pg, size):
    image = picture(0, *size)
    for found in pg.segment(image, "dog", max_new_tokens=30):
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] and found.mask.shape == size[::-1]
    assert pg.draw(image, pg.detect(image, "dog", max_new_tokens=30)).size == size


def test_bfloat16_goes_from_picture_to_mask(folder):
    pg = paligemma.load(str(folder / "model"), dtype="bfloat16")
    (found, *_) = pg.segment(picture(0), "dog", max_new_tokens=40)
    assert pg.model.dtype == torch.bfloat16 and found.mask.dtype == bool


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "rope_theta", "x"),
        ("text_config", "rms_norm_eps", [1]),
        ("text_config", "query_pre_attn_scalar", "x"),
        ("text_config", "final_logit_softcapping", "x"),
        ("text_config", "layer_types", 5),
        ("vision_config", "layer_norm_eps", "x"),
    ],
)
def test_a_setting_of_another_type_is_named(part, key, value):
    settings = tiny_config("gemma2").to_dict()
    settings[part][key] = value
    with pytest.raises(ValueError, match=rf"{part}\.{key} is .*expected"):
        paligemma.PaliGemmaConfig.from_dict(settings)


def test_names_that_mean_nothing_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="name of the model is empty"):
        paligemma.load("")
    with pytest.raises(ValueError, match="name a folder"):
        convert(folder / "model", tmp_path / "copy.safetensors")
    assert not list(tmp_path.iterdir())
