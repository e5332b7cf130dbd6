"""What is checked about the suites of a run's evaluation before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from disagg_core.errors import PromptError, PromptRejected
from disagg_core.evaluation.questions import read_suite
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.pinned import PinnedData, PinnedFile
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts

_PROBED = 32


def check_suites(
    spec: RunSpec, tokenizer: Any | None, facts: TargetFacts | None, pinned: PinnedData | None
) -> dict[str, PinnedFile]:
    """Read all suites of `spec`, encode the first questions of each where there is a tokenizer; return their pins.

    Raises:
        PromptError: a suite is missing, broken, or none of its first questions can be encoded.
        DataChanged: a suite is not what was `pinned`.
    """
    encoder = PromptEncoder(spec, tokenizer, facts) if tokenizer is not None and spec.evaluation.suites else None
    pins: dict[str, PinnedFile] = {}
    for name, path in spec.evaluation.suites.items():
        known = pinned.suites.get(name) if pinned is not None else None
        try:
            questions, pins[name] = read_suite(Path(path).expanduser(), spec.data, known)
        except PromptError as error:
            raise PromptError(f"evaluation.suites.{name}: {error}") from error
        if encoder is None:
            continue
        reasons: list[str] = []
        for question in questions[:_PROBED]:
            try:
                encoder.encode_prompt(question.record)
            except PromptRejected as error:
                reasons.append(f"{question.source}: {error}")
        if len(reasons) == len(questions[:_PROBED]):
            raise PromptError(f"evaluation.suites.{name}: none of the first {len(reasons)} can be asked; {reasons[0]}")
    return pins
