"""The settings of a server, as `paligemma serve` takes them. Every wait and every size has its limit here."""

from __future__ import annotations

from dataclasses import dataclass, field

MB = 2**20
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """name: of the model, in /v1/models. api_key: None where anybody may ask.

    hosts: what the Host header may say; another name is a page that reaches a local server through DNS rebinding.
    origins: whose pages may read replies (CORS), beside the server's own. image_domains: https hosts that pictures are
    fetched from. Times are in seconds, max_body in MB, max_pixels in millions, cache_memory in GB.
    """

    name: str = "tiny"
    embedded: bool = False  # the model that ships: the page says that it knows only its small world
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = LOCAL_HOSTS
    origins: tuple[str, ...] = ()
    image_domains: tuple[str, ...] = ()
    # How many, and how long
    max_rows: int = 16
    max_queue: int = 64
    queue_timeout: float = 30
    timeout: float = 300
    grace: float = 30
    # What a request may hold
    max_body: float = 32
    max_pixels: float = 40
    max_images: int = 4
    max_new_tokens: int = 512
    # The engine
    cache_memory: float | None = None
    image_cache: int = 32
    prefill_every: int = 8
    compile: bool = False
    threads: int | None = None
    decode_workers: int = 2
    # The rest
    log: str = "text"
    page: bool = True
    ignore_history: bool = False
    # Not options of the command; tests shorten them.
    body_timeout: float = 30
    header_timeout: float = 30
    comment_every: float = 15
    explored_for: float = 600

    @property
    def places(self) -> int:
        """Requests that may run or wait at a time."""
        return self.max_rows + self.max_queue

    def room(self, image_tokens: int) -> int | None:
        """With `compile`, the tokens of a row at most: one picture, a prompt of 255 tokens, and the longest answer."""
        return image_tokens + 255 + self.max_new_tokens if self.compile else None

    @property
    def body_bytes(self) -> int:
        return int(self.max_body * MB)

    @property
    def most_pixels(self) -> int:
        return int(self.max_pixels * 1_000_000)
