"""A service that the run needs is away for a while."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import Start
from tests.chaos.platform import ChaosPlatform
from tests.chaos.redis_server import RedisServer

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that keeps what it was told on the disk."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.mark.parametrize("seconds", [30, 120])
def test_the_prefect_server_is_away(start: Start, own: ChaosPlatform, seconds: int) -> None:
    run = start(f"Prefect server killed, and started again {seconds} s later", on=own)
    run.train_until(step=6)

    run.disturb(own.server().kill)
    run.wait_out(seconds)
    own.start_server_again()
    run.completes()


def test_redis_is_away(start: Start, redis: RedisServer) -> None:
    run = start("Redis killed, and started again 60 s later", f"channel.url={redis.url}")
    run.train_until(step=6)
    run.disturb(redis.kill)
    run.detects_that_the_channel_is_away()
    run.wait_out(60)
    redis.start()
    run.completes()


def test_redis_fails_over(start: Start, redis: RedisServer, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "replica", replica_of=redis.port) as replica:
        run = start("Redis demoted to a replica for 20 s (READONLY), then primary again", f"channel.url={redis.url}")
        run.train_until(step=6)
        run.disturb(lambda: redis.hand_over_to(replica))
        run.detects_that_the_channel_is_away()
        run.wait_out(20)
        replica.hand_over_to(redis)
        run.completes()
