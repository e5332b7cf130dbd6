"""Child of the tests of several ranks: joins as torchrun says, trains the stream, rank 0 saves the final weights."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import SampleRef, sample_id_of
from disagg_core.errors import SampleLost
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run_spec.document import HeldOutSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.distributed import Ranks
from disagg_core.training.heldout import HeldOutPlan
from disagg_core.training.observers import MetricsObserver
from tests.integration.training.consumer_kit import consumer, identity_of, section


class LossyStore(MooncakeFeatureStore):
    """Has lost one sample, for this rank alone."""

    lost: str | None = None

    def get(self, ref: SampleRef, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        if ref.sample_id == self.lost:
            raise SampleLost(f"{ref.sample_id}: lost on its way to this rank")
        return super().get(ref, device)


def held_out(told: dict[str, str]) -> HeldOutPlan | None:
    """Return what is measured while the drafts are trained, if anything is."""
    if "heldout" not in told:
        return None
    files = HeldOutFiles(Path(told["heldout"]), identity_of(told["run_id"]))
    return HeldOutPlan(files, HeldOutSection(every_steps=2), None)


def main() -> None:
    """Run one rank; the JSON file named in the arguments says everything."""
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks.join("cpu"))
        endpoints = StoreEndpoints.model_validate(told["store"])
        store = stack.enter_context(LossyStore(endpoints, namespace=told["namespace"]))
        if ranks.rank == told.get("lossy_rank"):
            store.lost = sample_id_of(told["lost"])
        channel = (
            stack.enter_context(StreamingRefChannel(told["url"], run_id=told["run_id"], attempt=told["attempt"]))
            if ranks.is_first
            else None
        )
        trainer, loader = consumer(
            channel,
            store,
            ranks,
            training=section(**told["training"]),
            checkpoints=Path(told["checkpoints"]),
            total_steps=told["total_steps"],
            observer=MetricsObserver(Path(told["metrics"]), heldout=Path(told.get("heldout_metrics", "unused"))),
            heldout=held_out(told),
        )
        outcome = trainer.fit(loader)
        weights = trainer.trainees[0].weights()
        if ranks.is_first:
            save_file(weights, told["weights"])
            Path(told["outcome"]).write_text(
                json.dumps({"steps": outcome.steps, "samples": outcome.samples, "lost": outcome.lost})
            )


if __name__ == "__main__":
    main()
