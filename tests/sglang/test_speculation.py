"""An exported draft in a stock SGLang server: it drafts there as it does here.

SGLang passes over tensors that it does not know and leaves out those it does not find, without a word, so the only
proof that it runs our draft is that it keeps as many drafted tokens as our own decoder does, place by place.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, training_time_test
from disagg_core.drafts.export import export_draft, import_draft
from disagg_core.drafts.vocab import VocabMap
from disagg_core.engines.sglang.launch import find_sglang_python
from disagg_core.evaluation import generate_all, measure_accept_length
from disagg_core.evaluation.server import decoding_on_server, measure_on_server
from disagg_core.evaluation.slices import SuiteResult, measured_prompts, results_of
from disagg_core.evaluation.turns import decode_in_turn
from disagg_core.processes.shared_memory import SharedMemory
from disagg_core.processes.tree import describe_exit, free_port, spawn, stop_tree, tail
from disagg_core.settings import CHECKOUT, get_settings
from tests.kit.waiting import eventually
from tests.sglang.support import START_TIMEOUT_S, VOCABULARY, random_tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

DRAFT_TOKENS = 3
NEW_TOKENS = 48
END = 2
LAYERS = (0, 2, 4)
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
DRAFTS: dict[str, dict[str, Any]] = {
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "yarn, normed thirds": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64
        },
        "fc_norm": True,
    },
    "another width": {"hidden_size": 48, "draft_vocab_size": VOCABULARY},
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A draft in SGLang's format, what it drafts for, and what was learned by heart."""

    target_path: Path
    path: Path
    target: torch.nn.Module
    draft: Eagle3Draft
    prompts: list[list[int]]
    continuations: list[list[int]]


@pytest.fixture
def exported(request: pytest.FixtureRequest, model_of: Callable[[str], Path], tmp_path: Path) -> Exported:
    """A draft that knows much, not all, of what a random target says after eight prompts.

    None of the texts ends: the server counts a pass in which one does otherwise than we do.
    """
    target = AutoModelForCausalLM.from_pretrained(model_of("llama"), dtype=torch.float32).eval().requires_grad_(False)
    tried = [random_tokens(12 + 3 * number, number) for number in range(16)]
    plain = generate_all(target, None, tried, max_new_tokens=NEW_TOKENS, eos_token_ids=[END])
    endless = [number for number, generation in enumerate(plain) if END not in generation.tokens][:8]
    prompts, continuations = [tried[number] for number in endless], [plain[number].tokens for number in endless]
    draft = fresh_draft(target, [*prompts, *continuations], DRAFTS[request.param])
    learn_by_heart(draft, target, [[*a, *b] for a, b in zip(prompts, continuations, strict=True)])
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file(draft.serving_state_dict(), checkpoint / "draft.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(draft.config.to_dict()))
    path = export_draft(checkpoint, tmp_path / "export", "sglang").path
    draft.load_serving_state_dict(import_draft(path).state)  # in bf16, as the server has it
    return Exported(model_of("llama"), path, target, draft.eval(), prompts, continuations)


def fresh_draft(target: Any, texts: list[list[int]], options: dict[str, Any]) -> Eagle3Draft:
    torch.manual_seed(0)
    config = Eagle3Config.from_dict(
        {
            "hidden_size": 64,
            "target_hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": VOCABULARY,
            "draft_vocab_size": 240,
            "max_position_embeddings": 256,
            "aux_layer_ids": LAYERS,
            **options,
        }
    )
    draft = Eagle3Draft(config)
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # so that one that is left out is missed
    if not config.owns_embedding:
        draft.set_embedding(target.get_input_embeddings().weight)
    counts = torch.bincount(torch.tensor([token for text in texts for token in text]), minlength=VOCABULARY)
    draft.set_vocab_map(VocabMap.from_counts(counts, config.draft_vocab_size))
    return draft


def learn_by_heart(draft: Eagle3Draft, target: Any, texts: list[list[int]], steps: int = 150) -> None:
    longest = max(map(len, texts))
    input_ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    states = target.model(input_ids, attention_mask=mask, output_hidden_states=True)
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "loss_mask": mask,
        "aux_hidden_states": torch.cat([states.hidden_states[layer + 1] for layer in LAYERS], dim=-1),
        "last_hidden_state": states.last_hidden_state,
    }
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    for _ in range(steps):
        output = training_time_test(draft, batch, lm_head=target.lm_head.weight, ttt_length=DRAFT_TOKENS)
        optimizer.zero_grad()
        output.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()


