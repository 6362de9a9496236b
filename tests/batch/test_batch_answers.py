"""Rows become lines: what the model says, or why it cannot say anything. No row harms its neighbours."""

import base64
import io
import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from standins import line_of

import paligemma
from paligemma.answers.constraints import nothing_allowed
from paligemma.answers.mask_codec import MaskCodec
from paligemma.batch.answering import AnswerRows, ahead, kind_of, seed_of
from paligemma.batch.drawings import drawing_path
from paligemma.batch.pictures import bytes_of, open_picture
from paligemma.batch.row_files import list_rows
from paligemma.batch.rows import KINDS, InputRow, RowFailure, mask_of
from paligemma.batch.settings import Settings
from paligemma.engine import Engine
from paligemma.generation import TooLong

SCENE = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "scene.png")


@pytest.fixture(scope="module")
def pg():
    return paligemma.load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def scene():
    return Image.open(SCENE).convert("RGB")


def answers(pg, rows, stop=lambda: False, draw=None, **options):
    """{id: line} of some rows."""
    answer = AnswerRows(pg, Settings(**{"max_new_tokens": 12, **options}), draw)
    return {row.id: line for row, line in answer(rows, stop)}


# ---------------------------------------------------------------------------------------------- the model's answers


def test_lines_say_what_generate_says(pg):
    """Rows with different prompts and budgets run together; each has the answer that it has alone."""
    prompts = ["caption en", "detect book ; house", "answer en how many dogs are there ?", "segment book"]
    rows = [InputRow(str(k), SCENE, prompt, {"max_new_tokens": 30 + k}) for k, prompt in enumerate(prompts)]
    lines = answers(pg, rows, batch_size=3)
    for k, prompt in enumerate(prompts):
        alone = pg.generate(SCENE, prompt, 30 + k, constrained=True)
        line = lines[str(k)]
        assert (line["text"], line["finished"], line["error"]) == (alone.text, alone.finished, None)
        assert abs(line["score"] - alone.score) < 2e-4
        assert [tuple(item["box"]) for item in line["detections"]] == [item.box for item in alone.detections]
        assert line["image_size"] == [384, 384]
        for item, segment in zip(line["segments"], alone.segments, strict=True):
            assert (mask_of(item) == segment.mask).all()


def test_a_line_has_the_keys_of_json_and_five_more(pg):
    (line,) = answers(pg, [InputRow("a", SCENE, "caption en")]).values()
    of_run = ["image", "prompt", "text", "score", "finished", "detections", "segments", "invalid"]
    assert sorted(line) == sorted([*of_run, "id", "image_size", "error", "attempts", "ms"])
    assert sorted(line_of(InputRow("a", SCENE, "caption en"))) == sorted(line)  # the stand-in is like it


def test_rows_without_a_picture_and_with_two(pg):
    lines = answers(pg, [InputRow("none", None, "caption en"), InputRow("two", [SCENE, SCENE], "caption en")])
    assert lines["none"]["text"] == pg.generate(None, "caption en", 12).text and lines["none"]["image_size"] is None
    assert lines["two"]["text"] == pg.generate((SCENE, SCENE), "caption en", 12).text
    assert lines["two"]["image"] == [SCENE, SCENE]


def test_masks_as_png_and_none(pg):
    row = InputRow("a", SCENE, "segment book", {"max_new_tokens": 40})
    rle, png, none = (answers(pg, [row], masks=way)["a"]["segments"] for way in ("rle", "png", "none"))
    assert rle and (mask_of(rle[0]) == mask_of(png[0])).all() and mask_of(none[0]) is None
    assert Image.open(io.BytesIO(base64.b64decode(png[0]["mask"]["png"]))).size == (384, 384)


