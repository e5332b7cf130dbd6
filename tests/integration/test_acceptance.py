"""The specification's own acceptance: eight prompts through the Python API, from live target to two optimizer steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.rollout import TransformersTarget, build_disagg_online_producer
from disagg_core.run_spec.document import RolloutSection, TargetSection
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.integration

RUN = "acceptance"
CAPTURE = Capture((1, 2, 4), last_hidden_state=True)


@pytest.fixture
def target_dir(tmp_path: Path) -> Path:
    """A tiny Llama with random weights, saved as people save theirs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def prompts(count: int) -> list[PromptTask]:
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for ordinal in range(count):
        ids = torch.randint(0, 96, (12 + 3 * ordinal,), generator=generator).tolist()
        mask = [0] * 4 + [1] * (len(ids) - 4)
        tasks.append(PromptTask(ordinal=ordinal, source=f"prompt {ordinal}", input_ids=ids, loss_mask=mask))
    return tasks


def test_eight_prompts_become_two_optimizer_steps_in_another_process(target_dir, tmp_path):
    section = TargetSection(model=str(target_dir))
    facts = read_target_facts(section)
    identity = RunIdentity(
        run_id=RUN,
        attempt=1,
        strategy="eagle3",
        target_model_version=facts.version,
        tokenizer_version="none",
        vocab_map_version="identity",
        draft_weight_version=0,
        capture=CAPTURE,
        dtype=facts.dtype,
    )
    with (
        managed_store(64 << 20, log_dir=tmp_path / "logs") as endpoints,
        MooncakeFeatureStore(endpoints, namespace=f"{RUN}/1") as store,
        StreamingRefChannel(tmp_path / "channel", run_id=RUN) as channel,
    ):
        target = TransformersTarget(section, facts, CAPTURE)
        target.prepare(identity)
        _workers, drive_producer = build_disagg_online_producer(
            prompts=prompts(8),
            target=target,
            store=store,
            channel=channel,
            identity=identity,
            rollout=RolloutSection(),
            window=4,
        )

        totals = drive_producer()

        assert (totals.refs, totals.prompts, totals.rejected) == (8, 8, 0)
        assert channel.published == channel.in_flight_remote() == 8
        assert store.key_count() == 8

        outcome = consume_elsewhere(tmp_path, endpoints.model_dump(), target_dir)

        assert (outcome["steps"], outcome["samples"], outcome["reason"]) == (2, 8, "end of stream")
        assert (outcome["backend"], outcome["ranks"], outcome["sharded"]) == ("gloo", 1, "DTensor")
        assert all(0 < loss < 12 for loss in outcome["losses"])  # an untrained draft: (1 + .8 + .64) ln 96 = 11.1
        assert channel.in_flight_remote() == 0
        assert channel.in_flight_bytes_remote() == 0
        assert channel.reader_status().state == "done"
        assert store.key_count() == 0
        assert store.health().evicted == 0


def consume_elsewhere(root: Path, store: dict[str, str], target_dir: Path) -> dict:
    """Run the consumer as a process of its own; return what it wrote."""
    told = root / "told.json"
    outcome = root / "outcome.json"
    told.write_text(
        json.dumps(
            {
                "run_id": RUN,
                "store": store,
                "channel": str(root / "channel"),
                "model": str(target_dir),
                "outcome": str(outcome),
            }
        )
    )
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("acceptance_consumer.py")), str(told)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(outcome.read_text())
