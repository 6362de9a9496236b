"""Faults that are put in, and how a server ends: the rows concerned fail, the others do not; a dead engine is said."""

import ctypes
import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving import SCENE, Command, Running, chat, data_url, error_of, picture, running, wait_until

import paligemma.engine as engine_module
from paligemma.cli.serve import run
from paligemma.serve.server import listen_at
from paligemma.serve.settings import Settings

URL = "/v1/chat/completions"


def ask(client, prompt, **fields):
    return client.post(URL, json=chat(prompt, **fields))


# ------------------------------------------------------------------------------------------------ single rows


def test_logits_that_are_no_numbers_end_their_row_alone(pg, monkeypatch):
    choose = engine_module.choose_tokens

    def choose_with_a_fault(rows, logits, *others):
        for n, row in enumerate(rows):
            if row.request.options.max_new_tokens == 77 and len(row.answer.token_ids) == 3:
                logits[n] = float("nan")
        return choose(rows, logits, *others)

    monkeypatch.setattr(engine_module, "choose_tokens", choose_with_a_fault)
    expected = pg.generate(SCENE, "caption en").text
    with running(pg) as server, server.client() as client, ThreadPoolExecutor(3) as pool:
        fine = [pool.submit(ask, client, "caption en") for _ in range(2)]
        failing = pool.submit(ask, client, "caption en", max_tokens=77)
        status, code, _ = error_of(failing.result())
        assert (status, code) == (500, "row_failed") and "not finite" in failing.result().text
        assert [reply.result().json()["choices"][0]["message"]["content"] for reply in fine] == [expected] * 2
        stream = ask(client, "caption en", max_tokens=77, stream=True).text
        assert json.loads(stream.split("data: ")[-1])["error"]["code"] == "row_failed" and "[DONE]" not in stream
        assert "paligemma_engine_errors_total 2.0" in client.get("/metrics").text
        assert client.get("/health").status_code == 200


def test_a_dead_end_of_a_constraint_ends_its_row_alone(pg, monkeypatch):
    import paligemma.serve.rows as rows

    def dead_end(pg, ask):
        return lambda generated, remaining: torch.empty(0, dtype=torch.int64)

    with running(pg) as server, server.client() as client:
        with monkeypatch.context() as patched:
            patched.setattr(rows, "_constraint", dead_end)
            assert error_of(ask(client, "detect book"))[:2] == (500, "row_failed")
        assert ask(client, "detect book").status_code == 200


def test_what_the_engine_refuses_for_another_reason_than_length_is_no_fault_of_max_tokens(pg, monkeypatch):
    def refuse(engine, request, listener=None):
        raise ValueError("input_ids has 4 <image> tokens for 8 image features")

    with running(pg) as server, server.client() as client:
        with monkeypatch.context() as patched:
            patched.setattr(engine_module.Engine, "admit", refuse)
            reply = ask(client, "caption en")
            assert error_of(reply)[:2] == (500, "row_failed") and "for 8 image features" in reply.text
        assert ask(client, "caption en").status_code == 200


def test_an_exception_in_a_step_fails_the_rows_of_that_step(pg, monkeypatch):
    """The next ones start afresh."""
    decode, failing = engine_module.Engine._decode, threading.Event()

    def decode_with_a_fault(self):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("injected")
        return decode(self)

    monkeypatch.setattr(engine_module.Engine, "_decode", decode_with_a_fault)
    with running(pg) as server, server.client() as client:
        failing.set()
        status, code, _ = error_of(ask(client, "caption en"))
        assert (status, code) == (500, "row_failed")
        assert ask(client, "caption en").status_code == 200 and client.get("/health").status_code == 200


def test_a_mistake_of_the_server_is_a_500_whose_log_does_not_quote(pg, monkeypatch, capfd):
    import paligemma.serve.app as app

    prompt = " ".join(["a", "secret", "prompt"])

    def broken(*arguments):
        raise KeyError(prompt)

    monkeypatch.setattr(app, "completion", broken)
    with running(pg) as server, server.client() as client:
        assert error_of(ask(client, "caption en"))[:2] == (500, "internal")
        assert client.get("/health").status_code == 200 and server.service.taken == 0
    log = capfd.readouterr().err
    assert "fault: KeyError" in log and prompt not in log


def test_a_mistake_on_a_path_without_questions(pg, monkeypatch):
    with running(pg) as server, server.client() as client:
        monkeypatch.setattr(server.service.metrics, "text", lambda: 1 / 0)
        assert error_of(client.get("/metrics"))[:2] == (500, "internal")


# ------------------------------------------------------------------------------------------------ the engine dies


