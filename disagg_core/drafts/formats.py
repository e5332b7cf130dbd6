"""What a draft method says of its serving formats, and what an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingFormat:
    """One of a method's formats: who loads it (for people), and what it has room for besides the draft itself."""

    loaded_by: str
    names_target: bool = False
    holds_parts: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """What an export is to say besides the draft itself.

    `format` is one of the method's; `dtype` is torch's name; `verifier_name` and `verifier_architectures` name the
    target, in formats that do; `draft_tokens` is the number of tokens that an engine should propose.
    """

    format: str
    dtype: str
    draft_tokens: int
    verifier_name: str | None = None
    verifier_architectures: tuple[str, ...] = ()
