"""Random requests: whatever is sent, the server answers with a status of its own and never with a 500."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from serving import SCENE, data_url, png

from paligemma.data.openai_chat import NEUTRAL

IMAGE = data_url(png(Image.new("RGB", (8, 8), "red")))
EXPECTED = {200, 400, 404, 413, 415, 422, 429}

words = st.sampled_from(
    ["caption en", "detect dog ; cat", "segment house", "ocr", "answer en what is this?", "<image>", "<loc0001>", ";",
     "detect", "detect ;", "segment <seg001>", "\ud83d", "\x00", "é", "👩‍👩‍👧", "\n", " ", "", "<bos>", "<eos>", IMAGE,
     "data:image/png;base64,", "data:,", "https://example.org/a.png", "file:///etc/passwd", "user", "system", "text",
     "image_url", "json_object", "tiny"]
)  # fmt: skip
texts = words | st.text(max_size=20) | st.lists(words, max_size=3).map(" ".join)
odd = [1e308, -0.0, 10**30, float("nan"), float("inf")]
numbers = st.integers(-3, 600) | st.integers() | st.floats() | st.sampled_from(odd)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
part = st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | st.just(
    {"type": "image_url", "image_url": {"url": IMAGE}}
)
parts = st.lists(part | values, max_size=4)
message = st.fixed_dictionaries({"role": st.just("user") | texts, "content": parts | texts | values})
small = st.integers(1, 4)


def mostly(strategy):
    """Mostly what belongs there, so that the checks behind the first one are reached."""
    return st.one_of(strategy, strategy, strategy, values)


known = {
    "model": st.just("tiny"), "temperature": numbers, "top_p": numbers, "top_k": numbers, "seed": numbers,
    "constrained": st.booleans(),
}  # fmt: skip
chat_bodies = st.fixed_dictionaries(
    {"messages": mostly(st.lists(message, min_size=1, max_size=1)), "max_tokens": small},
    optional={
        **{name: mostly(strategy) for name, strategy in known.items()},
        **{name: st.sampled_from([*neutral, None]) | values for name, neutral in NEUTRAL.items()},
        "stream": st.booleans(), "logprobs": st.booleans(), "stream_options": values,
        "response_format": mostly(st.sampled_from([{"type": "json_object"}, {"type": "text"}])),
        "structured_outputs": mostly(st.fixed_dictionaries({"choice": st.lists(texts, max_size=3)})),
        "user": texts, "other": values,
    },
)  # fmt: skip
native_bodies = st.fixed_dictionaries(
    {"image": mostly(st.just(IMAGE)), "max_tokens": small},
    optional={
        **{name: mostly(strategy) for name, strategy in known.items()},
        "prompt": mostly(texts), "labels": mostly(st.lists(texts, min_size=1, max_size=3)),
        "min_score": mostly(st.floats(0, 1)), "masks": mostly(st.sampled_from(["rle", "png", "polygon", "none"])),
        "choices": mostly(st.lists(texts, max_size=3)), "other": values,
    },
)  # fmt: skip
json_requests = st.tuples(st.just("/v1/chat/completions"), chat_bodies | values) | st.tuples(
    st.sampled_from(["/v1/answer", "/v1/detect", "/v1/segment"]), native_bodies | values
)


def check(client, path, body):
    content = json.dumps(body).encode()
    reply = client.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in EXPECTED, (reply.status_code, reply.text[:300], body)
    assert "row_failed" not in reply.text and '"internal"' not in reply.text, (reply.text[:300], body)
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]


options = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=200, **options)
@given(json_requests)
def test_random_requests(client, request):
    check(client, *request)


@pytest.mark.slow
@settings(max_examples=10_000, **options)
@given(json_requests)
def test_ten_thousand_random_requests(client, request):
    check(client, *request)


@settings(max_examples=60, **options)
@given(st.binary(max_size=300) | st.binary(max_size=80).map(lambda cut: SCENE[: len(SCENE) // 2] + cut), st.booleans())
def test_random_files(client, data, as_form):
    if as_form:
        reply = client.post("/v1/detect", files={"image": ("a.png", data)}, data={"labels": "dog"})
    else:
        reply = client.post("/v1/detect", json={"image": data_url(data), "labels": ["dog"]})
    assert reply.status_code == 400


@settings(max_examples=60, **options)
@given(
    st.binary(max_size=200), st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", "x"])
)
def test_random_bodies(client, body, kind):
    prefix = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' if "form" in kind else b""
    reply = client.post("/v1/detect", content=prefix + body, headers={"content-type": kind})
    assert reply.status_code in {400, 415}, reply.text
