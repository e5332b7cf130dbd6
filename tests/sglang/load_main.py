"""Loads exported drafts in SGLang's own environment with the model classes that their configs name.

Arguments: a draft's directory and a file for the class's parameters, as often as wished. Imports nothing of this
project.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_context
from transformers import AutoConfig


def load(draft: str, result: str) -> None:
    config = AutoConfig.from_pretrained(draft)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.load_weights(load_file(Path(draft) / "model.safetensors").items())
    save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, result)


def main(*drafts_and_results: str) -> None:
    pairs = list(zip(drafts_and_results[::2], drafts_and_results[1::2], strict=True))
    first, result = pairs[0]
    get_context().override_server_args(model_path=first, device="cpu", attention_backend="torch_native").install()
    init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{result}.rendezvous"
    )
    initialize_model_parallel()
    for draft, result in pairs:
        load(draft, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
