"""What `draft.init_from` came to when the run was planned: all roles and attempts continue the same draft."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class WarmStart(BaseModel):
    """A draft to continue from, found and fixed.

    `reference` is what the document says; `pinned` means the same draft for ever, whatever the champion is by then;
    `path` is its directory, which all roles see; `draft_vocab_size` is how many tokens it can propose.
    """

    model_config = ConfigDict(frozen=True)

    reference: str
    pinned: str
    path: Path
    draft_vocab_size: int
