"""Clients that leave, times that run out, and more clients than places."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import SCENE, Command, chat, data_url, error_of, picture, running, wait_until

from paligemma import explore

URL = "/v1/chat/completions"


@pytest.fixture
def held(pg, monkeypatch):
    """A server with a gate in front of each step of its engine: `gate.clear()` holds it, `gate.set()` lets it go, and
    `let(n)` lets it make n steps."""
    with running(pg, max_rows=2, max_queue=4) as server:
        gate, permits, step = threading.Event(), threading.Semaphore(0), server.service.engine.engine.step
        gate.set()
        server.gate, server.steps = gate, 0

        def gated_step():
            while not gate.is_set() and not permits.acquire(timeout=0.01):
                pass
            server.steps += 1
            return step()

        def let(count):
            wanted = server.steps + count
            permits.release(count)
            wait_until(lambda: server.steps == wanted)

        server.let = let
        monkeypatch.setattr(server.service.engine.engine, "step", gated_step)
        yield server
        gate.set()


def begin(server, body, path=URL, **options):
    """Sends a request and returns the open connection. options: of its socket."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    connection.settimeout(20)
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.connect(server.address)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(held, stream):
    engine = held.service.engine
    held.gate.clear()
    connections = [begin(held, chat(stream=stream))]
    wait_until(lambda: len(engine.running) == 1)
    connections += [begin(held, chat(stream=stream)) for _ in range(3)]
    wait_until(lambda: engine.waiting == 3)
    connections[-1].close()
    wait_until(lambda: engine.waiting == 2)  # at once: the engine has not moved
    assert held.service.taken == 3
    held.gate.set()
    wait_until(lambda: held.service.taken == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_while_its_row_runs(held, pg, stream, phase):
    """The row is gone within two steps, and its neighbour's answer is what it would have been."""
    service, engine = held.service, held.service.engine
    with ThreadPoolExecutor(1) as pool, held.client() as client:
        held.gate.clear()
        leaving = begin(held, chat("caption en", max_tokens=100, stream=stream))
        wait_until(lambda: len(engine.running) == 1)
        (job,) = engine.running
        neighbour = pool.submit(client.post, URL, json=chat("detect book ; house"))
        wait_until(lambda: service.taken == 2)
        if phase == "decode":
            held.let(3)
            assert job.ticket.written()[0]
        leaving.close()
        wait_until(lambda: service.taken == 1)
        held.let(2)
        held.let(1)  # the second one has ended when the third begins
        assert job not in engine.running and all(row.ticket is not job.ticket for row in engine.engine._running)
        held.gate.set()
        content = neighbour.result().json()["choices"][0]["message"]["content"]
        assert content == pg.generate(SCENE, "detect book ; house", 512, constrained=True).text
    assert "paligemma_cancelled_total 1.0" in service.metrics.text().decode()


def test_a_page_whose_client_has_left_is_still_the_only_one_that_is_made(pg, monkeypatch):
    began, gate = threading.Event(), threading.Event()

    def make_page(*_):
        began.set()
        assert gate.wait(20)
        return b"<p>page</p>"

    monkeypatch.setattr("paligemma.serve.exploring.make_page", make_page)
    with running(pg) as server, server.client() as client:
        explore = {"image": data_url(), "prompt": "caption en"}
        leaving = begin(server, explore, path="/v1/explore")
        assert began.wait(20)
        leaving.close()
        wait_until(lambda: server.service.taken == 0)
        assert error_of(client.post("/v1/explore", json=explore))[:2] == (429, "exploring")
        gate.set()
        wait_until(lambda: not server.service.exploring)
        assert client.post("/v1/explore", json=explore).status_code == 200


def test_a_page_whose_client_has_left_is_not_finished(pg, monkeypatch):
    began, gate, finished, look = threading.Event(), threading.Event(), threading.Event(), explore.look

    def gated_look(*given, **named):
        began.set()
        assert gate.wait(20)
        return look(*given, **named)

    monkeypatch.setattr(explore, "look", gated_look)
    monkeypatch.setattr(explore, "page", lambda *_, **__: finished.set())
    with running(pg) as server:
        leaving = begin(server, {"image": data_url(), "prompt": "caption en"}, path="/v1/explore")
        assert began.wait(20)
        leaving.close()
        wait_until(lambda: server.service.taken == 0)
        gate.set()
        wait_until(lambda: not server.service.exploring)
    assert not finished.is_set()


def test_a_page_that_waits_is_forgotten_with_its_pictures_when_its_client_leaves(pg):
    gate = threading.Event()
    with running(pg) as server:
        engine = server.service.engine
        before = engine.call(lambda _: gate.wait(20))
        wait_until(before.running)
        leaving = begin(server, {"image": data_url(), "prompt": "caption en"}, path="/v1/explore")
        wait_until(lambda: len(engine._calls) == 1)
        leaving.close()
        wait_until(lambda: not server.service.exploring)
        assert not engine._calls
        gate.set()


def test_more_clients_than_places(held):
    """Beyond the queue: 429 at once, with the seconds after which another try may help."""
    held.gate.clear()
    connections = [begin(held, chat()) for _ in range(6)]
    wait_until(lambda: held.service.taken == 6)
    with held.client() as client:
        reply = client.post(URL, json=chat())
        assert error_of(reply) == (429, "queue_full", None) and 1 <= int(reply.headers["retry-after"]) <= 60

        assert client.get("/health").status_code == 200
        held.gate.set()
        wait_until(lambda: held.service.taken == 0)
        assert client.post(URL, json=chat(max_tokens=1)).status_code == 200
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


def test_openai_client_tries_again_after_429(held):
    held.gate.clear()
    connections = [begin(held, chat(max_tokens=1)) for _ in range(6)]
    wait_until(lambda: held.service.taken == 6)
    asked = []
    http = httpx.Client(
        event_hooks={"response": [lambda response: (asked.append(response.status_code), held.gate.set())]}
    )
    with openai.OpenAI(base_url=f"{held.url}/v1", api_key="none", max_retries=3, http_client=http) as client:
        answer = client.chat.completions.create(**chat("caption en", max_tokens=1))
    assert answer.choices[0].message.content and asked == [429, 200]
    for connection in connections:
        connection.close()


def test_a_request_whose_turn_does_not_come(pg, monkeypatch):
    with running(pg, max_rows=1, queue_timeout=0.2, timeout=5) as server, server.client() as client:
        gate, step = threading.Event(), server.service.engine.engine.step
        monkeypatch.setattr(server.service.engine.engine, "step", lambda: gate.wait(20) and step())
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(client.post, URL, json=chat(stream=s)) for s in (False, True)]
            codes = [error_of(reply.result()) for reply in replies]
            gate.set()
        assert codes == [(503, "queue_timeout", None)] * 2
        wait_until(lambda: not server.service.engine.running)


