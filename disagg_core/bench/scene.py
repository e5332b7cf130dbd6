"""What the benchmarks work on: shapes of targets, a draft of any method for them, and samples as captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.drafts.method import DraftMethod, FrozenParts, Sample
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.draft import DraftSection, draft_sections
from disagg_core.target.facts import TargetFacts
from disagg_core.training.consumer import DraftToTrain

RUN = "bench"


@dataclass(frozen=True)
class Shape:
    """The sizes of a target, and of its draft's vocabulary where the method has one of its own."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    draft_vocab: int
    dtype: str

    def facts(self) -> TargetFacts:
        """Return the facts of a target of this shape."""
        return TargetFacts(
            model=f"bench/{self.name}",
            model_type="qwen3",
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            max_position_embeddings=40_960,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_ids=(1,),
            pad_token_id=None,
            dtype=self.dtype,
            version="bench",
        )

    def model(self, device: str) -> nn.Module:
        """Return a target of this shape with random weights, as transformers runs it."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            dtype=self.dtype,
        )
        with torch.device(device):
            model: nn.Module = Qwen3ForCausalLM._from_config(config)
        return model


TINY = Shape("tiny", 64, 8, 4, 2, 16, 128, 512, 512, "float32")
SMALL = Shape("small", 256, 8, 4, 2, 64, 688, 4096, 4096, "float32")
QWEN3_8B = Shape("Qwen3-8B", 4096, 36, 32, 8, 128, 12288, 151_936, 32_000, "bfloat16")


@dataclass(frozen=True)
class Bench:
    """A fresh draft with all that training it takes, for a target of random weights."""

    shape: Shape
    method: DraftMethod
    section: DraftSection
    capture: Capture
    to_train: DraftToTrain
    parts: FrozenParts

    def identity(self) -> RunIdentity:
        """Return the identity that references to its samples carry."""
        return RunIdentity(
            run_id=RUN,
            attempt=1,
            strategy=self.section.method,
            target_model_version="bench",
            tokenizer_version="",
            vocab_map_version="",
            draft_weight_version=0,
            capture=self.capture,
            dtype=self.shape.dtype,
        )

    def tensors(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Return a sample of `tokens` tokens as a target hands it over; every token is trained on."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.capture.features(tokens, self.shape.hidden, self.shape.dtype).items():
            kind = getattr(torch, dtype)
            if name == "input_ids":
                found[name] = torch.randint(2, self.shape.vocab - 2, shape, generator=generator, dtype=kind)
            elif name == "loss_mask":
                found[name] = torch.ones(shape, dtype=kind)
            else:
                found[name] = torch.randn(shape, generator=generator).to(kind)
        return found

    def sample(self, tokens: int, number: int = 0) -> Sample:
        """Return sample `number`, of `tokens` tokens."""
        return Sample(f"s{number:09d}", self.tensors(tokens, number))


def capture_of(method: str, shape: Shape) -> Capture:
    """Return what `method` captures by default of a target of `shape`."""
    return method_of(method).capture(draft_sections()[method].model_validate({}), shape.layers, None)


def bench_of(
    method: str, shape: Shape, options: Mapping[str, Any] | None = None, *, device: str = "cpu", seed: int = 0
) -> Bench:
    """Return a draft of `method` with fresh weights, attached to random parts of a target of `shape`."""
    torch.manual_seed(seed)
    facts, found = shape.facts(), method_of(method)
    known = draft_sections()[method].model_fields
    usual = {"vocab_size": shape.draft_vocab, "mask_token_id": shape.vocab - 1}
    section = draft_sections()[method].model_validate(
        {name: value for name, value in usual.items() if name in known} | dict(options or {})
    )
    capture = found.capture(section, shape.layers, None)
    size = found.vocabulary(section, facts).size
    with torch.device(device):
        model = found.model(found.config_for(section, facts, capture, size))
    dtype = getattr(torch, shape.dtype)
    embedding, head = (torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device) * 0.02 for _ in range(2))
    parts = FrozenParts(embedding, head)
    model.attach(parts, VocabMap.from_counts(torch.arange(shape.vocab, 0, -1), size))
    return Bench(shape, found, section, capture, DraftToTrain(model, section), parts)


def resized(shape: Shape, **changes: Any) -> Shape:
    """Return `shape` with other sizes."""
    return replace(shape, **changes)
