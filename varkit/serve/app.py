"""The server as an application: routes, limits and errors around a `Service`.

/v1/images/generations   /v1/images/edits   /v1/models   /healthz   /metrics
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from varkit import __version__
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.serve.answers import EventStream, Kind, Wrapping, all_at_once
from varkit.serve.batcher import Busy, Stopping
from varkit.serve.errors import BROKEN, ApiError, as_api_error, documented, of_validation
from varkit.serve.gate import Gate
from varkit.serve.metrics import Counted, Metrics
from varkit.serve.schema import Asked, Edit, EditForm, Generation, Health, ModelCard, ModelList, Pictures
from varkit.serve.service import Limits, Order, Service

GATE = (401, 403)
"""Errors of any route but /healthz."""

DRAWING = (*GATE, 400, 404, 408, 413, 429, 500, 503, 504)
FILES = {"image": "image", "image[]": "image", "mask": "mask"}
"""Names of files in a form; clients send the second where they were given a list."""


def create_app(
    models: Mapping[str, Pipeline], limits: Limits | None = None, keys: Sequence[str] = ()
) -> FastAPI:
    """The server for `models`, by the names that clients use, as an ASGI application.

    keys: API keys; without any, only this machine is answered.
    """
    limits, metrics = limits or Limits(), Metrics()
    service = Service(models, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="varkit",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they come from other hosts
        redoc_url=None,
        dependencies=[Depends(_no_query)],
    )
    app.state.service = service
    app.add_middleware(Gate, keys=keys, most_bytes=limits.body)
    app.add_middleware(Counted, metrics=metrics)
    _add_errors(app)
    _add_drawing(app, service)
    _add_telling(app, service, metrics)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's own, less the answer 422, which is not given here."""
        whole = described()
        for path in whole["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return whole

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_drawing(app: FastAPI, service: Service) -> None:
    streamed = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
    told: dict[str, Any] = {"response_model": Pictures, "response_model_exclude_none": True}
    told["responses"] = {**documented(*DRAWING), **streamed}

    @app.post("/v1/images/generations", **told)
    async def generations(request: Request, asked: Generation = Body()) -> Any:  # noqa: B008
        """Pictures of a prompt."""
        order = await run_in_threadpool(service.generation, asked, asked.prompt)
        return await _answer(service, order, asked, "image_generation", request)

    form = {"required": True, "content": {"multipart/form-data": {"schema": EditForm.model_json_schema()}}}

    @app.post("/v1/images/edits", openapi_extra={"requestBody": form}, **told)
    async def edits(request: Request) -> Any:
        """A picture of which a part is drawn anew."""
        asked, files = await _read_form(request)
        order = await run_in_threadpool(service.edit, asked, files["image"], files.get("mask"))
        return await _answer(service, order, asked, "image_edit", request)


def _add_telling(app: FastAPI, service: Service, metrics: Metrics) -> None:
    created = int(time.time())

    @app.get("/v1/models", response_model=ModelList, responses=documented(*GATE, 400))
    async def models() -> ModelList:
        """The models of this server."""
        return ModelList(data=service.cards(created))

    @app.get("/v1/models/{name}", response_model=ModelCard, responses=documented(*GATE, 400, 404))
    async def model(name: str) -> ModelCard:
        """One model."""
        for card in service.cards(created):
            if card.id == name:
                return card
        raise ApiError(404, f"there is no model {name[:60]!r}", "model", "model_not_found")

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}, **documented(400)})
    async def healthz() -> JSONResponse:
        """Whether the server can work."""
        batcher = service.batcher
        told = Health(status=service.status, waiting=len(batcher.waiting), active=batcher.active)
        return JSONResponse(told.model_dump(), 200 if told.status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses=documented(*GATE, 400))
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


async def _answer(service: Service, order: Order, asked: Asked, kind: Kind, request: Request) -> Any:
    ticket, wrapping = service.submit(order), Wrapping.of(asked)
    if asked.stream:
        return EventStream(ticket, wrapping, kind)
    return await all_at_once(ticket, wrapping, request)


async def _read_form(request: Request) -> tuple[Edit, dict[str, bytes]]:
    """The fields of an edit, and its files."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, "the body is no form; send multipart/form-data", code="invalid_body")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=32) as form:
        for name, value in form.multi_items():
            short = FILES.get(name, name)
            if short in fields or short in files:
                raise ApiError(
                    400, f"parameter {short!r} is given twice; send it once", short, "invalid_value"
                )
            if isinstance(value, UploadFile) != (name in FILES):
                kind = "a file" if name in FILES else "no file"
                raise ApiError(400, f"parameter {short!r} is {kind}; send it as such", short, "invalid_value")
            if isinstance(value, UploadFile):
                files[short] = await value.read()
            else:
                fields[short] = value
    try:
        asked = Edit.model_validate(fields)
    except ValidationError as error:
        raise of_validation(list(error.errors())) from error
    if "image" not in files:
        raise ApiError(400, "parameter 'image' is missing", "image", "missing_required_parameter")
    return asked, files


def _no_query(request: Request) -> None:
    """Parameters come in the body; one in the address would be overlooked."""
    for name in request.query_params:
        raise ApiError(
            400,
            f"unknown parameter {name[:60]!r} in the address; send it in the body",
            name[:60],
            "unknown_parameter",
        )


def _add_errors(app: FastAPI) -> None:
    async def expected(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(list(error.errors())).response()

    async def http(request: Request, error: Exception) -> Response:
        """What starlette itself refuses: unknown addresses, methods, broken bodies."""
        assert isinstance(error, HTTPException)
        said = {404: "there is nothing at this address", 405: "this address does not know this method"}
        answer = ApiError(error.status_code, said.get(error.status_code, "the body cannot be read"))
        answer.headers |= dict(error.headers or {})
        return answer.response()

    async def broken(request: Request, error: Exception) -> Response:
        return ApiError(500, BROKEN, code="internal_error").response()

    for kind in (ApiError, UserError, Busy, Stopping):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, broken)
