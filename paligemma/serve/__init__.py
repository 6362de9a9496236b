"""A server for one model, with OpenAI's chat completions and with boxes and masks as JSON: `paligemma serve`.

A request goes through the files of this room in this order:

    guard.py          Host, Origin, key; headers of every reply; one line in the log
    app.py            which path is answered by what
    bodies.py         the body is read, within its limits of time and size, and taken apart
    chat.py native.py its fields are checked: what is asked becomes an `Ask`
    pictures.py       pictures are found and their headers read; fetching.py for URLs that are allowed
    rows.py           in a worker: prompt and pictures -> the tensors of a row
    engine_thread.py  the one thread that runs the model; rows wait, run, and can be cancelled
    conversation.py   one request from its body to its reply: deadlines, and a client that leaves
    replies.py        answers -> JSON, whole or as a stream of events

Three rules hold everywhere. Nothing that takes long runs on the event loop. Whatever waits has a limit, and beyond it
the client is told so. What is wrong with a request is said in one line that names the field.

`Deployment` is the same server as a Ray Serve deployment (needs the extra `ray`).
"""

from __future__ import annotations

from typing import Any

__all__ = ["Deployment"]

Deployment: Any


def __getattr__(name: str) -> object:
    if name == "Deployment":  # made when it is used: ray is an extra
        from paligemma.serve.deployment import deployment

        return deployment()
    raise AttributeError(f"module 'paligemma.serve' has no attribute {name!r}")
