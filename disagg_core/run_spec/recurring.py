"""The section of the run document about recurring training: what a night does with the data that is new."""

from __future__ import annotations

from pydantic import Field

from disagg_core.run_spec.section import Section


class RecurringSection(Section):
    """Each run goes on from the champion, on what is new in `data.prompts` since the run that made the champion."""

    min_new_prompts: int = Field(
        100, ge=1, description="With fewer new prompts the run is skipped: a successful end, called Skipped."
    )
    replay: float = Field(
        0.2, ge=0, le=10, description="Old prompts mixed in against forgetting: a share of the new ones."
    )
