"""An empty database of this Prefect, made once for all workers of a test session: migrations take ten CPU seconds."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from prefect.server.database import provide_database_interface
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config


def copy_empty_database(session: pytest.TempPathFactory, to: Path) -> None:
    """Write a copy, as Prefect's server leaves it after its first start, to the file `to`."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with _template(_shared(session)) as template:
        _copy(template, to)


def _shared(session: pytest.TempPathFactory) -> Path:
    """Return the directory that the workers of a session have in common."""
    base = session.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def _template(directory: Path) -> Iterator[Path]:
    template = directory / "prefect-template.db"
    with (directory / "prefect-template.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not template.exists():
            made, whole = directory / "prefect-migrated.db", directory / "prefect-whole.db"
            with temporary_database_config(AioSqliteConfiguration(f"sqlite+aiosqlite:///{made}")):
                asyncio.run(provide_database_interface().create_db())
            _copy(made, whole)
            whole.rename(template)
        yield template


def _copy(source: Path, to: Path) -> None:
    """Copy a database with what its write-ahead log still holds."""
    with closing(sqlite3.connect(source)) as found, closing(sqlite3.connect(to)) as copy:
        found.backup(copy)
