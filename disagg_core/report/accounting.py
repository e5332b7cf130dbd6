"""The accounting identity of a run: every prompt is trained on, or it is known why not.

``prompts = published + rejected`` and ``published = trained + quarantined + unused``, with nothing left in the store.
`unused` are samples that were published and freed untrained because the trainer had reached its last step.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from disagg_core.errors import AccountingError


class Accounting(BaseModel):
    """The counts of a run over all its attempts, as they stand in the report."""

    model_config = ConfigDict(frozen=True)

    prompts: int
    rejected: int
    published: int
    trained: int
    quarantined: int
    unused: int = 0
    store_keys_left: int

    def problems(self) -> list[str]:
        """Return the identities that do not hold, each with its numbers; empty for a sound run."""
        found = []
        if self.prompts != self.published + self.rejected:
            found.append(
                f"prompts = published + rejected does not hold: {self.prompts} != {self.published} + {self.rejected}"
            )
        if self.published != self.trained + self.quarantined + self.unused:
            found.append(
                "published = trained + quarantined + unused does not hold: "
                f"{self.published} != {self.trained} + {self.quarantined} + {self.unused}"
            )
        if self.unused < 0:
            found.append(f"more samples were trained and quarantined than published, by {-self.unused}")
        if self.store_keys_left:
            found.append(f"{self.store_keys_left} samples were left in the store, expected 0")
        return found

    def check(self) -> None:
        """Raise `AccountingError` if an identity does not hold."""
        problems = self.problems()
        if problems:
            raise AccountingError("the run's numbers do not add up: " + "; ".join(problems))
