"""The resolved plan of a run: everything that both roles must agree on, derived once from the run document.

`make_plan` derives and checks it before anything is started; it is written to ``run.json`` and handed to the roles as
a `RoleAssignment`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.drafts.registry import method_names, method_of
from disagg_core.drafts.together import capture_for, capture_of, strategy_of
from disagg_core.errors import BadInput, SpecError
from disagg_core.prompts.pinned import PinnedData
from disagg_core.run.directory import AttemptDir, DraftDir, RunDir
from disagg_core.run.progress import figure_of
from disagg_core.run.warm_start import WarmStart
from disagg_core.run.watermarks import Watermarks
from disagg_core.run_spec.document import RunSpec, TargetSection
from disagg_core.run_spec.draft import DraftSection, keeps_vocabulary
from disagg_core.store.capacity import staging_bytes_for
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import TargetFacts

if TYPE_CHECKING:
    from disagg_core.drafts.method import DraftMethod, DraftVocabulary

_ALIGNMENT_SLACK = 4 * 64


def run_id_of(spec: RunSpec, flow_run_id: object) -> str:
    """Return the id of the run that the parent flow run `flow_run_id` is."""
    return f"{spec.run.name}-{str(flow_run_id).rsplit('-', 1)[-1]}"


@dataclass(frozen=True)
class PlannedDraft:
    """One of a run's drafts: its section, the run's target, where its files lie, and the draft that it continues.

    `folder` is its folder in a checkpoint and the first part of its results' names; empty for a run's only draft.
    """

    section: DraftSection
    dir: DraftDir
    folder: str
    target_section: TargetSection
    target: TargetFacts
    warm_start: WarmStart | None = None

    @property
    def name(self) -> str:
        """What the draft is called."""
        return self.section.label

    @property
    def method(self) -> DraftMethod:
        """Its draft method."""
        return method_of(self.section.method)

    @property
    def capture(self) -> Capture:
        """What it reads of what is captured."""
        return capture_for(self.section, self.target_section, self.target)

    @property
    def vocabulary(self) -> DraftVocabulary:
        """Which tokens it can propose; a continued draft keeps its vocabulary."""
        fresh = self.method.vocabulary(self.section, self.target)
        if self.warm_start is not None and keeps_vocabulary(self.section):
            return replace(fresh, size=self.warm_start.draft_vocab_size)
        return fresh

    @property
    def init_path(self) -> Path | None:
        """The directory of the draft that this one continues; None for a fresh one."""
        if self.section.init_from is None:
            return None
        return self.warm_start.path if self.warm_start is not None else Path(self.section.init_from).expanduser()

    def checkpoint_in(self, step: Path) -> Path:
        """Return where its part of the checkpoint `step` lies."""
        return step / self.folder

    def figure(self, name: str) -> str:
        """Return what its figure `name` is called among those of all drafts; by itself where it is the only one."""
        return figure_of(self.folder, name)

    def result_name(self, when: str) -> str:
        """Return the name of its evaluation `when`: before or after training."""
        return f"{self.folder}-{when}" if self.folder else when


class RunPlan(BaseModel):
    """A run, resolved: spec, facts of the target, identities, counts and watermarks."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    root: Path
    spec: RunSpec
    target: TargetFacts
    capture: Capture
    tokenizer_version: str
    total_prompts: int | None
    total_steps: int | None
    store_capacity: int
    watermarks: Watermarks
    data: PinnedData | None = None
    """What the prompts were when the run was planned; None where that was not looked at."""
    warm_starts: dict[str, WarmStart] = {}
    """The drafts that are continued, by what the document calls them."""

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return RunDir(self.root)

    @property
    def drafts(self) -> tuple[PlannedDraft, ...]:
        """The drafts that are trained, in the document's order."""
        sections = self.spec.all_drafts
        if len(sections) == 1:
            return (self._planned(sections[0], self.dir, ""),)
        return tuple(
            self._planned(section, DraftDir(self.dir.drafts / section.label), section.label) for section in sections
        )

    def _planned(self, section: DraftSection, place: DraftDir, folder: str) -> PlannedDraft:
        continued = self.warm_starts.get(section.init_from or "")
        return PlannedDraft(section, place, folder, self.spec.target, self.target, continued)

    def draft(self, name: str | None) -> PlannedDraft:
        """Return the draft called `name`; None names a run's only one.

        Raises:
            BadInput: there is no such draft, or there are several.
        """
        found = [draft for draft in self.drafts if name in (None, draft.name)]
        if len(found) != 1:
            known = ", ".join(draft.name for draft in self.drafts)
            raise BadInput(f"run {self.run_id}: expected the name of one of its drafts ({known}), found {name}")
        return found[0]

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token of a sample."""
        return self.capture.bytes_per_token(self.target.hidden_size, self.target.dtype)

    @property
    def max_sample_bytes(self) -> int:
        """The most bytes that one sample takes in the store."""
        return self.watermarks.max_sample_bytes

    @property
    def staging_bytes(self) -> int:
        """The memory that one process takes for transfers in one direction."""
        return staging_bytes_for(self.max_sample_bytes)

    def next_attempt(self) -> int:
        """Return the number of the first attempt that was not begun: 1 unless an earlier process of this run ended."""
        return max(self.dir.begun_attempts(), default=0) + 1

    def identity(self, attempt: int, vocab_map_version: str) -> RunIdentity:
        """Return the identity that the references of `attempt` carry."""
        return RunIdentity(
            run_id=self.run_id,
            attempt=attempt,
            strategy=strategy_of(self.spec.all_drafts),
            target_model_version=self.target.version,
            tokenizer_version=self.tokenizer_version,
            vocab_map_version=vocab_map_version,
            draft_weight_version=0,
            capture=self.capture,
            dtype=self.target.dtype,
        )


class RoleAssignment(BaseModel):
    """What one role process is told: the plan, which attempt it is, and where the store is."""

    model_config = ConfigDict(frozen=True)

    plan: RunPlan
    attempt: int
    store: StoreEndpoints

    @property
    def dir(self) -> AttemptDir:
        """The attempt's directory."""
        return self.plan.dir.attempt(self.attempt)

    @property
    def namespace(self) -> str:
        """The prefix of the attempt's keys in the store."""
        return f"{self.plan.run_id}/{self.attempt}"

    @property
    def channel_url(self) -> str:
        """The attempt's reference channel."""
        configured = self.plan.spec.channel.url
        return configured if configured else f"file:{self.dir.channel}"


