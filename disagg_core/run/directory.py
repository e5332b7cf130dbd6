"""The layout of a run's directory, in one place.

::

    <runs>/<run_id>/
      run.json                  resolved spec and identity, no secrets
      vocab_map.safetensors     draft vocabulary, derived once per run
      continuations.jsonl       what the target said to the prompts, with data.generate
      attempts/<n>/channel/     the reference channel (file backend)
      attempts/<n>/logs/        one file for each process
      attempts/<n>/state/       progress of the roles, plain JSON; rejected.jsonl and quarantined.jsonl with reasons
      checkpoints/step-<k>/     complete when its manifest exists
      heldout/                  held-out samples, with training.heldout
      metrics/                  train.jsonl, heldout.jsonl, rollout.jsonl, phases.jsonl
      profiles/                 traces of single steps, with training.profile
      tensorboard/              event files, in a folder for each of several drafts
      tracking/                 what trackers were told, their logs, and what W&B wrote offline
      evaluation/               before.json, after.json
      night.json  night.jsonl   recurring training: what is new, and its prompts
      gate.json                 what the gate decided
      completion.json           the checked end of the training, once it is complete
      record.json               attempts, roles and seconds until then, for the report of a later process of the run
      export/                   what a serving engine loads
      report.json  report.md  report.html  report.png

Of several drafts each has vocabulary map, ``metrics/{train,heldout}.jsonl`` and export in ``drafts/<name>/``, and its
part of a checkpoint in ``checkpoints/step-<k>/<name>/``; its results are ``evaluation/<name>-before.json`` and
``-after.json``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""A plain name: as the name of a file or directory it stays where it is put."""


@dataclass(frozen=True)
class AttemptDir:
    """Directory of one attempt of a run."""

    root: Path

    @property
    def channel(self) -> Path:
        """The file backend's directory."""
        return self.root / "channel"

    @property
    def logs(self) -> Path:
        """Log files of the attempt's processes."""
        return self.root / "logs"

    @property
    def state(self) -> Path:
        """Progress and outcome files of the roles."""
        return self.root / "state"

    @property
    def rejected(self) -> Path:
        """The prompts that no sample was published for, with reasons; written by the producer."""
        return self.state / "rejected.jsonl"

    @property
    def quarantined(self) -> Path:
        """The samples that could not be trained on, with reasons; written by the consumer."""
        return self.state / "quarantined.jsonl"


@dataclass(frozen=True)
class DraftDir:
    """Directory with the files of one draft."""

    root: Path

    @property
    def vocab_map(self) -> Path:
        """The draft vocabulary map."""
        return self.root / "vocab_map.safetensors"

    @property
    def metrics(self) -> Path:
        """Metric files."""
        return self.root / "metrics"

    @property
    def train_metrics(self) -> Path:
        """The draft's figures of each optimizer step."""
        return self.metrics / "train.jsonl"

    @property
    def heldout_metrics(self) -> Path:
        """The draft's figures of the held-out samples."""
        return self.metrics / "heldout.jsonl"

    @property
    def export(self) -> Path:
        """The draft in serving format."""
        return self.root / "export"


@dataclass(frozen=True)
class RunDir(DraftDir):
    """Directory of one run; also that of its draft, if it has but one."""

    @classmethod
    def of(cls, runs: Path, run_id: str) -> RunDir:
        """Return the directory of `run_id` below `runs`.

        Raises:
            ValueError: `run_id` is not a plain name, so its directory could lie elsewhere.
        """
        if not re.fullmatch(NAME_PATTERN, run_id):
            raise ValueError(f"expected a run id of letters, digits, '.', '_' and '-', found {run_id!r}")
        return cls(runs / run_id)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.root.name

    def attempt(self, number: int) -> AttemptDir:
        """Return the directory of attempt `number`."""
        return AttemptDir(self.root / "attempts" / str(number))

    def begun_attempts(self) -> list[int]:
        """Return the numbers of the attempts that were begun, in order."""
        return sorted(int(path.name) for path in (self.root / "attempts").glob("[0-9]*"))

    @property
    def document(self) -> Path:
        """The resolved spec with the run's identity."""
        return self.root / "run.json"

    @property
    def phases(self) -> Path:
        """Where the trainer's time went, window by window."""
        return self.metrics / "phases.jsonl"

    @property
    def rollout_metrics(self) -> Path:
        """The producer's figures of every few seconds."""
        return self.metrics / "rollout.jsonl"

    @property
    def profiles(self) -> Path:
        """Traces of torch.profiler, of the steps that training.profile asks for."""
        return self.root / "profiles"

    @property
    def drafts(self) -> Path:
        """The directories of several drafts."""
        return self.root / "drafts"

    @property
    def night(self) -> Path:
        """What a night of recurring training was found to be."""
        return self.root / "night.json"

    @property
    def night_prompts(self) -> Path:
        """The prompts of a night of recurring training."""
        return self.root / "night.jsonl"

    @property
    def gate(self) -> Path:
        """What the gate decided about the draft."""
        return self.root / "gate.json"

    @property
    def continuations(self) -> Path:
        """The target's continuations of the prompts, as tokens."""
        return self.root / "continuations.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one directory each."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def tracking(self) -> Path:
        """What trackers were told and how far they came."""
        return self.root / "tracking"

    @property
    def heldout(self) -> Path:
        """The held-out samples that drafts are measured on while they are trained."""
        return self.root / "heldout"

    @property
    def evaluation(self) -> Path:
        """Evaluation results."""
        return self.root / "evaluation"

    @property
    def completion(self) -> Path:
        """The checked end of the training; there is none before it is complete."""
        return self.root / "completion.json"

    @property
    def record(self) -> Path:
        """What the process that completed the training knew of it beside its end."""
        return self.root / "record.json"

    @property
    def report(self) -> Path:
        """The machine-readable report; report.md, report.html and report.png lie beside it."""
        return self.root / "report.json"
