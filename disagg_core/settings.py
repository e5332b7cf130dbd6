"""What belongs to the machine and not to the run: directories, bind addresses, endpoints and secrets.

Read from the environment (prefix ``DRAFTLINE_``). Never a flow parameter, never written into a record.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from disagg_core.errors import BadInput

CHECKOUT = Path(__file__).resolve().parent.parent


def _default_home() -> Path:
    """Return ``.draftline/`` in a checkout, the user's data directory otherwise."""
    if (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "infra").is_dir():
        return CHECKOUT / ".draftline"
    return Path.home() / ".local" / "share" / "draftline"


class Settings(BaseSettings):
    """Machine settings; each field is read from ``DRAFTLINE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="DRAFTLINE_", extra="ignore", frozen=True)

    home: Path = Field(default_factory=_default_home, description="Runs, logs, archive and the local Prefect home.")
    registry: str | None = Field(None, description="Registry of drafts; default: registry/ under DRAFTLINE_HOME.")
    host: str = Field("127.0.0.1", description="Address that our servers bind to; loopback unless told otherwise.")
    prefect_port: int | None = Field(None, ge=1, le=65535, description="Port of the local Prefect server.")
    redis_password: SecretStr | None = Field(None, description="Password of the channel's Redis server.")
    redis_ca: Path | None = Field(None, description="CA certificate file for rediss:// channels.")
    sglang_python: Path | None = Field(None, description="Python of the SGLang environment (infra/sglang/setup.sh).")

    @property
    def drafts_cache(self) -> Path:
        """Drafts that were fetched from elsewhere, by content; on the mount of the runs, so that all roles see them."""
        return self.home / "cache" / "drafts"

    @property
    def runs_dir(self) -> Path:
        """Directory of all runs; must be on a mount that all roles share."""
        return self.home / "runs"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return this process's settings, read once.

    Raises:
        BadInput: an environment variable of ours has a value of the wrong type.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        wrong = (f"DRAFTLINE_{item['loc'][0]}".upper() + f": {item['msg']}" for item in error.errors())
        raise BadInput("; ".join(wrong)) from None
    return settings.model_copy(update={"home": settings.home.expanduser().resolve()})
