"""The Prefect server of the local platform: ``prefect server start``, on SQLite whose writers wait for each other.

Prefect opens most transactions as deferred. One that has read and then writes, while another one has written, cannot be
waited for: SQLite refuses it at once, whatever the busy timeout ("database is locked"), and a heartbeat or an event is
lost. An immediate transaction takes its turn before it reads, for up to Prefect's busy timeout of 60 s.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
from prefect.settings import get_current_settings
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class WritersTakeTurns(AioSqliteConfiguration):
    """SQLite whose transactions are all immediate; plain reads need none."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction]:
        """Begin a transaction that may write."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def main(arguments: list[str]) -> None:
    """Run ``prefect server start`` with `arguments` in this process."""
    url = get_current_settings().server.database.connection_url
    assert url is not None, "the platform's environment names its database"
    with temporary_database_config(WritersTakeTurns(connection_url=url.get_secret_value())):
        sys.argv = ["prefect", "server", "start", *arguments]
        runpy.run_module("prefect", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