def test_the_official_codec_is_for_segment_rows_whatever_came_before(pg, monkeypatch):
    """It is loaded with the first of them. A row's masks must not depend on which rows this worker had before."""
    processor = paligemma.PaliGemmaProcessor.for_config(pg.processor.tokenizer, pg.model.config)
    without = paligemma.PaliGemma(pg.model, processor)
    monkeypatch.setattr(MaskCodec, "load", lambda *_: pg.codec)
    given, to_answer = [], without.to_answer

    def noted(generated, size, codec=None):
        given.append(codec)
        return to_answer(generated, size, codec=codec)

    monkeypatch.setattr(without, "to_answer", noted)
    prompts = ["caption en", "segment book", "caption en"]
    answers(without, [InputRow(str(k), SCENE, prompt) for k, prompt in enumerate(prompts)], batch_size=1)
    assert given == [None, pg.codec, None]


def test_beams_are_searched_row_by_row(pg):
    lines = answers(pg, [InputRow("a", SCENE, "caption en")], beams=2, max_new_tokens=6)
    assert lines["a"]["text"] == pg.generate(SCENE, "caption en", 6, num_beams=2).text


def test_a_sampled_row_does_not_depend_on_its_neighbours(pg):
    rows = [InputRow(str(k), SCENE, "caption en") for k in range(3)]
    options = {"temperature": 1.5, "seed": 7, "max_new_tokens": 8}
    together = answers(pg, rows, **options)
    assert answers(pg, rows[1:2], **options)["1"]["text"] == together["1"]["text"]
    assert len({seed_of(7, row.id) for row in rows}) == 3 and seed_of(None, "a") is None


def test_temperature_0_of_a_row_is_greedy(pg):
    row = InputRow("a", SCENE, "caption en", {"temperature": 0, "max_new_tokens": 6})
    assert answers(pg, [row], temperature=2.0)["a"]["text"] == pg.generate(SCENE, "caption en", 6).text


def test_top_p_of_a_row_without_a_temperature_is_greedy(pg):
    """As in `paligemma serve`. Where the run samples, the row does, with its own top_p."""
    row = InputRow("a", SCENE, "caption en", {"top_p": 0.9, "top_k": 50, "max_new_tokens": 6})
    assert answers(pg, [row], seed=3)["a"]["text"] == pg.generate(SCENE, "caption en", 6).text
    run = AnswerRows(pg, Settings(temperature=2.0, top_p=0.5, seed=3)).options(row)
    assert (run.do_sample, run.temperature, run.top_p, run.top_k) == (True, 2.0, 0.9, 50)


# ---------------------------------------------------------------------------------------------- what is wrong with it


def bad_pictures(folder, scene):
    """{name: kind} of pictures that cannot be answered."""
    file = io.BytesIO()
    scene.save(file, "PNG")
    whole = file.getvalue()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("no picture")
    Image.new("1", (13_300, 13_300)).save(folder / "bomb.png")  # 21 KB on the disk, 177 million pixels
    header = whole[:16] + bytes(8) + whole[24:]
    (folder / "no-pixels.png").write_bytes(header)
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere.png", folder / "dangling.png")
    kinds = dict.fromkeys(["truncated.png", "empty.png", "folder.png", "text.png", "no-pixels.png"], "unreadable")
    missing = dict.fromkeys(["loop.png", "dangling.png", "never-there.png"], "missing")
    return {**kinds, **missing, "bomb.png": "too_many_pixels"}


def test_every_fault_of_a_picture_has_its_kind(tmp_path, scene):
    for name, kind in bad_pictures(tmp_path, scene).items():
        with pytest.raises(RowFailure) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the command does not
            open_picture(str(tmp_path / name), max_pixels=100)
        assert caught.value.kind == kind and name in caught.value.message, name


