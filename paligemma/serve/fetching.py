"""Pictures from https URLs, of domains that the operator allowed, and without a way into the operator's own network.

A server that fetches what strangers name can be made to read from inside: a cloud's metadata service, a router, a
database on loopback. So: https alone, exact host names, no port, user or redirect; the name is resolved once, every
address must be a public one, and the connection goes to an address that was checked (a name may mean another address a
moment later). TLS still verifies the certificate for the name. At most 10 MB in 10 seconds.

h11 parses the reply; httpx would resolve the name itself, and is not needed by the server otherwise.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from urllib.parse import quote, urlsplit

import h11

from paligemma.serve.errors import ApiError, invalid, shown
from paligemma.serve.pictures import Source

PORT = 443
LARGEST = 10 * 2**20  # bytes
LONGEST = 10.0  # seconds, for all of it


def check_url(source: Source, domains: Sequence[str]) -> tuple[str, str]:
    """(host, path with query) of a URL that may be fetched. ApiError for any other."""
    url, param = str(source.value), source.param

    def refused(why: str) -> ApiError:
        return invalid(param, f"{param} is {shown(url)}: {why}", "url_not_allowed")

    try:
        parts = urlsplit(url)
        host, port, user = (parts.hostname or "").lower(), parts.port, parts.username
    except ValueError:
        raise refused("it is no URL") from None
    if not domains:
        raise refused("this server fetches no pictures: send the picture itself, as a data: URL or an upload")
    if parts.scheme != "https":
        raise refused("only data: and https: URLs are taken")
    if host not in domains:
        raise refused(f"pictures are fetched from {', '.join(domains)} alone")
    if port not in (None, 443) or user is not None:
        raise refused("a port or a user name in the URL is not allowed")
    query = f"?{quote(parts.query, safe=SAFE)}" if parts.query else ""
    return host, (quote(parts.path, safe=SAFE) or "/") + query


SAFE = "/%:@!$&'()*+,;=~-._?[]"


async def fetch(source: Source, domains: Sequence[str]) -> Source:
    """The picture behind an allowed URL, as bytes. ApiError 400 where it is not allowed, 422 where there is none."""
    host, target = check_url(source, domains)
    try:
        data = await asyncio.wait_for(_get(host, target), LONGEST)
    except (asyncio.TimeoutError, TimeoutError):
        raise no_picture(source, f"no answer from {host} within {LONGEST:g} seconds") from None
    except (OSError, ssl.SSLError, h11.ProtocolError, EOFError) as error:
        raise no_picture(source, f"{host} could not be read ({type(error).__name__})") from None
    except ValueError as error:
        raise no_picture(source, str(error)) from None
    return replace(source, value=data, name=str(source.value), fetched=True)


def no_picture(source: Source, why: str) -> ApiError:
    return ApiError(422, "no_image_at_url", f"{source.param}: {why}", source.param)


async def resolve(host: str) -> list[str]:
    """The addresses of a name, all of them public. ValueError if one is not: then none of them is dialled."""
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    for address in addresses:
        if not is_public(address):
            raise ValueError(f"{host} has an address that is not public, so it is not read")
    return addresses


def is_public(address: str) -> bool:
    """An address anybody on the internet may have. Of IPv6 forms that carry an IPv4 address, both must be public."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = None
    if isinstance(ip, ipaddress.IPv6Address):
        teredo = ip.teredo
        inner = ip.ipv4_mapped or ip.sixtofour or (teredo[1] if teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and (inner is None or is_public(str(inner)))


@cache
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _get(host: str, target: str) -> bytes:
    reader, writer = await _connect(host, await resolve(host))
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", host), ("Accept", "image/*"), ("User-Agent", "paligemma"), ("Connection", "close")]
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return await _body(host, connection, reader)
    finally:
        writer.close()


async def _connect(host: str, addresses: Sequence[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first address that can be reached: not every machine has a way to those of IPv6."""
    for address in addresses[:-1]:
        with suppress(OSError, asyncio.TimeoutError):
            dialled = asyncio.open_connection(address, PORT, ssl=tls(), server_hostname=host)
            return await asyncio.wait_for(dialled, LONGEST / len(addresses))
    return await asyncio.open_connection(addresses[-1], PORT, ssl=tls(), server_hostname=host)


async def _body(host: str, connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Response):
            if 300 <= event.status_code < 400:
                raise ValueError(f"{host} redirects, and redirects are not followed: name the picture's own URL")
            if event.status_code != 200:
                raise ValueError(f"{host} answered with status {event.status_code}")
        elif isinstance(event, h11.Data):
            data += event.data
            if len(data) > LARGEST:
                raise ValueError(f"the picture at {host} has more than {LARGEST // 2**20} MB")
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return bytes(data)
