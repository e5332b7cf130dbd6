"""The local server's database: a transaction that reads and then writes waits for its turn, and is never refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession

from flows.platform.server import WritersTakeTurns

pytestmark = pytest.mark.integration


async def read_then_write(config: AioSqliteConfiguration, between: asyncio.Barrier | None) -> None:
    """Count up by one, as a heartbeat does; wait for the other one after reading, if it may come."""
    async with AsyncSession(await config.engine()) as session, config.begin_transaction(session):
        count = (await session.execute(sa.text("SELECT count FROM counter"))).scalar_one()
        if between is not None:
            await between.wait()
        await session.execute(sa.text("UPDATE counter SET count = :count"), {"count": count + 1})


async def two_at_once(config: AioSqliteConfiguration, between: asyncio.Barrier | None) -> int:
    engine = await config.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE counter (count INTEGER)"))
        await connection.execute(sa.text("INSERT INTO counter VALUES (0)"))
    await asyncio.gather(*(read_then_write(config, between) for _ in range(2)))
    async with engine.connect() as connection:
        count = int((await connection.execute(sa.text("SELECT count FROM counter"))).scalar_one())
    await engine.dispose()
    return count


def test_two_that_read_and_then_write_both_succeed(tmp_path: Path) -> None:
    config = WritersTakeTurns(connection_url=f"sqlite+aiosqlite:///{tmp_path}/ours.db")
    assert asyncio.run(two_at_once(config, None)) == 2


def test_prefect_s_own_transactions_refuse_one_of_them(tmp_path: Path) -> None:
    """Why ours are immediate; where this no longer holds, they need not be."""
    config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    with pytest.raises(sa.exc.OperationalError, match="database is locked"):
        asyncio.run(two_at_once(config, asyncio.Barrier(2)))
