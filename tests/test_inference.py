"""The face of the project: what goes in, what comes out, how lists pair up."""

import base64
import math
import os
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from make_tokenizer import build_tokenizer
from PIL import Image
from reference import randomize, tiny_config

from paligemma.answers import grammar
from paligemma.answers.grammar import DetectionGrammar
from paligemma.answers.mask_codec import MaskCodec
from paligemma.answers.parsing import NUM_LOC
from paligemma.answers.results import Detection, Segment
from paligemma.engine import Engine, generate
from paligemma.generation import Options
from paligemma.inference import Answer, PaliGemma, load, main, shown
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tickets import Request
from paligemma.tokenizer import load_tokenizer

SMALL_CODEC = {"embedding_dim": 8, "encoder_widths": (4, 4, 4, 4), "decoder_widths": (4, 4, 4, 4, 4)}


@pytest.fixture(scope="module")
def pg(tmp_path_factory) -> PaliGemma:
    """A random model: its answers mean nothing, but they are many and different."""
    tokenizer = load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    rows = (len(tokenizer) + 63) // 64 * 64
    config = tiny_config("gemma", vocab_size=rows, image_token_index=tokenizer.image_token_id)
    model = PaliGemmaForConditionalGeneration(config)
    randomize(model)
    torch.manual_seed(0)
    return PaliGemma(model, PaliGemmaProcessor(tokenizer, 4, 28), codec=MaskCodec(**SMALL_CODEC))


