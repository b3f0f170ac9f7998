"""Connections to a PostgreSQL for which the event loop waits, not a thread.

To wake a thread for a query, and the event loop for its answer, takes longer than the query.
"""

import asyncio
import contextlib
from typing import Any

import psycopg
from psycopg.waiting import wait_async
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from connections import READERS, connect_arguments, postgres_settings, statement_seconds
from lookup import Lookup, Prepared


class Connection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """Waits ``longest`` seconds for a server that says nothing. Who stops waiting closes it:
    psycopg would ask the server to stop first, for ten seconds."""

    longest: float | None = None

    async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        longest = self.longest if timeout is None else timeout
        try:
            return await wait_async(gen, self.pgconn.socket, interval, longest)
        except (psycopg.errors._WaitTimeout, asyncio.CancelledError):
            self.pgconn.finish()  # in the middle of an answer: nothing can follow
            raise


class AsyncPostgres:
    """A few connections, made when they are needed, each with one query at a time.

    They commit by themselves: a query is one round trip.
    """

    def __init__(self, url: URL, timeout: float) -> None:
        self.url = url
        self.dialect = url.get_dialect()()
        self.timeout = timeout
        self.turns = asyncio.Semaphore(READERS)
        self.free: list[Connection] = []

    async def row(self, lookup: Lookup, given: dict[str, Any]) -> list[Any] | None:
        """The row that a query finds. A query is repeated if its connection had died before.

        Raises DBAPIError; TimeoutError when no connection is free in time.
        """
        prepared = lookup.prepared_for(self.dialect)
        async with asyncio.timeout(self.timeout):
            await self.turns.acquire()
        try:
            return await self.answer(prepared, given)
        except psycopg.Error as error:
            raise DBAPIError.instance(
                prepared.sql,
                None,
                error,
                psycopg.Error,
                hide_parameters=True,
                dialect=self.dialect,
            ) from error
        finally:
            self.turns.release()

    async def answer(self, prepared: Prepared, given: dict[str, Any]) -> list[Any] | None:
        if self.free:
            connection = self.free.pop()
            try:
                return await self.ask(connection, prepared, given)
            except psycopg.errors._WaitTimeout:
                raise
            except psycopg.OperationalError:
                if not connection.closed:
                    raise
            self.close()  # the others may have died with it, each to be found out
        return await self.ask(await self.connect(), prepared, given)

    async def ask(
        self, connection: Connection, prepared: Prepared, given: dict[str, Any]
    ) -> list[Any] | None:
        try:
            cursor = await connection.execute(prepared.sql, prepared.arguments(given))
            return prepared.shown(await cursor.fetchone())
        finally:
            if not connection.closed:
                self.free.append(connection)

    async def connect(self) -> Connection:
        positional, named = self.dialect.create_connect_args(self.url)
        named.update(connect_arguments(self.url, self.timeout), autocommit=True)
        connection = await Connection.connect(*positional, **named)
        connection.longest = statement_seconds(self.timeout)
        try:
            for setting in postgres_settings(self.timeout):
                await connection.execute(setting)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def close(self) -> None:
        """From whatever thread, also while the event loop reads."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self.free.pop()
                connection.pgconn.finish()
