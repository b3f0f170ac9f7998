"""Structured logs: an event's name and its fields, as one JSON object or one readable line.

Fields hold ids, sizes, durations and names, never prompt or output text. The request id is added
by itself.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def event(logger: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log an event with fields, e.g. ``event(log, logging.INFO, "record accepted", id=7)``."""
    logger.log(level, name, extra={"fields": fields})


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(getattr(record, "fields", {}))
    if (current := request_id.get()) is not None:
        fields["request_id"] = current
    return fields


def timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= fields_of(record)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = [timestamp(record), f"{record.levelname:<7}", record.getMessage()]
        parts += [f"{name}={value}" for name, value in fields_of(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def is_no_handshake(record: logging.LogRecord) -> bool:
    """Uvicorn logs a WebSocket's handshake with its query string, beside what is worth reading."""
    return '"WebSocket %s"' not in str(record.msg)


def configure(style: str, level: str) -> None:
    """Send every log through one handler. Uvicorn's access log goes: it prints query strings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if getattr(h, "of_this_service", False)]:
        root.removeHandler(old)
    handler.of_this_service = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.error").addFilter(is_no_handshake)
    for name in ("uvicorn.error", "uvicorn.asgi"):
        if (logger := logging.getLogger(name)).isEnabledFor(logging.DEBUG):
            logger.setLevel(logging.INFO)  # below they print what a WebSocket says, and addresses
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False  # with no handler in sight, uvicorn does not even make the line
    for name in ("httpx", "httpcore", "httpx2", "httpcore2", "alembic", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