def test_to_wait_for_the_decoders_is_to_wait_too(pg, monkeypatch):
    gate = threading.Event()
    look_inside = {"image": data_url(), "prompt": "caption en"}
    with running(pg, queue_timeout=0.2, timeout=5, decode_workers=1) as server, server.client() as client:
        occupied = server.service._decoders.submit(gate.wait, 20)  # by the large pictures of others
        asked = [(URL, chat()), ("/v1/answer", look_inside), ("/v1/explore", look_inside)]
        for path, body in asked:
            assert error_of(client.post(path, json=body)) == (503, "queue_timeout", None)
        gate.set()
        occupied.result()
        gate.clear()
        monkeypatch.setattr("paligemma.serve.service.read", lambda *_: gate.wait(20))  # its own large picture
        assert error_of(client.post(URL, json=chat())) == (503, "queue_timeout", None)
        gate.set()
        assert server.service.taken == 0


def test_a_page_that_is_made_does_not_wait_for_its_turn(pg, monkeypatch):
    monkeypatch.setattr("paligemma.serve.exploring.make_page", lambda *_: time.sleep(1.5) or b"page")
    with running(pg, queue_timeout=1) as server, server.client() as client:
        assert client.post("/v1/explore", json={"image": data_url(), "prompt": "caption en"}).status_code == 200


def test_an_answer_that_takes_too_long(pg, monkeypatch):
    """504; in the middle of a stream, an event with the error and no [DONE]."""
    with running(pg, timeout=0.5) as server, server.client() as client:
        engine, step = server.service.engine.engine, server.service.engine.engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
        assert error_of(client.post(URL, json=chat("detect book ; house"))) == (504, "timeout", None)
        reply = client.post(URL, json=chat("detect book ; house", stream=True))
        assert reply.status_code == 200 and "[DONE]" not in reply.text
        assert json.loads(reply.text.strip().split("data: ")[-1])["error"]["code"] == "timeout"
        wait_until(lambda: not server.service.engine.running)
        client_of_openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="was not complete after"):
            list(client_of_openai.chat.completions.create(**chat("detect book ; house"), stream=True))


def test_a_stream_is_kept_open_by_comments(pg, monkeypatch):
    with running(pg, comment_every=0.05) as server, server.client() as client:
        engine, step = server.service.engine.engine, server.service.engine.engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.2), step())[1])
        text = client.post(URL, json=chat(stream=True, max_tokens=3)).text
    assert ": the answer is on its way\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_tokens_without_text_are_no_reason_to_be_silent(pg, monkeypatch):
    """An answer in JSON is sent at its end, however often a token comes before."""
    with running(pg, comment_every=0.5) as server, server.client() as client:
        engine, step = server.service.engine.engine, server.service.engine.engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.3), step())[1])
        body = chat("detect book ; house", stream=True, max_tokens=12, response_format={"type": "json_object"})
        text = client.post(URL, json=body).text
    assert text.count(": the answer is on its way\n\n") >= 2 and text.endswith("data: [DONE]\n\n")


