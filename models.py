"""The tables and the schemas. Imports nothing of ours but how columns keep values.

A text is stored once: ``generation_records`` holds the prompt and the continuation, and whatever
else shows them (``generated_text``, a conversation, a stream) is a view of that row.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError
from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    Integer,
    String,
    false,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.sql.elements import ColumnElement

from column_types import (
    TABLE_OPTIONS,
    Bytes,
    Count,
    Hash,
    Id,
    Parameters,
    StoredText,
    UtcDateTime,
)
from words import NonsenseError, parse_search

LOCAL_OWNER = "local"  # whose rows they are where no key is configured


class Status(StrEnum):
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.COMPLETED, Status.INCOMPLETE, Status.FAILED, Status.CANCELLED})


STATUS_CODES = {
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


class Base(DeclarativeBase):
    pass


# Of indexes whose keys come in order, PostgreSQL would leave a tenth of each page free in vain.
APPENDED = {"fillfactor": 100}


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
    own_prompt: Mapped[str] = mapped_column("prompt", StoredText)
    own_completion: Mapped[str] = mapped_column("completion", StoredText)
    model_name: Mapped[str] = mapped_column(String(200))
    model_fingerprint: Mapped[str] = mapped_column(String(16))
    dtype: Mapped[str] = mapped_column(String(16))
    parameters: Mapped[dict[str, Any]] = mapped_column(Parameters)
    seed: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    duration_ms: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    cancel_requested: Mapped[bool | None] = mapped_column(Boolean)
    lease_id: Mapped[int | None] = mapped_column(BigInteger)  # who runs it; null once it ended
    attempts: Mapped[int] = mapped_column(Integer, default=1, server_default="1")
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    idempotency_fingerprint: Mapped[str | None] = mapped_column(Hash)
    cache_key: Mapped[str | None] = mapped_column(Hash)  # the work it did, for who asks again
    flight_key: Mapped[str | None] = mapped_column(Hash)  # the same, while it runs
    # The record that holds the text of an answer from the cache; never one from the cache itself.
    source_id: Mapped[int | None] = mapped_column(ForeignKey("generation_records.id"))
    pinned: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    text_removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # by retention

    # In one statement with the record: between two the text could move to another record.
    source: Mapped["GenerationRecord | None"] = relationship(
        remote_side="GenerationRecord.id", lazy="joined", join_depth=1
    )

    __table_args__ = (
        Index("ix_records_owner", "owner_id", "id", postgresql_with=APPENDED),
        Index(
            "ix_records_user",
            "owner_id",
            "user_id",
            "id",
            sqlite_where=user_id.is_not(None),
            postgresql_where=user_id.is_not(None),
            postgresql_with=APPENDED,
        ),
        Index(  # almost all are completed: those are found among all
            "ix_records_status",
            "owner_id",
            "status",
            "id",
            sqlite_where=text("status <> 'completed'"),
            postgresql_where=text("status <> 'completed'"),
        ),
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
        Index(
            "ix_records_idempotency",
            "idempotency_key",
            "owner_id",
            unique=True,
            sqlite_where=idempotency_key.is_not(None),
            postgresql_where=idempotency_key.is_not(None),
        ),
        Index(
            "ix_records_cache",
            "cache_key",
            "id",
            sqlite_where=cache_key.is_not(None),
            postgresql_where=cache_key.is_not(None),
        ),
        Index(
            "ix_records_flight",
            "flight_key",
            unique=True,
            sqlite_where=flight_key.is_not(None),
            postgresql_where=flight_key.is_not(None),
        ),
        Index(
            "ix_records_source",
            "source_id",
            sqlite_where=source_id.is_not(None),
            postgresql_where=source_id.is_not(None),
        ),
        TABLE_OPTIONS,
    )

    # What was said is the row's own text, or its source's; in a query it is the column.

    @property
    def text_of(self) -> "GenerationRecord":
        return self if self.source_id is None or self.source is None else self.source

    @hybrid_property
    def prompt(self) -> str:
        return self.text_of.own_prompt

    @prompt.inplace.setter
    def _set_prompt(self, text: str) -> None:
        self.own_prompt = text

    @prompt.inplace.expression
    @classmethod
    def _prompt_column(cls) -> ColumnElement[str]:
        return cls.own_prompt.expression

    @hybrid_property
    def completion(self) -> str:
        return self.text_of.own_completion

    @completion.inplace.setter
    def _set_completion(self, text: str) -> None:
        self.own_completion = text

    @completion.inplace.expression
    @classmethod
    def _completion_column(cls) -> ColumnElement[str]:
        return cls.own_completion.expression

    @property
    def generated_text(self) -> str:
        return self.prompt + self.completion

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cached(self) -> bool:
        return self.source_id is not None

    # A record as the answer of `/analyze`.

    @property
    def result(self) -> str:
        return self.completion

    @property
    def tokens_used(self) -> int:
        return self.total_tokens

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
    # Null once it has its title, true while the model is to make one, false before there is
    # anything to make one from: the initial prompt, or the first message.
    title_pending: Mapped[bool | None] = mapped_column(Boolean)
    initial_prompt: Mapped[str | None] = mapped_column(StoredText)
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


BUSY = 4  # requests in an hour or a day: few of all sums have so many
IS_BUSY = text(f"requests >= {BUSY}")  # as the index's condition has it


class UsageKind(StrEnum):
    MODEL_HOUR = "hour"
    MODEL_DAY = "day"
    USER_DAY = "user"
    LOCK = "lock"  # no sum: whoever adds to the sums holds this row


class Counts:
    """What is counted of requests that have ended."""

    requests: Mapped[int] = mapped_column(Count)
    failures: Mapped[int] = mapped_column(Count)  # failed or incomplete
    cancelled: Mapped[int] = mapped_column(Count)
    cached: Mapped[int] = mapped_column(Count)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


class UsageDelta(Counts, Base):
    """One request that ended and is not in the sums yet."""

    __tablename__ = "usage_deltas"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    owner_id: Mapped[str] = mapped_column(String(64))
    user_id: Mapped[str | None] = mapped_column(String(200))
    model_name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    duration_ms: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (TABLE_OPTIONS,)


class Usage(Counts, Base):
    """The requests of one hour or day, by the name of a model or of a user, added up."""

    __tablename__ = "usage_sums"

    owner_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[UsageKind] = mapped_column(String(10), primary_key=True)
    hour: Mapped[int] = mapped_column(Integer, primary_key=True)  # its first one, since 1970
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    latencies: Mapped[bytes] = mapped_column(Bytes)

    __table_args__ = (
        Index(
            "ix_usage_busy",
            "owner_id",
            "kind",
            "hour",
            "requests",
            sqlite_where=IS_BUSY,
            postgresql_where=IS_BUSY,
        ),
        TABLE_OPTIONS | {"sqlite_autoincrement": False, "sqlite_with_rowid": False},
    )


class RecordBlock(Base):
    """When the records of some thousand neighbouring ids were created; it may say more than that.

    Ids follow the clock nearly always: this finds a time's ids, without an index of every record.
    """

    __tablename__ = "record_blocks"

    block: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    earliest: Mapped[datetime] = mapped_column(UtcDateTime)
    latest: Mapped[datetime] = mapped_column(UtcDateTime)


class ModelBlock(Base):
    """A block of ids in which an owner has, or had, a record of a model."""

    __tablename__ = "model_blocks"

    owner_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_name: Mapped[str] = mapped_column(String(200), primary_key=True)
    block: Mapped[int] = mapped_column(BigInteger, primary_key=True)

    __table_args__ = (TABLE_OPTIONS | {"sqlite_autoincrement": False, "sqlite_with_rowid": False},)


class Lease(Base):
    """A running process's claim on the rows that carry its id; ``beat`` moves while it lives."""

    __tablename__ = "leases"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    beat: Mapped[int] = mapped_column(BigInteger)
    machine: Mapped[str] = mapped_column(String(100))
    process: Mapped[str] = mapped_column(String(100))

    __table_args__ = (TABLE_OPTIONS,)