def test_a_picture_that_needs_too_much_memory_is_that_row_alone(monkeypatch):
    monkeypatch.setattr("paligemma.batch.pictures.load_image", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(RowFailure) as caught:
        open_picture(SCENE)
    assert caught.value.kind == "out_of_memory"


def test_bad_rows_between_good_ones(pg, tmp_path, scene):
    """The neighbours of a bad row have the answers that they have without it."""
    bad = bad_pictures(tmp_path, scene)
    rows = [InputRow(name, str(tmp_path / name), "caption en") for name in list(bad)[:3]]
    rows += [InputRow("long", SCENE, "answer en " + "why " * 3000), InputRow("tag", SCENE, "<image><image> ocr")]
    rows += [InputRow("no label", SCENE, "detect "), InputRow("good", SCENE, "caption en")]
    lines = answers(pg, rows, batch_size=4)
    kinds = {name: line["error"] and line["error"]["kind"] for name, line in lines.items()}
    expected = {name: bad[name] for name in list(bad)[:3]}
    assert kinds == {**expected, "long": "prompt_too_long", "tag": "internal", "no label": "constraint", "good": None}
    assert lines["good"]["text"] == pg.generate(SCENE, "caption en", 12).text
    for line in lines.values():
        if line["error"]:
            assert line["error"]["kind"] in KINDS and line["error"]["message"]
            assert line["text"] is line["detections"] is line["score"] is None


def test_half_of_a_surrogate_pair_is_an_error_of_its_row(pg, tmp_path):
    """JSON can spell it, in the prompt or in the name of the picture. The line that says so is UTF-8."""
    prompt = r'{"id": "prompt", "image": null, "prompt": "caption \ud800"}'
    image = r'{"id": "image", "image": "\ud800.jpg", "prompt": "ocr"}'
    (tmp_path / "rows.jsonl").write_text(f"{prompt}\n{image}\n")
    lines = answers(pg, list(list_rows(str(tmp_path / "rows.jsonl"))))
    assert {name: line["error"]["kind"] for name, line in lines.items()} == {"prompt": "internal", "image": "missing"}
    assert lines["prompt"]["prompt"] == r"caption \ud800" and lines["image"]["image"].endswith(r"\ud800.jpg")
    json.dumps(lines, ensure_ascii=False).encode()


def test_a_constraint_that_fails_is_that_row_alone(pg):
    class DeadEnd:
        def allowed(self, *_):
            raise ValueError("nothing may follow")

    answer = AnswerRows(pg, Settings(max_new_tokens=6))
    answer.grammars["detect dead end"] = DeadEnd()
    rows = [InputRow("a", SCENE, "caption en"), InputRow("b", SCENE, "detect dead end"), InputRow("c", SCENE, "ocr")]
    lines = {row.id: line for row, line in answer(rows)}
    assert lines["b"]["error"]["kind"] in ("constraint", "internal") and lines["b"]["text"] is None
    assert lines["a"]["error"] is lines["c"]["error"] is None


def test_a_batch_that_does_not_fit_into_memory_is_halved(pg, monkeypatch):
    sizes, prefill = [], Engine._prefill

    def crowded(engine, rows):
        sizes.append(len(engine._running) + len(rows))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(engine, rows)

    monkeypatch.setattr(Engine, "_prefill", crowded)
    rows = [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 4}) for k in range(8)]
    lines = answers(pg, rows, batch_size=8)
    assert [lines[str(k)]["error"] for k in range(8)] == [None] * 8
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) <= 2


def test_a_row_for_which_memory_does_not_suffice_even_alone(pg, monkeypatch):
    prefill = Engine._prefill

    def crowded(engine, rows):
        if any(len(row.request.prompt) > 16 + pg.processor.num_image_tokens for row in [*engine._running, *rows]):
            raise MemoryError
        return prefill(engine, rows)

    monkeypatch.setattr(Engine, "_prefill", crowded)
    rows = [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 4}) for k in range(3)]
    lines = answers(pg, [*rows, InputRow("large", [SCENE, SCENE], "caption en")], batch_size=4)
    assert {name: line["error"] and line["error"]["kind"] for name, line in lines.items()} == {
        "0": None, "1": None, "2": None, "large": "out_of_memory",
    }  # fmt: skip


