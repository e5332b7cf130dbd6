"""A DFlash2 draft's config: DFlash's, and the sizes of the convolutions and of the selector."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash2.options import DFlash2Section


class DFlash2Config(DFlashConfig):
    """Sizes and conventions of one DFlash2 draft; the names are those of ``config.json``."""

    architecture: ClassVar[str] = "DFlash2DraftModel"
    speculators_architecture: ClassVar[str] = "DFlash2DraftModel"
    own_keys: ClassVar[tuple[str, ...]] = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    foreign_keys: ClassVar[tuple[str, ...]] = ()

    conv_kernel_size: int = Field(ge=1, description="Taps T of the convolutions.")
    conv_group_size: int = Field(ge=1, description="Channels that share a tap's correction; divides the width.")
    selector_rank: int = Field(ge=1, description="Width R of the selector's codebooks.")
    selector_top_k: int = Field(ge=1, description="Candidates C of a slot.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.hidden_size % self.conv_group_size:
            raise ValueError(f"conv_group_size {self.conv_group_size} does not divide hidden_size {self.hidden_size}")
        if self.selector_top_k > self.vocab_size:
            raise ValueError(f"selector_top_k {self.selector_top_k} is above vocab_size {self.vocab_size}")
        return self

    @classmethod
    def from_dflash(cls, config: DFlashConfig, options: DFlash2Section) -> Self:
        """Return the config of the DFlash2 draft that begins as the DFlash draft of `config`."""
        own = {key: getattr(options, key) for key in cls.own_keys}
        return cls.model_validate({**config.model_dump(), **own})
