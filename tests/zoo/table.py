"""The table of ``docs/targets.md``: what each architecture of the zoo is as a target. ``python -m tests.zoo.table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from disagg_core.drafts.rope_parameters import ROPE_TYPES
from disagg_core.errors import BadInput
from disagg_core.evaluation.target_runner import config_rolls_back
from disagg_core.run.plan import RunPlan
from disagg_core.target.facts import load_target_config, model_class
from disagg_core.target.text_model import logit_scale, mlp_width
from tests.zoo.architectures import ARCHITECTURES, Architecture
from tests.zoo.tiny import tiny_config
from tests.zoo.trial import planned

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "targets.md"
_BEGIN, _END = "<!-- table: python -m tests.zoo.table -->\n", "<!-- end of the table -->\n"
_HEADER = (
    "| architecture | `model_type` | target | its logits | rotation of a draft | MLP of a draft | decoding here |",
    "|---|---|---|---|---|---|---|",
)


def table() -> str:
    """The rows of all architectures, as Markdown."""
    return "\n".join([*_HEADER, *map(_row, ARCHITECTURES)]) + "\n"


def committed() -> str:
    """The table that stands in the document."""
    return DOCUMENT.read_text().split(_BEGIN)[1].split(_END)[0]


def _row(architecture: Architecture) -> str:
    name = f"| {architecture.title} | `{architecture.model_type}` |"
    with tempfile.TemporaryDirectory() as directory:
        try:
            plan = planned(tiny_config(architecture.model_type, **architecture.changes), Path(directory))[0]
        except BadInput as error:
            return f"{name} no: {str(error).removeprefix('target.model: ')} | | | | |"
        if architecture.unfit:
            return f"{name} no: {architecture.unfit} | | | | |"
        return f"{name} yes | {' | '.join(_cells(plan))} |"


def _cells(plan: RunPlan) -> tuple[str, ...]:
    config = load_target_config(plan.spec.target)
    text, facts = config.get_text_config(), plan.target
    scale = logit_scale(config)
    logits = [f"times {scale:g}"] if scale != 1 else []
    logits += [f"at most {facts.logit_cap:g}"] if facts.logit_cap else []
    rope = facts.rope_parameters
    kind = "none" if not rope else "part of a head" if "partial_rotary_factor" in rope else rope["rope_type"]
    rotation = "the target's" if kind in ROPE_TYPES else f"plain (target: {kind})"
    again = not config_rolls_back(config, model_class(config)._model_mapping[type(config)])
    return (
        ", ".join(logits) or "plain",
        rotation,
        "the target's" if mlp_width(text) else "4 times hidden",
        "prefix run again" if again else "with a cache",
    )


def main() -> None:
    """Write the table into the document."""
    before, rest = DOCUMENT.read_text().split(_BEGIN)
    DOCUMENT.write_text(before + _BEGIN + table() + _END + rest.split(_END)[1])


if __name__ == "__main__":
    main()