def make_plan(
    spec: RunSpec,
    target: TargetFacts,
    *,
    run_id: str,
    root: Path,
    total_prompts: int | None,
    tokenizer_version: str = "",
    data: PinnedData | None = None,
    warm_starts: Mapping[str, WarmStart] | None = None,
) -> RunPlan:
    """Derive the plan of a run and check its numbers against each other.

    `total_prompts` counts all epochs; None where the prompts cannot be counted beforehand (a streamed dataset).
    A continued draft keeps its vocabulary, which is known of those in `warm_starts`.

    Raises:
        BadInput: the draft's options do not fit the target.
        SpecError: context, watermarks or store capacity cannot work together; each number is named.
    """
    capture = capture_of(spec.all_drafts, spec.target, target)
    if spec.data.max_tokens > target.max_position_embeddings:
        raise SpecError(
            f"data.max_tokens: expected at most the target's context of {target.max_position_embeddings}, "
            f"found {spec.data.max_tokens}"
        )
    _check_drafts(spec, target)
    bytes_per_token = capture.bytes_per_token(target.hidden_size, target.dtype)
    sample_bytes = spec.data.max_tokens * bytes_per_token + _ALIGNMENT_SLACK
    watermarks = Watermarks.resolve(
        spec.rollout, spec.global_batch_size, max_sample_bytes=sample_bytes, store_capacity=spec.store.capacity
    )
    steps = None if total_prompts is None else math.ceil(total_prompts / spec.global_batch_size)
    if spec.training.max_steps is not None:
        steps = spec.training.max_steps if steps is None else min(steps, spec.training.max_steps)
    return RunPlan(
        run_id=run_id,
        root=root,
        spec=spec,
        target=target,
        capture=capture,
        tokenizer_version=tokenizer_version,
        total_prompts=total_prompts,
        total_steps=steps,
        store_capacity=spec.store.capacity,
        watermarks=watermarks,
        data=data,
        warm_starts=dict(warm_starts or {}),
    )


def _check_drafts(spec: RunSpec, target: TargetFacts) -> None:
    """Have each draft's method check it against the target, and against how it is to be trained.

    Raises:
        BadInput: one does not fit; of several, every one that does not is named.
    """
    sections, faults = spec.all_drafts, []
    for section in sections:
        method = method_of(section.method)
        try:
            _check_context(method, spec.training.context_parallel)
            method.vocabulary(section, target)
            method.check(section, target, max_tokens=spec.data.max_tokens, draft_tokens=spec.evaluation.draft_tokens)
        except BadInput as error:
            if len(sections) == 1:
                raise
            faults.append(f"{section.label}: {error}")
    if faults:
        raise BadInput("; ".join(faults))


def _check_context(method: DraftMethod, shared_by: int) -> None:
    if shared_by > 1 and not method.context_parallel:
        able = ", ".join(name for name in method_names() if method_of(name).context_parallel)
        raise SpecError(
            f"training.context_parallel: expected 1 with draft.method {method.name}, whose loss cannot share the "
            f"positions of a sample over ranks, found {shared_by}; methods that can: {able}"
        )
