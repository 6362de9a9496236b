"""What goes wrong, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import json
import reprlib
from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error that the client is told. param: the field at fault. retry_after: seconds until another try may help."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    def body(self) -> dict[str, Any]:
        type = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status == 408:  # what is still on its way would only be read to be thrown away
            return {"connection": "close"}
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, code, message, param)


def unavailable(state: str) -> ApiError:
    """A 503: the server as a whole cannot answer now."""
    reasons = {
        "loading": "the model is still being loaded",
        "stopping": "the server is stopping and takes no new requests",
        "failed": "the engine failed and the server is about to stop",
        "stuck": "the engine has not finished a step for a long time",
    }
    return ApiError(503, state, reasons[state], retry_after=5)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxdict = _short.maxlist = 3
_short.maxlevel = 2
_short.maxlong = 24


def shown(value: object) -> str:
    """A value of a request for an error message: short, whatever it is."""
    return _short.repr(value)


def json_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, stays an escape: that is JSON too."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")
