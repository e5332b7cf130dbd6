"""Child of the tests of several drafts: each of the told companies is trained from its stream, by all ranks."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.distributed import Ranks
from tests.contract.drafts.kit import Case
from tests.integration.training.company_kit import consumer_of, reader_of


def main() -> None:
    """Run one rank; the JSON file named in the arguments says everything."""
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    endpoints = StoreEndpoints.model_validate(told["store"])
    with Ranks.join("cpu") as ranks:
        for company in told["companies"]:
            with ExitStack() as stack:
                run_id = company["run_id"]
                store = stack.enter_context(MooncakeFeatureStore(endpoints, namespace=f"{run_id}/1"))
                reader = stack.enter_context(reader_of(Path(company["url"]), run_id, ranks))
                cases = [Case.of(name) for name in company["methods"]]
                trainer, loader = consumer_of(
                    reader, store, ranks, cases, training={"batch_size": 2, "accumulation_steps": 1}
                )
                trainer.fit(loader)
                for case, trainee in zip(cases, trainer.trainees, strict=True):
                    weights = trainee.weights()
                    if ranks.is_first:
                        save_file(weights, Path(company["weights"]) / f"{case.method.name}.safetensors")


if __name__ == "__main__":
    main()
