"""Reads server-sent events as a browser does."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    name: str
    data: Any
    id: str


def event_of(fields: dict[str, str], line: str) -> Event | None:
    """Take a line into ``fields``; the event, and ``fields`` empty again, when it was the last."""
    if line:
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
        return None
    if "event" not in fields:
        return None
    event = Event(fields["event"], json.loads(fields["data"]), fields["id"])
    fields.clear()
    return event


def events(lines: Iterable[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if (event := event_of(fields, line)) is not None:
            yield event


def text_of(found: Iterable[Event]) -> str:
    return "".join(event.data["text"] for event in found if event.name == "token")
