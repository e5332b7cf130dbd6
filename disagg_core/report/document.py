"""The report of a run: one typed document, written as JSON; `figures` says what people are shown of it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from disagg_core.errors import FailureClass
from disagg_core.report.accounting import Accounting


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class TrainingFigures(_Part):
    """What the trainer did, over all attempts; rates are those of the last one. Of several drafts each has its loss."""

    steps: int
    samples_per_second: float
    loss_first: float | None
    loss_last: float | None


class ProgressFigures(_Part):
    """How far a run that did not complete had come, as its roles said last; counts are of all attempts.

    `loss` is that of an only draft; several have theirs in `losses`, by name.
    """

    attempt: int
    prompts: int
    total_prompts: int | None
    steps: int
    total_steps: int | None
    trained: int
    loss: float | None
    losses: dict[str, float] = {}


class TimeFigures(_Part):
    """Where the time of all attempts went, in seconds of each phase (`disagg_core.run.phases`), and what it says.

    `training` is rank 0, `producer` the rollout workers together, `producer_beside` other threads meanwhile.
    """

    training: dict[str, float]
    producer: dict[str, float]
    producer_beside: dict[str, float]
    bottleneck: str


class Estimate(_Part):
    """A figure with its 95 % bootstrap interval, which needs several prompts or batches."""

    value: float
    interval: tuple[float, float] | None


class MeasuredFigures(_Part):
    """A suite, or a part of it: questions of a category or with prompts of some length, passes at some place.

    Lengths and places are ranges of tokens. `speedup` is tokens per second over those of plain decoding; the gains are
    parts of the champion's accept length and tokens per second. All of these are of the same questions and batches.
    """

    suite: str
    kind: Literal["suite", "category", "prompt_length", "position"]
    part: str | None
    questions: int
    accept_length: Estimate | None
    per_position: list[float]
    tokens_per_second: Estimate | None
    speedup: Estimate | None
    gain: Estimate | None
    speed_gain: Estimate | None


class EvaluationFigures(_Part):
    """Speculative decoding of held-out prompts; accept length is tokens per target pass."""

    draft_tokens: int
    prompts: int
    accept_length_before: float
    accept_length_after: float
    interval_after: tuple[float, float] | None
    per_position_after: list[float]
    lossless: bool
    tokens_per_second: float | None = None
    """With the trained draft, all prompts together, where the evaluation ran."""
    suites: list[MeasuredFigures] = []
    """With the trained draft: each suite, the held-out prompts first, followed by its parts."""


class BestFigures(_Part):
    """The best that a draft's held-out samples have said of it in training: `value` of `figure` after a step.

    `since` counts the measurements after it, none of which was better.
    """

    step: int
    figure: str
    value: float
    since: int


class DraftFigures(_Part):
    """One draft of the run: what was trained, in how many of the run's steps, and what came of it.

    `skipped` windows were not finite for it; `seconds` are those of its own steps. `best` is None where drafts are not
    measured while they are trained.
    """

    name: str
    method: str
    title: str
    parameters: int
    steps: int
    skipped: int
    seconds: float
    loss_first: float | None
    loss_last: float | None
    best: BestFigures | None = None
    export: str | None = None
    evaluation: EvaluationFigures | None = None


class Criterion(_Part):
    """One bound of the gate, what was found, and whether it is kept; `suite` is None for all prompts together."""

    name: Literal["lossless", "min_accept_length", "min_gain", "max_regression"]
    suite: str | None
    bound: float
    estimate: float
    interval: tuple[float, float] | None
    verdict: Literal["kept", "uncertain", "missed"]


class SuiteFigures(_Part):
    """Accept lengths of candidate and incumbent on the same prompts; `gain` is a part of the incumbent's."""

    suite: str
    prompts: int
    candidate: float
    candidate_interval: tuple[float, float]
    incumbent: float | None
    gain: float | None
    gain_interval: tuple[float, float] | None


