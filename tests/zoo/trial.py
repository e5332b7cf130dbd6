"""One architecture taken through the product: facts, plan, weights, capture, a draft of each method, decoding."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from disagg_core.contracts import PromptTask, sample_id_of
from disagg_core.drafts.export import export_draft, import_draft
from disagg_core.drafts.method import DraftModel, FrozenParts, Sample
from disagg_core.drafts.registry import method_names, method_of
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS, save_tensors
from disagg_core.drafts.vocab import VocabMap
from disagg_core.engines.contract import Captured
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.errors import BadInput
from disagg_core.files import write_atomically
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec, TargetSection
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.loading import load_target
from disagg_core.target.parts import TargetParts, load_target_parts
from tests.contract.drafts.kit import OPTIONS
from tests.zoo.architectures import Architecture
from tests.zoo.tiny import VOCAB, tiny_config, tiny_model


def options_of(method: str) -> dict[str, Any]:
    """The small options of `method`, for the zoo's vocabulary."""
    options = OPTIONS[method]
    return {"method": method, **options, **({"mask_token_id": VOCAB - 1} if "mask_token_id" in options else {})}


def spec_of(model: Path, method: str = "eagle3") -> RunSpec:
    """A run for the target in `model` with a small draft."""
    return RunSpec.model_validate(
        {
            "target": {"model": str(model), "dtype": "float32", "device": "cpu"},
            "draft": options_of(method),
            "data": {"prompts": "prompts.jsonl", "max_tokens": 64},
            "evaluation": {"draft_tokens": 3},
        }
    )


def planned(config: PreTrainedConfig, directory: Path) -> list[RunPlan]:
    """The plan of a run with each draft method for a target of which there is the `config` alone.

    Raises:
        BadInput: the target is refused, in the words that a user reads.
    """
    config.save_pretrained(directory)
    plans = []
    for name in method_names():
        spec = spec_of(directory, name)
        facts = read_target_facts(spec.target)
        plan = make_plan(spec, facts, run_id="zoo", root=directory, total_prompts=8)
        method_of(name).config_for(spec.draft, facts, plan.capture, plan.drafts[0].vocabulary.size)
        plans.append(plan)
    return plans


def refusal(architecture: Architecture) -> str | None:
    """What a user reads whose target is of this architecture; None where it is not refused."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            planned(tiny_config(architecture.model_type, **architecture.changes), Path(directory))
        except BadInput as error:
            return str(error)
    return None


@dataclass
class Trial:
    """A tiny target on disk, and as it is loaded from there."""

    section: TargetSection
    facts: TargetFacts
    model: Any
    parts: TargetParts

    @classmethod
    def of(cls, architecture: Architecture, directory: Path) -> Trial:
        """The target of `architecture` with random weights, in `directory`."""
        tiny_model(tiny_config(architecture.model_type, **architecture.changes)).save_pretrained(directory)
        section = spec_of(directory).target
        facts = read_target_facts(section)
        return cls(section, facts, load_target(section, facts), load_target_parts(section))

    def plan(self, method: str) -> RunPlan:
        """The plan of a run with `method`."""
        root = Path(self.section.model)
        return make_plan(spec_of(root, method), self.facts, run_id="zoo", root=root, total_prompts=8)

    def captured(self, plan: RunPlan, prompts: list[list[int]]) -> list[Sample]:
        """The samples of `prompts` for `plan`, as the producer's engine captures them."""
        target = TransformersTarget(self.section, self.facts, plan.capture, model=self.model)
        target.prepare(plan.identity(1, "none"))
        tasks = [
            PromptTask(ordinal=number, source="zoo", input_ids=ids, loss_mask=[0, 0, *[1] * (len(ids) - 2)])
            for number, ids in enumerate(prompts)
        ]
        samples = {}
        for outcome in target.capture(tasks, avoid={}):
            assert isinstance(outcome, Captured), outcome
            number = outcome.task.ordinal
            samples[number] = Sample(sample_id_of(number), {k: v.clone() for k, v in outcome.tensors.items()})
        target.close()
        return [samples[number] for number in range(len(prompts))]

    @property
    def frozen(self) -> FrozenParts:
        """What a draft takes from the target."""
        parts = self.parts
        return FrozenParts(parts.embedding, parts.lm_head, parts.logit_cap, parts.logit_scale, parts.embedding_scale)

    def trained_draft(self, plan: RunPlan, samples: list[Sample]) -> DraftModel:
        """A draft after one step on `samples`; every weight that training touches is finite and has moved."""
        options = plan.spec.draft
        method = method_of(options.method)
        torch.manual_seed(3)
        config = method.config_for(options, self.facts, plan.capture, plan.drafts[0].vocabulary.size)
        draft = method.model(config)
        parts = self.frozen
        draft.attach(parts, VocabMap.from_counts(torch.arange(VOCAB), plan.drafts[0].vocabulary.size))
        batcher = method.batcher(options, config, seed=1)
        module = method.loss(draft, parts, options, activation_checkpointing=False)
        weights = [weight for weight in draft.parameters() if weight.requires_grad]
        before = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        batch = batcher.collate(samples)
        normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
        module(batch, normalisers).total.backward()
        optimizer.step()
        assert all(bool(torch.isfinite(weight).all()) for weight in weights)
        assert any(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
        return draft.eval().requires_grad_(False)


def exported(draft: DraftModel, directory: Path) -> DraftModel:
    """The draft as it is read back from an export in fp32."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    save_tensors(draft.serving_state_dict(), checkpoint / CHECKPOINT_WEIGHTS, {"format": "pt"})
    write_atomically(checkpoint / "config.json", json.dumps(draft.config.to_dict()))
    export_draft(checkpoint, directory / "export", dtype="float32", draft_tokens=3)
    method, config, state = import_draft(directory / "export")
    again = method.model(config)
    again.load_serving_state_dict(state)
    return again.eval().requires_grad_(False)
