"""The report of a run: one typed document, written as JSON for programs and as markdown for people."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from disagg_core.errors import FailureClass
from disagg_core.report.accounting import Accounting


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class TrainingFigures(_Part):
    """What the trainer did, over all attempts; rates are those of the last one."""

    steps: int
    samples_per_second: float
    loss_first: float | None
    loss_last: float | None


class ProgressFigures(_Part):
    """How far a run that did not complete had come, as its roles said last; counts are of all attempts."""

    attempt: int
    prompts: int
    total_prompts: int | None
    steps: int
    total_steps: int | None
    trained: int
    loss: float | None


class EvaluationFigures(_Part):
    """Speculative decoding of held-out prompts; accept length is tokens per target pass."""

    draft_tokens: int
    prompts: int
    accept_length_before: float
    accept_length_after: float
    interval_after: tuple[float, float] | None
    per_position_after: list[float]
    lossless: bool


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
    """Why a run did not complete."""

    failure_class: FailureClass
    message: str


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


GO_ON = "Retry on its page in the Prefect UI goes on from its newest checkpoint"


class RunReport(_Part):
    """Everything that is said about a run at its end."""

    run_id: str
    name: str
    state: EndState
    failure: Failure | None = None
    progress: ProgressFigures | None = None
    accounting: Accounting | None
    training: TrainingFigures | None
    evaluation: EvaluationFigures | None
    roles: dict[Literal["producer", "consumer"], RoleFigures]
    archive: ArchiveFigures | None
    attempts: list[AttemptFigures]
    store_counters: dict[str, float]
    rejected_reasons: dict[str, int]
    servers: list[ServerFigures] = []
    run_dir: str
    export: str | None
    flow_run_id: str | None
    seconds: float

    @property
    def can_go_on(self) -> bool:
        """Whether the run was cut off from outside, so that its flow run may be tried again."""
        return self.state in ("cancelled", "crashed")

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documented order
    @property
    def roles_overlap_seconds(self) -> float:
        """How long both roles ran at the same time."""
        spans = [(role.started, role.ended) for role in self.roles.values() if role.started and role.ended]
        if len(spans) < 2:
            return 0.0
        overlap = min(ended for _, ended in spans) - max(started for started, _ in spans)
        return max(overlap.total_seconds(), 0.0)

    def to_markdown(self) -> str:
        """Return the report as a person reads it."""
        parts = (
            self._failure(),
            self._progress(),
            self._accounting(),
            self._training(),
            self._evaluation(),
            self._attempts(),
            self._servers(),
            self._places(),
        )
        return "\n".join([f"# Run {self.run_id}: {self.state}", "", *(line for part in parts for line in part)])

    def _failure(self) -> list[str]:
        return [f"**{self.failure.failure_class}**: {self.failure.message}", ""] if self.failure else []

    def _progress(self) -> list[str]:
        p = self.progress
        if p is None:
            return []
        loss = f", loss {p.loss:.3f}" if p.loss is not None else ""
        return [
            f"In attempt {p.attempt}, {p.prompts} of {p.total_prompts or '?'} prompts were captured and {p.trained} "
            f"samples trained, in {p.steps} of {p.total_steps or '?'} steps{loss}."
            + (f" {GO_ON}." if self.can_go_on else ""),
            "",
        ]

    def _accounting(self) -> list[str]:
        a = self.accounting
        if a is None:
            return []
        rows = ["## Every sample accounted for", "", "| prompts | rejected | published | trained | quarantined |"]
        rows[-1] += " unused | left in the store |"
        rows += ["|---:|---:|---:|---:|---:|---:|---:|"]
        rows += [
            f"| {a.prompts} | {a.rejected} | {a.published} | {a.trained} | {a.quarantined} | {a.unused} "
            f"| {a.store_keys_left} |",
            "",
        ]
        problems = a.problems()
        rows += [f"- **{problem}**" for problem in problems] or [
            f"prompts = published + rejected: {a.prompts} = {a.published} + {a.rejected}; "
            f"published = trained + quarantined + unused: "
            f"{a.published} = {a.trained} + {a.quarantined} + {a.unused}"
        ]
        if self.rejected_reasons:
            rows += ["", "Rejected prompts:", ""]
            rows += [f"- {count} x {reason}" for reason, count in sorted(self.rejected_reasons.items())]
        return [*rows, ""]

    def _training(self) -> list[str]:
        t = self.training
        if t is None:
            return []
        loss = "-" if t.loss_first is None or t.loss_last is None else f"{t.loss_first:.3f} to {t.loss_last:.3f}"
        return [
            "## Training",
            "",
            f"{t.steps} optimizer steps, {t.samples_per_second:.1f} samples/s, loss {loss}; both roles ran together "
            f"for {self.roles_overlap_seconds:.0f} s of {self.seconds:.0f} s.",
            "",
        ]

    def _evaluation(self) -> list[str]:
        e = self.evaluation
        if e is None:
            return []
        interval = f" (95% interval {e.interval_after[0]:.2f} to {e.interval_after[1]:.2f})" if e.interval_after else ""
        positions = ", ".join(f"{rate:.2f}" for rate in e.per_position_after)
        return [
            "## Evaluation",
            "",
            f"Accept length with {e.draft_tokens} drafted tokens on {e.prompts} held-out prompts: "
            f"**{e.accept_length_before:.2f} before, {e.accept_length_after:.2f} after**{interval}. "
            f"Acceptance by position: {positions}. "
            + (
                "Output identical to plain greedy decoding."
                if e.lossless
                else "**Output differs from greedy decoding.**"
            ),
            "",
        ]

    def _attempts(self) -> list[str]:
        if len(self.attempts) < 2:
            return []
        lines = ["## Attempts", ""]
        for attempt in self.attempts:
            end = f"{attempt.failure_class}: {attempt.reason}" if attempt.failure_class else "finished"
            end = end.replace("\n", "\n   ")  # the end of a log stays in its item
            if attempt.incomplete:
                end += f"; {attempt.incomplete} lost samples are captured again"
            lines.append(f"{attempt.attempt}. {end}")
        return [*lines, ""]

    def _servers(self) -> list[str]:
        servers = [server for server in self.servers if server.name != "local"]
        if not servers:
            return []
        lines = ["## Servers", "", "| server | captured | failures | restarts | what happened |"]
        lines += ["|---|---:|---:|---:|---|"]
        for server in servers:
            figures = f"{server.name} | {server.captured} | {server.failures} | {server.restarts}"
            lines.append(f"| {figures} | {'; '.join(server.events)} |")
        return [*lines, ""]

    def _places(self) -> list[str]:
        rows = ["## Where things are", "", f"- run directory: `{self.run_dir}`"]
        if self.export:
            rows.append(f"- draft for serving: `{self.export}`")
        if self.archive:
            rows.append(f"- archive: `{self.archive.url}`, manifest `{self.archive.manifest}`")
        return [*rows, ""]