class GateFigures(_Part):
    """What the gate decided about a draft, and why; `suites` has all prompts together first, as ``all``."""

    decision: Literal["promoted", "rejected", "needs_approval"]
    reasons: list[str]
    criteria: list[Criterion]
    suites: list[SuiteFigures]
    candidate: str
    incumbent: str | None
    confidence: float
    seed: int


class RoleFigures(_Part):
    """The flow run in which a role ended the run; `restarts` are those of all attempts."""

    flow_run_id: str
    work_pool: str
    started: datetime | None
    ended: datetime | None
    restarts: int = 0


class ArchiveFigures(_Part):
    """Where the results are."""

    url: str
    manifest: str


class Failure(_Part):
    """Why a run did not complete; `judged`: it did all its work, and what came of it was not good enough."""

    failure_class: FailureClass
    message: str
    judged: bool = False


class AttemptFigures(_Part):
    """How one attempt ended."""

    attempt: int
    failure_class: FailureClass | None
    reason: str
    incomplete: int


class ServerFigures(_Part):
    """One server of the target in the last attempt: what it captured, and what happened to it, in words."""

    name: str
    captured: int
    failures: int
    restarts: int
    events: list[str]


EndState = Literal["completed", "failed", "cancelled", "crashed"]
"""How a run ended. `crashed`: its process was killed, or it lost its Prefect server."""


HOW_TO_RESUME = (
    "Retry on its page in the Prefect UI, or `prefect flow-run retry {flow_run_id}`, resumes from its newest checkpoint"
)
REST = "the training is complete: Retry on its page in the Prefect UI does what is left, archive and evaluation; "
MEASURE = "draftline evaluate {run_id} measures the draft here, or with --server on an SGLang server"


class RunReport(_Part):
    """Everything that is said about a run at its end.

    `drafts` has every draft of a run whose training is complete. What is said of a run's only draft elsewhere too, loss
    and evaluation, is said of several there alone.
    """

    run_id: str
    name: str
    state: EndState
    failure: Failure | None = None
    progress: ProgressFigures | None = None
    accounting: Accounting | None
    training: TrainingFigures | None
    evaluation: EvaluationFigures | None
    time_spent: TimeFigures | None = None
    drafts: list[DraftFigures] = []
    gate: GateFigures | None = None
    roles: dict[Literal["producer", "consumer"], RoleFigures]
    archive: ArchiveFigures | None
    attempts: list[AttemptFigures]
    store_counters: dict[str, float]
    rejected_reasons: dict[str, int]
    quarantined_reasons: dict[str, int] = {}
    servers: list[ServerFigures] = []
    run_dir: str
    export: str | None
    flow_run_id: str | None
    seconds: float

    @property
    def measured(self) -> bool:
        """Whether its drafts were measured."""
        return self.evaluation is not None or bool(self.evaluations)

    @property
    def evaluations(self) -> dict[str, EvaluationFigures]:
        """What was measured, by the draft's name."""
        return {draft.name: draft.evaluation for draft in self.drafts if draft.evaluation is not None}

    @property
    def way_on(self) -> str | None:
        """How a run goes on that was cut off from outside, or whose training is complete and its draft not measured."""
        if self.state in ("cancelled", "crashed"):
            return HOW_TO_RESUME.format(flow_run_id=self.flow_run_id)
        if self.state != "failed" or self.failure is None or self.accounting is None or self.measured:
            return None
        return ("" if self.failure.judged else REST) + MEASURE.format(run_id=self.run_id)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documented order
    @property
    def roles_overlap_seconds(self) -> float:
        """How long both roles ran at the same time."""
        spans = [(role.started, role.ended) for role in self.roles.values() if role.started and role.ended]
        if len(spans) < 2:
            return 0.0
        overlap = min(ended for _, ended in spans) - max(started for started, _ in spans)
        return max(overlap.total_seconds(), 0.0)
