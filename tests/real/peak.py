"""Continue and capture prompts as the producer does, and print the peak of the process's memory in bytes.

python peak.py TASKS.json NEW_TOKENS
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec
import torch

from disagg_core.contracts import PromptTask, RunIdentity
from disagg_core.drafts.registry import method_of
from disagg_core.engines.generation import Sampling
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts


def main() -> None:
    """Do what the module says."""
    torch.set_num_threads(1)
    tasks = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[PromptTask])
    spec = load_spec(Path(__file__).resolve().parents[2] / "infra" / "runs" / "smollm2.yaml", [])
    facts = read_target_facts(spec.target)
    capture = method_of(spec.draft.method).capture(spec.draft, facts.num_layers, None)
    sampling = Sampling(max_new_tokens=int(sys.argv[2]), max_tokens=512, temperature=0, top_p=1, seed=0)
    target = TransformersTarget(spec.target, facts, capture, batch_tokens=8192, sampling=sampling)
    target.prepare(
        RunIdentity(
            run_id="peak",
            attempt=1,
            strategy=spec.draft.method,
            target_model_version=facts.version,
            tokenizer_version="",
            vocab_map_version="",
            draft_weight_version=0,
            capture=capture,
            dtype=facts.dtype,
        )
    )
    captured = sum(1 for _ in target.capture(tasks, avoid={}))
    print(captured, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
