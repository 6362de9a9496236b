"""The page: one file that needs nothing else, whose numbers are those of the library."""

import base64
import json
import math
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from typer.testing import CliRunner

import paligemma
from paligemma import explore
from paligemma.cli.main import app
from paligemma.explore.stages import Stage, duration
from paligemma.tiny.renderer import render

SCENE = "examples/scene.png"


def opened(path):
    """(meta, arrays) of a page, decoded as `view.js` does."""
    text = path.read_text(encoding="utf-8")

    def script(name):
        return re.search(f'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.S)[1]

    meta, packed = json.loads(script("meta")), zlib.decompress(base64.b64decode(script("arrays")))
    arrays = {
        name: np.frombuffer(packed, a["dtype"], offset=a["offset"], count=a["bytes"] // np.dtype(a["dtype"]).itemsize)
        .reshape(a["shape"])
        for name, a in meta["arrays"].items()
    }  # fmt: skip
    return text, meta, arrays


def weights_of(stored):
    return torch.from_numpy((stored.astype(np.float32) / 255) ** 2)


@pytest.fixture(scope="module")
def look(tiny):
    return explore.look(tiny, SCENE, "caption en")


@pytest.fixture(scope="module")
def whole_page(look, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "look.html"
    assert explore.page(look, path) == {}
    return path


def test_its_numbers_are_those_of_the_library(look, whole_page):
    _, meta, arrays = opened(whole_page)
    weights = explore.attention(look).weights
    S = len(look.input_ids)
    order = [*look.image_columns.tolist(), *range(look.first_text, S)]
    rows = torch.cat([weights.mean(1, keepdim=True), weights], dim=1)  # the mean of the heads first
    assert_close(weights_of(arrays["attention"]), rows[..., order], atol=0.004, rtol=0)
    assert meta["answer"] == look.tokens[look.first_answer :] and meta["text"] == look.tokens[look.first_text :]
    assert_close(torch.tensor(arrays["logprobs"]), look.logprobs)
    assert_close(torch.tensor(arrays["drop"]), explore.knock_out(look).drop, atol=1e-5, rtol=0)
    words = explore.lens(look, k=1, columns=look.image_columns.tolist())
    decode = look.pg.processor.tokenizer.decode
    assert meta["words"][arrays["words"][5, 27]] == decode([int(words.ids[5, 27, 0])])
    first = meta["routes"][0]
    found = explore.routes(look, first["token"])
    assert_close(torch.tensor(arrays["routes"][: found.change.numel()]), found.change.flatten(), atol=1e-5, rtol=1e-5)
    assert whole_page.stat().st_size < 150_000


def test_it_needs_no_network(whole_page):
    text = whole_page.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text) and "fetch(" not in text and "XMLHttpRequest" not in text
    screens = re.findall(r'<section id="([a-z-]+)">', text)
    assert screens == ["flow", "attention", "words", "knock-out", "locations", "routes"]
    for section in re.findall(r"<section.*?</section>", text, re.S):
        assert section.count('class="what"') == 1 and section.count('class="not"') == 1  # and what it does not prove


def test_tokens_and_prompts_are_inert(tiny, tmp_path):
    evil = '</script><img src=x onerror="alert(1)">{{arrays}}'
    look = explore.look(tiny, SCENE, "caption en " + evil, "a " + evil)
    explore.page(look, tmp_path / "look.html", knock_out=False)
    text, meta, _ = opened(tmp_path / "look.html")
    assert "<img" not in text and "".join(meta["answer"]) == "a " + evil
    assert text.count("<script") == text.count("</script>") == 3
    assert list(meta["left_out"]) == ["knock-out"]
    assert re.fullmatch(r"not computed: .* a pass .* for every patch, about \d+ s", meta["left_out"]["knock-out"])


def test_of_many_heads_the_best_eight_are_kept_beside_the_mean_of_all(make_pg, picture, tmp_path):
    """As in PaliGemma 2 10b, which has 16."""
    look, path = (
        explore.look(make_pg("gemma", num_attention_heads=16), picture, "caption en", "a dog"),
        tmp_path / "page",
    )
    left_out, most = {}, 8_000_000
    while "heads" not in left_out:
        left_out = explore.page(look, path, max_bytes=most, knock_out=False, routes=False)
        most = path.stat().st_size - 100
    assert left_out["heads"] == "8 of 16 heads are kept; the mean is that of all"
    _, meta, arrays = opened(path)
    stored, weights = weights_of(arrays["attention"]), explore.attention(look).weights
    assert stored.shape[1] == 9 and len(meta["heads"]) == 8
    on_text = [*range(look.first_text, len(look.input_ids))]
    rows = torch.cat([weights.mean(1, keepdim=True), weights[:, meta["heads"]]], dim=1)[..., on_text]
    assert_close(stored[..., meta["attention_patches"] :], rows, atol=0.004, rtol=0)


def test_the_flow_of_a_page_is_that_of_its_row(make_pg, picture, tmp_path):
    look = explore.look(make_pg("gemma"), (picture, picture), "caption en", "a dog")
    explore.page(look, tmp_path / "page", knock_out=False, routes=False)
    _, meta, _ = opened(tmp_path / "page")
    shapes = {name: shape for stage in meta["flow"] for name, shape in stage["shapes"].items()}
    assert shapes["input_ids"] == [1, look.first_answer]


def test_too_large_a_page_is_made_coarser_and_says_so(look, tmp_path):
    path = tmp_path / "look.html"
    explore.page(look, path, knock_out=False)
    # Half a kilobyte less: the times of the first screen have other digits in each run.
    left_out = explore.page(look, path, max_bytes=path.stat().st_size - 500, knock_out=False)
    text, meta, arrays = opened(path)
    assert meta["pool"] == 2 and "2 x 2 patches share one number" in left_out["attention"]
    assert meta["left_out"] == left_out and "2 x 2 patches" in text
    weights = explore.attention(look).weights[..., look.image_columns].sum(-1)
    # Sixteen numbers, each rounded by .004 at most.
    stored = weights_of(arrays["attention"])[:, 1:]
    assert_close(stored[..., : meta["attention_patches"]].sum(-1), weights, atol=0.03, rtol=0)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"the page would have .* bytes, at most 1,000 were asked for: raise max_bytes"
    ):
        explore.page(look, path, max_bytes=1000, knock_out=False)
    assert path.read_bytes() == before  # an old page is as it was


def test_comparing_two_pictures_adds_a_screen(tiny, tmp_path):
    twins = [
        Image.fromarray(render(5, "val", things=[("car", tint)], sign=0.0, sign_only=0.0).image)
        for tint in ("red", "blue")
    ]
    a, b = [explore.look(tiny, twin, "answer en what color is the car ?") for twin in twins]
    explore.page(a, tmp_path / "look.html", compare=b, knock_out=False)
    text, meta, arrays = opened(tmp_path / "look.html")
    assert '<section id="compare">' in text and meta["compare"]["names"][0] == "image"
    assert arrays["restored"][0, 0] == pytest.approx(1, abs=0.05) and arrays["per_patch"].shape == (6, a.grid**2)
    done = []  # refused before the long work
    with pytest.raises(ValueError, match="answered both 'red': there is no word in which they differ"):
        explore.page(a, tmp_path / "look.html", compare=a, progress=lambda *counts: done.append(counts))
    assert done == []


def test_times_are_rounded_to_a_unit_that_is_read_easily():
    stages = [Stage("decoder layers (prefill)", "", [], {}, ms=2000)]
    said = [duration(stages, passes) for passes in (0, 16, 256, 4096)]
    assert said == ["about 1 s", "about 32 s", "about 9 min", "about 2.3 h"]


# ---------------------------------------------------------------------------------------------- the command


def command(*arguments):
    return CliRunner().invoke(app, ["explore", *arguments], catch_exceptions=False)


def test_the_command_writes_a_page(tmp_path):
    done = command("caption en", SCENE, "--out", str(tmp_path / "look.html"), "--answer", "a green book")
    assert done.exit_code == 0 and done.stdout == ""
    assert "written: " in done.stderr and (tmp_path / "look.html").stat().st_size < 150_000


def test_the_command_prints_numbers():
    done = command("detect book", SCENE, "--json", "--no-knock-out")
    numbers = json.loads(done.stdout)
    assert numbers["look"]["tokens"][numbers["look"]["grid"] ** 2] == "<bos>" and numbers["knock_out"] is None
    assert [edge["name"] for edge in numbers["locations"]] == ["y0", "x0", "y1", "x1"]
    assert [stage["name"] for stage in numbers["flow"]][-1] == "one more token"
    assert len(numbers["routes"][0]["names"]) == len(numbers["routes"][0]["change"])
    assert np.allclose(np.sum(numbers["attention"]["share"], -1), 1, atol=1e-5)


def test_the_command_rounds_weights_as_run_does():
    done = command("caption en", SCENE, "--json", "--answer", "a", "--quantize", "bf16", "--device", "cpu")
    assert done.exit_code == 0 and json.loads(done.stdout)["look"]["answer"] == "a"


def test_coarse_knock_outs_are_of_blocks_and_the_page_says_so(tmp_path):
    page = tmp_path / "look.html"
    done = command("caption en", SCENE, "--out", str(page), "--answer", "a green", "--coarse")
    assert done.exit_code == 0 and "knock-out: of 4 x 4 blocks of patches" in done.stderr
    _, meta, arrays = opened(page)
    grid = math.isqrt(len(arrays["drop"]))
    drop, of = arrays["drop"].reshape(grid, grid, -1), np.arange(grid) * 4 // grid  # of: the block of a row or column
    first = np.searchsorted(of, of)  # the first row or column of the same block
    assert meta["knock_out_grid"] == 4 and (drop == drop[first][:, first]).all() and len(np.unique(drop[..., 0])) > 4
    done = command("caption en", SCENE, "--json", "--answer", "a green", "--coarse")
    knocked_out = json.loads(done.stdout)["knock_out"]
    assert np.allclose(knocked_out["drop"], arrays["drop"], atol=1e-5)
    assert len(knocked_out["filled_with"]) == grid**2 // 8


@pytest.mark.parametrize("choice", [[], ["--coarse"]])
def test_the_steps_are_run_once_for_the_note_and_the_page(choice, tmp_path, monkeypatch):
    """Each time, an official size on a CPU takes half a minute."""
    flow, runs = explore.flow, []
    for place in ("paligemma.explore.flow", "paligemma.explore.rendering.flow"):
        monkeypatch.setattr(place, lambda *given: runs.append(given) or flow(*given))
    for place in ("paligemma.weights.published", "paligemma.explore.stages"):  # wherever it is asked
        monkeypatch.setattr(f"{place}.published_name", lambda config: "an official one", raising=False)
    done = command("caption en", SCENE, "--out", str(tmp_path / "a.html"), "--answer", "a green", *choice)
    assert done.exit_code == 0 and len(runs) == 1


@pytest.mark.parametrize("choice, said", [([], 1), (["--no-knock-out"], 1), (["--coarse"], 1)])
def test_of_an_official_size_it_is_said_once_what_is_not_computed(choice, said, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma.explore.stages.published_name", lambda config: "an official one")
    done = command("caption en", SCENE, "--out", str(tmp_path / "a.html"), "--answer", "a green", *choice)
    assert done.exit_code == 0 and done.stderr.count("routes") == said
    assert len(re.findall(r"about \d+ s", done.stderr)) == 1  # how long they take


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("paligemma.inference.load", None)
    with pytest.raises(OSError, match=r"--out .*look.html cannot be written \(.*\): choose another folder"):
        command("caption en", SCENE, "--out", str(tmp_path / "file" / "look.html"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --out page.html, or --json for the numbers"),
        (["--out", "a.html", "--json"], "give --out page.html, or --json for the numbers"),
        (["--out", "a.html", "--window", "2"], "--window is 2, expected an odd number"),
        (["--json", "--compare", "b.png"], "--compare adds a screen to the page"),
        (["--out", "a.html", "--coarse", "--no-knock-out"], "--coarse is a way to knock out"),
        (["--out", SCENE], "would replace the picture itself"),
        (["--out", "other.png", "--compare", "other.png"], "would replace the picture itself"),
        (["--out", "examples"], "examples is a folder: name a page"),
    ],
)
def test_wrong_usage_is_told_at_once(arguments, message):
    done = command("caption en", SCENE, *arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()).replace("│ ", "")


def test_a_swapped_prompt_and_picture_are_told():
    done = CliRunner().invoke(app, ["explore", SCENE, "caption en", "--out", "a.html"])
    assert done.exit_code == 2 and "the prompt comes first" in done.stderr


def test_an_answer_that_begins_another_is_named(tiny, tmp_path):
    a = explore.look(tiny, SCENE, "caption en", "a green")
    b = explore.look(tiny, SCENE, "caption en", "a green book")
    with pytest.raises(ValueError, match="'a green' and 'a green book', one the beginning of the other"):
        explore.page(a, tmp_path / "look.html", compare=b, knock_out=False)


def test_answers_that_differ_in_a_byte_are_compared(make_pg, picture, tmp_path):
    """A character outside the vocabulary is several byte tokens, and one of them is no text by itself."""
    pg, path = make_pg("gemma"), tmp_path / "look.html"
    a, b = explore.look(pg, picture, "caption en", "a 日"), explore.look(pg, picture[::-1], "caption en", "a 明る")
    explore.page(a, path, compare=b, knock_out=False, routes=False)
    _, meta, arrays = opened(path)
    assert meta["compare"]["said"].startswith("This picture says '<0x97>', the other '<0x98>': ")
    ids_a, ids_b = a.answer_ids.tolist(), b.answer_ids.tolist()
    token = next(t for t in range(len(ids_a)) if ids_a[t] != ids_b[t])
    short = explore.look(pg, picture[::-1], "caption en", "a 明")  # as many tokens as the first
    expected = explore.patch(a, short, token, patches=True)
    assert_close(torch.tensor(arrays["restored"]), expected.restored, atol=1e-4, rtol=1e-4)
    assert_close(torch.tensor(arrays["per_patch"]), expected.per_patch, atol=1e-4, rtol=1e-4)


def test_another_prompt_is_not_compared(tiny, look, tmp_path):
    with pytest.raises(ValueError, match="patching needs the same prompt"):
        explore.page(look, tmp_path / "a", compare=explore.look(tiny, SCENE, "caption de", "a dog"), knock_out=False)


@pytest.mark.filterwarnings("error")
def test_a_page_of_an_empty_answer(make_pg, picture, tmp_path):
    look = explore.look(make_pg("gemma", num_attention_heads=16), picture, "caption en", "")
    assert explore.page(look, tmp_path / "look.html") == {}


def test_the_flow_names_the_part_that_runs(picture):
    """A part may be replaced at load, also by one from elsewhere."""
    config = paligemma.load("tiny", device="cpu").model.config
    linear = torch.nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
    pg = paligemma.load("tiny", device="cpu", extra={"multi_modal_projector": torch.nn.Sequential(linear)})
    stage = next(stage for stage in explore.flow(pg, picture, "caption en") if stage.name == "norm and projector")
    assert stage.calls == ["Sequential.forward"]
    assert re.fullmatch(r"torch/nn/modules/container.py:\d+", stage.file)
