"""A tiny target, drafts that know by heart what it says, and vLLM decoding in its own environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from disagg_core.contracts import sample_id_of
from disagg_core.drafts.export import VerifierInfo, export_draft, import_draft
from disagg_core.drafts.method import DraftModel, FrozenParts, Sample
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.evaluation import generate_all
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.draft import draft_sections
from disagg_core.settings import CHECKOUT
from disagg_core.target.facts import read_target_facts
from tests.numbered import run_elsewhere

VOCABULARY = 320
MASK = VOCABULARY - 1
NEW_TOKENS = 48
DRAFT_TOKENS = 4
VLLM_PYTHON = CHECKOUT / ".venv-vllm" / "bin" / "python"
_MAX_TOKENS = 256
_STEPS = 60
"""Enough for a draft that is right about half of the time."""
_DECODING_S = 400.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Target:
    """A random model of six layers, prompts, and how it goes on after them."""

    path: Path
    model: Any
    prompts: list[list[int]]
    continuations: list[list[int]]

    @classmethod
    def make(cls, path: Path) -> Target:
        """Save and load one whose layers do differ, with weights ten times the usual size.

        The head width is one that vLLM's attention on a CPU knows.
        """
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=_MAX_TOKENS,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            dtype="float32",
        )
        model = Qwen3ForCausalLM(config).float().eval().requires_grad_(False)
        model.save_pretrained(path)
        generator = torch.Generator().manual_seed(1)
        lengths = range(12, 36, 3)
        prompts = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
        plain = generate_all(model, None, prompts, max_new_tokens=NEW_TOKENS)
        return cls(path, model, prompts, [generation.tokens for generation in plain])

    @property
    def parts(self) -> FrozenParts:
        """Embedding and LM head."""
        return FrozenParts(self.model.get_input_embeddings().weight, self.model.lm_head.weight)

    def samples(self, layers: Sequence[int], *, last: bool) -> list[Sample]:
        """Every prompt with its continuation, captured; all of it is trained on."""
        texts = [[*a, *b] for a, b in zip(self.prompts, self.continuations, strict=True)]
        return [self._sample(number, text, layers, last=last) for number, text in enumerate(texts)]

    def _sample(self, number: int, text: list[int], layers: Sequence[int], *, last: bool) -> Sample:
        states = self.model.model(torch.tensor([text]), output_hidden_states=True)
        tensors: dict[str, Tensor] = {
            "input_ids": torch.tensor(text, dtype=torch.int32),
            "loss_mask": torch.ones(len(text), dtype=torch.uint8),
            "aux_hidden_states": torch.cat([states.hidden_states[layer + 1][0] for layer in layers], dim=-1),
        }
        if last:
            tensors["last_hidden_state"] = states.last_hidden_state[0]
        return Sample(sample_id_of(number), tensors)


@dataclass(frozen=True)
class Exported:
    """An exported draft, and the same one as our own decoder runs it."""

    path: Path
    draft: DraftModel


def export_learned(
    target: Target, directory: Path, method_name: str, options: dict[str, Any], formats: Sequence[str]
) -> dict[str, Exported]:
    """Train a draft for a few steps on what `target` says and return its exports by format."""
    method = method_of(method_name)
    section = draft_sections()[method_name].model_validate(options)
    facts = read_target_facts(TargetSection(model=str(target.path), dtype="float32", device="cpu"))
    capture = method.capture(section, facts.num_layers, (0, 2, 4))
    size = method.vocabulary(section, facts).size
    said = torch.tensor([token for text in target.continuations for token in text])
    vocab_map = VocabMap.from_counts(torch.bincount(said, minlength=VOCABULARY), size)
    config = method.config_for(section, facts, capture, size)
    torch.manual_seed(0)
    draft = method.model(config)
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # so that one that is left out is missed
    _share_key_norms(draft)
    draft.attach(target.parts, vocab_map)
    batcher = method.batcher(section, config, seed=0)
    batch = batcher.collate(target.samples(capture.layers, last=capture.last_hidden_state))
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
    module = method.loss(draft, target.parts, section, activation_checkpointing=False)
    _train([p for p in draft.parameters() if p.requires_grad], lambda: module(batch, normalisers).total)

    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    save_file(draft.serving_state_dict(), checkpoint / "draft.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(config.to_dict()))
    return {
        format: Exported(
            path := _export(target, checkpoint, directory / format, format), _read(path, target, vocab_map)
        )
        for format in formats
    }


def _export(target: Target, checkpoint: Path, path: Path, format: str) -> Path:
    known = import_draft(checkpoint).method.formats[format]
    section = TargetSection(model=str(target.path), dtype="float32", device="cpu")
    return export_draft(
        checkpoint,
        path,
        format,
        dtype="float32",
        verifier=VerifierInfo.of(section) if known.names_target else None,
        parts=target.parts if known.holds_parts else None,
        draft_tokens=DRAFT_TOKENS,
    ).path


def _read(path: Path, target: Target, vocab_map: VocabMap) -> DraftModel:
    method, config, state = import_draft(path)
    draft = method.model(config)
    draft.load_serving_state_dict(state)
    draft.attach(target.parts, vocab_map)
    return draft.eval().requires_grad_(False)


def _share_key_norms(draft: DraftModel) -> None:
    """Give the key norms of all layers the same frozen weights.

    vLLM normalises the context's keys of all layers of a DFlash draft in one call, and its kernel for CPUs takes the
    first layer's weights for every layer.
    """
    norms = [parameter for name, parameter in draft.named_parameters() if "k_norm" in name]
    for norm in norms:
        norm.requires_grad_(False).copy_(norms[0])


def _train(parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / _STEPS))
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Decoded:
    """What vLLM said, and what it counted."""

    tokens: list[list[int]]
    counters: dict[str, Any]


def decode(target: Target, draft: Path, format: str, method: str, directory: Path) -> Decoded:
    """Let vLLM go on after the target's prompts, in a process that has ended when this returns.

    A draft in speculators format names its target and is served as if it were the model; otherwise the target is the
    model, and vLLM is told the method: where it is not, it goes by the name of the draft's directory.
    """
    model, speculative_config = draft, None
    if format != "speculators":
        model = target.path
        speculative_config = {"model": str(draft), "method": method, "num_speculative_tokens": DRAFT_TOKENS}
    directory.mkdir()
    job, result, log = directory / "job.json", directory / "result.json", directory / "vllm.log"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "max_model_len": _MAX_TOKENS,
                "max_new_tokens": NEW_TOKENS,
                "prompts": target.prompts,
                "speculative_config": speculative_config,
            }
        )
    )
    command = [str(VLLM_PYTHON), str(Path(__file__).with_name("decode_main.py")), str(job), str(result)]
    run_elsewhere(command, log, ENVIRONMENT, within_s=_DECODING_S)
    return Decoded(**json.loads(result.read_text()))
