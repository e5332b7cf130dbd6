"""The drafts of the run document: what all methods have in common, and the union of what each adds.

A run document stands below the draft methods, which read it. The methods' own sections are therefore not imported here
but asked of `disagg_core.drafts.registry` by name, when the document's class is made.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from disagg_core.run_spec.section import Layers, Section

DEFAULT_METHOD = "eagle3"
"""The method of a document that names none."""
_SECTIONS = "disagg_core.drafts.registry:SECTIONS"


DraftName: TypeAlias = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z0-9][a-z0-9_-]*$")]
"""Names a draft among others of its run, and its folders."""


class DraftSection(Section):
    """What every draft method has; a method's own section adds to it. Sizes that are not given are the target's."""

    title: ClassVar[str]
    """The method's name for people."""
    method: str
    name: DraftName | None = Field(None, description="Name of the draft among several of a run; by default its method.")
    init_from: str | None = Field(
        None,
        description="Draft to continue from: champion, latest or a version (v3) of the registry, a run's id, a "
        "directory (a path starts with ./, ../, / or ~), a Hugging Face id or a URL. Sizes and vocabulary are its own.",
    )
    aux_layers: Layers | None = Field(
        None, description="Decoder layers (0-based) whose outputs this draft reads; by default target.aux_layers."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of this draft; by default training.learning_rate."
    )

    @property
    def label(self) -> str:
        """What the draft is called."""
        return self.name or self.method

    @classmethod
    def own_options(cls) -> frozenset[str]:
        """Return the options that say how a fresh draft is built; one that is continued has its own."""
        return frozenset()

    def given(self, names: Iterable[str]) -> list[str]:
        """Return which of the options `names` have another value than by default."""
        fields = type(self).model_fields
        return sorted(name for name in names if getattr(self, name) != fields[name].default)

    @model_validator(mode="after")
    def _sizes_come_with_init_from(self) -> DraftSection:
        if self.init_from is not None and (found := self.given(self.own_options())):
            raise ValueError(f"expected no sizes beside init_from, whose draft has its own, found {', '.join(found)}")
        return self

    def continuing(self, draft: str) -> DraftSection:
        """Return the section of a run that continues `draft`, with its sizes and vocabulary, as this one says."""
        own = self.own_options() | ({"vocab_size"} & type(self).model_fields.keys())
        kept = {name: value for name, value in self.model_dump().items() if name not in own}
        return type(self).model_validate({**kept, "init_from": draft})


class ReducedVocabulary(Section):
    """For methods whose draft may propose a part of the target's vocabulary only."""

    vocab_size: int | None = Field(
        None,
        ge=2,
        description="Draft vocabulary; by default the target's, or that of the draft in init_from, whose tokens are "
        "chosen anew if this is given.",
    )
    vocab_sample: int = Field(
        512, ge=1, description="Prompts whose continuations are counted for the vocabulary map when generating."
    )


class OwnRope(Section):
    """For methods whose draft has rotary position embeddings of its own."""

    rope_theta: float | None = Field(
        None,
        gt=0,
        description="Base of a plain RoPE of the draft's own; by default the target's RoPE, or a plain one of its base "
        "where the target rotates a part of a head or by longrope.",
    )


def keeps_vocabulary(section: DraftSection) -> bool:
    """Tell whether the draft has the vocabulary of the one that it is continued from."""
    anew = isinstance(section, ReducedVocabulary) and section.vocab_size is not None
    return section.init_from is not None and not anew


@cache
def draft_sections() -> dict[str, type[DraftSection]]:
    """Return the section of every registered method, by name."""
    sections: tuple[type[DraftSection], ...] = pkgutil.resolve_name(_SECTIONS)
    return {section.model_fields["method"].default: section for section in sections}


def draft_field() -> Any:
    """Return the type of the document's draft: a union told apart by `method`, `DEFAULT_METHOD` where it names none."""
    union = reduce(or_, draft_sections().values())
    return Annotated[union, Field(discriminator="method"), BeforeValidator(_with_method)]


def default_draft() -> DraftSection:
    """Return the draft of a document that says nothing about it."""
    return draft_sections()[DEFAULT_METHOD].model_validate({})


def _with_method(value: object) -> object:
    return {"method": DEFAULT_METHOD, **value} if isinstance(value, dict) else value