class Secret(Base):
    """What this database alone knows, such as the key of the cache's hashes."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    value: Mapped[str] = mapped_column(String(64))


def refuse_unstorable(text: object) -> object:
    if not isinstance(text, str):
        return text
    if "\0" in text:
        raise PydanticCustomError("nul_character", "Text must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell lone surrogates, UTF-8 cannot
        raise PydanticCustomError(
            "lone_surrogate", "Text must not contain half a character"
        ) from None
    return text


def refuse_dots(user_id: str) -> str:
    """Clients fold ``/users/a/../b`` to ``/users/b``: what such an id asks for is another's."""
    if {".", ".."} & set(user_id.split("/")):
        raise PydanticCustomError(
            "dots_in_path", "A user id must not be . or .., nor have them between slashes"
        )
    return user_id


# A plain pattern-free schema: that NUL is refused is said in words, not as a regular expression.
# It comes after the lengths of a text, which would else be told in items and not in characters.
STORABLE = BeforeValidator(refuse_unstorable)
UserId = Annotated[str, Field(min_length=1, max_length=200), STORABLE, AfterValidator(refuse_dots)]
Prompt = Annotated[str, Field(min_length=1, max_length=500), STORABLE]
SomeText = Annotated[str, Field(min_length=1, max_length=100_000), STORABLE]


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
        list[Annotated[str, Field(min_length=1, max_length=100), STORABLE]], Field(max_length=4)
    ] = Field(default_factory=list, description="The text ends before the first of these.")
    use_cache: bool = Field(
        False,
        strict=True,
        description="Answer from the store what the same user asked in the same way lately.",
    )


class GenerateRequest(SamplingOptions):
    prompt: Prompt


class AnalyzeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: SomeText
    use_cache: bool = Field(True, strict=True)


