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
        "auto", description="number format of the model: auto, float32 or bfloat16"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs: auto, cpu or cuda"
    )
    forbidden_words: Annotated[tuple[str, ...], NoDecode] = Field(
        ("hate", "violence"), description="prompts with these words are refused; commas between"
    )
    max_waiting: int = Field(
        256, ge=1, le=100_000, description="generations that may wait or run before 503"
    )
    request_timeout_seconds: float = Field(
        120.0, gt=0, le=86_400, description="longest a request may take before 504"
    )
    request_threads: int = Field(
        400, ge=8, le=10_000, description="threads for requests; keep it above MAX_WAITING"
    )
    max_body_bytes: int = Field(1_048_576, ge=1024, description="largest request body")
    database_timeout_seconds: float = Field(
        5.0, gt=0, le=600, description="longest wait for a database lock or connection"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="console: a readable line; json: one JSON object a line"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    port: int = Field(8000, ge=1, le=65_535, description="port that `make run` serves")

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
