"""`/v1/answer`, `/v1/detect`, `/v1/segment`, `/v1/explore`, and the small endpoints."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from serving import SCENE, data_url, error_of, png, running

from paligemma.answers.formats import outline, rle_decode
from paligemma.serve.exploring import Abandoned, make_page
from paligemma.serve.openapi import schemas
from paligemma.serve.rows import Ask
from paligemma.serve.settings import Settings

IMAGE = data_url()


def test_detect(client, pg):
    reply = client.post("/v1/detect", json={"image": IMAGE, "labels": ["book", "house"]}).json()
    assert list(reply) == [
        "id", "model", "image", "image_size", "prompt", "text", "score", "finished", "box_format", "detections",
        "segments", "invalid", "usage", "timing_ms",
    ]  # fmt: skip
    expected = pg.generate(SCENE, "detect book ; house", 512, constrained=True)
    assert reply["text"] == expected.text and reply["prompt"] == "detect book ; house"
    assert reply["box_format"] == "xyxy_pixels" and reply["image_size"] == [384, 384] and reply["image"] is None
    for found, wanted in zip(reply["detections"], expected.detections, strict=True):
        assert found["label"] == wanted.label and found["box"] == list(wanted.box)
        np.testing.assert_allclose(found["edges"], wanted.edges, atol=1e-2)
    assert set(reply["timing_ms"]) == {"queue", "vision", "prefill", "decode"}
    assert reply["timing_ms"]["prefill"] > 0 and reply["timing_ms"]["decode"] > 0


def test_a_prompt_in_place_of_labels(client):
    by_labels = client.post("/v1/detect", json={"image": IMAGE, "labels": "book"}).json()
    by_prompt = client.post("/v1/detect", json={"image": IMAGE, "prompt": "detect book"}).json()
    assert by_labels["text"] == by_prompt["text"]


def test_boxes_below_the_score_are_left_out(client):
    every = client.post("/v1/detect", json={"image": IMAGE, "labels": ["book", "house"]}).json()["detections"]
    scores = sorted(item["score"] for item in every)
    limit = sum(scores) / 2
    body = {"image": IMAGE, "labels": ["book", "house"], "min_score": limit}
    kept = client.post("/v1/detect", json=body).json()
    assert [item["score"] for item in kept["detections"]] == [score for score in scores if score >= limit]
    assert "house" in kept["text"] and "book" in kept["text"]  # the text is what the model wrote


@pytest.mark.parametrize("masks", ["rle", "png", "polygon", "none"])
def test_masks_in_every_form(client, pg, masks):
    (expected,) = pg.segment(SCENE, ["house"])
    reply = client.post("/v1/segment", json={"image": IMAGE, "labels": ["house"], "masks": masks}).json()
    (found,) = reply["segments"]
    mask = found["mask"]
    if masks == "rle":
        assert (rle_decode(mask) == expected.mask).all()
    elif masks == "png":
        pixels = Image.open(io.BytesIO(base64.b64decode(mask.removeprefix("data:image/png;base64,"))))
        assert (np.asarray(pixels) == expected.mask).all()
    elif masks == "polygon":
        assert mask == outline(expected.mask).tolist()
    else:
        assert mask is None
    assert found["box"] == list(expected.box)


def test_segment_takes_the_bare_expression_of_refcoco(client, pg):
    reply = client.post("/v1/segment", json={"image": IMAGE, "prompt": "the house", "masks": "none"}).json()
    assert [s["box"] for s in reply["segments"]] == [list(s.box) for s in pg.segment(SCENE, prompt="the house")]


def test_answer(client, pg):
    question = "answer en how many dogs are there?"
    reply = client.post("/v1/answer", json={"image": IMAGE, "prompt": question, "choices": ["seven", "nine"]}).json()
    assert reply["text"] == pg.ask(SCENE, "how many dogs are there?", choices=["seven", "nine"]).text
    reply = client.post("/v1/answer", json={"image": IMAGE, "prompt": "caption en", "max_tokens": 2}).json()
    assert not reply["finished"] and reply["usage"]["completion_tokens"] == 2


def test_a_form_with_a_file(client):
    file = {"image": ("scene.png", SCENE, "image/png")}
    fields = {"labels": ["book", "house"], "min_score": "0.01", "masks": "none", "max_tokens": "400", "seed": "3"}
    reply = client.post("/v1/detect", files=file, data=fields).json()
    same = client.post("/v1/detect", json={"image": IMAGE, "labels": ["book", "house"], "min_score": 0.01}).json()
    assert reply["detections"] == same["detections"] and reply["image"] == "scene.png"


def test_boxes_refer_to_the_picture_turned_upright(client):
    image = Image.open(io.BytesIO(SCENE)).convert("RGB").resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    reply = client.post("/v1/detect", json={"image": data_url(file.getvalue(), "jpeg"), "labels": ["book"]}).json()
    assert reply["image_size"] == [200, 300]


@pytest.mark.parametrize(
    "path, fields, code, param",
    [
        ("detect", {}, "invalid_value", "labels"),
        ("detect", {"labels": ["a"], "prompt": "detect a"}, "invalid_value", "labels"),
        ("detect", {"labels": []}, "invalid_value", "labels"),
        ("detect", {"labels": ["dog", ""]}, "invalid_value", "labels[1]"),
        ("detect", {"labels": ["dog ; cat"]}, "invalid_value", "labels[0]"),
        ("detect", {"labels": ["<image>"]}, "invalid_prompt", "labels[0]"),
        ("detect", {"labels": ["<loc0001>"]}, "invalid_prompt", "labels"),
        ("detect", {"prompt": "detect <loc0001>"}, "invalid_prompt", "prompt"),
        ("detect", {"labels": [f"thing {n}" for n in range(1_000)]}, "prompt_too_long", "labels"),
        ("detect", {"prompt": f"detect {'thing ' * 3_000}"}, "prompt_too_long", "prompt"),
        ("segment", {"prompt": "thing " * 3_000}, "prompt_too_long", "prompt"),
        ("answer", {"prompt": "caption en", "choices": ["yes", " "]}, "invalid_value", "choices[1]"),
        ("detect", {"labels": [7]}, "invalid_value", "labels[0]"),
        ("detect", {"labels": {"dog": 1}}, "invalid_value", "labels"),
        ("detect", {"labels": ["half \ud83d"]}, "invalid_value", "labels[0]"),
        ("detect", {"prompt": "caption en"}, "invalid_value", "prompt"),
        ("detect", {"labels": ["a"], "masks": "gif"}, "invalid_value", "masks"),
        ("detect", {"labels": ["a"], "min_score": 2}, "invalid_value", "min_score"),
        ("detect", {"labels": ["a"], "image": None}, "no_image", "image"),
        ("detect", {"labels": ["a"], "image": 3}, "invalid_value", "image"),
        ("detect", {"labels": ["a"], "image": [IMAGE] * 5}, "too_many_images", "image"),
        ("answer", {"prompt": "caption en", "labels": ["a"]}, "unknown_field", "labels"),
        ("answer", {}, "invalid_value", "prompt"),
        ("answer", {"prompt": "caption en", "stream": True}, "unknown_field", "stream"),
        ("explore", {"prompt": "caption en", "temperature": 1}, "unknown_field", "temperature"),
        ("explore", {"prompt": "caption en", "max_tokens": 9}, "unknown_field", "max_tokens"),
    ],
)
def test_whatever_is_wrong_is_named(client, path, fields, code, param):
    content = json.dumps({"image": IMAGE, **fields})
    reply = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert error_of(reply) == (400, code, param)


def test_a_form_that_is_wrong(client):
    file = {"image": ("scene.png", SCENE)}
    assert error_of(client.post("/v1/detect", files=file, data={"labels": "a", "x": "1"}))[1:] == ("unknown_field", "x")
    wrong = {"labels": "a", "min_score": "high"}
    assert error_of(client.post("/v1/detect", files=file, data=wrong))[1:] == ("invalid_value", "min_score")
    other = {"picture": ("scene.png", SCENE)}
    assert error_of(client.post("/v1/detect", files=other, data={"labels": "a"}))[1] == "unknown_field"
    misnamed = {"image": ("https:x", b"hello")}  # no fetched picture, which would be a 422
    assert error_of(client.post("/v1/detect", files=misnamed, data={"labels": "a"})) == (400, "bad_image", "image")
    headers = {"content-type": "multipart/form-data"}
    assert error_of(client.post("/v1/detect", content=b"nothing", headers=headers))[1] == "invalid_form"


def test_a_form_may_hold_as_much_as_json(client):
    file = {"image": ("scene.png", SCENE)}
    few = {"labels": [f"thing {n % 3}" for n in range(1_000)], "max_tokens": "1"}
    assert client.post("/v1/detect", files=file, data=few).status_code == 200
    many = {"labels": [f"thing {n}" for n in range(1_001)]}
    assert error_of(client.post("/v1/detect", files=file, data=many)) == (400, "invalid_value", "labels")
    six = [("image", ("scene.png", SCENE))] * 6
    assert error_of(client.post("/v1/detect", files=six, data={"labels": "a"})) == (400, "too_many_images", "image")
    large = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)))
    text = {"image": (None, data_url(large)), "labels": (None, "a"), "max_tokens": (None, "1")}
    assert len(large) > 2**20 and client.post("/v1/detect", files=text).status_code == 200


def test_a_form_has_fewer_parts_than_would_fill_the_memory(client):
    for name in ("", "a.png"):  # fields, then files
        many = [("image", (name, b"")) for _ in range(2_001)]
        assert error_of(client.post("/v1/detect", files=many))[:2] == (400, "invalid_form")


def test_the_media_type_is_checked(client):
    for headers in ({"content-type": "text/plain"}, {}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = client.post("/v1/detect", content=b"{}", headers=headers)
        assert error_of(reply) == (415, "unsupported_media_type", "Content-Type")
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert error_of(client.post("/v1/detect", content=b"{}", headers=headers))[2] == "Content-Encoding"


def test_a_picture_is_encoded_once_for_many_questions(pg):
    with running(pg) as server, server.client() as client:
        image = data_url(png(Image.new("RGB", (40, 40), "red")))
        for prompt in ("caption en", "ocr", "detect dog"):
            assert client.post("/v1/answer", json={"image": image, "prompt": prompt}).status_code == 200
        assert server.service.cache.hits >= 2
        assert "paligemma_image_cache_hits 2.0" in client.get("/metrics").text


def test_a_row_that_no_cache_could_hold(pg):
    with running(pg, cache_memory=0.002) as server, server.client() as client:
        body = {"image": IMAGE, "prompt": "caption en", "max_tokens": 500}
        assert error_of(client.post("/v1/answer", json=body)) == (400, "invalid_value", "max_tokens")
        assert client.post("/v1/answer", json={**body, "max_tokens": 2}).status_code == 200


def test_the_page_that_looks_inside(client):
    reply = client.post("/v1/explore", json={"image": IMAGE, "prompt": "answer en how many dogs are there?"}).json()
    assert list(reply) == ["url"] and reply["url"].startswith("/explored/")
    page = client.get(reply["url"])
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    )
    assert error_of(client.get("/explored/guessed"))[0] == 404


def test_the_page_of_an_official_size_has_no_routes(pg, monkeypatch):
    """Hundreds of passes on the engine's thread, for which all rows would wait."""
    monkeypatch.setattr("paligemma.explore.stages.published_name", lambda config: "an official one")
    monkeypatch.setattr("paligemma.explore.rendering.routes_of", None)
    ask = Ask("answer en how many dogs are there ?", (), 128)
    page = make_page(pg, [Image.open(io.BytesIO(SCENE)).convert("RGB")], ask, lambda: False)
    assert b"not computed: each takes a pass of the model for every layer" in page