@contextmanager
def speculating_server(exported: Exported, log: Path) -> Iterator[str]:
    """A server that drafts greedy chains on the CPU; yields its URL."""
    port = free_port("127.0.0.1")
    command = [str(find_sglang_python(get_settings())), "-m", "sglang.launch_server"]
    command += ["--model-path", str(exported.target_path), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(exported.path)]
    command += ["--speculative-num-steps", str(DRAFT_TOKENS), "--speculative-eagle-topk", "1"]
    command += ["--speculative-num-draft-tokens", str(DRAFT_TOKENS + 1), "--disable-radix-cache"]
    # Without AMX instructions SGLang replaces intel_amx, the one backend that speculates on a CPU, by torch_native
    # when it is asked for as a whole, not when it is asked for by halves.
    command += ["--attention-backend", "torch_native", "--prefill-attention-backend", "intel_amx"]
    command += ["--decode-attention-backend", "intel_amx", "--device", "cpu", "--dtype", "float32"]
    command += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--disable-cuda-graph"]
    command += ["--skip-server-warmup", "--max-total-tokens", "4096", "--mem-fraction-static", "0.8"]
    # Compiling a few small functions takes longer than everything else here.
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    process = spawn(command, log, environment=environment, death_signal=signal.SIGKILL)
    memory = SharedMemory(log.with_suffix(".shared-memory"))
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        code = process.poll()
        assert code is None, f"{describe_exit(code)}; the end of {log}:\n{tail(log)}"
        try:
            return httpx.get(f"{url}/health", timeout=20.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(healthy, f"a server that speculates (log: {log})", within_s=START_TIMEOUT_S, every_s=0.1)
        yield url
    finally:
        memory.note(process)
        stop_tree(process, grace_s=3.0)
        memory.free()


@pytest.mark.parametrize(
    "exported",
    ["llama3", *(pytest.param(name, marks=pytest.mark.slow) for name in DRAFTS if name != "llama3")],
    indirect=True,
)
def test_a_server_keeps_as_many_of_the_exported_drafts_tokens_as_our_own_decoder(
    exported: Exported, tmp_path: Path
) -> None:
    own = measure_accept_length(
        exported.target,
        exported.draft,
        exported.prompts,
        draft_tokens=DRAFT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        eos_token_ids=[END],
    )
    assert own.lossless
    assert 2.0 < own.accept_length < DRAFT_TOKENS + 0.9, "neither too bad a draft nor a perfect one tells much"

    with speculating_server(exported, tmp_path / "sglang.log") as url:
        served = measure_on_server(
            url, exported.prompts, max_new_tokens=NEW_TOKENS, concurrency=4, expected=exported.continuations
        )
        loads = at_loads(url, exported.prompts, 1, 4)

    assert served.lossless
    assert served.draft_tokens == DRAFT_TOKENS
    # Both compute the same in fp32 but sum in another order. Only where two logits of the draft are equal but for their
    # last bits can they draft different tokens; one token in all is allowed for that.
    one_token = 1.01 / own.target_passes
    assert served.per_position == pytest.approx(own.per_position, abs=one_token)
    assert served.accept_length == pytest.approx(own.accept_length, abs=one_token)
    for result in loads.values():
        assert result.total.accept_length == pytest.approx(own.accept_length, abs=one_token)
        assert result.total.tokens == NEW_TOKENS * len(exported.prompts)
    beside = loads["4"].total.against["1"]
    assert beside.accept_length is not None
    assert beside.accept_length.value == pytest.approx(1.0, abs=one_token)
    assert beside.tokens_per_second is not None
    assert beside.tokens_per_second.interval is not None


def at_loads(url: str, prompts: list[list[int]], *loads: int) -> dict[str, SuiteResult]:
    """What the server does at each number of requests at once, in turn over batches of four prompts."""
    with ExitStack() as stack:
        decoders = {
            str(load): stack.enter_context(decoding_on_server(url, max_new_tokens=NEW_TOKENS, concurrency=load))
            for load in loads
        }
        decoded = decode_in_turn(prompts, decoders, batch_size=4)
    return results_of({load: measured_prompts(prompts, found) for load, found in decoded.items()}, ("1",))


def test_trees_are_refused_where_there_are_no_kernels() -> None:
    path = CHECKOUT / "infra" / "sglang" / "stand_ins" / "sgl_kernel.py"
    spec = importlib.util.spec_from_file_location("sgl_kernel_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    lengths, rows, slots = torch.tensor([5]), torch.tensor([0]), torch.zeros(1, 16, dtype=torch.int32)

    with pytest.raises(NotImplementedError, match=r"expected a chain \(--speculative-eagle-topk 1\)"):
        stand_in.assign_draft_cache_locs_contiguous_cpu(rows, slots, lengths, torch.zeros(12), 16, 4, 3)
