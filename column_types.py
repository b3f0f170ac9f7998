"""How values are kept in columns, alike on every database. Imports nothing of ours."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Integer, LargeBinary, Text, Uuid
from sqlalchemy.dialects.mysql import DATETIME, LONGBLOB, LONGTEXT, VARBINARY
from sqlalchemy.types import TypeDecorator

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

# What ``parameters`` mostly are. Rows are read by it: it may never change.
USUAL = {
    "max_new_tokens": 50,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "stop": [],
}
USUAL_REPR = {name: repr(value) for name, value in USUAL.items()}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, in UTC with an offset in Python whatever the database keeps of it.

    SQLite, which has no type for it, keeps microseconds since 1970: 8 bytes instead of 26.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(BigInteger())
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        moment = value.astimezone(UTC)
        if dialect.name == "sqlite":
            return (moment - EPOCH) // MICROSECOND
        return moment if dialect.name == "postgresql" else moment.replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "sqlite":
            since: timedelta = value * MICROSECOND
            return EPOCH + since
        moment: datetime = value
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


class Parameters(TypeDecorator[dict[str, Any]]):
    """A JSON object; one that has all of USUAL's names is kept as a list that holds, if anything,
    an object of what differs: mostly ``[]``."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, _: Dialect) -> Any:
        return value if value is None else shortened(value)

    def process_result_value(self, value: Any, _: Dialect) -> dict[str, Any] | None:
        return value if value is None else whole(value)


def shortened(parameters: dict[str, Any]) -> Any:
    if not USUAL.keys() <= parameters.keys():
        return parameters
    # As they are written: in Python 1 is 1.0 and True.
    other = {
        name: value
        for name, value in parameters.items()
        if name not in USUAL or repr(value) != USUAL_REPR[name]
    }
    return [other] if other else []


def whole(kept: Any) -> dict[str, Any]:
    if isinstance(kept, dict):
        return kept
    return USUAL | {"stop": []} | (kept[0] if kept else {})


class Hash(TypeDecorator[str]):
    """32 hexadecimal digits, kept as the 16 bytes that they are.

    PostgreSQL's type for so many is that of UUIDs: of bytes it would keep the length as well, and
    what follows in an index begins at a multiple of eight.
    """

    impl = LargeBinary(16)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(VARBINARY(16))
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Uuid())
        return dialect.type_descriptor(LargeBinary(16))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | UUID | None:
        if value is None:
            return None
        return UUID(value) if dialect.name == "postgresql" else bytes.fromhex(value)

    def process_result_value(self, value: bytes | UUID | None, _: Dialect) -> str | None:
        if value is None:
            return None
        return value.hex if isinstance(value, UUID) else bytes(value).hex()


# A prompt's or an output's text; the one place to change how such text is kept. MySQL's TEXT ends
# at 64 KiB.
StoredText = Text().with_variant(LONGTEXT(), "mysql", "mariadb")

Bytes = LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb")  # BLOB ends at 64 KiB too

# Of requests in a day at most. (PostgreSQL keeps each number in all of its bytes.)
Count = BigInteger().with_variant(Integer, "postgresql")

Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by INTEGER alone

# Ids are never used again on SQLite; on MySQL, texts compare by their bytes as elsewhere.
TABLE_OPTIONS = {
    "sqlite_autoincrement": True,
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_nopad_bin",
}
