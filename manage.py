"""The operator's command line: ``python -m manage --help``.

Thin: reads what was asked, calls a service, prints what came of it. It works on the database that
DATABASE_URL names, beside a running service.
"""

import contextlib
import dataclasses
import gc
import io
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, BinaryIO, TextIO

import typer
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import log
from database import FAILURES, Database, kind
from errors import CommandError, ServiceError, StartError
from models import (
    LOCAL_OWNER,
    HistoryQuery,
    Record,
    StatisticsQuery,
    Status,
    refuse_unstorable,
)
from services import (
    backup,
    cache,
    erasure,
    history,
    importing,
    inspection,
    retention,
    statistics,
    transfer,
)
from settings import load_settings

LAST_ID = 2**63 - 1  # a database's numbers end there
PATIENCE_SECONDS = 60.0  # a command may wait longer than a request, its statements much longer

app = typer.Typer(
    help="Look after the records of the AI Database Service: the database is DATABASE_URL's.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def checked_name(name: str | None) -> str | None:
    """Of an owner or a user. Raises BadParameter for what can be nobody's."""
    if name == "":
        raise typer.BadParameter("A name has at least one character")
    try:
        refuse_unstorable(name)
    except PydanticCustomError as error:  # bytes that are no text where this process runs
        raise typer.BadParameter(error.message()) from None
    return name


OwnerOption = Annotated[
    str | None,
    typer.Option(
        "--owner", help="Only what belongs to this owner; else everything.", callback=checked_name
    ),
]


def connected() -> Database:
    settings = load_settings()
    return Database(
        settings.database_url,
        max(PATIENCE_SECONDS, settings.database_timeout_seconds),
        unsafe_commits=settings.database_unsafe_commits,
    )


class Bucket(StrEnum):
    HOUR = "hour"
    DAY = "day"
    ALL = "all"


class By(StrEnum):
    MODEL = "model"
    USER = "user"


@contextlib.contextmanager
def opened() -> Iterator[Database]:
    """The database, if it is there and of this version. Raises StartError."""
    database = connected()
    try:
        database.expect_schema()
        yield database
    finally:
        database.close()


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[transfer.Progress]:
    """A bar on standard error, where that is a terminal."""
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@app.command()
def migrate() -> None:
    """Make the tables, or bring them to this version."""
    database = connected()
    database.migrate()
    database.close()
    say("The database is of this version.")


@app.command()
def show(id: Annotated[int, typer.Argument(min=1, max=LAST_ID)], owner: OwnerOption = None) -> None:
    """Print one record as JSON."""
    with opened() as database, database.sessions() as session:
        record = Record.model_validate(history.find(session, owner, id))
    print_json(record, indent=2)


@app.command()
def search(
    words: Annotated[str, typer.Argument(help='Words, "exact phrases", a beginning*, -without.')],
    owner: Annotated[str, typer.Option(help="Whose records.", callback=checked_name)] = LOCAL_OWNER,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 10,
) -> None:
    """Print the newest records that hold certain words. As JSON, one a line."""
    with opened() as database, database.sessions() as session:
        found, _ = history.page(session, owner, asked(q=words, limit=limit))
        for record in found:
            print_json(Record.model_validate(record))


@app.command()
def stats(
    owner: Annotated[
        str, typer.Option(help="Whose requests.", callback=checked_name)
    ] = LOCAL_OWNER,
    bucket: Annotated[Bucket, typer.Option(help="A line for each of these.")] = Bucket.ALL,
    by: Annotated[By | None, typer.Option(help="A line for each model, or user.")] = None,
) -> None:
    """Count the last 30 days' requests, tokens and failures. With latencies, as JSON lines."""
    query = StatisticsQuery.model_validate({"bucket": bucket, "by": by})
    with opened() as database, database.sessions() as session:
        for line in statistics.statistics(session, owner, query):
            print_json(line)


@app.command("export")
def export_history(
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this file; what was cut off goes on after its last line."),
    ] = None,
    owner: OwnerOption = None,
    user_id: Annotated[str | None, typer.Option(help="Only this user's records.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only records with this status.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Only this model's records.")] = None,
    created_after: Annotated[str | None, typer.Option(help="Only later ones (ISO 8601).")] = None,
    created_before: Annotated[str | None, typer.Option(help="Only earlier ones.")] = None,
) -> None:
    """Write the history as newline-delimited JSON.

    Conversations come first, then records, one a line. With filters, the records that all of them
    let through, and the conversations of those; of a status, which may change meanwhile, also
    those of other records. Not during an import.
    """
    query = asked(
        user_id=user_id,
        status=status,
        model_name=model_name,
        created_after=created_after,
        created_before=created_before,
    )
    with opened() as database, progress_bar("export") as progress:
        if out is None:
            transfer.export_to(database, given(sys.stdout, "output"), owner, query, progress)
        else:
            transfer.export_file(database, out, owner, query, progress)


@app.command("import")
def import_history(
    file: Annotated[
        Path | None,
        typer.Argument(help="Standard input when left out.", exists=True, dir_okay=False),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option(help="Leave broken lines out, naming each, instead of stopping.")
    ] = False,
) -> None:
    """Bring in what an export wrote. What is there stays as it is: twice changes nothing."""
    skip = say if skip_broken else None
    gc.freeze()  # millions of rows pass: what is loaded by now need not be looked at each time
    with opened() as database, source(file) as (lines, size), progress_bar("import") as progress:
        done = importing.Importer(database, skip).run(lines, progress, size)
    say(
        f"{done.records} records and {done.conversations} conversations came in,"
        f" {done.present} were there, {done.broken} lines were left out."
    )


