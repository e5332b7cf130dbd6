"""The run document: one typed place for every tunable of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.run_spec.document import (
        ArchiveSection,
        ChannelSection,
        DataSection,
        EvaluationSection,
        GateSection,
        GenerateSection,
        OrchestrationSection,
        PoolsSection,
        RegistrySection,
        RolloutSection,
        RunSection,
        RunSpec,
        StoreSection,
        TargetSection,
        TrainingSection,
    )
    from disagg_core.run_spec.draft import DraftSection
    from disagg_core.run_spec.section import parse_bytes
    from disagg_core.run_spec.yaml_file import load_spec

_DOCUMENT = (
    "ArchiveSection",
    "ChannelSection",
    "DataSection",
    "EvaluationSection",
    "GateSection",
    "GenerateSection",
    "OrchestrationSection",
    "PoolsSection",
    "RegistrySection",
    "RolloutSection",
    "RunSection",
    "RunSpec",
    "StoreSection",
    "TargetSection",
    "TrainingSection",
)

__all__ = [
    "ArchiveSection",
    "ChannelSection",
    "DataSection",
    "DraftSection",
    "EvaluationSection",
    "GateSection",
    "GenerateSection",
    "OrchestrationSection",
    "PoolsSection",
    "RegistrySection",
    "RolloutSection",
    "RunSection",
    "RunSpec",
    "StoreSection",
    "TargetSection",
    "TrainingSection",
    "load_spec",
    "parse_bytes",
]

__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(_DOCUMENT, "run_spec.document")
    | {"DraftSection": "run_spec.draft", "load_spec": "run_spec.yaml_file", "parse_bytes": "run_spec.section"},
)
