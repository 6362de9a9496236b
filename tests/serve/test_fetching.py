"""Pictures from URLs: of allowed domains alone, by https, from public addresses, and without a detour."""

import asyncio
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from serving import SCENE, error_of, running

from paligemma.serve import fetching, service
from paligemma.serve.errors import ApiError
from paligemma.serve.fetching import check_url, is_public
from paligemma.serve.pictures import Source

DOMAINS = ("pictures.example",)


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://pictures.example/a.png", ("pictures.example", "/a.png")),
        ("https://PICTURES.example", ("pictures.example", "/")),
        ("https://pictures.example:443/a?b=c#d", ("pictures.example", "/a?b=c")),
        ("https://pictures.example/ä b%20c", ("pictures.example", "/%C3%A4%20b%20c")),
    ],
)
def test_urls_that_may_be_fetched(url, expected):
    assert check_url(Source(url, "image"), DOMAINS) == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a.png", "https://other.example/a.png", "https://pictures.example.other.example/",
        "https://a.pictures.example/", "https://pictures.example:8443/", "https://me@pictures.example/",
        "https://other.example\\@pictures.example/", "https://pictures.example@other.example/", "https://127.0.0.1/",
        "https://2130706433/", "https://169.254.169.254/", "//pictures.example/", "https:///a.png", "https://[",
        "https://pictures.example:99999/", "https://pictures.example\r\n.other/", "file://pictures.example/etc/passwd",
    ],
)  # fmt: skip
def test_urls_that_may_not(url):
    with pytest.raises(ApiError) as error:
        check_url(Source(url, "image"), DOMAINS)
    assert (error.value.status, error.value.code, error.value.param) == (400, "url_not_allowed", "image")


def test_addresses_that_are_public():
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"):
        assert is_public(address), address
    for address in (
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "ff02::1",
        "64:ff9b::7f00:1", "192.0.2.1",
    ):  # fmt: skip
        assert not is_public(address), address


# ------------------------------------------------------------------------------------------------ over TLS


class Site:
    """pictures.example, on this machine: an https server with a certificate that the test trusts."""

    def __init__(self, folder):
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example",
             "-keyout", str(key), "-out", str(certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.trust = ssl.create_default_context(cafile=str(certificate))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.context, self.answer, self.requests = context, b"", []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            try:
                with self.context.wrap_socket(connection, server_side=True) as tls:
                    self.requests.append(tls.recv(65536))
                    tls.sendall(self.answer)
            except OSError:
                pass

    def serves(self, body, head=b"HTTP/1.1 200 OK\r\n"):
        self.answer = head + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("tls"))
    yield site
    site.socket.close()


@pytest.fixture
def reachable(site, monkeypatch):
    """The name means this machine, and this machine counts as public."""
    names = []

    async def resolve(host):
        names.append(host)
        return ["127.0.0.1"]

    monkeypatch.setattr(fetching, "resolve", resolve)
    monkeypatch.setattr(fetching, "PORT", site.port)
    monkeypatch.setattr(fetching, "tls", lambda: site.trust)
    site.names = names
    return site


@pytest.fixture(scope="module")
def fetching_server(pg):
    with running(pg, image_domains=DOMAINS) as server:
        yield server


def ask(server, url="https://pictures.example/scene.png"):
    with server.client() as client:
        return client.post("/v1/detect", json={"image": url, "labels": ["book"], "max_tokens": 8})


def test_a_picture_is_fetched(fetching_server, reachable):
    reachable.serves(SCENE)
    reply = ask(fetching_server)
    assert reply.status_code == 200 and reply.json()["image"] == "https://pictures.example/scene.png"
    assert reachable.requests[-1].startswith(b"GET /scene.png HTTP/1.1\r\nHost: pictures.example\r\n")
    assert reachable.names == ["pictures.example"]  # resolved once


