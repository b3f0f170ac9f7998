"""Connections to a PostgreSQL for which the event loop waits, not a thread.

To wake a thread for a query, and the event loop for its answer, takes longer than the query.
"""

import asyncio
from typing import Any

import psycopg
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from connections import READERS, connect_arguments, postgres_settings, statement_seconds
from lookup import Lookup, Prepared

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


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

        Raises DBAPIError; TimeoutError when no connection is free or the server is silent too long.
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
        while self.free:
            connection = self.free.pop()
            try:
                return await self.ask(connection, prepared, given)
            except psycopg.OperationalError:
                if not connection.closed:
                    raise
        return await self.ask(await self.connect(), prepared, given)

    async def ask(
        self, connection: Connection, prepared: Prepared, given: dict[str, Any]
    ) -> list[Any] | None:
        try:
            async with asyncio.timeout(statement_seconds(self.timeout)):
                cursor = await connection.execute(prepared.sql, prepared.arguments(given))
                found = await cursor.fetchone()
        except psycopg.Error:
            if not connection.closed:
                self.free.append(connection)
            raise
        except BaseException:
            connection.pgconn.finish()  # in the middle of an answer: nothing can follow
            raise
        self.free.append(connection)
        return prepared.shown(found)

    async def connect(self) -> Connection:
        positional, named = self.dialect.create_connect_args(self.url)
        named.update(connect_arguments(self.url, self.timeout), autocommit=True)
        connection = await Connection.connect(*positional, **named)
        for setting in postgres_settings(self.timeout):
            await connection.execute(setting)
        return connection

    def close(self) -> None:
        for connection in self.free:
            connection.pgconn.finish()
        self.free.clear()
