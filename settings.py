"""Every setting, declared once: its environment variable, type, default and help.

A ``.env`` file works. README lists them all, and a test holds it to that.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from errors import StartError


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    database_url: str = Field(
        "sqlite:///ai_service.db",
        description="a SQLite file, PostgreSQL or MySQL, as a URL",
        pattern=r"^(sqlite|postgres(ql)?|mysql|mariadb)(\+\w+)?://",
    )
    model: str | None = Field(
        None, description="a model hub id or a folder; unset: gpt2, else the bundled model"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto, float32 or bfloat16: the model's number format"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto, cpu or cuda: where the model runs"
    )
    forbidden_words: Annotated[tuple[str, ...], NoDecode] = Field(
        ("hate", "violence"),
        description="words, commas between: prompts with them are refused; a comma alone: none",
    )
    cache_ttl_seconds: float = Field(
        86_400.0,
        ge=0,
        le=31_536_000,
        description="seconds, up to a year: how old an answer from the store may be; 0: none",
    )
    redis_url: str | None = Field(
        None,
        description="a Redis that all processes share, as in redis://host:6379/0",
        pattern=r"^(rediss?|unix)://",
    )
    idempotency_hours: float = Field(
        24.0, ge=24, le=8_784, description="hours, 24 to 8784: how long an Idempotency-Key is kept"
    )
    max_waiting: int = Field(
        256,
        ge=1,
        le=100_000,
        description="1 to 100000: generations that may wait, beside those that run",
    )
    request_timeout_seconds: float = Field(
        120.0, gt=0, le=86_400, description="seconds, up to 86400: longest a generation may take"
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=86_400, description="seconds: how long running work may take when stopping"
    )
    watchdog_seconds: float = Field(
        60.0, gt=0, le=86_400, description="seconds: a step of the model that takes longer hangs"
    )
    slow_reader_seconds: float = Field(
        30.0, gt=0, le=86_400, description="seconds: a stream's reader that takes longer is dropped"
    )
    request_threads: int = Field(
        512,
        ge=8,
        le=10_000,
        description="8 to 10000: threads for requests; keep it above MAX_WAITING",
    )
    max_body_bytes: int = Field(
        1_048_576, ge=1024, description="bytes, 1024 or more: the largest request body"
    )
    database_timeout_seconds: float = Field(
        5.0, gt=0, le=600, description="seconds, up to 600: longest wait for the database"
    )
    database_pool_size: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="2 to 1000: connections a process keeps, beside a few for reads; unset: 32 on"
        " SQLite, 16 on a server",
    )
    database_unsafe_commits: bool = Field(
        False, description="true or false: run on a server that may lose what it acknowledged"
    )
    retention_days: int | None = Field(
        None, ge=1, le=36_500, description="days, 1 to 36500: how long records are kept"
    )
    retention_body_days: int | None = Field(
        None, ge=1, le=36_500, description="days, 1 to 36500: how long records keep their texts"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="console (a readable line) or json (one JSON object a line)"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    host: str = Field("127.0.0.1", description="the address that `make run` serves")
    port: int = Field(
        8000, ge=1, le=65_535, description="1 to 65535: the port that `make run` serves"
    )

    @field_validator("forbidden_words", mode="before")
    @classmethod
    def split_words(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(word.strip() for word in value.split(",") if word.strip())
        return value


def load_settings() -> Settings:
    """Read the environment. Raises StartError: one line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])
        takes = Settings.model_fields[name].description
        raise StartError(f"{name.upper()} is not usable: it takes {takes}") from None