def test_an_error_of_the_whole_batch_meets_the_row_that_it_belongs_to(pg, monkeypatch):
    prefill = Engine._prefill

    def failing(engine, rows):
        if any(len(row.request.prompt) > 16 + pg.processor.num_image_tokens for row in [*engine._running, *rows]):
            raise RuntimeError("a kernel does not know what to do")
        return prefill(engine, rows)

    monkeypatch.setattr(Engine, "_prefill", failing)
    rows = [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 4}) for k in range(5)]
    rows.insert(2, InputRow("odd", [SCENE, SCENE], "caption en"))
    lines = answers(pg, rows, batch_size=3)
    assert len(lines) == 6
    assert [name for name, line in lines.items() if line["error"]] == ["odd"]
    assert lines["odd"]["error"]["message"] == "a kernel does not know what to do"


def test_pictures_that_cannot_be_encoded_together_are_encoded_in_halves(pg, monkeypatch):
    encode = pg.model.encode_image

    def crowded(pixels):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(pg.model, "encode_image", crowded)
    lines = answers(pg, [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 3}) for k in range(3)])
    assert [line["error"] for line in lines.values()] == [None] * 3


def test_pictures_that_do_not_fit_beside_rows_that_run_wait_for_them(pg, monkeypatch):
    encode, prefill, running = pg.model.encode_image, Engine._prefill, []

    def watched(engine, rows):
        running[:] = [engine]
        return prefill(engine, rows)

    def crowded(pixels):
        if running and running[0]._running:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(Engine, "_prefill", watched)
    monkeypatch.setattr(pg.model, "encode_image", crowded)
    rows = [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 3 + k}) for k in range(6)]
    lines = answers(pg, rows, batch_size=4)
    assert [line["error"] for line in lines.values()] == [None] * 6


def test_without_masks_nobody_asks_for_a_codec(pg, monkeypatch):
    """It might have to be downloaded."""
    answer = AnswerRows(pg, Settings(max_new_tokens=30, masks="none"))
    monkeypatch.setattr(type(pg), "codec", property(lambda self: pytest.fail("the codec was asked for")))
    ((_, line),) = answer([InputRow("a", SCENE, "segment book")])
    assert line["error"] is None and line["segments"]


def test_what_the_engine_refuses_is_no_matter_of_length_unless_it_says_so(pg, monkeypatch):
    refusals = iter([ValueError("row 0 already ends in eos"), TooLong("the prompt has 9 tokens")])
    admit = Engine.admit

    def refuse_two(engine, request, listener=None):
        if error := next(refusals, None):
            raise error
        return admit(engine, request, listener)

    monkeypatch.setattr(Engine, "admit", refuse_two)
    lines = answers(pg, [InputRow(name, SCENE, "caption en") for name in "abc"])
    assert lines["a"]["error"] == {"kind": "internal", "message": "row 0 already ends in eos"}
    assert lines["b"]["error"] == {"kind": "prompt_too_long", "message": "the prompt has 9 tokens"}
    assert lines["c"]["error"] is None and lines["c"]["text"]


def test_kinds_of_errors():
    assert kind_of(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out_of_memory"
    assert kind_of(nothing_allowed([], 3)) == "constraint"
    assert kind_of(TooLong("the prompt has 9 tokens")) == "prompt_too_long"
    assert kind_of(ValueError("some shape does not fit")) == "internal"
    assert kind_of(FloatingPointError("not finite")) == "internal"


# ---------------------------------------------------------------------------------------------- --dedupe, --draw, stop


def test_equal_pictures_are_answered_once(pg, tmp_path, scene, monkeypatch):
    for name in "abc":
        scene.save(tmp_path / f"{name}.png")
    scene.rotate(90).save(tmp_path / "d.png")
    rows = [InputRow(name, str(tmp_path / f"{name}.png"), "caption en") for name in "abcd"]
    rows.append(InputRow("other prompt", str(tmp_path / "a.png"), "ocr"))
    admitted, admit = [], Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda engine, request: admitted.append(1) or admit(engine, request))
    once = answers(pg, rows, dedupe=True, batch_size=2)
    assert len(admitted) == 3
    assert {name: line["text"] for name, line in once.items()} == {
        name: line["text"] for name, line in answers(pg, rows).items()
    }
    assert [once[name]["image"] for name in "abc"] == [str(tmp_path / f"{name}.png") for name in "abc"]


