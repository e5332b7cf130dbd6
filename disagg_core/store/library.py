"""Loading Mooncake: the wheel, its environment, and the program files that come with it.

Mooncake reads its ``MC_*`` variables once, when it is first imported, so everything that imports it comes through here.
"""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

from disagg_core.errors import MissingLibrary

ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_SLICE_SIZE": "1048576",
    "MC_STORE_CLIENT_SETUP_RETRIES": "3",
    "MC_RPC_TIMEOUT_MS": "10000",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "10",
    "MC_TCP_STATUS_TIMEOUT_SEC": "10",
}
"""Set before the first import unless the machine says otherwise: quiet, pooled, and no call takes over 10 seconds."""

_SYSTEM_LIBRARIES = {"ibverbs": "libibverbs1", "numa": "libnuma1", "curl": "libcurl4"}
_INSTALL_WHEEL = "pip install 'draftline[cpu]' (or [cuda12], [cuda13] on a GPU machine)"


def require_mooncake() -> None:
    """Check that Mooncake can be loaded here.

    Raises:
        MissingLibrary: the wheel or a system library is missing; the message holds the command that installs it.
    """
    load_mooncake()
    master_binary()


def load_mooncake() -> ModuleType:
    """Import and return ``mooncake.store`` with our environment in place."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("mooncake") is None:
        raise MissingLibrary(f"the feature store needs the Mooncake wheel, which is not installed: {_INSTALL_WHEEL}")
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        absent = [package for name, package in _SYSTEM_LIBRARIES.items() if ctypes.util.find_library(name) is None]
        way_out = f"apt-get install {' '.join(absent)}" if absent else f"reinstall the wheel: {_INSTALL_WHEEL}"
        raise MissingLibrary(f"Mooncake cannot be loaded: {error}; {way_out}") from error


def master_binary() -> Path:
    """Return the ``mooncake_master`` program inside the wheel."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        raise MissingLibrary(f"the feature store needs the Mooncake wheel, which is not installed: {_INSTALL_WHEEL}")
    for location in spec.submodule_search_locations:
        program = Path(location) / "mooncake_master"
        if program.is_file():
            if not os.access(program, os.X_OK):
                program.chmod(program.stat().st_mode | 0o111)
            return program
    raise MissingLibrary(f"the Mooncake wheel holds no mooncake_master program; reinstall it: {_INSTALL_WHEEL}")
