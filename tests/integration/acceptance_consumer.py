"""Child of the acceptance test: a consumer in a process of its own, with its own store client. No torchrun."""

import json
import sys
from pathlib import Path

import torch

from disagg_core.channel import StreamingRefChannel
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.document import TargetSection, TrainingSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from disagg_core.target.parts import load_target_parts
from disagg_core.training import DraftToTrain, build_disagg_online_consumer


def main() -> None:
    """Train the stream named in the JSON file of the arguments; write the outcome beside it."""
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    target = TargetSection(model=told["model"])
    facts = read_target_facts(target)
    parts = load_target_parts(target)
    draft = Eagle3Draft(Eagle3Config.for_target(facts, Eagle3Section()))
    frozen = FrozenParts(parts.embedding, parts.lm_head)
    draft.attach(frozen, VocabMap.identity(facts.vocab_size))
    with (
        StreamingRefChannel(told["channel"], run_id=told["run_id"]) as channel,
        MooncakeFeatureStore(StoreEndpoints.model_validate(told["store"]), namespace=f"{told['run_id']}/1") as store,
    ):
        trainer, loader = build_disagg_online_consumer(
            channel=channel,
            store=store,
            drafts=[DraftToTrain(draft, Eagle3Section(ttt_length=3))],
            parts=frozen,
            section=TrainingSection(batch_size=1, accumulation_steps=4, device="cpu"),
        )
        outcome = trainer.fit(loader)
    Path(told["outcome"]).write_text(
        json.dumps(
            {
                "steps": outcome.steps,
                "samples": outcome.samples,
                "reason": outcome.reason,
                "backend": torch.distributed.get_backend(),
                "ranks": torch.distributed.get_world_size(),
                "sharded": type(draft.fc.weight).__name__,
                "losses": [outcome.drafts[""].loss_first, outcome.drafts[""].loss_last],
            }
        )
    )


if __name__ == "__main__":
    main()