def picture(seed: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(a: Answer, b: Answer) -> bool:
    return a.token_ids == b.token_ids and np.allclose(a.token_logprobs, b.token_logprobs, atol=1e-5)


def same_boxes(a: list, b: list) -> bool:
    """Labels and boxes to the bit; scores up to the rounding that another batch brings."""
    places = [(item.label, item.box) for item in a] == [(item.label, item.box) for item in b]
    return places and np.allclose([item.score for item in a], [item.score for item in b], atol=1e-5)


def test_an_answer_says_what_was_chosen_and_how_likely_it_was(pg):
    answer = pg.generate(picture(0), "caption en", max_new_tokens=12)
    assert answer.text == pg.processor.decode(answer.token_ids) == str(answer)
    assert pg.model.config.eos_token_id not in answer.token_ids
    assert len(answer.token_logprobs) == len(answer.token_ids) > 0
    assert answer.score == pytest.approx(math.exp(np.mean(answer.token_logprobs)))
    assert 0 <= answer.score <= 1
    assert answer.finished == (len(answer.token_ids) < 12)


def test_an_empty_answer_has_the_probability_of_saying_nothing(pg):
    eos = pg.model.config.eos_token_id
    answer = pg.generate(picture(0), "caption en", constraint=lambda generated, remaining: torch.tensor([eos, 7]))
    silent = pg.generate(picture(0), "caption en", constraint=lambda generated, remaining: torch.tensor([eos]))
    assert silent.text == "" and silent.finished and silent.score == 1.0
    assert 0 < answer.score < 1


def test_each_row_may_have_a_constraint_of_its_own(pg):
    def only(token):
        return lambda generated, remaining: torch.tensor([token if remaining > 1 else pg.model.config.eos_token_id])

    free = pg.generate(picture(0), "ocr", 3)
    answers = pg.generate(picture(0), ["ocr", "ocr", "ocr"], 3, constraint=[only(300), None, only(301)])
    assert [answer.token_ids for answer in answers] == [[300, 300], free.token_ids, [301, 301]]
    with pytest.raises(ValueError, match="2 constraints for 1 rows"):
        pg.generate(picture(0), "ocr", constraint=[None, None])
    with pytest.raises(ValueError, match=r"constraint and constrained=True .* exclude each other"):
        pg.generate(picture(0), "detect dog", constraint=only(300), constrained=True)


@pytest.mark.parametrize("budget", [8])
def test_lists_pair_up(pg, budget):
    a, b = picture(0), picture(1, 30, 50)
    single = pg.generate(a, "caption en", budget)
    assert isinstance(single, Answer)
    # one image, two prompts
    two = pg.generate(a, ["caption en", "ocr"], budget)
    assert same(two[0], single) and same(two[1], pg.generate(a, "ocr", budget))
    # two images, one prompt
    two = pg.generate([a, b], "caption en", budget)
    assert same(two[0], single) and same(two[1], pg.generate(b, "caption en", budget))
    # pair by pair
    pairs = pg.generate([a, b], ["caption en", "ocr"], budget)
    assert same(pairs[0], single) and same(pairs[1], pg.generate(b, "ocr", budget))
    # a list of one stays a list; a tuple is one row that sees both
    assert len(pg.generate([a], "caption en", budget)) == 1
    assert len(pg.generate([a], ["ocr", "caption en"][:1], budget)) == 1
    both = pg.generate((a, b), "caption en", budget)
    assert isinstance(both, Answer) and not same(both, single)
    assert pg.generate([], "caption en") == []


def test_batches_larger_than_the_batch_size_are_worked_off_in_order(pg):
    pictures = [picture(seed) for seed in range(5)]
    whole = pg.generate(pictures, "ocr", 6)
    parts = pg.generate(pictures, "ocr", 6, batch_size=2)
    assert all(map(same, whole, parts))


def test_an_image_is_encoded_once_however_many_prompts_it_has(pg, monkeypatch):
    seen = []
    encode = pg.model.encode_image
    monkeypatch.setattr(pg.model, "encode_image", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    image = picture(0)
    pg.generate(image, ["ocr", "caption en", "describe en"], 4, batch_size=2)
    pg.generate([image, picture(1), image], "ocr", 4)
    assert seen == [1, 2]


def test_of_a_long_list_few_pictures_are_in_memory(pg, monkeypatch):
    """The features of a picture at 448 pixels take 4 MB, and a list may have thousands."""
    alive, most, inputs_of = weakref.WeakSet(), [], pg._inputs

    def watched(*given):
        for part, inputs, sizes in inputs_of(*given):
            alive.add(inputs["image_features"])
            most.append(len(alive))
            yield part, inputs, sizes

    monkeypatch.setattr(pg, "_inputs", watched)
    pg.generate([picture(seed) for seed in range(20)], "ocr", 1, batch_size=1)
    assert len(most) == 20 and max(most) <= 2


def test_unequal_lists_are_refused(pg):
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        pg.generate([picture(0)] * 3, ["ocr", "caption en"])
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        pg.generate([picture(0)], ["ocr", "caption en"])
    with pytest.raises(ValueError, match="empty tuple"):
        pg.generate((), "ocr")
    with pytest.raises(TypeError, match="a prompt is int"):
        pg.generate(picture(0), 3)


def test_a_swapped_prompt_and_picture_are_told(pg, tmp_path):
    path = str(tmp_path / "photo.jpg")
    Image.fromarray(picture(0)).save(path)
    for call in (pg.generate, lambda *a: list(pg.stream(*a))):
        with pytest.raises(ValueError, match=r"photo\.jpg', is a file: the image comes first"):
            call("caption en", path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        pg.generate("nowhere.png", "caption en")
    assert pg.generate(path, path, 4).token_ids  # an odd prompt, and not swapped


def test_a_file_that_is_called_like_the_prompt_is_no_picture(pg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ocr").write_text("")
    with pytest.raises(FileNotFoundError, match=r"photo\.png: no such file"):
        pg.generate("photo.png", "ocr")
    Image.fromarray(picture(0)).save(tmp_path / "ocr.png")
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'ocr.png').read_bytes()).decode()}"
    assert pg.generate(url, "ocr.png", 4).token_ids == pg.generate(picture(0), "ocr.png", 4).token_ids


def test_streamed_pieces_join_to_the_whole_answer(pg):
    pieces = list(pg.stream(picture(0), "caption en", max_new_tokens=16))
    assert len(pieces) > 1
    assert "".join(pieces) == pg.generate(picture(0), "caption en", 16).text


def test_a_stream_returns_the_answer_that_it_showed(pg):
    for prompt in ("caption en", "detect dog"):
        pieces = []
        answer = shown(pg.stream(picture(0), prompt, max_new_tokens=16), pieces.append)
        whole = pg.generate(picture(0), prompt, 16)
        assert pieces.pop() == "\n" and "".join(pieces) == answer.text
        assert same(answer, whole) and answer.finished == whole.finished and answer.detections == whole.detections


def test_a_prompt_too_long_is_refused_before_the_image_is_looked_at(pg, monkeypatch):
    monkeypatch.setattr(pg.model, "encode_image", lambda pixels: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="positions"):
        pg.generate(picture(0), "what " * 9000)
    with pytest.raises(ValueError, match="positions"):  # the last of a list: the answers of the others would be lost
        pg.generate([picture(0)] * 3, ["ocr", "ocr", "what " * 9000], batch_size=1)
    with pytest.raises(ValueError, match="positions"):
        list(pg.stream(picture(0), "ocr", max_new_tokens=9000))


def test_tasks_write_the_prompts_of_the_official_checkpoints(pg, monkeypatch):
    prompts = []
    lay_out = pg.processor.lay_out
    monkeypatch.setattr(pg.processor, "lay_out", lambda p, *a, **k: prompts.extend(p) or lay_out(p, *a, **k))
    short = {"max_new_tokens": 30}
    image = picture(0)
    pg.caption(image)
    pg.caption(image, language="de")
    pg.ask(image, "how many dogs are there?")
    pg.ask(image, ["is it day?", "is it night?"])
    pg.ocr(image)
    pg.detect(image, ["dog", " red car "], **short)
    pg.detect(image, "dog", **short)
    pg.segment(image, ["dog", "cat"], max_new_tokens=50)
    pg.segment(image, prompt="the dog on the left", max_new_tokens=50)
    assert prompts == [
        "caption en",
        "caption de",
        "answer en how many dogs are there?",
        "answer en is it day?",
        "answer en is it night?",
        "ocr",
        "detect dog ; red car",
        "detect dog",
        "segment dog ; cat",
        "the dog on the left",
    ]


def test_choices_leave_nothing_else_to_say(pg):
    answers = {pg.ask(picture(seed), "what is it?", choices=["yes", "no"]).text for seed in range(12)}
    assert answers <= {"yes", "no"}


def test_a_choice_too_long_for_the_budget_is_refused_before_any_work(pg, monkeypatch):
    """Making a tree of its tokens took seconds, and the error repeated all of it."""
    monkeypatch.setattr(pg.model, "encode_image", lambda pixels: pytest.fail("encoded"))
    monkeypatch.setattr(grammar, "_Tree", lambda eos: pytest.fail("a tree was made"))
    with pytest.raises(ValueError, match=r"the choice .* takes .* only 128 may be generated") as caught:
        pg.ask(picture(0), "what ?", choices=["yes", "no" * 50_000])
    assert len(str(caught.value)) < 300


def test_a_string_is_no_list_of_choices(pg):
    with pytest.raises(ValueError, match="choices must be a list of one or more strings, got 'four'"):
        pg.ask(picture(0), "how many?", choices="four")
    assert pg.ask(picture(0), "how many?", choices={"four", "two"}).text in ("four", "two")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pg, image: pg.detect(image, [1]), "a label is int, expected a string"),
        (lambda pg, image: pg.detect([image] * 2, [["book"], ["house"]]), "a label is list, expected a string"),
        (lambda pg, image: pg.detect(image, None), "labels is None, expected a string or a list of strings"),
        (lambda pg, image: pg.segment(image, prompt=["the dog"]), "the prompt is list, expected a string"),
        (lambda pg, image: pg.ask(image, None), "a question is NoneType, expected a string"),
        (lambda pg, image: pg.ask(image, ["is it day?", 1]), "a question is int, expected a string"),
        (lambda pg, image: pg.ask(image, "is it day?", language=None), "the language is NoneType"),
        (lambda pg, image: pg.caption(image, language=None), "the language is NoneType, expected a string"),
    ],
)
def test_what_is_no_text_never_becomes_part_of_a_prompt(pg, call, message):
    with pytest.raises(TypeError, match=message):
        call(pg, picture(0))


