"""What clients are told when something goes wrong: OpenAI's shape of an error, never a path or a traceback."""

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from varkit.errors import UserError
from varkit.serve.batcher import Busy, Stopping

CLIENT_LEFT = 499
STOPPING_RETRY = 5
BROKEN = "something broke on the server; its log says what"


class ErrorBody(BaseModel):
    """What went wrong; param: the parameter that is to blame, where it is one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An answer with a status from 400 on."""

    error: ErrorBody


class ApiError(Exception):
    """An answer other than 200. retry: seconds after which the same request may succeed; None: it will not."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and retry is None else "server_error"
        self.status = status
        self.body = ErrorAnswer(error=ErrorBody(message=message, type=kind, param=param, code=code))
        # OpenAI's clients heed the second header: without it they would send a request again that took too long.
        again = {"x-should-retry": "false"} if retry is None else {"Retry-After": str(retry)}
        self.headers = again | (headers or {})

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", retry=error.seconds)
    if isinstance(error, Stopping):
        return ApiError(503, "the server is stopping; try again", code="stopping", retry=STOPPING_RETRY)
    return ApiError(500, BROKEN, code="internal_error")


def of_validation(problems: list[Any]) -> ApiError:
    """The first of pydantic's problems with a request, naming the parameter."""
    first = problems[0]
    # Where it lies begins with "body" in what FastAPI checks, and goes down to parts of a value.
    places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
    name = places[0] if places else None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown parameter {name!r}; this server does not know it", name, "unknown_parameter"
        )
    if first["type"] == "missing" and name:
        return ApiError(400, f"parameter {name!r} is missing", name, "missing_required_parameter")
    if first["type"] in ("json_invalid", "missing", "model_attributes_type") or name is None:
        return ApiError(400, "the body is no JSON object; send one as application/json", code="invalid_body")
    text = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"parameter {name!r}: {text[:1].lower()}{text[1:]}", name, "invalid_value")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its OpenAPI description."""
    return {status: {"model": ErrorAnswer, "description": EXPLAINED[status]} for status in statuses}


EXPLAINED = {
    400: "A parameter is unknown, missing or wrong, or the body is.",
    401: "The API key is missing or wrong.",
    403: "The server has no API keys, so it answers only this machine.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "Something broke.",
    503: "The server is stopping; `Retry-After` says when to come back.",
    504: "The pictures took longer than the server's limit.",
}
