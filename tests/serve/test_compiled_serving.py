"""`paligemma serve --compile`: the same answers over HTTP, from one graph."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving import SCENE, Command, Running, chat, data_url, error_of, running, wait_until

from paligemma import compiled
from paligemma.generation import decode_one_token
from paligemma.serve.settings import Settings

ROWS = [("caption en", 20), ("detect book", 20), ("answer en how many dogs are there?", 12)]


def ask(client, row):
    prompt, budget = row
    body = {"image": data_url(), "prompt": prompt, "max_tokens": budget, "masks": "none"}
    return client.post("/v1/answer", json=body).json()["text"]


def ask_all(client, pg):
    """Some requests at once; their texts are those of the library."""
    with ThreadPoolExecutor(len(ROWS)) as pool:
        found = list(pool.map(lambda row: ask(client, row), ROWS))
    assert found == [pg.generate(SCENE, prompt, budget, constrained=True).text for prompt, budget in ROWS]
    return found


def test_answers_over_http_come_from_one_graph(pg, monkeypatch):
    """Also after somebody looked inside the model. (The graph runs as it is, which takes no compiler.)"""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: step)
    with running(pg, compile=True, max_rows=2, max_new_tokens=100) as server, server.client() as client:
        texts = ask_all(client, pg)
        assert client.post("/v1/explore", json={"image": data_url(), "prompt": "caption en"}).status_code == 200
        assert ask(client, ROWS[2]) == texts[2]
        assert len(graphs) == 1


def test_a_row_beyond_its_slot_is_refused_before_anything_is_computed(pg, monkeypatch):
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: decode_one_token)
    with running(pg, compile=True, max_rows=2, max_new_tokens=100) as server, server.client() as client:
        monkeypatch.setattr(pg.model, "encode_image", lambda pixels: pytest.fail("computed"))
        long = chat("caption en " + "very " * 200, max_tokens=100)
        assert error_of(client.post("/v1/chat/completions", json=long))[:2] == (400, "prompt_too_long")
        three = {"image": [data_url()] * 3, "prompt": "caption en " + "very " * 90, "max_tokens": 100}
        response = client.post("/v1/answer", json=three)
        assert error_of(response)[:2] == (400, "prompt_too_long")
        room = pg.processor.num_image_tokens + 255 + 100
        assert f"and this server has room for {room} in a row" in response.json()["error"]["message"]


def test_slots_that_do_not_fit_into_the_memory_end_the_start(pg):
    server = Running(lambda: pg, Settings(compile=True, max_rows=4096, cache_memory=0.001), wait=False)
    wait_until(lambda: server.service.engine.failure is not None)
    assert "lower max_rows or slot_length, or raise cache_bytes" in str(server.service.engine.failure)
    server.stop()


@pytest.mark.slow
def test_the_command_compiled_by_inductor(pg):
    options = ("--compile", "--max-rows", "2", "--dtype", "float32")  # the CPU may be quick in bfloat16, and take that
    with Command(*options) as command, httpx.Client(base_url=command.url, timeout=300) as client:
        ask_all(client, pg)
        assert command.end()[0] == 0