def test_detections_are_boxes_of_what_was_asked_for_in_pixels_of_the_picture(pg):
    image = picture(2, 640, 480)
    found = pg.detect(image, ["dog", "cat"], max_new_tokens=100)
    assert found and all(isinstance(item, Detection) for item in found)
    for item in found:
        x0, y0, x1, y1 = item.box
        assert item.label in ("dog", "cat")
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480
        assert item.score is not None and 0 < item.score <= 1
        assert item.edges is not None and item.edges.shape == (4, 2)
        assert (item.edges[:, 1] >= 0).all()
    per_picture = pg.detect([image, picture(3)], ["dog", "cat"], max_new_tokens=100)
    assert len(per_picture) == 2 and same_boxes(per_picture[0], found)


def test_segments_have_masks_at_the_size_of_the_picture(pg):
    found = pg.segment(picture(2, 90, 70), "dog", max_new_tokens=60)
    assert found and all(isinstance(item, Segment) for item in found)
    assert found[0].mask.shape == (70, 90) and found[0].mask.dtype == bool and len(found[0].codes) == 16
    # An answer without labels, as RefCOCO checkpoints give it.
    assert pg.segment(picture(2, 90, 70), prompt="the dog on the left", max_new_tokens=60)
    with pytest.raises(ValueError, match="not both"):
        pg.segment(picture(2), "dog", prompt="the dog")
    with pytest.raises(ValueError, match="not both"):
        pg.segment(picture(2))


