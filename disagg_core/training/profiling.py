"""A window of torch.profiler over some steps of rank 0, as `training.profile` asks for it.

The trace opens in Perfetto or chrome://tracing. It is there to be looked at: one that cannot be written is logged, and
training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from disagg_core.run_spec.document import ProfileSection
from disagg_core.training.progress import TrainingProgress
from disagg_core.training.trainer import StepObserver

_log = logging.getLogger(__name__)


class ProfileObserver(StepObserver):
    """Profiles the optimizer steps ``start + 1`` to ``start + steps`` into ``steps-<first>-<last>.json.gz``.

    A run that is resumed inside the window profiles the rest of it.
    """

    def __init__(self, section: ProfileSection, directory: Path) -> None:
        self._first, self._end = section.start, section.start + section.steps
        self._directory = directory
        self._profiler: Any = None
        self._began_at = 0

    def on_phase(self, phase: str, progress: TrainingProgress) -> None:
        """Begin with training, where the window does; end with it at the latest."""
        if phase == "training":
            self._at(progress.step)
        elif phase == "finished":
            self._end_at(progress.step)

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Begin or end between two steps."""
        self._at(int(record["step"]))

    def _at(self, step: int) -> None:
        if step >= self._end:
            self._end_at(step)
        elif self._profiler is None and step >= self._first:
            self._began_at = step
            self._profiler = profile(activities=_activities())
            self._profiler.start()

    def _end_at(self, step: int) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._directory / f"steps-{self._began_at + 1}-{step}.json.gz"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.warning("%s: the profile cannot be written: %s", path, error)
            return
        _log.info("profiled steps %d to %d: %s", self._began_at + 1, step, path)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]
