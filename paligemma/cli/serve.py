"""`paligemma serve`: a server for one model."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paligemma.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    ImageSize,
    LocScale,
    Model,
    Quantize,
    Revision,
    Threads,
    one_of,
)
from paligemma.cli.output import note, say

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma
    from paligemma.serve.settings import Settings

KEY_VARIABLE = "PALIGEMMA_API_KEY"


def serve(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in /v1/models. Default: --model, without the path.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"The file with the key that clients must send. Or set {KEY_VARIABLE}.")
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Let anybody ask who reaches an address beyond this machine.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients may call this server by (Host header).")
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="An origin whose pages may ask: https://example.org.")] = None,
    image_urls: Annotated[
        list[str] | None, typer.Option(help="A domain that pictures may be fetched from, by https. Default: none.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, max=4096, help="Rows that run together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, max=65536, help="Requests that may wait; beyond: 429.")] = 64,
    queue_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may wait; then 503.")] = 30,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds an answer may take; then 504.")] = 300,
    max_body: Annotated[float, typer.Option(min=0.001, max=1024, help="MB of a request.")] = 32,
    max_pixels: Annotated[float, typer.Option(min=0.001, max=178, help="Million pixels of a picture.")] = 40,
    max_images: Annotated[int, typer.Option(min=1, max=64, help="Pictures of a request.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a request may ask for.")] = 512,
    cache_memory: Annotated[
        float | None, typer.Option(min=0.001, help="GB for keys and values. Default: half of the free memory.")
    ] = None,
    image_cache: Annotated[int, typer.Option(min=0, help="Encoded pictures that are kept.")] = 32,
    prefill_every: Annotated[int, typer.Option(min=1, help="Steps between two prefills while rows run.")] = 8,
    threads: Threads = None,
    decode_workers: Annotated[int, typer.Option(min=1, max=64, help="Threads that decode pictures.")] = 2,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what runs when the server is stopped.")] = 30,
    log: Annotated[
        str, typer.Option(help="A line for each request: text or json.", callback=one_of("text", "json"))
    ] = ("text"),
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve no page at /.")] = False,
    ignore_history: Annotated[
        bool, typer.Option("--ignore-history", help="Drop earlier messages of a conversation instead of refusing it.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Decode with one compiled graph, for GPUs. The start takes a minute longer."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    image_size: ImageSize = None,
    loc_scale: LocScale = 1024,
) -> None:
    """Serve a model: OpenAI's chat completions, boxes and masks as JSON, and a page to try it on.

    Prints one line, the URL, once it answers. SIGTERM lets running answers finish.
    """
    if compile and quantize:
        raise typer.BadParameter("--compile does not go with --quantize: its kernels cannot be compiled")
    key = read_key(api_key_file)
    local = uds is not None or is_loopback(host)
    if not local and key is None and not no_key:
        raise typer.BadParameter(
            f"--host {host} is reached from other machines: give a key (--api-key-file or {KEY_VARIABLE}), or --no-key "
            "to let anybody ask"
        )

    from paligemma.serve.settings import LOCAL_HOSTS, Settings

    own_name = f"[{host}]" if ":" in host else host
    allowed = [checked_name("--allow-host", name) for name in allow_host or []]
    settings = Settings(
        name=name or default_name(model), embedded=model == "tiny", api_key=key,
        hosts=tuple(dict.fromkeys([*LOCAL_HOSTS, own_name.lower(), *allowed])),
        origins=tuple(checked_origin(origin) for origin in cors or []),
        image_domains=tuple(checked_name("--image-urls", domain).strip("[]") for domain in image_urls or []),
        max_rows=max_rows, max_queue=max_queue, queue_timeout=queue_timeout, timeout=timeout, grace=grace,
        max_body=max_body, max_pixels=max_pixels, max_images=max_images, max_new_tokens=max_new_tokens,
        cache_memory=cache_memory, image_cache=image_cache, prefill_every=prefill_every, threads=threads,
        decode_workers=decode_workers, log=log, page=not no_page, ignore_history=ignore_history,
        compile=compile,
    )  # fmt: skip

    def load() -> PaliGemma:
        from paligemma.serve.loading import load_for_serving

        return load_for_serving(
            model, note, device=device, dtype=dtype, quantize=quantize, revision=revision, image_size=image_size,
            loc_scale=loc_scale, device_map=device_map,
        )  # fmt: skip

    raise typer.Exit(run(load, settings, host, port, uds))


def run(load: object, settings: Settings, host: str, port: int, uds: Path | None) -> int:
    from paligemma.serve.server import listen, listen_at, mark_of, serve

    listening, url = listen(host, port) if uds is None else listen_at(uds)
    ours = None if uds is None else mark_of(uds)
    try:
        with listening:
            note(f"loading {settings.name}")
            return serve(load, settings, listening, url, say)  # type: ignore[arg-type]
    finally:
        if uds is not None and mark_of(uds) == ours:  # not that of a server which has taken our place meanwhile
            uds.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ checks


def read_key(file: Path | None) -> str | None:
    """The key, from the file or the environment; never from the command line, which every user of a machine can see."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        source = KEY_VARIABLE
        if not key:
            return None
    else:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise typer.BadParameter(f"--api-key-file {file}: {reason}") from None
        source = f"--api-key-file {file}"
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise typer.BadParameter(f"{source} holds no key: expected one line of letters and digits")
    return key


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_name(option: str, host: str) -> str:
    """The name of a machine, which holds at every port."""
    if not re.fullmatch(r"\[[0-9a-fA-F:.]+\]|[\w.-]+", host):
        raise typer.BadParameter(
            f"{option} is {host!r}, expected a name alone, such as example.org or [::1]: leave out scheme and port"
        )
    return host.lower()


def checked_origin(origin: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
        raise typer.BadParameter(f"--cors is {origin!r}, expected an origin such as https://example.org")
    return origin.lower()


def default_name(model: str) -> str:
    """A hub id as it is; of a folder or file its name, without the way to it."""
    return Path(model).resolve().name if os.path.exists(model) else model