def test_an_engine_of_your_own_finds_the_same_boxes_and_masks(pg):
    """`pg.grammar` before it and `pg.to_answer` after it are what `detect` and `segment` do."""
    image, size = picture(2, 90, 70), (90, 70)
    inputs = pg.processor(["segment dog"], [image])
    options = Options(60, watch=(pg.processor.tokenizer.first_loc_id, NUM_LOC), num_tokens=len(pg.processor.tokenizer))
    features = pg.model.encode_image(inputs["pixel_values"])
    engine = Engine(pg.model)
    ticket = engine.admit(Request(inputs["input_ids"][0], features, options, pg.grammar("segment dog")))
    while engine.step():
        pass
    found = pg.segment(image, "dog", max_new_tokens=60)
    answer = pg.to_answer(ticket.result(), size, image, pg.codec)
    assert same_boxes(answer.segments, found) and np.array_equal(answer.segments[0].mask, found[0].mask)
    assert answer.picture is image
    assert pg.to_answer(ticket.result(), size).segments[0].mask is None  # without a codec
    assert pg.grammar("caption en") is None


def test_repeated_boxes_can_be_forbidden(pg, monkeypatch):
    made = []
    init = DetectionGrammar.__init__
    monkeypatch.setattr(DetectionGrammar, "__init__", lambda *a, **k: made.append(k["forbid_repeats"]) or init(*a, **k))
    for forbid in (True, False):
        pg.detect(picture(0), "dog", max_new_tokens=20, forbid_repeats=forbid)
        pg.segment(picture(0), "dog", max_new_tokens=30, forbid_repeats=forbid)
        pg.segment(picture(0), prompt="the dog", max_new_tokens=30, forbid_repeats=forbid)
        pg.generate([picture(0)] * 2, "detect dog", 20, constrained=True, forbid_repeats=forbid)
        assert made == [forbid] * 4  # one for two rows with the same prompt
        made.clear()
    with pytest.raises(ValueError, match="forbid_repeats is a rule of the grammar"):
        pg.detect(picture(0), "dog", constrained=False, forbid_repeats=True)


def test_free_decoding_is_what_generate_gives(pg, monkeypatch):
    free = pg.generate(picture(4), "detect dog", 40)
    assert pg.detect(picture(4), "dog", constrained=False, max_new_tokens=40) == free.detections


@pytest.mark.parametrize("labels", [[], [""], ["dog", " "], "a ; b"])
def test_labels_that_name_nothing_are_refused(pg, labels):
    with pytest.raises(ValueError, match=r"name at least one thing|separates labels"):
        pg.detect(picture(0), labels)


def test_many_pictures_of_different_sizes_at_once_equal_one_by_one(pg):
    pictures = [picture(seed, 20 + 13 * seed, 200 - 11 * seed) for seed in range(16)]
    together = pg.detect(pictures, ["dog", "cat"], max_new_tokens=40)
    assert len(together) == 16 and any(together)
    for found, image in zip(together, pictures):
        assert same_boxes(found, pg.detect(image, ["dog", "cat"], max_new_tokens=40))


def test_results_keep_the_picture_as_it_was_given(pg, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture(2, 90, 70)).save(path)
    found = pg.detect(path, ["dog", "cat"], max_new_tokens=60)
    assert found and found.picture is path and found._repr_png_().startswith(b"\x89PNG")
    image = Image.open(path)
    assert pg.segment([image, path], "dog", max_new_tokens=60)[0].picture is image
    assert pg.generate((path, image), "ocr", 4).picture is path
    answers = pg.generate([path, image], "ocr", 4)
    assert answers[0].picture is path and answers[1].picture is image
    stream = pg.stream(path, "ocr", 4)
    assert shown(stream, lambda piece: None).picture is path


def test_a_row_without_a_picture(pg):
    """The prompt alone is read, as the processor lays it out without images."""
    alone = pg.generate(None, "how many legs has a dog ?", 8)
    inputs = pg.processor(text=["how many legs has a dog ?"], images=None)
    expected = generate(pg.model, inputs, max_new_tokens=8, num_tokens=len(pg.processor.tokenizer))[0]
    assert alone.token_ids == expected.token_ids and alone.picture is None
    # Beside rows with one picture and with two, and in a stream.
    question, two = "how many legs has a dog ?", (picture(0), picture(1))
    mixed = pg.generate([picture(0), None, two], question, 8)
    assert same(mixed[1], alone)
    assert same(mixed[0], pg.generate(picture(0), question, 8)) and same(mixed[2], pg.generate(two, question, 8))
    assert same(pg.ask(None, "why ?"), pg.generate(None, "answer en why ?"))
    assert "".join(pg.stream(None, question, 8)) == alone.text