def test_a_failure_is_not_remembered(pg, monkeypatch):
    """Memory that ran out may be there the next time."""
    answer = AnswerRows(pg, Settings(dedupe=True))
    row = InputRow("a", SCENE, "ocr", {"max_new_tokens": 4})

    def full(pixels):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(pg.model, "encode_image", full)
        ((_, line),) = answer([row])
        assert line["error"]["kind"] == "out_of_memory"
    ((_, line),) = answer([row])
    assert line["error"] is None
    monkeypatch.setattr(pg.model, "encode_image", full)
    assert [line["error"] for _, line in answer([row])] == [None]  # an answer is


def test_drawings_keep_the_folders_of_ids(pg, tmp_path):
    rows = [InputRow(f"{folder}/x.jpg", SCENE, "detect book", {"max_new_tokens": 40}) for folder in "ab"]
    answers(pg, [*rows, InputRow("words.jpg", SCENE, "caption en")], draw=tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        "a/x.jpg.png", "b/x.jpg.png",
    ]  # fmt: skip


def test_arrays_are_known_by_all_of_their_values():
    """Printed they differ only in the corners."""
    one = np.zeros((64, 64, 3), np.uint8)
    other = one.copy()
    other[30, 30] = 255
    assert len({bytes_of(array) for array in (one, other, one.reshape(32, 128, 3), one.view(np.int8))}) == 4
    assert bytes_of(other.copy()) == bytes_of(Image.fromarray(other).quantize(2)) == bytes_of(other)


def test_rows_that_are_answered_once_are_all_drawn(pg, tmp_path):
    """Those that wait for the same answer, and those that find it there."""
    rows = [InputRow(name, SCENE, "detect book", {"max_new_tokens": 40}) for name in ("a", "b", "x/c")]
    answer = AnswerRows(pg, Settings(dedupe=True), tmp_path)
    assert [line["id"] for some in (rows[:2], rows[2:]) for _, line in answer(some)] == ["a", "b", "x/c"]
    drawn = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "x/c.png")]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(
    "name", ["../../etc/x", "/etc/x", "a/../../x", "..", "", "C:\\x", "n" * 900, "画" * 83 + ".jpg", "x\0"]
)
def test_no_id_leads_out_of_the_folder_of_drawings(tmp_path, name):
    path = drawing_path(tmp_path, name)
    assert tmp_path in path.parents and ".." not in path.parts
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert len(os.fsencode(path.name)) <= 240


def test_long_ids_with_an_equal_beginning_have_two_drawings(tmp_path):
    names = ["n" * 900, "n" * 901, "画" * 300 + "a", "画" * 300 + "b", "a\0", "a_"]
    assert len({drawing_path(tmp_path, name) for name in names}) == len(names)


@pytest.mark.parametrize("beams", [1, 2])
def test_what_cannot_be_drawn_is_an_error_that_names_the_row(pg, tmp_path, monkeypatch, beams):
    def broken(*_):
        raise ValueError("no such colour")

    monkeypatch.setattr("paligemma.batch.answering.draw_answer", broken)
    with pytest.raises(OSError, match="the answer to 'a' cannot be drawn: no such colour"):
        answers(pg, [InputRow("a", SCENE, "caption en")], draw=tmp_path, beams=beams, max_new_tokens=4)


def test_a_stop_lets_the_rows_that_run_end(pg):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 1  # after the first batch was taken

    lines = answers(
        pg, [InputRow(str(k), SCENE, "caption en", {"max_new_tokens": 3}) for k in range(6)], stop, batch_size=2
    )
    assert sorted(lines) == ["0", "1"] and all(line["text"] for line in lines.values())


def test_few_pictures_are_opened_ahead():
    from concurrent.futures import ThreadPoolExecutor

    opened = []
    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, opened.append, range(100), 4)
        next(results)
        results.close()
    assert len(opened) <= 5


