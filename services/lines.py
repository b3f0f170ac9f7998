"""What a line of an export holds: a conversation, or a record, as one JSON object.

The contract's field names, and beside them what it takes to have the same row again elsewhere.
Knows no files and no database: lines in, values of rows out, and back.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails, to_json

from models import (
    LOCAL_OWNER,
    Conversation,
    FinishReason,
    GenerationRecord,
    Moment,
    Status,
)

NO_LEASE = 0  # no process has it, so the next sweep closes what came in while it was in progress

MOST_ID = 2**53 - 1  # exact in JavaScript, and new ids that go on after it never come to an end
RowId = Annotated[int, Field(ge=1, le=MOST_ID)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
MOST_LEVELS = 20  # of objects and lists in parameters: MariaDB takes 32 in JSON
NO_ROW = "it is no JSON object of a record or a conversation"
Name = Annotated[str, Field(max_length=200)]
Named = Annotated[Name, Field(min_length=1)]
ShortName = Annotated[str, Field(max_length=16)]


class BrokenLineError(Exception):
    """A line that is no row; the message says why and repeats nothing of the line."""


def check_parameters(values: Iterable[JsonValue], levels: int) -> None:
    """As deep as every database takes them, and no 1e999, which JSON can say and not mean.

    Raises BrokenLineError.
    """
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise BrokenLineError("parameters: a number is not finite")
        if isinstance(value, dict | list):
            if levels == 1:
                raise BrokenLineError(f"parameters: more than {MOST_LEVELS} levels deep")
            check_parameters(value.values() if isinstance(value, dict) else value, levels - 1)


class Line(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    id: RowId
    owner_id: Annotated[str, Field(min_length=1, max_length=64)] = LOCAL_OWNER
    created_at: Moment
    updated_at: Moment | None = None


class ConversationLine(Line):
    kind: ClassVar = Conversation

    object: Literal["conversation"]
    title: Named
    model_type: Name
    initial_prompt: str | None = None
    title_pending: bool | None = None

    def values(self) -> dict[str, Any]:
        """The columns of its row."""
        values = dict(self.__dict__)
        del values["object"]
        values["updated_at"] = self.updated_at or self.created_at
        return values


class RecordLine(Line):
    kind: ClassVar = GenerationRecord

    object: Literal["record"] = "record"
    prompt: str
    generated_text: str
    model_name: Name
    status: Status
    finish_reason: FinishReason | None
    user_id: Named | None
    conversation_id: RowId | None
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: int
    cached: bool
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    duration_ms: Count | None
    model_fingerprint: ShortName = ""
    dtype: ShortName = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    attempts: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    source_id: RowId | None = None
    pinned: bool = False
    text_removed_at: Moment | None = None

    def values(self) -> dict[str, Any]:
        """The columns of its row. Raises BrokenLineError where fields contradict each other."""
        values = dict(self.__dict__)
        del values["object"], values["cached"]
        if self.source_id is not None and not self.source_id < self.id:
            raise BrokenLineError("its source_id is not that of an earlier record")
        text = values.pop("generated_text")
        if not text.startswith(self.prompt):
            raise BrokenLineError("generated_text does not begin with the prompt")
        if values.pop("total_tokens") != self.prompt_tokens + self.completion_tokens:
            raise BrokenLineError("total_tokens is not the sum of its parts")
        check_parameters(self.parameters.values(), MOST_LEVELS)
        values["completion"] = text[len(self.prompt) :]
        values["updated_at"] = self.updated_at or self.created_at
        values["lease_id"] = NO_LEASE if self.status is Status.IN_PROGRESS else None
        return values


RECORD, CONVERSATION = TypeAdapter(RecordLine), TypeAdapter(ConversationLine)


@dataclass(frozen=True)
class Incoming:
    """A line as the row that it is to be."""

    kind: type[Conversation] | type[GenerationRecord]
    values: dict[str, Any]

    @property
    def id(self) -> int:
        return int(self.values["id"])

    @property
    def identity(self) -> tuple[str, datetime]:
        """What tells it, beside its id, from another row."""
        return self.values["owner_id"], self.values["created_at"]


def parse(line: bytes) -> Incoming:
    """Raises BrokenLineError."""
    try:
        found = validated(line)
        if b"\\u0000" in line:
            refuse_nul(found)
        return Incoming(found.kind, found.values())
    except ValidationError as error:
        first = reason(error)
        place = ".".join(map(str, first["loc"]))
        if place in ("", "object"):
            raise BrokenLineError(NO_ROW) from None
        raise BrokenLineError(f"{place}: {first['msg']}") from None
    except ValueError:
        raise BrokenLineError(NO_ROW) from None


def validated(line: bytes) -> RecordLine | ConversationLine:
    """Nearly all are records: to look first what a line is would read each one twice."""
    try:
        return RECORD.validate_json(line)
    except ValidationError as error:
        if reason(error)["loc"] != ("object",):
            raise
    return CONVERSATION.validate_json(line)


def reason(error: ValidationError) -> ErrorDetails:
    """Without anything of the line."""
    return error.errors(include_input=False, include_url=False, include_context=False)[0]


def refuse_nul(line: Line) -> None:
    """Not in the schema, which would look for it in each text; half a character is no JSON."""
    for name, value in line.__dict__.items():
        if isinstance(value, str) and "\0" in value:
            raise BrokenLineError(f"{name}: Text must not contain NUL characters")


def conversation_line(row: Mapping[str, Any]) -> bytes:
    return (
        to_json(
            {
                "object": "conversation",
                "id": row["id"],
                "owner_id": row["owner_id"],
                "title": row["title"],
                "model_type": row["model_type"],
                "initial_prompt": row["initial_prompt"],
                "title_pending": row["title_pending"],
                "created_at": row["created_at"],
                "updated_at": row["updated_at"],
            }
        )
        + b"\n"
    )


def record_line(row: Mapping[str, Any]) -> bytes:
    return (
        to_json(
            {
                "object": "record",
                "id": row["id"],
                "owner_id": row["owner_id"],
                "prompt": row["prompt"],
                "generated_text": row["prompt"] + row["completion"],
                "model_name": row["model_name"],
                "created_at": row["created_at"],
                "updated_at": row["updated_at"],
                "status": row["status"],
                "finish_reason": row["finish_reason"],
                "user_id": row["user_id"],
                "conversation_id": row["conversation_id"],
                "prompt_tokens": row["prompt_tokens"],
                "completion_tokens": row["completion_tokens"],
                "total_tokens": row["prompt_tokens"] + row["completion_tokens"],
                "cached": row["source_id"] is not None,
                "seed": row["seed"],
                "duration_ms": row["duration_ms"],
                "model_fingerprint": row["model_fingerprint"],
                "dtype": row["dtype"],
                "parameters": dict(sorted(row["parameters"].items())),
                "attempts": row["attempts"],
                "source_id": row["source_id"],
                "pinned": row["pinned"],
                "text_removed_at": row["text_removed_at"],
            }
        )
        + b"\n"
    )
