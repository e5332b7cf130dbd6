"""Decodes in vLLM's own environment: reads a job as JSON from the file named first, writes what came out to the second.

Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(job_file: str, result_file: str) -> None:
    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=job["speculative_config"],
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    counters = {
        metric.name.removeprefix("vllm:spec_decode_"): getattr(metric, "values", None) or metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_")
    }
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(result_file).write_text(json.dumps({"tokens": tokens, "counters": counters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
