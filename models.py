"""The tables and the schemas. Imports nothing of ours.

A text is stored once: ``generation_records`` holds the prompt and the continuation, and whatever
else shows them (``generated_text``, a conversation, a stream) is a view of that row.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
)
from sqlalchemy.dialects.mysql import DATETIME, LONGTEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

LOCAL_OWNER = "local"  # whose rows they are where no key is configured


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.COMPLETED, Status.INCOMPLETE, Status.FAILED, Status.CANCELLED})


STATUS_CODES = {
    Status.QUEUED: 202,
    Status.IN_PROGRESS: 202,
    Status.COMPLETED: 200,
    Status.INCOMPLETE: 503,
    Status.FAILED: 500,
    Status.CANCELLED: 409,
}


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DISCONNECTED = "disconnected"
    INTERRUPTED = "interrupted"
    ERROR = "error"


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, in UTC with an offset in Python whatever the database keeps of it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = value.astimezone(UTC)
        return moment if dialect.name == "postgresql" else moment.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class StoredText(TypeDecorator[str]):
    """A prompt's or an output's text; the one place to change how such text is kept."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name in ("mysql", "mariadb"):  # TEXT ends at 64 KiB there
            return dialect.type_descriptor(LONGTEXT())
        return self.impl_instance


Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by INTEGER alone

# Ids are never used again on SQLite; on MySQL, texts compare by their bytes as elsewhere.
TABLE_OPTIONS = {
    "sqlite_autoincrement": True,
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_nopad_bin",
}


class Base(DeclarativeBase):
    pass


class GenerationRecord(Base):
    __tablename__ = "generation_records"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    owner_id: Mapped[str] = mapped_column(String(64))
    user_id: Mapped[str | None] = mapped_column(String(200))
    conversation_id: Mapped[int | None] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE")
    )
    status: Mapped[Status] = mapped_column(String(16))
    finish_reason: Mapped[FinishReason | None] = mapped_column(String(16))
    prompt: Mapped[str] = mapped_column(StoredText)
    completion: Mapped[str] = mapped_column(StoredText)
    model_name: Mapped[str] = mapped_column(String(200))
    model_fingerprint: Mapped[str] = mapped_column(String(16))
    dtype: Mapped[str] = mapped_column(String(16))
    parameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    duration_ms: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    cancel_requested: Mapped[bool | None] = mapped_column(Boolean)
    lease_id: Mapped[int | None] = mapped_column(BigInteger)  # who runs it; null once it ended

    __table_args__ = (
        Index("ix_records_owner", "owner_id", "id"),
        Index("ix_records_user", "owner_id", "user_id", "id"),
        Index("ix_records_status", "owner_id", "status", "id"),
        Index("ix_records_model", "owner_id", "model_name", "id"),
        Index("ix_records_created", "owner_id", "created_at", "id"),
        Index(
            "ix_records_conversation",
            "conversation_id",
            "id",
            sqlite_where=conversation_id.is_not(None),
            postgresql_where=conversation_id.is_not(None),
        ),
        Index(
            "ix_records_open",
            "lease_id",
            sqlite_where=lease_id.is_not(None),
            postgresql_where=lease_id.is_not(None),
        ),
        TABLE_OPTIONS,
    )

    @property
    def generated_text(self) -> str:
        return self.prompt + self.completion

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cached(self) -> bool:
        return False

    # A record as a message of its conversation.

    @property
    def prompt_content(self) -> str:
        return self.prompt

    @property
    def response_content(self) -> str:
        return self.completion

    @property
    def response_tokens(self) -> int:
        return self.completion_tokens

    @property
    def is_success(self) -> bool:
        return self.status == Status.COMPLETED

    @property
    def status_code(self) -> int:
        """What a client that waited for the message was answered, or will be."""
        return STATUS_CODES[Status(self.status)]


class Conversation(Base):
    __tablename__ = "conversations"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    owner_id: Mapped[str] = mapped_column(String(64))
    title: Mapped[str] = mapped_column(String(200))
    title_pending: Mapped[bool | None] = mapped_column(Boolean)  # null once it has its title
    initial_prompt: Mapped[str | None] = mapped_column(StoredText)  # what the title is made from
    model_type: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("ix_conversations_owner", "owner_id", "id"),
        Index(
            "ix_conversations_untitled",
            "title_pending",
            sqlite_where=title_pending.is_not(None),
            postgresql_where=title_pending.is_not(None),
        ),
        TABLE_OPTIONS,
    )


class Lease(Base):
    """A running process's claim on the rows that carry its id; ``beat`` moves while it lives."""

    __tablename__ = "leases"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    beat: Mapped[int] = mapped_column(BigInteger)
    machine: Mapped[str] = mapped_column(String(100))
    process: Mapped[str] = mapped_column(String(100))

    __table_args__ = (TABLE_OPTIONS,)


