"""Loads exported drafts in vLLM's own environment with the model classes that their configs name.

Arguments: the target's directory, then a draft's directory and a file for the class's parameters, as often as wished.
Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.config import SpeculativeConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig


def load(target: str, draft: str, result: str, *, first: bool) -> None:
    document = json.loads((Path(draft) / "config.json").read_text())
    if "speculators_model_type" in document:
        speculative = SpeculatorsConfig.extract_vllm_speculative_config(document)
    else:
        method = "dspark" if "markov_rank" in document else "dflash"
        speculative = {"method": method, "num_speculative_tokens": document["block_size"] - (method == "dflash")}
    arguments = EngineArgs(model=target, skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    config = arguments.create_engine_config()
    # As an argument of the engine, a draft that the runner for CPUs cannot run would be refused before it is loaded.
    config.speculative_config = SpeculativeConfig(
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
        model=draft,
        **speculative,
    )
    with set_current_vllm_config(config):
        if first:
            init_distributed_environment(1, 0, f"file://{result}.rendezvous", 0, "gloo")
            initialize_model_parallel()
        model = initialize_model(config, model_config=config.speculative_config.draft_model_config)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.fill_(torch.nan)
        model.load_weights(load_file(Path(draft) / "model.safetensors").items())
    held = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n == "mask_hidden"}}
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in held.items()}, result)


def main(target: str, *drafts_and_results: str) -> None:
    pairs = zip(drafts_and_results[::2], drafts_and_results[1::2], strict=True)
    for number, (draft, result) in enumerate(pairs):
        load(target, draft, result, first=number == 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
