"""The command line: the answer alone on stdout, talk on stderr, one line for an error, exit codes 0, 1 and 2."""

import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from make_tokenizer import build_tokenizer
from PIL import Image
from reference import randomize, tiny_config
from typer.main import get_command

from paligemma.answers.mask_codec import MaskCodec
from paligemma.answers.results import Detection
from paligemma.cli import main as cli
from paligemma.fast.swap import MODES
from paligemma.inference import Answer, PaliGemma, load
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tiny.world import STYLES, VARIED_STYLES
from paligemma.tokenizer import load_tokenizer
from paligemma.weights.info import in_units
from paligemma.weights.loading import DTYPES
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = load_tokenizer(build_tokenizer(folder / "tokenizer"))
    rows = (len(tokenizer) + 63) // 64 * 64
    model = PaliGemmaForConditionalGeneration(
        tiny_config("gemma", vocab_size=rows, image_token_index=tokenizer.image_token_id)
    )
    randomize(model)
    save_pretrained(model, folder / "model", processor=PaliGemmaProcessor(tokenizer, 4, 28))
    torch.manual_seed(0)
    codec = MaskCodec(embedding_dim=8, encoder_widths=(4, 4, 4, 4), decoder_widths=(4, 4, 4, 4, 4))
    codec.save(folder / "model" / "mask_codec.npz")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[::-1]).save(folder / "b.png")
    return folder


