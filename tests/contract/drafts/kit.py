"""What the contract tests give every draft method: a tiny target, samples of it, and small options by method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.contracts import Capture, sample_id_of
from disagg_core.drafts.figures import LossOutput
from disagg_core.drafts.method import DraftConfig, DraftMethod, DraftModel, FrozenParts, Sample
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.draft import DraftSection, draft_sections
from disagg_core.target.facts import TargetFacts

HIDDEN, VOCAB, LAYERS = 16, 64, 6
SEED = 11

OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"vocab_size": 40, "ttt_length": 3},
    "dflash": {"block_size": 4, "num_layers": 2, "mask_token_id": 63, "anchors": 6},
    "dflash2": {
        "block_size": 4,
        "num_layers": 2,
        "mask_token_id": 63,
        "anchors": 6,
        "sliding_window": 8,
        "conv_group_size": 4,
        "selector_rank": 4,
        "selector_top_k": 6,
    },
    "dspark": {"block_size": 4, "num_layers": 2, "mask_token_id": 63, "markov_rank": 6, "anchors": 6},
    "p_eagle": {"vocab_size": 40, "num_layers": 2, "depths": 4, "mask_token_id": VOCAB - 1},
}
"""Options that keep each method small. A registered method without an entry here fails the suite."""


def tiny_target() -> nn.Module:
    """A causal language model of the tiny target's sizes, the same weights each time."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_facts(**changes: Any) -> TargetFacts:
    values: dict[str, Any] = {
        "model": "./tiny",
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": None,
        "dtype": "float32",
        "version": "tiny",
    }
    return TargetFacts.model_validate(values | changes)


@dataclass
class Case:
    """One method on the tiny target, ready to compute."""

    method: DraftMethod
    options: DraftSection
    facts: TargetFacts
    capture: Capture
    config: DraftConfig
    parts: FrozenParts
    vocab_map: VocabMap

    @classmethod
    def of(cls, name: str, **changes: Any) -> Case:
        """Return the case of the method called `name`, with `changes` to its small options."""
        method, facts = method_of(name), tiny_facts()
        options = draft_sections()[name].model_validate(OPTIONS[name] | changes)
        capture = method.capture(options, facts.num_layers, None)
        vocabulary = method.vocabulary(options, facts)
        target = tiny_target()
        parts = FrozenParts(target.get_input_embeddings().weight, target.get_output_embeddings().weight)
        counts = torch.arange(VOCAB) % 7
        vocab_map = VocabMap.from_counts(counts, vocabulary.size)
        config = method.config_for(options, facts, capture, vocabulary.size)
        return cls(method, options, facts, capture, config, parts, vocab_map)

    def bare_draft(self) -> DraftModel:
        """A fresh draft that nothing is attached to."""
        torch.manual_seed(3)
        return self.method.model(self.config)

    def draft(self) -> DraftModel:
        """A fresh draft with every trainable weight away from its start, so that nothing is multiplied by zero."""
        draft = self.bare_draft()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        draft.attach(self.parts, self.vocab_map)
        return draft

    def sample(self, ordinal: int, tokens: int = 18, mask: list[int] | None = None) -> Sample:
        """The sample of one prompt; the first four tokens are the prompt's unless `mask` says otherwise."""
        generator = torch.Generator().manual_seed(100 + ordinal)
        tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.capture.features(tokens, HIDDEN, "float32").items():
            tensors[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        tensors["input_ids"] = torch.randint(3, VOCAB, (tokens,), generator=generator, dtype=torch.int32)
        tensors["loss_mask"] = torch.tensor(mask or [0] * 4 + [1] * (tokens - 4), dtype=torch.uint8)
        return Sample(sample_id_of(ordinal), tensors)

    def loss_of(
        self, draft: DraftModel, *micro_batches: list[Sample], multiple_of: int = 1, packed: bool = False
    ) -> LossOutput:
        """Run a window of `micro_batches`, leave its gradients on `draft`, and return total and figures summed."""
        batcher = self.method.batcher(self.options, self.config, seed=SEED)
        batches = [batcher.collate(samples, multiple_of=multiple_of, packed=packed) for samples in micro_batches]
        sums: dict[str, float] = {}
        for batch in batches:
            for name, value in batcher.normalisers(batch).items():
                sums[name] = sums.get(name, 0.0) + value
        normalisers = {name: torch.tensor(value) for name, value in sums.items()}
        module = self.method.loss(draft, self.parts, self.options, activation_checkpointing=False)
        outputs = [module(batch, normalisers) for batch in batches]
        total = torch.stack([output.total for output in outputs]).sum()
        total.backward()
        first, *others = outputs
        ratios = dict(first.ratios)
        for output in others:
            for name, ratio in output.ratios.items():
                known = ratios[name]
                ratios[name] = type(ratio)(known.numerator + ratio.numerator, known.denominator + ratio.denominator)
        return LossOutput(total.detach(), ratios)


def gradients(draft: DraftModel) -> dict[str, Tensor]:
    """The gradient of every trainable weight, by name; those that got none are missing."""
    return {
        name: parameter.grad.clone()
        for name, parameter in draft.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
