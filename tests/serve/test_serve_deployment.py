"""The server as a Ray Serve deployment: two replicas on one machine, one of them killed."""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from serving import SCENE, chat

import paligemma
from paligemma.answers.mask_codec import MaskCodec
from paligemma.serve.deployment import deployment

URL = "/v1/chat/completions"


def test_a_replica_loads_what_the_command_loads(pg, monkeypatch):
    """With the mask codec, which is downloaded for an official checkpoint. Without ray, whose decorators wrap it."""
    as_it_is = SimpleNamespace(deployment=lambda **_: lambda one: one, ingress=lambda: lambda one: one)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=as_it_is))
    processor = paligemma.PaliGemmaProcessor.for_config(pg.processor.tokenizer, pg.model.config)
    official, asked = paligemma.PaliGemma(pg.model, processor), []
    monkeypatch.setattr("paligemma.serve.loading.load", lambda model, **options: asked.append(options) or official)
    monkeypatch.setattr(MaskCodec, "load", lambda *_: pg.codec)
    options = {"revision": "float16", "image_size": 448, "loc_scale": 1023}
    deployment.__wrapped__()("tiny", "cpu", **options)
    assert official.loaded_codec is pg.codec
    assert asked == [{**options, "device": "cpu", "dtype": None, "quantize": None}]


@pytest.fixture(scope="module")
def address():
    ray = pytest.importorskip("ray")
    from ray import serve

    from paligemma.serve import Deployment

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"num_cpus": 0.5}
        app = Deployment.options(num_replicas=2, ray_actor_options=options).bind(dtype="float32", api_key="key")
        serve.run(app, name="paligemma")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_two_replicas_one_killed(address, pg):
    expected = pg.generate(SCENE, "caption en").text
    with httpx.Client(base_url=address, headers={"authorization": "Bearer key"}, timeout=60) as client:

        def answers(count):
            replies = [client.post(URL, json=chat()) for _ in range(count)]
            return [
                r.json()["choices"][0]["message"]["content"] if r.status_code == 200 else r.status_code for r in replies
            ]

        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert answers(6) == [expected] * 6
        stream = client.post(URL, json=chat(stream=True)).text
        assert stream.endswith("data: [DONE]\n\n")
        os.kill(one_replica(), signal.SIGKILL)
        after = answers(6)  # those that were on their way to it may fail, the others are answered
        assert after.count(expected) >= 4, after
        end = time.monotonic() + 120
        while running_replicas() < 2:
            assert time.monotonic() < end, "it was not replaced"
            time.sleep(1)
        assert answers(6) == [expected] * 6


def running_replicas():
    from ray import serve

    return serve.status().applications["paligemma"].deployments["PaliGemma"].replica_states.get("RUNNING", 0)


def one_replica():
    """The process of a replica, by the title that Ray gives it."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:paligemma"):
                    return int(folder.name)
    raise AssertionError("no replica runs")