@app.command("backup")
def back_up(file: Annotated[Path, typer.Argument(help="Must not be there yet.")]) -> None:
    """Copy the whole database while it is used.

    The copy is looked over. For PostgreSQL and MySQL, their own programs (pg_dump, mysqldump)
    must be on the PATH.
    """
    with opened() as database, progress_bar("backup") as progress:
        backup.back_up(database, file, progress)
    say(f"{file} holds everything that was stored when the backup began.")


@app.command()
def restore(file: Annotated[Path, typer.Argument(help="What `backup` made.")]) -> None:
    """Fill an empty database from a backup. Nothing that is there is ever replaced."""
    database = connected()
    try:
        with progress_bar("restore") as progress:
            records = backup.restore(database, file, progress)
    finally:
        database.close()
    say(f"The database has {records} records.")


@app.command("retention")
def remove_old(
    dry_run: Annotated[bool, typer.Option(help="Only count what would go.")] = False,
) -> None:
    """Remove what is older than the service keeps.

    That is what RETENTION_DAYS and RETENTION_BODY_DAYS say; a service does so itself. Pinned
    records stay, and what is in progress.
    """
    settings = load_settings()
    days, body_days = settings.retention_days, settings.retention_body_days
    if days is None and body_days is None:
        raise CommandError("Neither RETENTION_DAYS nor RETENTION_BODY_DAYS is set: all is kept.")
    limits = retention.Limits.of(days, body_days)
    with opened() as database:
        if dry_run:
            removed = retention.count(database, limits)
        else:
            found = retention.Retention(database, days, body_days).run(limits)
            if found is None:
                raise CommandError("Another process is removing what is old at this moment.")
            removed = found
    for name, number in dataclasses.asdict(removed).items():
        typer.echo(f"{name}: {number}")


@app.command()
def erase(
    user: Annotated[str, typer.Argument(help="A `user_id`.", callback=checked_name)],
    owner: OwnerOption = None,
) -> None:
    """Delete every record of a user.

    Pinned and running ones too, and the conversations that were theirs alone. A SQLite file is
    written anew so that nothing of it is left there, which holds up writers while it lasts.
    Backups stay as they are.
    """
    settings = load_settings()
    lifetime = timedelta(seconds=settings.cache_ttl_seconds)
    pointers = cache.Pointers(settings.redis_url, lifetime) if settings.redis_url else None
    with opened() as database:
        if pointers is None:
            erased = erasure.erase(database, owner, user)
        else:
            erased = erasure.erase(database, owner, user, forget=pointers.forget)
    for name, number in dataclasses.asdict(erased).items():
        typer.echo(f"{name}: {number}")


@app.command()
def check(
    whole: Annotated[
        bool, typer.Option(help="Also have SQLite check a search index of over a million records.")
    ] = False,
) -> None:
    """Look the database over. Damage, what is missing or cannot be read, what neither its words nor
    its time lead to, lost links, records left open: status 1 if any.

    Every row is read. On SQLite nobody writes while it checks the search index: some three seconds
    for a million records.
    """
    wrong = 0
    with opened() as database:
        for name, found in inspection.problems(database, whole):
            typer.echo(f"{name}: {'; '.join(found) or 'ok'}")
            wrong += len(found)
    raise typer.Exit(1 if wrong else 0)


@contextlib.contextmanager
def source(file: Path | None) -> Iterator[tuple[BinaryIO, int]]:
    if file is None:
        yield given(sys.stdin, "input"), 0
        return
    with file.open("rb") as opened_file:
        yield opened_file, file.stat().st_size


def given(stream: TextIO | None, name: str) -> BinaryIO:
    """A process may be started without. Raises CommandError."""
    if stream is None:
        raise CommandError(f"standard {name} is closed")
    return stream.buffer


def asked(**filters: object) -> HistoryQuery:
    try:
        return HistoryQuery.model_validate(filters)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CommandError(f"{first['loc'][0]}: {first['msg']}") from None


def print_json(shown: BaseModel, indent: int | None = None) -> None:
    """In UTF-8, as an export is, wherever it is printed."""
    typer.echo(shown.model_dump_json(indent=indent).encode())


def say(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """Run a command; what goes wrong is one line on standard error, and exit status 1."""
    log.configure("console", "ERROR")
    try:
        app(prog_name="python -m manage")
    except BrokenPipeError:  # whoever read has enough
        drop_output()
        sys.exit(1)
    except (StartError, CommandError) as error:
        sys.exit(str(error))
    except ServiceError as error:
        sys.exit(error.detail)
    except FAILURES as error:
        sys.exit(f"The database failed ({kind(error)})")
    except OSError as error:
        drop_output()
        said = error.strerror or kind(error)
        sys.exit(f"{error.filename}: {said}" if error.filename else said)


def drop_output() -> None:
    """What standard output did not take would be tried, and fail, once more at the end."""
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):  # not a real file, or none
        out = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)


if __name__ == "__main__":
    main()