# ---------------------------------------------------------------------------------------------- Predictor


@pytest.fixture(scope="module")
def predictor():
    return paligemma.Predictor("tiny", device="cpu", max_new_tokens=20)


def test_predictor_takes_its_own_prompt_where_a_row_has_none(predictor):
    out = predictor({"image": np.array([None, None], object), "prompt": np.array(["caption en", None], object)})
    assert out["error"][0] == "" and json.loads(out["error"][1])["message"] == (
        "the row has no prompt, and Predictor was given none"
    )
    predictor.prompt = "caption en"
    try:
        out = predictor({"image": np.array([None], object), "prompt": np.array([None], object)})
    finally:
        predictor.prompt = None
    assert out["error"][0] == ""


def test_predictor_adds_columns_and_raises_for_no_row(predictor, tmp_path, scene):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file = io.BytesIO()
    scene.save(file, "PNG")
    images = np.array([SCENE, str(tmp_path / "broken.png"), file.getvalue(), np.asarray(scene), None, 3.5], object)
    prompts = np.array(["detect book"] * 4 + ["caption en"] * 2)
    out = predictor({"image": images, "prompt": prompts, "name": np.arange(6)})
    assert list(out)[3:] == ["text", "score", "finished", "detections", "segments", "invalid", "error"]
    assert out["name"].tolist() == list(range(6))
    assert out["text"][0] == out["text"][2] == out["text"][3] != ""
    assert json.loads(out["detections"][0])[0]["label"] == "book"
    kinds = [json.loads(error)["kind"] if error else None for error in out["error"]]
    assert kinds == [None, "unreadable", None, None, None, "unreadable"]
    assert out["detections"][1] == "[]" and np.isnan(out["score"][1]) and not out["finished"][1]


def test_predictor_takes_the_image_column_of_hugging_face(predictor, scene):
    file = io.BytesIO()
    scene.save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": SCENE}, {"path": None}, {"other": 1}]
    out = predictor({"image": images, "prompt": ["detect book"] * 4})
    kinds = [json.loads(error)["kind"] if error else None for error in out["error"]]
    assert kinds == [None, None, "unreadable", "unreadable"]
    assert out["text"][0] == out["text"][1] == predictor({"image": [SCENE], "prompt": ["detect book"]})["text"][0]


def test_predictor_takes_one_prompt_for_all_and_says_which_columns_it_misses(predictor):
    one = paligemma.Predictor.__new__(paligemma.Predictor)
    one.prompt, one.answer = "caption en", predictor.answer
    assert one({"image": [SCENE]})["text"][0] != ""
    with pytest.raises(ValueError, match="expected the columns image and prompt, got picture"):
        predictor({"picture": [SCENE]})


def test_answers_of_a_seed_do_not_depend_on_the_batches(predictor, scene):
    """Ray cuts batches as it likes, so the place of a row in its batch says nothing."""
    settings = Settings(temperature=2.0, seed=3, max_new_tokens=8)
    one = paligemma.Predictor.__new__(paligemma.Predictor)
    one.prompt, one.answer = "caption en", AnswerRows(predictor.answer.pg, settings)
    images = [SCENE, np.asarray(scene.crop((0, 0, 100, 100))), None, "nowhere.png"]
    whole = one({"image": images})
    assert [bool(error) for error in whole["error"]] == [False, False, False, True]
    assert whole["text"].tolist() == [one({"image": [image]})["text"][0] for image in images]
    assert len(set(whole["text"])) == 4


def test_columns_have_one_type_whatever_is_in_them(predictor):
    """A block in which every row failed can be joined with one in which none did."""
    pa = pytest.importorskip("pyarrow")
    good, bad = (predictor({"image": [image], "prompt": ["caption en"]}) for image in (SCENE, "nowhere.png"))
    columns = ("text", "score", "finished", "detections", "segments", "invalid", "error")
    types = [{name: pa.array(block[name]).type for name in columns} for block in (good, bad)]
    assert types[0] == types[1]