def refuse_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul_character", "Text must not contain NUL characters")
    return text


def refuse_surrogates(text: str) -> str:
    """JSON's escapes can spell half a character, which no database and no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("lone_surrogate", "Text must be valid Unicode")
    return text


# The plain pattern-free schema: that NUL is refused is said in words, not as a regular expression.
CleanText = Annotated[str, AfterValidator(refuse_nul), AfterValidator(refuse_surrogates)]
UserId = Annotated[CleanText, Field(min_length=1, max_length=200)]


class SamplingOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_length: int | None = Field(
        None,
        strict=True,
        ge=10,
        le=200,
        description="Tokens of the generated text, prompt included. Left out: 50, or the prompt"
        " and 50 more, whichever is greater, within the model's context.",
    )
    user_id: UserId | None = None
    temperature: float | None = Field(None, strict=True, ge=0, le=2, description="0 is greedy.")
    top_k: int | None = Field(None, strict=True, ge=0, le=2**31 - 1, description="0 is off.")
    top_p: float | None = Field(None, strict=True, gt=0, le=1)
    seed: int | None = Field(
        None, strict=True, ge=0, le=2**63 - 1, description="Drawn and stored when left out."
    )
    stop: Annotated[
        list[Annotated[CleanText, Field(min_length=1, max_length=100)]], Field(max_length=4)
    ] = Field(default_factory=list, description="The text ends before the first of these.")


class GenerateRequest(SamplingOptions):
    prompt: Annotated[CleanText, Field(min_length=1, max_length=500)]


class OnDisconnect(BaseModel):
    on_disconnect: Literal["cancel", "finish"] = Field(
        "cancel", description="What becomes of the generation when its last follower leaves."
    )


class StreamRequest(GenerateRequest, OnDisconnect):
    pass


class Record(BaseModel):
    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    id: int
    prompt: str
    generated_text: str = Field(description="The prompt and its continuation.")
    model_name: str
    created_at: datetime
    status: Status
    finish_reason: FinishReason | None
    user_id: str | None
    conversation_id: int | None
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached: bool
    seed: int
    duration_ms: int | None


def as_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:  # the first and last hours of the calendar
        raise PydanticCustomError("moment_out_of_range", "Moment is out of range") from None


Moment = Annotated[datetime, AfterValidator(as_utc)]


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(10, ge=1, le=100)
    after: int | None = Field(
        None, ge=1, le=2**63 - 1, description="The id that the previous page ended with."
    )


class HistoryQuery(Page):
    model_config = ConfigDict(protected_namespaces=())

    user_id: UserId | None = None
    status: Status | None = None
    model_name: Annotated[CleanText, Field(max_length=200)] | None = None
    created_after: Moment | None = Field(None, description="Without an offset it is UTC.")
    created_before: Moment | None = Field(None, description="Without an offset it is UTC.")


Title = Annotated[CleanText, Field(min_length=1, max_length=200)]
MessageText = Annotated[CleanText, Field(max_length=100_000)]


class ConversationCreate(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    title: Title | None = None
    model_type: Title | None = Field(None, description="The running model when left out.")
    initial_prompt: Annotated[MessageText, Field(min_length=1)] | None = Field(
        None, description="The model suggests a title from it when none is given."
    )


class ConversationUpdate(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    title: Title | None = None
    model_type: Title | None = None


class ConversationOut(BaseModel):
    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    id: int
    title: str
    model_type: str
    created_at: datetime
    updated_at: datetime


class ConversationQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    skip: int = Field(0, ge=0, le=2**31 - 1)
    take: int = Field(100, ge=1, le=100)
    after: int | None = Field(
        None, ge=1, le=2**63 - 1, description="The id that the previous page ended with."
    )


class MessageCreate(SamplingOptions):
    prompt_content: Annotated[MessageText, Field(min_length=1)]
    response_content: MessageText | None = Field(
        None, description="Given, the exchange is stored as it is and nothing is generated."
    )


class MessageStreamRequest(MessageCreate, OnDisconnect):
    response_content: None = None


class MessagePage(Page):
    limit: int = Field(100, ge=1, le=100)


class TextStreamQuery(OnDisconnect):
    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[CleanText, Field(min_length=1, max_length=500)]
    conversation_id: int | None = Field(None, ge=1, le=2**63 - 1)


class MessageUpdate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt_content: Annotated[MessageText, Field(min_length=1)] | None = None
    response_content: MessageText | None = None


class Message(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    conversation_id: int
    prompt_content: str
    response_content: str
    prompt_tokens: int
    response_tokens: int
    total_tokens: int
    is_success: bool
    status_code: int
    created_at: datetime
    updated_at: datetime


class ErrorBody(BaseModel):
    detail: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})]
    code: str
    request_id: str
    id: int | None = Field(None, description="The record that was accepted, where there is one.")
