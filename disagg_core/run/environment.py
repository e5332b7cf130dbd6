"""What a process of a run runs in: versions of everything installed, the code's revision, GPUs and their driver."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.files import write_atomically
from disagg_core.settings import CHECKOUT
from disagg_core.storage.redaction import redacted_environment

_ASK_S = 20.0
_OURS = (
    "CUDA_",
    "DRAFTLINE_",
    "HF_",
    "MC_",
    "MKL_",
    "MOONCAKE_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "PREFECT_",
    "PYTORCH_",
    "SGLANG_",
    "TORCH",
    "TRANSFORMERS_",
)
_SGLANG = "import importlib.metadata as m; print(m.version('sglang'))"


class Gpu(BaseModel):
    """One GPU of the machine."""

    model_config = ConfigDict(frozen=True)

    name: str
    driver: str
    memory_mib: int


class Environment(BaseModel):
    """The machine and software of one process. None is what was not there, or could not be asked."""

    model_config = ConfigDict(frozen=True)

    host: str
    platform: str
    python: str
    revision: str | None
    """Commit of the checkout that the code is from; ``+changes`` where files differ from it."""
    gpus: list[Gpu]
    mooncake: str | None
    sglang: str | None
    packages: dict[str, str]
    variables: dict[str, str]
    """Variables that change what our libraries do, without their secrets."""


def read_environment(sglang_python: Path | None = None) -> Environment:
    """Return the environment of this process; `sglang_python` is the Python that servers are started with."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    mooncake = next((packages[name] for name in sorted(packages) if name.startswith("mooncake-transfer-engine")), None)
    sglang = _said([str(sglang_python), "-c", _SGLANG]) if sglang_python is not None else packages.get("sglang")
    return Environment(
        host=platform.node(),
        platform=platform.platform(),
        python=sys.version.split()[0],
        revision=_revision(),
        gpus=_gpus(),
        mooncake=mooncake,
        sglang=sglang,
        packages=dict(sorted(packages.items())),
        variables=redacted_environment({name: value for name, value in os.environ.items() if name.startswith(_OURS)}),
    )


def write_environment(path: Path, sglang_python: Path | None = None) -> None:
    """Write the environment of this process to `path`."""
    write_atomically(path, read_environment(sglang_python).model_dump_json(indent=2))


def _revision() -> str | None:
    if not (CHECKOUT / ".git").exists():
        return None
    commit = _said(["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"])
    changed = _said(["git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if commit and changed else commit


def _gpus() -> list[Gpu]:
    listed = _said(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"])
    rows = [line.split(", ") for line in (listed or "").splitlines()]
    return [
        Gpu(name=row[0], driver=row[1], memory_mib=int(row[2])) for row in rows if len(row) == 3 and row[2].isdigit()
    ]


def _said(command: list[str]) -> str | None:
    """Return what a program prints; None if it is not there, fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