class Analysis(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    result: str
    tokens_used: int = Field(description="Of the text and of its continuation.")
    cached: bool


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
    pinned: bool = Field(description="A pinned record is kept however old it is.")
    text_removed_at: datetime | None = Field(
        description="When its text had been kept long enough and went; the numbers stay."
    )


SEARCH_HELP = (
    'Words, in any script, whatever their case and accents; `"an exact phrase"`; the'
    " beginning of a `word*`; `-without` a word or a phrase. Of answers from the cache only the"
    " record is found whose text they show."
)
SNIPPET_HELP = (
    "With `q`, the text around the first match, as HTML: escaped, with matches inside `<mark>`."
)


class HistoryItem(Record):
    snippet: str | None = Field(None, description=SNIPPET_HELP)


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


def refuse_nonsense(search: str) -> str:
    try:
        parse_search(search)
    except NonsenseError as error:
        raise PydanticCustomError("nonsense_search", "{reason}", {"reason": str(error)}) from None
    return search


Search = Annotated[str, Field(max_length=500), STORABLE, AfterValidator(refuse_nonsense)]


class HistoryQuery(Page):
    model_config = ConfigDict(protected_namespaces=())

    user_id: UserId | None = None
    status: Status | None = None
    model_name: Annotated[str, Field(max_length=200), STORABLE] | None = None
    created_after: Moment | None = Field(None, description="Without an offset it is UTC.")
    created_before: Moment | None = Field(None, description="Without an offset it is UTC.")
    q: Search | None = Field(None, description=SEARCH_HELP)
    order: Literal["newest", "rank"] = Field(
        "newest", description="With `q`: `rank` puts the best of the newest 1,000 matches first."
    )
    after_score: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="With `order=rank` and `after`: the score of that record, which then may be"
        " gone. The `Link` header gives both.",
    )

    @model_validator(mode="after")
    def refuse_rank_of_nothing(self) -> Self:
        if self.order == "rank" and self.q is None:
            raise PydanticCustomError("rank_of_nothing", "order=rank needs a search: q")
        return self

    @model_validator(mode="after")
    def refuse_score_of_nothing(self) -> Self:
        if self.after_score is not None and (self.order != "rank" or self.after is None):
            raise PydanticCustomError("score_of_nothing", "after_score needs order=rank and after")
        return self


Title = Annotated[str, Field(min_length=1, max_length=200), STORABLE]
MessageText = Annotated[str, Field(max_length=100_000), STORABLE]


class StatisticsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    created_after: Moment | None = Field(
        None, description="The range is widened to whole buckets; unset: 30 days before its end."
    )
    created_before: Moment | None = Field(None, description="Now when left out.")
    bucket: Literal["hour", "day", "all"] = Field(
        "day", description="`hour`: of at most 31 days, and not by user."
    )
    by: Literal["model", "user"] | None = None
    limit: int = Field(100, ge=1, le=1000, description="By user alone: the busiest so many.")

    @model_validator(mode="after")
    def refuse_limit_of_nothing(self) -> Self:
        if "limit" in self.model_fields_set and self.by != "user":
            raise PydanticCustomError("limit_of_nothing", "limit needs by=user")
        return self


class Latencies(BaseModel):
    """By the nearest rank, in milliseconds: exact, not estimated."""

    p50: int
    p90: int
    p95: int
    p99: int
    max: int


class Statistics(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    starts_at: datetime
    ends_at: datetime
    model_name: str | None = Field(description="By model.")
    user_id: str | None = Field(description="By user; null for requests without one.")
    requests: int = Field(description="Requests made in this time that have ended.")
    failures: int = Field(description="Of those, `failed` or `incomplete`.")
    cancelled: int
    cached: int = Field(description="Answered from the store.")
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    duration_ms: Latencies | None


class ConversationCreate(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    title: Title | None = None
    model_type: Title | None = Field(None, description="The running model when left out.")
    initial_prompt: SomeText | None = Field(
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


class ConversationItem(ConversationOut):
    snippet: str | None = Field(None, description=SNIPPET_HELP)


class ConversationQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    q: Search | None = Field(
        None, description=f"Found in the title, or in one message. {SEARCH_HELP}"
    )

    skip: int = Field(0, ge=0, le=2**31 - 1)
    take: int = Field(100, ge=1, le=100)
    after: int | None = Field(
        None, ge=1, le=2**63 - 1, description="The id that the previous page ended with."
    )


class MessageCreate(SamplingOptions):
    prompt_content: SomeText
    response_content: MessageText | None = Field(
        None, description="Given, the exchange is stored as it is and nothing is generated."
    )


class MessageStreamRequest(MessageCreate, OnDisconnect):
    response_content: None = None


class MessagePage(Page):
    limit: int = Field(100, ge=1, le=100)


class TextStreamQuery(OnDisconnect):
    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    conversation_id: int | None = Field(None, ge=1, le=2**63 - 1)


class MessageUpdate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt_content: SomeText | None = None
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
    text_removed_at: datetime | None
    created_at: datetime
    updated_at: datetime


class ErrorBody(BaseModel):
    detail: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})]
    code: str
    request_id: str
    id: int | None = Field(None, description="The record that was accepted, where there is one.")
