"""Tiny models, tasks and bounded waits for the tests with real SGLang servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.run_spec.document import TargetSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.target.facts import TargetFacts

MAX_TOKENS = 200
VOCABULARY = 320
START_TIMEOUT_S = 240.0
CAPTURE = Capture((0, 2, 4), last_hidden_state=True)


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges, with a ChatML template."""
    vocabulary = {token: number for number, token in enumerate(("<pad>", "<|im_start|>", "<|im_end|>", "<unk>"))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(directory)


def save_model(directory: Path, family: str, seed: int = 0) -> Path:
    """A random model of six layers whose layers do differ: its weights are ten times the usual size."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True))
    model.float().save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@dataclass
class Served:
    """A model with a server that runs it."""

    directory: Path
    section: TargetSection
    facts: TargetFacts
    server: ManagedServer

    @property
    def url(self) -> str:
        return self.server.url


def identity_of(facts: TargetFacts, store: MooncakeFeatureStore, capture: Capture = CAPTURE) -> RunIdentity:
    return RunIdentity(
        run_id=store.namespace.split("/")[0],
        attempt=1,
        strategy="eagle3",
        target_model_version=facts.version,
        tokenizer_version="tokenizer",
        vocab_map_version="vocabulary",
        draft_weight_version=0,
        capture=capture,
        dtype=facts.dtype,
    )


def task_of(ordinal: int, input_ids: list[int]) -> PromptTask:
    """A prompt whose second half may be trained on."""
    half = len(input_ids) // 2
    return PromptTask(
        ordinal=ordinal,
        source=f"test:{ordinal}",
        input_ids=input_ids,
        loss_mask=[0] * half + [1] * (len(input_ids) - half),
    )


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 260, (count,), generator=generator).tolist()
