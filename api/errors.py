"""One shape for every error, and one handler for each kind of exception."""

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

import log as logs
from database import kind
from errors import ServiceError, StorageUnavailableError
from models import ErrorBody

log = logging.getLogger(__name__)

CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "validation_error",
}
REPORTED_ERRORS = 20  # of a request with thousands
UNREADABLE = "The body could not be read as JSON in UTF-8, or it nests too deeply for that."
NOT_SENT_AS_JSON = "Send the body as JSON, with the header Content-Type: application/json."
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
CLOSE = {"Connection": "close"}  # what may come yet is the rest of a body that nobody reads


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for the OpenAPI document: what it takes may always be wrong,
    and a body too large, too late, or not JSON."""
    always = {408, 415, 422} if 413 in statuses else {422}
    return {status: {"model": ErrorBody} for status in sorted(always.union(statuses))}


def stream_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same of a route whose answers are streams: its errors are none."""
    json = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": json}
        for status in responses(*statuses)
        if isinstance(status, int)
    }


def body(code: str, detail: object, record_id: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"detail": detail, "code": code}
    found["request_id"] = logs.request_id.get() or ""
    if record_id is not None:
        found["id"] = record_id
    return found


def error_body(error: ServiceError) -> dict[str, Any]:
    return body(error.code, error.detail, error.record_id)


def validation_body(errors: Sequence[Any]) -> dict[str, Any]:
    """FastAPI's list, without what the client sent: it may be large, or not even text."""
    found = errors[:REPORTED_ERRORS]
    nul = any(item["type"] == "nul_character" for item in found)
    detail = [
        {
            "type": item["type"],
            "loc": [safe(part) for part in item["loc"]],
            "msg": safe(item["msg"]),
        }
        for item in found
    ]
    return body(CODES[400 if nul else 422], detail)


def service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error_body(error), error.status, headers)


def storage_error(request: Request, error: Exception) -> JSONResponse:
    logs.event(log, logging.ERROR, "database failed", error=kind(error))
    return service_error(request, StorageUnavailableError())


def event_body(error: Exception) -> dict[str, Any]:
    """What the handlers would answer, for an event: on a WebSocket they have no answer to give."""
    match error:
        case ServiceError():
            return error_body(error)
        case ValidationError():
            return validation_body(error.errors())
        case HTTPException():
            return body(CODES[error.status_code], error.detail)
        case DBAPIError() | PoolTimeoutError():
            logs.event(log, logging.ERROR, "database failed", error=kind(error))
            return error_body(StorageUnavailableError())
    log.error("request failed", exc_info=error)
    return body("internal_error", ServiceError.detail)


def http_error(request: Request | None, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 204:
        return Response(status_code=204)
    code = CODES.get(error.status_code, "http_error")
    # Nobody raises a bare 400 but FastAPI, for a body that it cannot read.
    detail = UNREADABLE if error.status_code == 400 else error.detail
    answer = JSONResponse(body(code, detail), error.status_code, error.headers)
    if error.status_code == 405 and request is not None:
        answer.headers["Allow"] = allowed_methods(request)
    return answer


def allowed_methods(request: Request) -> str:
    """What an address takes: each of its routes knows its own methods alone."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return ", ".join(
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in routes)
    )


def validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):  # as it came: what is said to be JSON has been read by now
        return JSONResponse(body(CODES[415], NOT_SENT_AS_JSON), 415)
    found = validation_body(error.errors())
    return JSONResponse(found, 400 if found["code"] == CODES[400] else 422)


def internal_error() -> JSONResponse:
    return JSONResponse(body("internal_error", ServiceError.detail), 500)


def body_too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit} bytes.", CLOSE)


def body_too_late(seconds: float) -> HTTPException:
    detail = f"Nothing more of the body came for {seconds:g} seconds. Send the request again."
    return HTTPException(408, detail, CLOSE)


def safe(part: str | int) -> str | int:
    """A field's name as it may be shown: short, and encodable."""
    if isinstance(part, int):
        return part
    return part[:200].encode("utf-8", "replace").decode()


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(DBAPIError, storage_error)
    app.add_exception_handler(PoolTimeoutError, storage_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
