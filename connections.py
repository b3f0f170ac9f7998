"""How connections are opened to each kind of database: driver, pool, time-outs, durability.

Every time-out follows from one number of seconds: connecting and waiting for a lock may take that
long, a statement ``STATEMENT_FACTOR`` times as long.
"""

import math
from functools import partial
from typing import Any

import psycopg
from sqlalchemy import URL, Engine, StaticPool, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError

from errors import StartError
from sqlite_file import WriteLock, begin, watch_errors

DRIVERS = {
    "sqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
MYSQL = ("mysql", "mariadb")
SQLITE_POOL = 32
SERVER_POOL = 16  # a server's connections are few: PostgreSQL has 100 for all its clients
READERS = 4  # beside those, for single records: more would only wait for one another
STATEMENT_FACTOR = 6
LONGEST_CONNECT = 30.0


def normalise_url(url: str) -> URL:
    """A URL as hosting platforms write it, with the driver this service ships, whatever driver it
    names. Raises ArgumentError."""
    parsed = make_url(url)
    if (driver := DRIVERS.get(parsed.get_backend_name())) is None:
        raise ArgumentError("no such kind of database")
    if driver == "sqlite" and parsed.password:
        raise ArgumentError("a driver that encrypts is meant, and would not be used")
    parsed = parsed.set(drivername=driver)
    if parsed.get_backend_name() in MYSQL:
        if not parsed.database:
            raise ArgumentError("no database is named, and MySQL has none of a user's own")
        parsed = parsed.update_query_dict({"charset": "utf8mb4"})
    return parsed


def open_engine(
    url: URL, lock: WriteLock | None, timeout: float, pool_size: int | None = None
) -> Engine:
    """``lock`` is a SQLite file's; None for a server."""
    if lock is None:
        # Servers differ in their default; what one transaction sees must not.
        isolation = {"isolation_level": "READ COMMITTED", "pool_pre_ping": True}
        return open_server(url, timeout, pool_size=pool_size or SERVER_POOL, **isolation)
    engine = create_engine(
        url, creator=lock.connect, pool_size=pool_size or SQLITE_POOL, **pool_options(timeout)
    )
    event.listen(engine, "begin", begin)
    watch_errors(engine, lock)
    return engine


def open_reader(url: URL, lock: WriteLock | None, timeout: float) -> Engine:
    """For queries of a single statement: they need no transaction.

    To a SQLite file one connection, for one thread, that waits for no lock. To a server a few, and
    nothing is sent but the query: neither a ping before nor the ends of a transaction around it.
    """
    if lock is None:
        alone = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
        return open_server(url, timeout, pool_size=READERS, **alone)
    engine = create_engine(url, creator=lock.connect, poolclass=StaticPool, hide_parameters=True)
    event.listen(engine, "connect", lambda made, _: made.execute("PRAGMA busy_timeout=0"))
    watch_errors(engine, lock)
    return engine


def pool_options(timeout: float) -> dict[str, Any]:
    # Parameters are prompts and outputs: an exception must not carry them.
    return {"hide_parameters": True, "pool_timeout": timeout, "max_overflow": 0}


def open_server(url: URL, timeout: float, **options: Any) -> Engine:
    mysql = url.get_backend_name() in MYSQL
    arguments = connect_arguments(url, timeout)
    engine = create_engine(url, connect_args=arguments, **pool_options(timeout), **options)
    connect = connect_mysql if mysql else partial(connect_postgres, statement_seconds(timeout))
    event.listen(engine, "do_connect", connect)
    set_up = set_up_mysql if mysql else set_up_postgres
    event.listen(engine, "connect", lambda connection, _: set_up(connection, timeout))
    return engine


def connect_arguments(url: URL, timeout: float) -> dict[str, Any]:
    """What the URL does not say itself."""
    mysql = url.get_backend_name() in MYSQL
    arguments = mysql_arguments(timeout) if mysql else postgres_arguments(timeout)
    return {name: value for name, value in arguments.items() if name not in url.query}


def statement_seconds(timeout: float) -> float:
    """How long an answer may take before its server is taken for dead: it ends a statement
    sooner itself."""
    return timeout * (STATEMENT_FACTOR + 1)


class PostgresConnection(psycopg.Connection[Any]):
    """Waits so many seconds for a server that keeps the connection and says nothing."""

    longest: float = math.inf

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.longest if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()  # in the middle of an answer: nothing can follow
            raise


def connect_postgres(
    longest: float, _: Any, __: Any, arguments: list[Any], options: dict[str, Any]
) -> PostgresConnection:
    try:
        connection = PostgresConnection.connect(*arguments, **options)
    except psycopg.ProgrammingError as error:  # before anything is sent
        raise not_taken() from error
    connection.longest = longest
    return connection


def connect_mysql(dialect: Any, _: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    try:
        return dialect.connect(*arguments, **options)
    except (AttributeError, TypeError, ValueError) as error:
        raise not_taken() from error


def not_taken() -> StartError:
    return StartError(
        "DATABASE_URL is not usable: the database's driver does not take one of the parameters"
        " that follow its question mark, or not that value"
    )


def postgres_arguments(timeout: float) -> dict[str, Any]:
    """A server that vanished without a word is found out by what it does not confirm."""
    return {
        "connect_timeout": math.ceil(min(timeout, LONGEST_CONNECT)),
        "keepalives_idle": max(1, round(timeout)),
        "keepalives_interval": 1,
        "keepalives_count": 5,
        "tcp_user_timeout": round(timeout * 1000),
    }


def mysql_arguments(timeout: float) -> dict[str, Any]:
    return {
        "connect_timeout": math.ceil(min(timeout, LONGEST_CONNECT)),
        "read_timeout": statement_seconds(timeout),
        "write_timeout": statement_seconds(timeout),
    }


def postgres_settings(timeout: float) -> list[str]:
    """Statements, not start-up options: connection poolers refuse those."""
    settings = {
        "lock_timeout": round(timeout * 1000),
        "statement_timeout": round(timeout * STATEMENT_FACTOR * 1000),
        # To compile a search among a million records took ten times as long as to run it.
        "jit": "off",
    }
    return [f"SET {name} = {value}" for name, value in settings.items()]


def set_up_postgres(connection: Any, timeout: float) -> None:
    with connection.cursor() as cursor:
        for setting in postgres_settings(timeout):
            cursor.execute(setting)
    connection.commit()


def set_up_mysql(connection: Any, timeout: float) -> None:
    """Without the strict mode, MySQL would cut a text that is too long and say nothing."""
    mariadb = "MariaDB" in connection.get_server_info()
    statement = timeout * STATEMENT_FACTOR
    limit = (
        f"max_statement_time = {statement}"
        if mariadb
        else f"max_execution_time = {round(statement * 1000)}"
    )
    with connection.cursor() as cursor:
        cursor.execute(
            f"SET SESSION innodb_lock_wait_timeout = {math.ceil(timeout)},"
            f" lock_wait_timeout = {math.ceil(timeout)}, {limit},"
            " sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES')"
        )
    connection.commit()


def unsafe_commits(engine: Engine) -> str | None:
    """The server's setting by which a power cut may take acknowledged commits; None if none."""
    unsafe: dict[str, set[str]] = {}
    if engine.dialect.name == "postgresql":
        unsafe = {"SHOW synchronous_commit": {"off"}, "SHOW fsync": {"off"}}
    elif engine.dialect.name in MYSQL:
        unsafe = {"SELECT @@innodb_flush_log_at_trx_commit": {"0", "2"}}
    for query, values in unsafe.items():
        with engine.connect() as connection:
            value = str(connection.scalar(text(query)))
        if value in values:
            return f"{query.split()[-1].lstrip('@')} is {value}"
    return None
