"""What a stranger may send to break the server: each gets the right status and a message that names the thing, and the
memory stays within 400 MB of what the server takes anyway."""

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving import SCENE, chat, error_of, png, running, wait_until

from paligemma.serve.errors import ApiError
from paligemma.serve.exploring import decode_all
from paligemma.serve.pictures import FORMATS, FeatureCache, Source, read

URL = "/v1/chat/completions"


def resident():
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest growth of this process's memory within the block, looked at a hundred times a second."""

    def __enter__(self):
        self.base = self.most = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.01):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    @property
    def growth(self):
        return self.most - self.base


def bomb(side, channels, rows):
    """A PNG of side x side equal pixels, of which only the first rows are there: the rest would be zeros too."""
    packed = zlib.compress(b"\0" * (1 + side * channels) * rows, 9)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, {1: 0, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow warns of them; the server refuses them
@pytest.mark.parametrize("channels", [1, 4])
def test_pixel_bombs_sixteen_at_a_time(client, channels):
    """177 million pixels in a few kilobytes."""
    body = chat(image=bomb(13_300, channels, rows=1_000))
    with Peak() as peak, ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: client.post(URL, json=body), range(16)))
    for reply in replies:
        status, code, param = error_of(reply)
        assert (status, code) == (413, "too_many_pixels") and param.endswith("image_url.url")
    assert "13,300 x 13,300" in replies[0].json()["error"]["message"]
    assert peak.growth < 400e6


def test_pictures_of_a_page_that_are_too_many_together():
    """Each of them is taken; the message names the limit of all, not what is left of it."""
    source = Source(png(Image.new("RGB", (100, 100))), "image")
    assert len(decode_all([source] * 2, 20_000)) == 2
    with pytest.raises(ApiError, match=r"the pictures have more than 0\.02 million pixels together") as error:
        decode_all([source] * 3, 20_000)
    assert (error.value.status, error.value.code) == (413, "too_many_pixels")


@pytest.mark.slow
def test_the_largest_pictures_that_are_taken(pg):
    """40 million transparent pixels take 320 MB while they are decoded, so they are decoded one at a time."""
    data = png(Image.new("RGBA", (6_300, 6_300), (0, 0, 0, 0)), compress_level=6)
    bodies = [chat(image=data + bytes([number]), max_tokens=2) for number in range(5)]  # each another picture
    with running(pg) as server, server.client() as client, Peak() as peak, ThreadPoolExecutor(5) as pool:
        replies = list(pool.map(lambda body: client.post(URL, json=body), bodies))
    assert {reply.status_code for reply in replies} == {200}
    assert peak.growth < 400e6