@pytest.fixture
def paligemma(folder, monkeypatch, capsys):
    """Runs a command in this process: `code, out, err = paligemma("run", "caption en", "a.png")`."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["paligemma", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def test_run_prints_the_answer_and_nothing_else(paligemma, folder):
    code, out, err = paligemma("run", "caption en", "a.png", "--model", "model", "--max-new-tokens", "6")
    assert code == 0
    assert out == load("model").generate("a.png", "caption en", 6).text + "\n"
    assert "small world" not in err  # that note belongs to the embedded model


def test_on_a_terminal_the_answer_comes_in_pieces_and_a_spent_budget_is_noted(paligemma, monkeypatch):
    asked = ("run", "caption en", "a.png", "--model", "model", "--max-new-tokens", "6")
    whole = paligemma(*asked)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, err = paligemma(*asked)
    assert (code, out) == whole[:2]
    assert "note: a.png: stopped after 6 tokens; --max-new-tokens allows more" in err
    assert "note: a.png: stopped after 6 tokens" in whole[2]


def test_run_takes_many_pictures_and_one_from_stdin(paligemma, folder):
    short = ("--model", "model", "--max-new-tokens", "6")
    _, both, _ = paligemma("run", "ocr", "a.png", "b.png", *short)
    _, a, _ = paligemma("run", "ocr", "a.png", *short)
    _, b, _ = paligemma("run", "ocr", "-", *short, stdin=(folder / "b.png").read_bytes())
    assert both.splitlines() == [f"{n}.png: {line}" for n, out in (("a", a), ("b", b)) for line in out.splitlines()]


def test_run_takes_data_urls(paligemma, folder, tmp_path):
    url = "data:image/png;base64," + base64.b64encode((folder / "b.png").read_bytes()).decode()
    assert len(url) > 5000
    asked = ("--model", "model", "--max-new-tokens", "6")
    _, b, _ = paligemma("run", "ocr", "b.png", *asked)
    assert paligemma("run", "ocr", url, *asked)[:2] == (0, b)
    found = ("--free", "--save", str(tmp_path / "found"))
    code, _, err = paligemma("run", "detect dog", url, "b.png", *asked, *found)
    assert (
        code == 0
        and len(err) < 1000
        and sorted(p.name for p in (tmp_path / "found").iterdir()) == ["b.png", "picture.png"]
    )
    code, out, _ = paligemma("run", "ocr", url, *asked, "--json")
    assert json.loads(out)["image"] == url
    code, _, err = paligemma("run", "ocr", url[:3000], *asked)
    assert code == 1 and "the data: URL is damaged or truncated" in err and len(err) < 300


def test_each_line_names_its_picture_and_where_nothing_is_found_there_is_none(paligemma, monkeypatch):
    box = Detection("dog", (1, 2, 3, 4), 0.5)
    answers = {
        "detect dog": [Answer("...", [], [], 0.5, True, [box, box]), Answer("", [], [], 0.9, True)],
        "ocr": [Answer("one\ntwo", [], [], 0.5, True), Answer("", [], [], 0.9, True)],
        "detect cat": [Answer("", [], [], 0.0, False)] * 2,
    }
    monkeypatch.setattr(PaliGemma, "generate", lambda self, images, prompt, **_: answers[prompt][-len(images) :])
    asked = ("a.png", "b.png", "--model", "model")
    _, out, err = paligemma("run", "detect dog", *asked)
    assert out == "a.png: dog  [1 2 3 4]  0.50\n" * 2 and err == "note: b.png: nothing found\n"
    assert paligemma("run", "detect dog", *asked[1:])[1:] == ("", "note: b.png: nothing found\n")
    assert paligemma("run", "ocr", *asked)[1:] == ("a.png: one\na.png: two\nb.png: \n", "")
    assert paligemma("run", "ocr", *asked[1:])[1:] == ("\n", "")
    _, out, err = paligemma("run", "detect cat", *asked)  # whether there is one is not known
    assert out == "" and "nothing found" not in err and "b.png: stopped after 512 tokens" in err


def test_boxes_that_repeat_until_the_budget_ends_are_noted(paligemma, monkeypatch):
    box = Detection("dog", (1, 2, 30, 40), 0.5)
    given = []
    answer = Answer("...", [], [], 0.5, False, [box] * 3)
    monkeypatch.setattr(PaliGemma, "generate", lambda self, *_, **options: given.append(options) or [answer])
    asked = ("run", "detect dog", "a.png", "--model", "model")
    _, out, err = paligemma(*asked)
    note = "note: a.png: stopped after 512 tokens; 2 of 3 boxes repeat an earlier one, which --forbid-repeats prevents"
    assert out.count("dog") == 3 and err == note + "\n"
    paligemma(*asked, "--forbid-repeats")
    assert [options["forbid_repeats"] for options in given] == [False, True]
    for wrong in (("run", "ocr", "a.png", "--forbid-repeats"), (*asked, "--forbid-repeats", "--free")):
        code, _, err = paligemma(*wrong)
        assert code == 2 and "rule of their grammar" in " ".join(err.split())


def test_json_has_the_promised_keys(paligemma):
    code, out, _ = paligemma(
        "run", "segment dog", "a.png", "b.png", "--model", "model", "--json", "--max-new-tokens", "50"
    )
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert list(first) == ["image", "prompt", "text", "score", "finished", "detections", "segments", "invalid"]
    assert (first["image"], second["image"]) == ("a.png", "b.png")
    mask = first["segments"][0]["mask"]
    assert {"label", "box", "score"} <= set(first["segments"][0])
    assert mask["size"] == [48, 64] and sum(mask["counts"]) == 48 * 64


def test_boxes_are_lines_and_can_be_drawn(paligemma, folder, tmp_path):
    code, out, err = paligemma(
        "run",
        "detect dog ; cat",
        "a.png",
        "--model",
        "model",
        "--max-new-tokens",
        "40",
        "--save",
        str(tmp_path / "out.png"),
    )
    assert code == 0
    assert all(line.split("  ")[0] in ("dog", "cat") for line in out.splitlines()) and out
    assert Image.open(tmp_path / "out.png").size == (8 * 64, 8 * 48)  # small pictures are enlarged
    assert "out.png" in err
    paligemma(
        "run",
        "detect dog",
        "a.png",
        "b.png",
        "--model",
        "model",
        "--max-new-tokens",
        "20",
        "--save",
        str(tmp_path / "all"),
    )
    assert sorted(os.listdir(tmp_path / "all")) == ["a.png", "b.png"]


def test_an_answer_without_boxes_is_not_drawn(paligemma, tmp_path):
    """Other answers than those to detect and segment may have some, so it is known only in the end."""
    asked = ("a.png", "--model", "model", "--max-new-tokens", "6", "--save", str(tmp_path / "out.png"))
    code, _, err = paligemma("run", "ocr", *asked)
    assert code == 0 and "note: a.png: not drawn, the answer has no boxes" in err and "drawn: " not in err
    assert not (tmp_path / "out.png").exists()


def test_free_decoding_and_sampling_are_options(paligemma):
    base = ("run", "detect dog", "a.png", "--model", "model", "--max-new-tokens", "20", "--json")
    texts = {
        json.loads(paligemma(*base, *extra)[1])["text"]
        for extra in ([], ["--free"], ["--free", "--temperature", "3", "--seed", "1"], ["--free", "--beams", "2"])
    }
    assert len(texts) >= 3
    sampled = (
        "run",
        "ocr",
        "a.png",
        "--model",
        "model",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--seed",
        "7",
        "--max-new-tokens",
        "8",
    )
    assert paligemma(*sampled)[1] == paligemma(*sampled)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0"], "leave it out for greedy"),
        (["--temperature", "-1"], "more than 0"),
        (["--top-p", "0"], "(0, 1]"),
        (["--top-p", "1.5"], "(0, 1]"),
        (["--top-k", "0"], "top-k"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--loc-scale", "1000"], "1024 or 1023"),
        (["--beams", "2", "--temperature", "1"], "choose one"),
        (["--seed", "1"], "--seed is for sampling"),
        (["--seed", "1", "--beams", "2"], "--seed is for sampling"),
        (["--free"], "--free is for detect and segment"),
        (["--dtype", "int3"], "'int3', expected bfloat16, float16, float32"),
        (["--device", "tpu"], "'tpu', expected cuda, mps, cpu"),
        (["--quantize", "int3"], "'int3', expected int8, int4, bnb-int8, nf4, bf16"),
        (["--device-map", "balanced"], "'balanced', expected auto"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(paligemma, options, message):
    code, out, err = paligemma("run", "ocr", "a.png", "--model", "model", *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ocr", "nothing.png", "--model", "model"], "nothing.png: no such file"),
        (["ocr", "model/config.json", "--model", "model"], "not a picture"),
        (["ocr", "a.png", "--model", "./no/such/folder"], "no/such/folder"),
        (["ocr", "a.png", "--model", "model", "--device", "cuda:7"], "cuda:7"),
        (["ocr", "a.png", "--model", "model", "--max-new-tokens", "9000"], "positions"),
    ],
)
def test_what_fails_exits_with_1_in_one_line_without_a_traceback(paligemma, arguments, message):
    code, out, err = paligemma("run", *arguments)
    assert (code, out) == (1, "")
    assert message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "rows.jsonl", "--out", "out", "--schedule", "sine"], "expected one of cosine, linear"),
        (["train", "--data", "rows.jsonl", "--out", "out", "--lr", "-1"], "lr is -1, expected a number above 0"),
        (["tiny", "scenes", "--out", "out", "--split", "mine"], "'mine', expected train, val, test, heldout, twemoji"),
        (["convert", "model", "out", "--dtype", "int3"], "'int3', expected bfloat16, float16, float32"),
        (
            ["quantize", "model", "out", "--int8", "--dtype", "float16"],
            "int8 layers compute in bfloat16 or float32, not in float16",
        ),
    ],
)
def test_other_commands_tell_wrong_usage_too(paligemma, folder, arguments, message):
    code, out, err = paligemma(*arguments)
    assert (code, out) == (2, "") and message in " ".join(err.replace("│", " ").split())
    assert not (folder / "out").exists()


def test_the_names_that_options_know_are_those_of_the_modules():
    """They are written out, since `--help` must not import torch."""
    for command, option, names in (
        ("run", "dtype", DTYPES),
        ("convert", "dtype", DTYPES),
        ("quantize", "dtype", DTYPES),
        ("run", "quantize", MODES),
        ("scenes", "split", {**STYLES, **VARIED_STYLES}),
        ("run", "device", ("cuda", "mps", "cpu")),
    ):
        top = get_command(cli.app)
        (found,) = [p for p in {**top.commands, **top.commands["tiny"].commands}[command].params if p.name == option]
        assert all(found.callback(None, found, name) == name and name in found.help for name in names)
        with pytest.raises(typer.BadParameter) as refused:
            found.callback(None, found, "?")
        assert len(refused.value.message.split("expected ")[1].split(", ")) == len(names)


@pytest.mark.parametrize("option", [("--apart",), ("--most", "2"), ("--questions", "3")])
def test_options_of_counting_by_color_are_for_that_task(paligemma, folder, option):
    code, _, err = paligemma("tiny", "scenes", "--count", "1", "--out", "scenes", *option)
    assert code == 2 and "are for --task count_color" in err
    assert not (folder / "scenes").exists()


def test_a_closed_stdin_is_no_picture(folder, tmp_path):
    command = [sys.executable, "-m", "paligemma", "run", "ocr", "-", "--model", "model"]
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=folder, capture_output=True, text=True)
    assert (closed.returncode, closed.stdout) == (1, "")
    assert closed.stderr.strip() == "error: '-' stands for a picture on stdin, and stdin is closed"


def test_what_the_system_refuses_is_named_without_its_number(paligemma, folder):
    code, _, err = paligemma("convert", "model", "a.png/copy")
    assert code == 1 and "a.png" in err and "[Errno" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_a_full_disk_is_told_without_a_number_and_named(folder):
    command = [sys.executable, "-m", "paligemma", "run", "ocr", "a.png", "--model", "model", "--max-new-tokens", "1"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "error: stdout: No space left on device\n")


def test_a_large_picture_is_answered_without_a_warning(folder):
    Image.new("1", (10_000, 9_000)).save(folder / "large.png")  # beyond Pillow's limit, and within twice that
    command = [
        sys.executable,
        "-m",
        "paligemma",
        "run",
        "ocr",
        "large.png",
        "--model",
        "model",
        "--max-new-tokens",
        "1",
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and "Warning" not in result.stderr


def test_labels_without_spaces_around_the_semicolon_get_a_note(paligemma):
    asked = ("a.png", "--model", "model", "--max-new-tokens", "8")
    assert "detect dog ; cat" in paligemma("run", "detect dog;cat", *asked)[2]
    assert "detect dog ; cat" not in paligemma("run", "detect dog ; cat", *asked)[2]


def test_labels_are_suggested_once(paligemma):
    err = paligemma("run", "detect dog;dog ; cat", "a.png", "--model", "model", "--max-new-tokens", "8")[2]
    assert "'detect dog ; cat' may find more" in err


@pytest.mark.parametrize(
    ("prompt", "learned"),
    [
        ("  detect   dog  ", "'detect dog'"),
        ("caption  en", "'caption en'"),
        ("detect dog  ;  cat", "'detect dog ; cat'"),
    ],
)
def test_other_spaces_than_the_model_learned_get_a_note(paligemma, prompt, learned):
    err = paligemma("run", prompt, "a.png", "--model", "model", "--max-new-tokens", "8")[2]
    assert f"note: the model learned prompts with single spaces, and none at the ends: {learned}" in err


def test_a_long_prompt_is_not_quoted_whole(paligemma):
    for prompt in ("what is this " * 300, "detect " + "dog;" * 300 + "cat"):
        err = paligemma("run", prompt, "a.png", "--model", "model", "--max-new-tokens", "2")[2]
        assert "note: " in err and all(len(line) < 400 for line in err.splitlines())


@pytest.mark.parametrize("prompt", ["detect", "segment ", "detect dog ;"])
def test_a_prompt_without_labels_is_wrong_usage(paligemma, prompt):
    code, out, err = paligemma("run", prompt, "a.png", "--model", "model")
    assert (code, out) == (2, "") and "name at least one thing to look for" in " ".join(err.split())
    asked = ("--model", "model", "--max-new-tokens", "8")
    assert paligemma("run", prompt, "a.png", "--free", *asked)[0] == 0  # without the grammar, which needs them


def test_labels_parted_by_commas_get_a_note(paligemma):
    asked = ("a.png", "--model", "model", "--max-new-tokens", "8")
    err = " ".join(paligemma("run", "detect dog, book", *asked)[2].split())
    assert err.count("comma") == 1 and "'detect dog ; book' asks for each" in err
    assert "as one label" not in paligemma("run", "detect dog ; book", *asked)[2]


def test_a_prompt_of_no_known_task_is_answered_with_a_note_on_stderr(paligemma):
    asked = ("a.png", "--model", "model", "--max-new-tokens", "4")
    for prompt in ("wo ist der Hund", "", "Caption en"):
        code, out, err = paligemma("run", prompt, *asked)
        assert code == 0 and "known task" not in out and err.count("\n") <= 2
        assert f"{prompt!r} begins with no known task (caption, cap, describe, answer," in err
    for prompt in ("caption de", "  ocr", "detect dog", "question en red"):
        assert "known task" not in paligemma("run", prompt, *asked)[2]


def test_the_embedded_model_names_its_own_prompts(paligemma):
    _, out, err = paligemma("run", "describe en", "a.png", "--max-new-tokens", "2")
    assert "'caption en', 'answer en QUESTION', 'ocr'" in err and "QUESTION" not in out
    assert "QUESTION" not in paligemma("run", "caption en", "a.png", "--max-new-tokens", "2")[2]


def test_a_quantised_checkpoint_is_a_folder(paligemma, tmp_path):
    code, _, err = paligemma("quantize", "model", str(tmp_path / "small.npz"), "--int8")
    assert code == 2 and "folder" in err and not (tmp_path / "small.npz").exists()


def test_debug_shows_the_traceback(folder):
    command = [sys.executable, "-m", "paligemma", "--debug", "run", "ocr", "nothing.png", "--model", "model"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_info_and_convert(paligemma, tmp_path):
    code, out, _ = paligemma("info", "model")
    assert code == 0 and "PaliGemma 1" in out and "weights" in out
    code, _, _ = paligemma("convert", "model", str(tmp_path / "copy.npz"))
    assert code == 0 and (tmp_path / "copy.npz").is_file()
    assert paligemma("convert", "model", str(tmp_path / "half"), "--dtype", "bfloat16")[0] == 0
    assert open_checkpoint(tmp_path / "half").dtype == torch.bfloat16


def test_what_was_written_is_said(paligemma, tmp_path):
    """In one line on stderr, also where that is no terminal."""

    def size(*files):
        return in_units(sum(file.stat().st_size for file in files))

    npz = tmp_path / "new" / "copy.npz"
    _, out, err = paligemma("convert", "model", str(npz))
    beside = "config.json, mask_codec.npz, preprocessor_config.json, tokenizer.json, tokenizer_config.json"
    assert (out, err) == ("", f"written: {npz}, {size(npz)}; beside it {beside}\n")
    for command, *options in (["convert"], ["quantize", "--int8"]):
        folder = tmp_path / command
        _, out, err = paligemma(command, "model", str(folder), *options)
        assert (out, err) == ("", f"written: {folder}, {size(*folder.iterdir())} in 6 files\n")


def test_help_answers_at_once_and_names_every_command(folder):
    code = "import sys; from paligemma.cli.main import app; app(['--help'], standalone_mode=False)\n"
    code += "assert 'torch' not in sys.modules, 'loaded torch'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("run", "info", "convert", "download", "tiny"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("fast", "options"), [(False, []), (False, ["--dtype", "bfloat16"]), (True, ["--dtype", "bfloat16"])]
)
def test_evaluate_hints_at_float32_where_bfloat16_was_asked_for_and_is_slow(paligemma, fast, options, monkeypatch):
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: fast)
    code, _, err = paligemma("evaluate", "--count", "1", *options)
    assert code == 0 and ("--dtype float32" in err) == (not fast and bool(options))


def test_info_as_json(paligemma):
    code, out, err = paligemma("info", "model", "--json")
    facts = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert facts["source"] == "model" and facts["parameters"]["total"] > 0 and facts["image_size"] == 28
