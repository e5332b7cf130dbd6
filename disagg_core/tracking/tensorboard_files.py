"""TensorBoard: event files in the run's directory, one folder for each of several drafts.

They are written without torch or TensorFlow, by TensorBoard's own writer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from disagg_core.report.document import EvaluationFigures, GateFigures, RunReport
from disagg_core.tracking.observer import Step, TrackedRun, evaluation_scalars, scalars_of

FOLDER = "tensorboard"


class TensorBoardObserver:
    """Writes scalars under their own names, what was measured below ``evaluation/``, and texts below ``run/``."""

    def __init__(self) -> None:
        self._writers: dict[str, Any] = {}
        self._root = Path()

    def started(self, run: TrackedRun) -> None:
        """Begin an event file for each draft, beside those of earlier processes."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writers = {draft: EventFileWriter(str(run.root / FOLDER / draft)) for draft in run.drafts}
        lines = [f"- **{name}**: {value}" for name, value in run.identity.items()]
        self._text("run/identity", "\n".join(lines))

    def steps(self, draft: str, steps: Sequence[Step]) -> None:
        """Write the scalars of each step."""
        for step in steps:
            self._scalars(draft, scalars_of(step), int(step["step"]), float(step.get("time", time.time())))
        self._writers[draft].flush()

    def evaluated(self, draft: str, figures: EvaluationFigures) -> None:
        """Write what was measured as scalars of one step."""
        scalars = ((f"evaluation/{name}", value) for name, value in evaluation_scalars(figures))
        self._scalars(draft, scalars, 0, time.time())

    def decided(self, gate: GateFigures, source: str) -> None:
        """Write the decision as a text."""
        self._text("run/decision", "\n".join([f"**{gate.decision}**: {gate.candidate}", *gate.reasons]))

    def finished(self, report: RunReport) -> None:
        """Write how the run ended as a text."""
        self._text("run/end", f"{report.state}: {report.failure.message}" if report.failure else report.state)

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.flush()
            writer.close()

    def _scalars(self, draft: str, scalars: Iterable[tuple[str, float]], step: int, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._writers[draft].add_event(Event(wall_time=when, step=step, summary=Summary(value=values)))

    def _text(self, tag: str, text: str) -> None:
        """Write a text of the whole run into every draft's file, as TensorBoard's text plugin reads it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        value = Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
            tensor=TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape),
        )
        for writer in self._writers.values():
            writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))
            writer.flush()
