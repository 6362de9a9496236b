"""The server as a deployment of Ray Serve, for more than one machine: replicas, each with a model of its own.

    from ray import serve
    from paligemma.serve import Deployment

    serve.run(Deployment.options(num_replicas=2).bind(model="google/paligemma2-3b-mix-224", api_key="..."))

Each replica is the whole ASGI application of `app.py`, engine included; Ray's proxy spreads requests over them. A
replica whose engine has died says so to Ray, which replaces it.

The class is made when it is first asked for, because ray is an extra and takes seconds to import.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


@cache
def deployment() -> Any:
    from ray import serve

    from paligemma.serve.app import create_app
    from paligemma.serve.loading import load_for_serving
    from paligemma.serve.settings import Settings

    @serve.deployment(name="PaliGemma", max_ongoing_requests=1_000, health_check_period_s=5)
    @serve.ingress()
    class Deployment:
        """model, device, dtype, quantize, revision, image_size, loc_scale: as in `paligemma.load`. settings: the fields
        of `Settings`, such as api_key and hosts (what the Host header may say; the proxy passes it on)."""

        def __init__(
            self,
            model: str = "tiny",
            device: str | None = None,
            dtype: str | None = None,
            quantize: str | None = None,
            revision: str | None = None,
            image_size: int | None = None,
            loc_scale: int = 1024,
            **settings: Any,
        ) -> None:
            pg = load_for_serving(
                model, lambda text: print(text, file=sys.stderr, flush=True), device=device, dtype=dtype,
                quantize=quantize, revision=revision, image_size=image_size, loc_scale=loc_scale,
            )  # fmt: skip
            named = {"name": model, "embedded": model == "tiny", **settings}
            self.server = create_app(lambda: pg, Settings(**named))

        def __serve_build_asgi_app__(self) -> Any:
            return self.server

        def check_health(self) -> None:
            """Asked by Ray every few seconds; an exception has the replica replaced."""
            if (state := self.server.service.state) in ("failed", "stuck"):
                raise RuntimeError(f"the engine is {state}")

    return Deployment
