"""The draft methods that there are: one line each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from disagg_core.drafts.dflash.options import DFlashSection
from disagg_core.drafts.dflash2.options import DFlash2Section
from disagg_core.drafts.dspark.options import DSparkSection
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.errors import BadInput
from disagg_core.run_spec.draft import DraftSection

if TYPE_CHECKING:
    from disagg_core.drafts.method import DraftMethod

SECTIONS: tuple[type[DraftSection], ...] = (
    Eagle3Section,
    DFlashSection,
    DFlash2Section,
    DSparkSection,
    PEagleSection,
)
"""The section of each method in the run document; the method itself is ``METHOD`` in ``method.py`` beside it."""

_HOMES = {section.model_fields["method"].default: section.__module__.removesuffix(".options") for section in SECTIONS}


def method_names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(_HOMES)


def method_of(name: str) -> DraftMethod:
    """Return the draft method called `name`, as the run document names it.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in _HOMES:
        raise BadInput(f"draft.method: expected one of {', '.join(_HOMES)}, found {name!r}")
    return cast("DraftMethod", importlib.import_module(f"{_HOMES[name]}.method").METHOD)
