"""Who may ask: the key, Host, Origin; the headers of every reply; what the log says."""

import json

import pytest
from serving import SCENE, chat, data_url, error_of, running

KEY = "a-key-of-the-tests"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def locked(pg):
    with running(pg, api_key=KEY, origins=("https://friend.example",), hosts=("127.0.0.1", "my.example")) as server:
        yield server


def every_route(server):
    """(method, path) of each route of the application, with something in the place of parameters."""
    for route in server.server.config.app.app.routes:
        path = route.path.replace("{name:path}", "tiny").replace("{page}", "random")
        if path == "/static":
            yield "GET", "/static/app.js"
        else:
            for method in getattr(route, "methods", None) or ["POST"]:
                yield method, path


def test_every_route_but_health_and_the_page_needs_the_key(locked):
    open_to_all = {"/", "/health", "/static/app.js", "/explored/random"}
    with locked.client() as client:
        seen = set()
        for method, path in every_route(locked):
            seen.add(path)
            status = client.request(method, path).status_code
            assert (status != 401) == (path in open_to_all), (method, path, status)
        assert {"/metrics", "/openapi.json", "/v1/chat/completions", "/v1/explore", *open_to_all} <= seen
        assert client.get("/v1/unknown").status_code == 401  # nor can a stranger find out what there is
        assert client.get("/static/../v1/models").status_code == 401
        assert client.get("/%2e%2e/metrics").status_code == 401


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xe9"])
def test_a_wrong_key(locked, value):
    with locked.client() as client:
        reply = client.get("/v1/models", headers={"authorization": value.encode("latin-1")})
        assert error_of(reply) == (401, "invalid_api_key", None)
        assert reply.headers["www-authenticate"] == "Bearer"


def test_the_right_key(locked):
    with locked.client(headers=BEARER) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/chat/completions", json=chat(max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "my.example.", "::1"]
)
def test_a_foreign_host_is_refused(locked, host):
    """Also at the page and at /health: another name is somebody else's page, by DNS rebinding."""
    with locked.client(headers={**BEARER, "host": host}) as client:
        for path in ("/", "/health", "/v1/models"):
            assert error_of(client.get(path)) == (403, "host_not_allowed", "Host")


def test_own_hosts_are_taken(locked):
    with locked.client(headers=BEARER) as client:
        for host in ("127.0.0.1", "127.0.0.1:81", "my.example", "MY.example:443"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://[", "file://"])
def test_a_foreign_origin_is_refused(locked, origin):
    with locked.client(headers={**BEARER, "origin": origin}) as client:
        assert error_of(client.get("/v1/models")) == (403, "origin_not_allowed", "Origin")
        reply = client.options("/v1/models", headers={"access-control-request-method": "POST"})
        assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers


def test_the_own_page_and_allowed_origins_may_ask(locked):
    with locked.client(headers=BEARER) as client:
        assert client.get("/v1/models", headers={"origin": locked.url}).status_code == 200
        proxied = {"origin": "https://my.example", "host": "my.example"}  # TLS ended before us
        assert client.get("/v1/models", headers=proxied).status_code == 200
        friend = {"origin": "https://friend.example"}
        reply = client.get("/v1/models", headers=friend)
        assert reply.headers["access-control-allow-origin"] == "https://friend.example"
        assert reply.headers["vary"] == "Origin"
        reply = client.post("/v1/detect", headers=friend, json={})
        assert reply.status_code == 400 and reply.headers["access-control-allow-origin"] == "https://friend.example"
    with locked.client() as client:  # a browser asks first, without the key
        reply = client.options("/v1/detect", headers={**friend, "access-control-request-method": "POST"})
        assert reply.status_code == 204 and "Authorization" in reply.headers["access-control-allow-headers"]


def test_an_allowed_page_may_send_headers_of_its_own(locked):
    """OpenAI's client for JavaScript does. What is no name of a header is not sent back."""
    asked = "authorization, x-stainless-lang,X-Stainless-OS, no name, a:b,,"
    headers = {"origin": "https://friend.example", "access-control-request-headers": asked}
    with locked.client() as client:
        reply = client.options("/v1/chat/completions", headers=headers)
    allowed = reply.headers["access-control-allow-headers"]
    assert allowed == "Authorization, Content-Type, authorization, x-stainless-lang, X-Stainless-OS"


def test_headers_of_every_reply(client):
    for path in ("/health", "/v1/models", "/v1/nothing", "/v1/detect", "/static/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_can_be_left_out(pg):
    with running(pg, page=False) as server, server.client() as client:
        assert client.get("/").status_code == 404 and client.get("/static/app.js").status_code == 404


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_holds_no_prompt_picture_key_or_query(pg, capfd, form):
    with running(pg, api_key=KEY, log=form) as server, server.client(headers=BEARER) as client:
        client.post("/v1/chat/completions?secret=query", json=chat("answer en my secret?", max_tokens=2))
        client.post("/v1/detect", json={"image": data_url(SCENE), "labels": ["secret ; thing"]})
        client.get("/v1/secret%1b[31m%0a")
        client.get(server.service.keep_explored(b"page"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "/" in line]
    assert len(lines) == 4 and "/explored/..." in lines[3]
    assert not any(word in line for line in lines[:2] for word in ("secret", KEY, "iVBOR"))
    assert not any("\x1b" in line for line in lines)
    if form == "json":
        assert json.loads(lines[0]).items() >= {"method": "POST", "path": "/v1/chat/completions", "status": 200}.items()