def dies(server):
    """What a server does whose engine has died: /health says so, and the process would end with 1."""
    with server.client() as client:
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json() == {"status": "failed"}
        assert error_of(ask(client, "caption en"))[:2] == (503, "failed")
    server.thread.join(20)
    assert not server.thread.is_alive() and server.server.exit_code == 1


def test_an_engine_that_fails_again_and_again_has_died(pg, monkeypatch):
    def always(self, *_):
        raise RuntimeError("injected")

    with running(pg) as server, server.client() as client:
        monkeypatch.setattr(engine_module.Engine, "_prefill", always)
        codes = [ask(client, "caption en").status_code for _ in range(3)]
        assert codes == [500] * 3
        dies(server)


def test_a_device_that_fails_in_every_picture(pg, monkeypatch):
    """No row runs, so it is not the engine that notices. What one row is refused for does not count."""
    import paligemma.serve.engine_thread as engine_thread

    errors = [RuntimeError("CUDA error"), RuntimeError("CUDA error"), ValueError("this row"), MemoryError()]

    def encode(pg, pixels):
        raise errors.pop(0) if errors else RuntimeError("CUDA error")

    with running(pg) as server, server.client() as client:
        with monkeypatch.context() as patched:
            patched.setattr(engine_thread, "encode", encode)
            codes = [ask(client, "caption en").status_code for _ in range(4)]
            assert codes == [500] * 4 and client.get("/health").status_code == 200
        assert ask(client, "caption en").status_code == 200  # so the next ones are counted anew
        monkeypatch.setattr(engine_thread, "encode", encode)
        images = [picture(seed) for seed in range(3)]  # none that the server has features of
        codes = [client.post(URL, json=chat("caption en", image)).status_code for image in images]
        assert codes == [500] * 3
        dies(server)


def test_an_engine_thread_that_is_killed(pg, monkeypatch):
    """Rows that run and rows that wait hear of it."""
    with running(pg, max_rows=1) as server, server.client() as client:
        engine = server.service.engine
        step, gate = engine.engine.step, threading.Event()
        monkeypatch.setattr(engine.engine, "step", lambda: gate.wait(20) and step())
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(ask, client, "caption en", stream=stream) for stream in (False, True)]
            wait_until(lambda: server.service.taken == 2 and engine.running)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(engine._thread.ident), ctypes.py_object(SystemExit)
            )
            gate.set()
            assert [error_of(reply.result())[:2] for reply in replies] == [(503, "failed")] * 2
        dies(server)


def test_a_step_that_never_ends_is_stuck(pg, monkeypatch):
    with running(pg, timeout=0.3) as server, server.client() as client:
        step, gate = server.service.engine.engine.step, threading.Event()
        monkeypatch.setattr(server.service.engine.engine, "step", lambda: gate.wait(20) and step())
        assert error_of(ask(client, "caption en"))[0] == 504
        wait_until(lambda: client.get("/health").json() == {"status": "stuck"})
        assert client.get("/health").status_code == 503
        gate.set()
        wait_until(lambda: client.get("/health").status_code == 200)


def test_health_while_the_model_is_loaded(pg):
    gate = threading.Event()

    def slowly():
        gate.wait(20)
        return pg

    server = Running(slowly, Settings(), wait=False)
    wait_until(lambda: server.server.started)
    with server.client() as client:
        assert client.get("/health").json() == {"status": "loading"}
        assert error_of(ask(client, "caption en"))[:2] == (503, "loading")
        gate.set()
        assert server.ready.wait(20) and client.get("/health").json() == {"status": "ok"}
    server.stop()


def test_no_thread_is_left(pg):
    before = set(threading.enumerate())
    with running(pg) as server, server.client() as client:
        assert ask(client, "caption en", max_tokens=2).status_code == 200
    wait_until(
        lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith(("engine", "decode", "reply"))]
    )


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs():
    """One line on stdout. Requests that have a place are answered in full, new ones get 503, and the exit code is 0."""
    with Command("--max-rows", "2") as command, httpx.Client(base_url=command.url, timeout=60) as client:
        body = chat("detect book ; house")
        with ThreadPoolExecutor(8) as pool:
            replies = [pool.submit(client.post, URL, json={**body, "stream": n % 2 == 1}) for n in range(8)]
            wait_until(lambda: "paligemma_places_taken 8.0" in client.get("/metrics").text)
            command.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            assert client.get("/health").json() == {"status": "stopping"}
            assert error_of(client.post(URL, json=body))[:2] == (503, "stopping")
            for n, reply in enumerate(replies):
                assert reply.result().status_code == 200
                assert "[DONE]" in reply.result().text if n % 2 else reply.result().json()["choices"]
        out, err = command.process.communicate(timeout=60)
        assert command.process.returncode == 0 and out == "" and "Traceback" not in err