def test_the_answer_that_is_looked_at_keeps_to_the_limit_of_the_server(pg):
    with running(pg, max_new_tokens=3) as server, server.client() as client:
        reply = client.post("/v1/explore", json={"image": IMAGE, "prompt": "caption en"}).json()
        meta = re.search('id="meta">(.*?)</script>', client.get(reply["url"]).text, re.S)[1]
    assert len(json.loads(meta)["answer"]) == 3


def test_a_page_that_nobody_waits_for_ends_with_the_pass_that_runs(pg):
    passes = []
    with pytest.raises(Abandoned):
        make_page(
            pg, [Image.new("RGB", (8, 8))], Ask("caption en", (), 64), lambda: passes.append(0) or len(passes) > 3
        )
    assert len(passes) == 4 and not pg.model.language_model.model._forward_pre_hooks


def test_pages_are_kept_for_a_while(pg):
    with running(pg, explored_for=0.05) as server, server.client() as client:
        path = server.service.keep_explored(b"<p>page</p>")
        assert client.get(path).text == "<p>page</p>"
        server.service.explored[path] = 0, b""
        assert client.get(path).status_code == 404


def test_many_small_pages_are_kept_and_of_large_ones_the_latest(pg, monkeypatch):
    monkeypatch.setattr("paligemma.serve.service.EXPLORED_BYTES", 1_000)
    with running(pg) as server, server.client() as client:
        paths = [server.service.keep_explored(bytes(10)) for _ in range(100)]
        assert all(client.get(path).status_code == 200 for path in paths)
        paths.append(server.service.keep_explored(bytes(15)))
        assert [client.get(path).status_code for path in (paths[0], paths[1], paths[2], paths[-1])] == [
            404,
            404,
            200,
            200,
        ]