def test_a_client_that_does_not_read_holds_nobody_up(pg):
    """Its connection is full before its answer is written; its time runs out, and its neighbours are answered."""
    long = {"choice": [" ".join(["dog"] * 850)]}  # 125 kB, more than a server keeps of what is not read
    body = chat(stream=True, logprobs=True, structured_outputs=long, max_tokens=870)
    with running(pg, timeout=6, max_new_tokens=870) as server, server.client() as client:
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have the same
        lazy = begin(server, body, SO_RCVBUF=2048)
        wait_until(lambda: server.service.taken == 1 and len(server.service.engine.running) == 1)
        wait_until(lambda: not server.service.engine.running)
        assert server.service.taken == 1  # the row is done, and its reply waits for the client
        assert client.post(URL, json=chat()).status_code == 200
        wait_until(lambda: server.service.taken == 0)
        lazy.settimeout(0.5)
        received = b""
        with contextlib.suppress(TimeoutError):
            while part := lazy.recv(2**16):
                received += part
        assert b'"code":"timeout"' in received and b"[DONE]" not in received
        lazy.close()


def test_a_body_is_forgotten_once_its_picture_is_pixels(held):
    """However long its answer takes, and however many wait."""
    held.gate.clear()
    connections = [begin(held, chat()) for _ in range(6)]
    wait_until(lambda: held.service.engine.waiting + len(held.service.engine.running) == 6)
    assert held.service.taken == 6 and held.service.memory.held == 0
    held.gate.set()
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


def overload(url, clients, seconds, expected):
    """Statuses of all requests that so many clients send for so long; every answer of 200 must be the right one."""
    statuses, together = [], threading.Barrier(clients)
    images = [data_url(picture(number)) for number in range(4)]

    def ask(number):
        body = {"image": images[number % 4], "prompt": "caption en", "max_tokens": 4}
        with httpx.Client(base_url=url, timeout=60, verify=False) as client:
            together.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                reply = client.post("/v1/answer", json=body)
                statuses.append(reply.status_code)
                if reply.status_code == 200:
                    assert reply.json()["text"] == expected[number % 4]
                else:
                    assert 1 <= int(reply.headers["retry-after"]) <= 60
                    time.sleep(0.5)

    with ThreadPoolExecutor(clients) as pool:
        for result in [pool.submit(ask, number) for number in range(clients)]:
            result.result()
    return statuses


def answers(pg):
    return [pg.generate(picture(number), "caption en", 4).text for number in range(4)]


def test_overload(pg):
    with running(pg, max_rows=4, max_queue=4) as server:
        statuses = overload(server.url, clients=24, seconds=1.5, expected=answers(pg))
        assert set(statuses) == {200, 429}
        assert server.service.taken == 0 and threading.active_count() < 60


# Asks /health, and for an answer, again and again, in a process of its own: the clients' threads would delay it.
PROBE = """
import http.client, json, sys, time
port, seconds, body = int(sys.argv[1]), float(sys.argv[2]), sys.stdin.read()
waits = {"health": [], "429": []}
end = time.monotonic() + seconds
while time.monotonic() < end:
    for path, method, content in (("/health", "GET", None), ("/v1/answer", "POST", body)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        start = time.perf_counter()
        connection.request(method, path, content, {"Content-Type": "application/json"})
        status = connection.getresponse().status
        if path == "/health" or status == 429:
            waits["health" if path == "/health" else "429"].append(time.perf_counter() - start)
        connection.close()
    time.sleep(0.1)
print(json.dumps(waits))
"""


@pytest.mark.slow
def test_overload_for_a_minute(pg):
    """200 clients against 64 places: every request ends in 200, 429 or 503, no answer is wrong, memory is flat."""
    options = ["--dtype", "float32", "--max-rows", "16", "--max-queue", "48"]
    with Command(*options, log=subprocess.DEVNULL) as command:
        overload(command.url, clients=200, seconds=5, expected=answers(pg))
        before = command.resident()
        body = json.dumps({"image": data_url(picture(0)), "prompt": "caption en", "max_tokens": 4})
        probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, command.url.rpartition(":")[2], "60"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            probed = pool.submit(probe.communicate, body)
            statuses = overload(command.url, clients=200, seconds=60, expected=answers(pg))
            waits = json.loads(probed.result()[0])
        growth = command.resident() - before
    print({
        "statuses": {status: statuses.count(status) for status in set(statuses)},
        **{f"p99 of {name} (ms)": round(sorted(w)[int(len(w) * 0.99)] * 1000) for name, w in waits.items() if w},
        "growth (MB)": round(growth / 1e6),
    })  # fmt: skip
    assert set(statuses) <= {200, 429, 503} and statuses.count(200) > 100
    assert growth < 50e6