def gif():
    file = io.BytesIO()
    frames = [Image.new("P", (64, 64), color) for color in range(50)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def test_of_an_animation_the_first_picture_is_taken(client):
    assert client.post(URL, json=chat(image=gif(), max_tokens=2)).status_code == 200


BROKEN = {
    "cut off": SCENE[: len(SCENE) // 2],
    "header alone": SCENE[:40],
    "no picture": b"hello",
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps, which would start a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.4\n",
    "noise behind a header": SCENE[:60] + os.urandom(2_000),
    "jpeg cut off": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "no pixels": SCENE.replace(SCENE[16:24], struct.pack(">II", 0, 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures(client, name):
    status, code, param = error_of(client.post(URL, json=chat(image=BROKEN[name])))
    assert (status, code, param) == (400, "bad_image", "messages[0].content[0].image_url.url")


def encoded(format, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format)
    return file.getvalue()


def test_no_other_format_of_pillow_is_read(client):
    """Each decoder may have faults of its own. Programs that write such files are rare, and EPS would start one."""
    others = {
        name: encoded(name)
        for name in ("DDS", "DIB", "EPS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA")
    }
    others |= {name: encoded(name, "1") for name in ("MSP", "XBM")}
    others["PSD"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(12 + 2 + 3 * 64)
    for name, data in others.items():
        assert Image.open(io.BytesIO(data)).format == name
        status, code, param = error_of(client.post(URL, json=chat(image=data)))
        assert (status, code, param) == (400, "bad_image", "messages[0].content[0].image_url.url"), name
    for name in FORMATS:
        assert client.post(URL, json=chat(image=encoded(name), max_tokens=1)).status_code == 200, name


def test_after_the_header_too_no_other_decoder_is_tried(monkeypatch):
    """A file may look like one format to one decoder and like another to the next."""
    tried = []
    open_any = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: tried.append(options) or open_any(file, **options))
    read(Source(SCENE, "image"), FeatureCache(1), 10**6, 28)
    assert tried == [{"formats": FORMATS}] * 2


def form(disposition):
    part = b'--B\r\nContent-Disposition: form-data; name="image"; %s\r\n\r\n%s\r\n' % (disposition, SCENE)
    return part + b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nocr\r\n--B--\r\n'


NAMES = {  # as it stands in the form: as it is sent back
    b"a%22b%0D%0A.png": "a%22b%0D%0A.png",  # as browsers write quotes and line breaks
    b'a\\"b.png': 'a"b.png',
    "süß 日本.png".encode(): "süß 日本.png",
    b"caf\xe9.png": "café.png",  # no UTF-8
    b"<script>alert(1)</script>.png": "<script>alert(1)</script>.png",
    b"../../etc/passwd": "../../etc/passwd",
    b"\x1b[31m\x00.png": "\x1b[31m\0.png",
    b"": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_may_hold_anything(client, capfd, name):
    """It comes back as a string of JSON, where quotes and control characters are escaped, and stands nowhere else."""
    headers = {"content-type": "multipart/form-data; boundary=B"}
    reply = client.post("/v1/answer", content=form(b'filename="%s"' % name), headers=headers)
    assert reply.status_code == 200 and reply.json()["image"] == NAMES[name]
    assert reply.headers["content-type"] == "application/json" and reply.headers["x-content-type-options"] == "nosniff"
    assert reply.text.isprintable() and all(".png" not in value for value in reply.headers.values())
    assert ".png" not in capfd.readouterr().err


def test_names_that_break_the_form(client):
    headers = {"content-type": "multipart/form-data; boundary=B"}
    for disposition in (b'filename="a\r\nb.png"', b'filename="%s"' % (b"x" * 30_000)):
        reply = client.post("/v1/answer", content=form(disposition), headers=headers)
        assert error_of(reply)[:2] == (400, "invalid_form")
    reply = client.post("/v1/answer", content=form(b"filename*=UTF-8''s%C3%BC.png"), headers=headers)
    assert error_of(reply)[:2] == (400, "invalid_value") and "expected a file" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,!!!!", "data:image/png;base64,AAAAA", "data:image/png,abc", "data:", "data:;base64,\xe9"],
)
def test_bad_base64(client, url):
    reply = client.post("/v1/detect", json={"image": url, "labels": ["dog"]})
    assert error_of(reply) == (400, "bad_base64", "image")


def test_base64_as_other_programs_write_it(client):
    packed = base64.b64encode(SCENE).decode()
    lines = "\n".join(packed[i : i + 76] for i in range(0, len(packed), 76))
    for data in (lines, packed.rstrip("="), packed.replace("+", "-").replace("/", "_")):
        body = {"image": f"data:image/png;base64,{data}", "labels": ["dog"], "max_tokens": 1}
        assert client.post("/v1/detect", json=body).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "/etc/passwd", "examples/scene.png", "http://example.org/a.png", "http://127.0.0.1/a.png",
        "http://169.254.169.254/latest/meta-data/", "https://2130706433/a.png", "https://0x7f.1/a.png",
        "https://[::1]/a.png", "https://localhost/a.png", "ftp://example.org/a.png", "https://exa mple.org", "https://[",
        "", "gopher://x", "https://example.org/a.png",
    ],
)  # fmt: skip
def test_no_picture_is_fetched_by_default(client, url):
    reply = client.post("/v1/detect", json={"image": url, "labels": ["dog"]})
    assert error_of(reply) == (400, "url_not_allowed", "image")


# ------------------------------------------------------------------------------------------------ bodies and headers


def raw(server, *pieces, seconds=20):
    """What a server answers to these bytes, sent as they are."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        with_error = None
        try:
            for piece in pieces:
                connection.sendall(piece)
        except OSError as error:  # it has closed the connection already
            with_error = error
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer and b"content-length" in answer.lower():
                    head, _, body = answer.partition(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                    if len(body) >= length:
                        break
        except OSError:
            assert answer or with_error
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def test_a_chunked_body_of_a_gigabyte(server):
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    with Peak() as peak:
        answer = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 1024)
    assert b" 413 " in answer and b"body_too_large" in answer
    assert peak.growth < 400e6


def test_a_body_that_says_it_is_too_long(server):
    answer = raw(server, HEAD + b"Content-Length: 999999999\r\n\r\n")
    assert b" 413 " in answer and b"32 MB" in answer


def test_large_bodies_together_are_limited(pg):
    """Many that come slowly cannot hold more than four could."""
    with running(pg, max_body=1, body_timeout=3) as server:

        def begun():
            connection = socket.create_connection(server.address)
            connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000)
            return connection

        first = [begun() for _ in range(4)]
        wait_until(lambda: server.service.memory.held == 4 * 900_000)
        late = begun()
        assert b" 429 " in late.recv(300)
        assert all(b" 408 " in connection.recv(300) for connection in first)
        wait_until(lambda: server.service.memory.held == 0)
        for connection in [*first, late]:
            connection.close()


def test_a_slow_body(pg):
    with running(pg, body_timeout=0.3) as server:
        answer = raw(server, HEAD + b'Content-Length: 100\r\n\r\n{"mess')
        assert b" 408 " in answer and b"body_timeout" in answer and b"0.3 seconds" in answer


def status_from(connection):
    """Of the next reply, which is read to its end."""
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    reply.read()
    return reply.status


def test_a_body_that_trickles_after_its_answer(pg):
    """No byte of it makes the connection live longer: anybody without a key could hold all of them."""
    unwanted = HEAD + b"Content-Length: 1000000\r\n\r\n"
    with running(pg, api_key="key", header_timeout=0.5) as server:
        with socket.create_connection(server.address, timeout=20) as connection:
            connection.sendall(unwanted)
            assert status_from(connection) == 401
            with contextlib.suppress(ConnectionError):
                connection.settimeout(0.05)
                start = time.monotonic()
                while time.monotonic() < start + 20:
                    connection.sendall(b" ")
                    with contextlib.suppress(TimeoutError):
                        assert connection.recv(1000) == b""  # closed, and no second answer
                        break
            assert time.monotonic() - start < 10
        wait_until(lambda: not server.server.server_state.connections)


def test_the_connection_of_a_body_that_came_to_its_end_lives_on(pg):
    """Most clients send all of it before they look for an answer. Then it is idle, which has its own limit: longer than
    that of clients and proxies, whose next request would be lost with the connection."""
    with running(pg, api_key="key", header_timeout=0.5) as server:
        assert server.server.config.timeout_keep_alive > 60
        server.server.config.timeout_keep_alive = 2
        with socket.create_connection(server.address, timeout=20) as connection:
            for _ in range(2):
                connection.sendall(HEAD + b"Content-Length: 10\r\n\r\n12345")
                assert status_from(connection) == 401
                connection.sendall(b"67890")
                time.sleep(0.6)
            assert connection.recv(1000) == b""


def test_slow_headers(pg):
    with running(pg, header_timeout=0.3) as server:
        assert b" 408 " in raw(server, b"POST /v1/chat/comp")
        assert b" 408 " in raw(server)
        with socket.create_connection(server.address, timeout=10) as connection:  # the second request of a connection
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b"ok" not in answer:
                answer += connection.recv(1000)
            connection.sendall(b"GET /health HT")
            assert b" 408 " in connection.recv(1000)
        with server.client() as client:  # an answer may take longer
            assert client.post(URL, json=chat()).status_code == 200


def test_a_client_that_reads_nothing_is_hung_up_on(pg):
    """A slow one is not: it takes a little each time that the server looks."""
    many = b"GET /static/example.png HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40
    last = b"GET /static/example.png HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with running(pg, header_timeout=0.4, api_key="key") as server:
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have the same
        connections = server.server.server_state.connections
        # Of one answer less is left unread than of many. Each waits in a buffer of the server.
        for content, reads in ((last, False), (many + last, False), (many + last, True)):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.connect(server.address)
                client.sendall(content)
                wait_until(lambda: connections)
                if not reads:
                    wait_until(lambda: not connections)
                    continue
                received = b""
                for _ in range(20):
                    received += client.recv(2048)
                    time.sleep(0.1)
                while part := client.recv(2**16):
                    received += part
                assert received.count(b"HTTP/1.1 200 OK") == 41


def test_headers_of_200_kilobytes(server):
    answer = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
    assert answer == b"" or b" 400 " in answer or b" 431 " in answer


def test_no_http_at_all(server):
    assert b" 400 " in raw(server, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"{'messages': []}", b"\xff\xfe",
        b'{"messages": ' + b"9" * 5_000,
        b"[" + b"[]," * 200_000 + b"[]]",
    ],
)  # fmt: skip
def test_what_is_no_json(client, body):
    reply = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert error_of(reply) == (400, "invalid_json", None)


@pytest.mark.parametrize("body", [b"null", b"[]", b"7", b'"text"'])
def test_json_that_is_no_object(client, body):
    reply = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert error_of(reply) == (400, "invalid_value", None)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_are_none(client, value):
    body = json.dumps(chat(temperature="here")).replace('"here"', value)
    reply = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert error_of(reply) == (400, "invalid_value", "temperature")


def test_a_body_of_many_values_is_refused_before_it_is_read(client):
    body = b'{"messages": [' + b"[]," * 5_000_000 + b"[]]}"
    with Peak() as peak:
        reply = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert error_of(reply)[1] == "invalid_json" and peak.growth < 200e6


def test_the_loop_is_free_while_hostile_bodies_are_read(server):
    """Others are answered meanwhile: nothing that takes long runs on the event loop."""
    body = json.dumps(chat(image=bytes(20_000_000)))
    slow = []

    def ask():
        with server.client() as client:
            client.post(URL, content=body, headers={"content-type": "application/json"})

    threads = [threading.Thread(target=ask) for _ in range(3)]
    with server.client() as client:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            start = time.perf_counter()
            assert client.get("/health").status_code == 200
            slow.append(time.perf_counter() - start)
    assert np.median(slow) < 0.5