def test_few_pictures_are_fetched_at_a_time(fetching_server, monkeypatch):
    """Their bytes are in no request's body, so nothing else limits them."""
    now, most = [0], [0]

    async def fetch(source, domains):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.05)
        now[0] -= 1
        return replace(source, value=SCENE)

    monkeypatch.setattr(service, "fetch", fetch)
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: ask(fetching_server), range(20)))
    assert {reply.status_code for reply in replies} == {200}
    assert 2 <= most[0] <= service.FETCHED_TOGETHER


@pytest.mark.parametrize(
    "head, body, says",
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n", b"", "redirects"),
        (b"HTTP/1.1 404 Not Found\r\n", b"", "status 404"),
        (b"HTTP/1.1 200 OK\r\n", b"<html>", "no picture that is read here"),
        (b"HTTP/1.1 200 OK\r\n", bytes(10 * 2**20 + 1), "more than 10 MB"),
        (b"no http\r\n", b"", "could not be read"),
        (b"HTTP/1.1 200 OK\r\n", SCENE[:1000], "damaged or truncated"),
    ],
)
def test_an_allowed_url_that_gives_no_picture(fetching_server, reachable, head, body, says):
    reachable.serves(body, head)
    reply = ask(fetching_server)
    assert error_of(reply) == (422, "no_image_at_url", "image") and says in reply.json()["error"]["message"]
    assert "127.0.0.1" not in reply.text
    assert error_of(ask(fetching_server, "HTTPS://pictures.example/scene.png"))[0] == 422


def test_a_site_that_never_answers(fetching_server, reachable, monkeypatch):
    monkeypatch.setattr(fetching, "LONGEST", 0.2)
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(fetching, "PORT", silent.getsockname()[1])
    reply = ask(fetching_server)
    assert error_of(reply)[:2] == (422, "no_image_at_url") and "within 0.2 seconds" in reply.text
    silent.close()


def test_a_certificate_for_another_name(fetching_server, reachable, monkeypatch):
    monkeypatch.setattr(fetching, "tls", ssl.create_default_context)
    assert error_of(ask(fetching_server))[:2] == (422, "no_image_at_url")


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["169.254.169.254"], ["::1"]])
def test_a_name_with_an_address_inside_is_not_dialled(fetching_server, monkeypatch, answers):
    """All addresses must be public: any of them might be dialled."""
    dialled = []
    resolver_answers(monkeypatch, [answers])
    monkeypatch.setattr(asyncio, "open_connection", lambda *a, **k: dialled.append(a))
    reply = ask(fetching_server)
    assert error_of(reply)[:2] == (422, "no_image_at_url") and "not public" in reply.text and not dialled


def test_a_name_that_changes_between_check_and_dial(fetching_server, monkeypatch):
    """The address that was checked is the one that is dialled; the name is not looked up again."""
    dialled, asked = [], resolver_answers(monkeypatch, [["93.184.216.34"], ["127.0.0.1"]])

    async def open_connection(host, port, **options):
        dialled.append((host, options["server_hostname"]))
        raise OSError("not reached from here")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    assert error_of(ask(fetching_server))[:2] == (422, "no_image_at_url")
    assert dialled == [("93.184.216.34", "pictures.example")] and asked == ["pictures.example"]


def test_the_next_address_is_dialled_where_the_first_cannot_be_reached(fetching_server, monkeypatch):
    """An address of IPv6 comes first, and many containers have no way to it."""
    dialled = []
    resolver_answers(monkeypatch, [["2606:2800:220:1:248:1893:25c8:1946", "93.184.216.34"]])

    async def open_connection(host, port, **options):
        dialled.append(host)
        raise OSError("not reached from here")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    assert error_of(ask(fetching_server))[:2] == (422, "no_image_at_url")
    assert dialled == ["2606:2800:220:1:248:1893:25c8:1946", "93.184.216.34"]


def resolver_answers(monkeypatch, answers):
    """Makes names mean these addresses, one list a question. Returns the names that were asked for."""
    asked = []

    async def getaddrinfo(self, host, port, **options):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[len(asked) - 1]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_does_not_exist(fetching_server, monkeypatch):
    async def getaddrinfo(self, host, port, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert error_of(ask(fetching_server))[:2] == (422, "no_image_at_url")