def test_small_endpoints(client, pg):
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model"
    assert model["paligemma"]["image_size"] == pg.processor.image_size
    assert client.get("/v1/models/tiny").json() == model
    assert error_of(client.get("/v1/models/other")) == (404, "model_not_found", "model")
    assert error_of(client.get("/v1/nothing"))[:2] == (404, "not_found")
    assert error_of(client.get("/v1/detect"))[:2] == (405, "method_not_allowed")


def test_metrics_name_what_happens(client):
    client.post("/v1/answer", json={"image": IMAGE, "prompt": "caption en"})
    text = client.get("/metrics").text
    for name in (
        'requests_total{code="200",route="/v1/answer"}', "cancelled_total", "rows_running", "rows_waiting",
        "queue_seconds_bucket", "time_to_first_token_seconds_count", "time_per_token_seconds_count",
        "batch_rows_count", 'tokens_total{kind="prompt"}', 'tokens_total{kind="answer"}', "cache_bytes",
        "image_cache_hits", "engine_errors_total",
    ):  # fmt: skip
        assert f"\npaligemma_{name}" in text, name


def test_the_openapi_document_names_every_path_and_field(client, server):
    document = client.get("/openapi.json").json()
    paths = {route.path for route in server.server.config.app.app.routes}
    hidden = {"/", "/static", "/openapi.json", "/explored/{page}", "/v1/models/{name:path}"}
    assert set(document["paths"]) == paths - hidden
    chat = document["components"]["schemas"]["Chat"]
    assert {"messages", "stream", "logprobs", "structured_outputs", "n"} <= set(chat["properties"])
    assert set(chat["properties"]["stream_options"]["properties"]) == {"include_usage", "include_obfuscation"}
    labels = document["components"]["schemas"]["Detect"]["properties"]["labels"]
    assert [kind["type"] for kind in labels["oneOf"]] == ["string", "array"]
    ignoring = schemas(Settings(ignore_history=True))["Chat"]["properties"]["messages"]["items"]
    assert ignoring == {"anyOf": [chat["properties"]["messages"]["items"], {}]}
    references = [part.split('"')[0] for part in client.get("/openapi.json").text.split("#/components/schemas/")[1:]]
    assert set(references) <= set(document["components"]["schemas"])