def test_boxes_without_a_picture_are_nowhere(pg):
    answer = pg.generate(None, "detect dog", 60, constrained=True)
    assert "<loc" in answer.text and answer.detections == []
    assert {reason for _, reason in answer.invalid} == {"a box without a picture"}
    for find in (pg.detect, pg.segment):
        for image in (None, [picture(0), None]):
            with pytest.raises(ValueError, match="no picture to look in"):
                find(image, "dog")


def test_a_repr_says_what_was_loaded(pg):
    assert re.fullmatch(r"PaliGemma\([\d,]+ parameters, 28 x 28 pixels, float32 on cpu\)", repr(pg))
    assert repr(pg.processor) == "PaliGemmaProcessor(num_image_tokens=4, image_size=28)"
    assert repr(pg.processor.tokenizer) == f"Tokenizer({len(pg.processor.tokenizer):,} tokens)"


def test_draw_takes_an_answer_or_a_list(pg):
    image = picture(2, 90, 70)
    answer = pg.generate(image, "detect dog", 60, constrained=True)
    drawn = pg.draw(image, answer)
    assert isinstance(drawn, Image.Image) and drawn.size == (90, 70)
    assert np.array_equal(np.asarray(drawn), np.asarray(pg.draw(image, answer.detections)))
    assert not np.array_equal(np.asarray(drawn), image)


def test_a_saved_model_opens_by_its_folder(pg, tmp_path):
    from paligemma.weights.saving import save_pretrained

    save_pretrained(pg.model, tmp_path / "model", processor=pg.processor)
    pg.codec.save(tmp_path / "model" / "mask_codec.npz")
    again = load(str(tmp_path / "model"), device="cpu")
    assert same(again.generate(picture(0), "caption en", 8), pg.generate(picture(0), "caption en", 8))
    assert again.codec.num_codes == 128  # its own, nothing is downloaded
    with pytest.raises(ValueError, match="loc_scale"):
        load(str(tmp_path / "model"), loc_scale=1000)


def test_the_script_of_the_founding_document(pg, tmp_path, capsys):
    from paligemma.weights.saving import save_pretrained

    save_pretrained(pg.model, tmp_path / "model", processor=pg.processor)
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    arguments = f"--model_path {tmp_path}/model --image_file_path {tmp_path}/photo.png --max_tokens_to_generate 8"
    arguments += " --temperature 0.8 --top_p 0.9 --do_sample False --only_cpu True"
    main([*arguments.split(), "--prompt", "caption en"])
    out, err = capsys.readouterr()
    assert out == pg.generate(picture(0), "caption en", 8).text + "\n"
    assert err == "note: stopped after 8 tokens; --max_tokens_to_generate allows more\n"

    main([*arguments.replace("--do_sample False", "--do_sample True").split(), "--prompt", "caption en"])
    assert capsys.readouterr().out.endswith("\n")

    with pytest.raises(SystemExit) as stop:
        main([*arguments.replace("photo.png", "none.png").split(), "--prompt", "caption en"])
    assert stop.value.code == 1
    assert "none.png: no such file" in capsys.readouterr().err

    swapped = ["--prompt", f"{tmp_path}/photo.png", "--image_file_path", "caption en"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments.split(), *swapped])
    assert stop.value.code == 2
    assert "photo.png': it has changed places with --image_file_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image_file_path", "none.png"], "none.png: no such file"),
        (
            ["--image_file_path", "photo.png", "--do_sample", "True", "--temperature", "0"],
            "temperature is 0.0",
        ),
        (["--image_file_path", "photo.png", "--max_tokens_to_generate", "0"], "max_new_tokens is 0, expected"),
    ],
)
def test_the_script_tells_mistakes_before_the_model_is_loaded(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(0)).save("photo.png")
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(SystemExit) as stop:
        main(["--prompt", "caption en", *options])
    assert stop.value.code == 1 and said in capsys.readouterr().err


def test_the_script_is_silent_where_nobody_reads_on(tmp_path):
    """As in `... | head`."""
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "paligemma.inference", "--prompt", "caption en", "--only_cpu", "True"]
    command += ["--image_file_path", str(tmp_path / "photo.png")]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_script_explains_itself():
    command = [sys.executable, "-m", "paligemma.inference", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--max_tokens_to_generate" in result.stdout
