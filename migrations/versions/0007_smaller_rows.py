"""Keep times, hashes and parameters in fewer bytes.

A migration never imports the models: it must mean the same when they have moved on.

On SQLite each table is written anew, in one transaction: that takes as much room as the tables
have, which is free for new rows afterwards. On MySQL, where a change of a table cannot be taken
back, a migration that was cut off is begun again: each step leaves what is done as it is.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

RECORDS = "generation_records"
TIMES = {
    "conversations": ("created_at", "updated_at"),
    RECORDS: ("created_at", "updated_at", "text_removed_at"),
    "usage_deltas": ("created_at",),
    "record_blocks": ("earliest", "latest"),
}
HASHES = ("idempotency_fingerprint", "cache_key", "flight_key")
USUAL = {
    "max_new_tokens": 50,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "stop": [],
}
BATCH = 1000

Columns = dict[str, tuple[str, str, str]]  # name: type before, type after, value after


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        rebuild_all("DATETIME", "BIGINT", microseconds, upgraded_record())
        return
    convert_parameters(shortened)
    if op.get_bind().dialect.name == "postgresql":
        change_types("BYTEA", "decode({}, 'hex')")
    else:
        pack_hashes()


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        rebuild_all("BIGINT", "DATETIME", date_and_time, downgraded_record())
        return
    convert_parameters(whole)
    if op.get_bind().dialect.name == "postgresql":
        change_types("VARCHAR(32)", "encode({}, 'hex')")
    else:
        unpack_hashes()


def shortened(parameters: Any) -> Any:
    if not isinstance(parameters, dict) or not USUAL.keys() <= parameters.keys():
        return parameters
    other = {
        name: value
        for name, value in parameters.items()
        if name not in USUAL or json.dumps(value) != json.dumps(USUAL[name])
    }
    return [other] if other else []


def whole(kept: Any) -> Any:
    if not isinstance(kept, list):
        return kept
    return USUAL | (kept[0] if kept else {})


# SQLite.


def microseconds(column: str) -> str:
    """Of a text like 2026-01-01 12:00:00.000001, since 1970."""
    seconds = f"CAST(strftime('%s', substr({column}, 1, 19)) AS INTEGER)"
    return f"{seconds} * 1000000 + CAST(substr({column}, 21) AS INTEGER)"


def date_and_time(column: str) -> str:
    fraction = f"({column} % 1000000 + 1000000) % 1000000"
    seconds = f"({column} - {fraction}) / 1000000"
    second = f"strftime('%Y-%m-%d %H:%M:%S', {seconds}, 'unixepoch')"
    return f"{second} || printf('.%06d', {fraction})"


def upgraded_record() -> Columns:
    add_function("shortened", lambda kept: json.dumps(shortened(json.loads(kept))))
    add_function("from_hex", lambda digits: digits and bytes.fromhex(digits))
    hashes = {name: ("VARCHAR(32)", "BLOB", f"from_hex({name})") for name in HASHES}
    return hashes | {"parameters": ("JSON", "JSON", "shortened(parameters)")}


def downgraded_record() -> Columns:
    add_function("whole", lambda kept: json.dumps(whole(json.loads(kept))))
    hashes = {name: ("BLOB", "VARCHAR(32)", f"lower(hex({name}))") for name in HASHES}
    hashes = {
        name: (before, after, f"CASE WHEN {name} IS NOT NULL THEN {value} END")
        for name, (before, after, value) in hashes.items()
    }
    return hashes | {"parameters": ("JSON", "JSON", "whole(parameters)")}


def add_function(name: str, function: Callable[[Any], Any]) -> None:
    connection: Any = op.get_bind().connection.driver_connection
    connection.create_function(name, 1, function, deterministic=True)


def rebuild_all(before: str, after: str, value: Callable[[str], str], record: Columns) -> None:
    for table, names in TIMES.items():
        columns = {name: (before, after, value(name)) for name in names}
        rebuild(table, columns | record if table == RECORDS else columns)


def rebuild(table: str, columns: Columns) -> None:
    """As https://sqlite.org/lang_altertable.html says; foreign keys are off."""
    run, new = op.get_bind().exec_driver_sql, f"new_{table}"
    schema = "SELECT type, sql FROM sqlite_master WHERE tbl_name = ? AND sql NOT NULL"
    parts = run(schema, (table,)).all()
    made = next(sql for kind, sql in parts if kind == "table")
    made = re.sub(rf"^CREATE TABLE \W?{table}\W?", f"CREATE TABLE {new} ", made)
    for name, (before, after, _) in columns.items():
        made = re.sub(rf"\b{name} {re.escape(before)}", f"{name} {after}", made)
    run(made)
    names = [name for _, name, *_ in run(f"PRAGMA table_info({table})")]
    values = [columns[name][2] if name in columns else name for name in names]
    run(
        f"INSERT INTO {new} ({', '.join(names)}) SELECT {', '.join(values)} FROM {table} ORDER BY 1"
    )
    # Ids that were given stay given, also where their rows are gone.
    run("DELETE FROM sqlite_sequence WHERE name = ?", (new,))
    run("UPDATE sqlite_sequence SET name = ? WHERE name = ?", (new, table))
    run(f"DROP TABLE {table}")
    run(f"ALTER TABLE {new} RENAME TO {table}")
    for kind, sql in parts:
        if kind != "table":
            run(sql)


# Servers.


def convert_parameters(convert: Callable[[Any], Any]) -> None:
    bind = op.get_bind()
    table = sa.table(RECORDS, sa.column("id"), sa.column("parameters", sa.JSON))
    rows = sa.select(table.c.id, table.c.parameters).order_by(table.c.id).limit(BATCH)
    update = table.update().where(table.c.id == sa.bindparam("of"))
    update = update.values(parameters=sa.bindparam("new"))
    last = 0
    while batch := bind.execute(rows.where(table.c.id > last)).all():
        new = [{"of": row.id, "new": convert(row.parameters)} for row in batch]
        changed = [of for of, row in zip(new, batch, strict=True) if of["new"] != row.parameters]
        if changed:
            bind.execute(update, changed)
        last = batch[-1].id


def change_types(new: str, value: str) -> None:
    """PostgreSQL: all in one statement, which writes the table anew once."""
    changes = [f"ALTER {name} TYPE {new} USING {value.format(name)}" for name in HASHES]
    op.execute(f"ALTER TABLE {RECORDS} {', '.join(changes)}")


def pack_hashes() -> None:
    """MySQL: a text's bytes stay when its type becomes bytes, and the other way round."""
    modify_hashes("VARBINARY(32)")
    for name in HASHES:
        of_text = f"LENGTH({name}) = 32"
        op.execute(f"UPDATE {RECORDS} SET {name} = UNHEX({name}) WHERE {of_text}")
    modify_hashes("VARBINARY(16)")


def unpack_hashes() -> None:
    mariadb = getattr(op.get_bind().dialect, "is_mariadb", False)
    collation = "utf8mb4_nopad_bin" if mariadb else "utf8mb4_0900_bin"
    modify_hashes("VARBINARY(32)")
    for name in HASHES:
        packed = f"LENGTH({name}) = 16"
        op.execute(f"UPDATE {RECORDS} SET {name} = LOWER(HEX({name})) WHERE {packed}")
    modify_hashes(f"VARCHAR(32) CHARACTER SET utf8mb4 COLLATE {collation}")


def modify_hashes(new: str) -> None:
    changes = [f"MODIFY {name} {new}" for name in HASHES]
    op.execute(f"ALTER TABLE {RECORDS} {', '.join(changes)}")