@pytest.mark.slow
def test_what_is_not_finished_within_the_grace_is_told():
    with (
        Command("--grace", "0", "--max-rows", "1") as command,
        httpx.Client(base_url=command.url, timeout=60) as client,
    ):
        with ThreadPoolExecutor(4) as pool:
            body = chat("detect book ; house")
            replies = [pool.submit(client.post, URL, json=body) for _ in range(4)]
            wait_until(lambda: "paligemma_places_taken 4.0" in client.get("/metrics").text)
            command.process.send_signal(signal.SIGTERM)
            statuses = [reply.result().status_code for reply in replies]
        assert command.process.wait(60) == 0 and 503 in statuses and set(statuses) <= {200, 503}


@pytest.mark.slow
def test_exit_codes(tmp_path):
    with Command() as command:
        assert command.end(signal.SIGINT)[0] == 130
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Command("--port", str(port), wait=False) as command:
            out, err = command.process.communicate(timeout=60)
            assert command.process.returncode == 1 and out == "" and f"port {port} cannot be listened on" in err
    with Command("-m", str(tmp_path / "nothing"), wait=False) as command:
        out, err = command.process.communicate(timeout=60)
        assert command.process.returncode == 1 and out == "" and err.startswith("loading") and "error:" in err


@pytest.mark.slow
def test_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with Command("--uds", str(path)) as command:
        assert command.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/health").status_code == 200
            assert (
                client.post("/v1/detect", json={"image": data_url(), "labels": ["book"]}, timeout=60).status_code == 200
            )
        assert command.end()[0] == 0 and not path.exists()


def test_the_socket_of_a_successor_is_left_alone(tmp_path, monkeypatch):
    """It may be started while the last requests of an old server are answered, which no longer listens."""
    path, successors = tmp_path / "socket", []

    def serve(load, settings, listening, url, say):
        listening.close()
        time.sleep(0.02)  # the file of the second may have the number of the first, but not its time
        successors.append(listen_at(path)[0])
        return 0

    monkeypatch.setattr("paligemma.serve.server.serve", serve)
    assert run(None, Settings(), "", 0, path) == 0
    with successors[0], socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    monkeypatch.setattr("paligemma.serve.server.serve", lambda *_: 0)
    assert run(None, Settings(), "", 0, path) == 0 and not path.exists()


def test_a_body_that_is_still_on_its_way_when_the_server_stops(pg):
    """It has no place, so nobody waits for it: 503 at once, in OpenAI's form."""
    with running(pg) as server, socket.create_connection(server.address, timeout=20) as connection:
        head = "POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b'Content-Length: 100\r\n\r\n{"image"')
        wait_until(lambda: server.service.memory.held == 8)
        start = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        error = json.loads(reply.read())["error"]
        assert (reply.status, error["code"]) == (503, "stopping") and time.monotonic() - start < 3
        server.thread.join(10)
        assert not server.thread.is_alive() and server.server.exit_code == 0


@pytest.mark.slow
def test_a_key_from_the_environment_and_from_a_file(tmp_path):
    (tmp_path / "key").write_text("from-a-file\n")
    for options, environment, key in (
        ([], {"PALIGEMMA_API_KEY": "from-the-environment"}, "from-the-environment"),
        (["--api-key-file", str(tmp_path / "key")], {}, "from-a-file"),
    ):
        with Command(*options, **environment) as command, httpx.Client(base_url=command.url) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert key not in command.end()[2]


def test_wrong_usage(tmp_path, monkeypatch):
    """Told before a model is loaded, with exit code 2."""
    from typer.testing import CliRunner

    from paligemma.cli.main import app

    monkeypatch.delenv("PALIGEMMA_API_KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    for arguments, expected in (
        (["--host", "0.0.0.0"], "--no-key"),
        (["--api-key-file", str(tmp_path / "empty")], "holds no key"),
        (["--api-key-file", str(tmp_path / "missing")], "No such file"),
        (["--cors", "example.org"], "expected an origin"),
        (["--allow-host", "example.org:8443"], "leave out scheme and port"),
        (["--allow-host", "https://example.org"], "leave out scheme and port"),
        (["--allow-host", "*.example.org"], "expected a name alone"),
        (["--image-urls", "https://example.org/a"], "leave out scheme and port"),
        (["--port", "70000"], "65535"),
        (["--loc-scale", "5"], "1024 or 1023"),
        (["--log", "xml"], "text, json"),
        (["--compile", "--quantize", "int8"], "--compile does not go with --quantize"),
        (["--api-key", "secret"], "No such option"),
    ):
        result = CliRunner().invoke(app, ["serve", *arguments])
        shown = " ".join(result.output.split()).replace("│ ", "")
        assert result.exit_code == 2 and expected in shown, (arguments, shown)
