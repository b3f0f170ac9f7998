"""One shape for every error, and one handler for each kind of exception."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

import log as logs
from database import kind
from errors import ServiceError, StorageUnavailableError
from models import ErrorBody

log = logging.getLogger(__name__)

CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "validation_error",
}
REPORTED_ERRORS = 20  # of a request with thousands


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for the OpenAPI document."""
    return {status: {"model": ErrorBody} for status in statuses}


def render(
    status: int,
    code: str,
    detail: object,
    record_id: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = {"detail": detail, "code": code, "request_id": logs.request_id.get() or ""}
    if record_id is not None:
        body["id"] = record_id
    return JSONResponse(body, status, headers)


def service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return render(error.status, error.code, error.detail, error.record_id, headers)


def storage_error(request: Request, error: Exception) -> JSONResponse:
    logs.event(log, logging.ERROR, "database failed", error=kind(error))
    return service_error(request, StorageUnavailableError())


def http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "http_error")
    return render(error.status_code, code, error.detail, headers=error.headers)


def validation_error(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's list, without what the client sent: it may be large, or not even text."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:REPORTED_ERRORS]
    status = 400 if any(item["type"] == "nul_character" for item in found) else 422
    detail = [
        {
            "type": item["type"],
            "loc": [safe(part) for part in item["loc"]],
            "msg": safe(item["msg"]),
        }
        for item in found
    ]
    return render(status, CODES[status], detail)


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
