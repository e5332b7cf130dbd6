"""Looking for what calls for another draft, each change once."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from disagg_core.recurring.sighting import Sighting
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings


@task(name="look", task_run_name="target, data and server", cache_policy=NO_CACHE)
def look(spec: RunSpec, server: str | None, drop: float) -> list[Sighting]:
    """Return what calls for another draft and was not told yet; see `disagg_core.recurring.watch`."""
    from disagg_core.recurring.watch import watch

    return watch(spec, get_settings(), server, drop)


@task(name="remember", task_run_name="what was told", cache_policy=NO_CACHE)
def remember(spec: RunSpec, told: list[Sighting]) -> None:
    """Keep what was told, so that the next look does not tell it again."""
    from disagg_core.recurring.watch import remember as keep

    keep(spec, get_settings(), told)
