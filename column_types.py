"""How values are kept in columns, alike on every database. Imports nothing of ours."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Integer, LargeBinary, Text
from sqlalchemy.dialects.mysql import DATETIME, LONGBLOB, LONGTEXT
from sqlalchemy.types import TypeDecorator


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


# A prompt's or an output's text; the one place to change how such text is kept. MySQL's TEXT ends
# at 64 KiB.
StoredText = Text().with_variant(LONGTEXT(), "mysql", "mariadb")

Bytes = LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb")  # BLOB ends at 64 KiB too

Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by INTEGER alone

# Ids are never used again on SQLite; on MySQL, texts compare by their bytes as elsewhere.
TABLE_OPTIONS = {
    "sqlite_autoincrement": True,
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_nopad_bin",
}
