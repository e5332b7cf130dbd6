"""Owns the demo's target: its tokenizer, and the small Llama that is trained to read documentation on in chat turns."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from corpus import Page, Window, windows
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BEGIN, END, _, USER, ASSISTANT = range(len(SPECIAL))
VOCAB_SIZE = 1024
MAX_TOKENS = 160
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def train_tokenizer(training: list[Page], out_dir: Path) -> Tokenizer:
    """Train the byte-level BPE tokenizer on the training pages and save it with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([page.text for page in training], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.chat_template = Path(__file__).with_name("chat_template.jinja").read_text().strip()
    wrapped.save_pretrained(out_dir)
    _name_class(out_dir / "tokenizer_config.json")
    return tokenizer


def _name_class(path: Path) -> None:
    """Write the tokenizer's class under the name that every version of transformers knows."""
    config = json.loads(path.read_text())
    config.pop("backend", None)
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def turns(window: Window, first_words: int) -> tuple[str, str]:
    """Return the user's turn (what is documented, and how its text begins) and how the page goes on."""
    words = window.text.split(" ")
    first_words = min(first_words, window.first, max(1, len(words) - 1))
    return f"{window.title}\n{' '.join(words[:first_words])}", " ".join(words[first_words:])


def encode(tokenizer: Tokenizer, user: str, assistant: str, ends: bool) -> list[int]:
    """Return the token ids that the chat template gives; without the end token if the page goes on."""
    ids = [BEGIN, USER, *tokenizer.encode(user).ids, ASSISTANT, *tokenizer.encode(assistant).ids]
    return [*ids, END][:MAX_TOKENS] if ends else ids[:MAX_TOKENS]


def new_target(seed: int) -> LlamaForCausalLM:
    """Return the untrained target."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def train(
    tokenizer: Tokenizer,
    training: list[Page],
    held_out: list[Window],
    *,
    out_dir: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    save_every: int = 500,
) -> dict[str, Any]:
    """Train the target for `steps` AdamW steps (cosine to zero), saving along the way, and return what was measured."""
    model = new_target(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    batches = _batches(tokenizer, training, batch_size, random.Random(seed))
    started = time.monotonic()
    tokens = 0
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        ids, labels = next(batches)
        loss = _loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((labels >= 0).sum())
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            rate = tokens / (time.monotonic() - started)
            print(f"step {step + 1}/{steps} loss {sum(recent) / len(recent):.4f} tokens/s {rate:.0f}", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_target(model, out_dir)
            print(f"step {step + 1} held-out loss {evaluate(model, tokenizer, held_out):.4f}", flush=True)
    return {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "tokens": tokens,
        "training_loss": round(sum(recent) / len(recent), 4),
        "held_out_loss": round(evaluate(model, tokenizer, held_out), 4),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def save_target(model: LlamaForCausalLM, out_dir: Path) -> None:
    """Write weights (rounded to bf16, computed with in fp32) and configs as `from_pretrained` and SGLang read them."""
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    partial = out_dir / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(out_dir / "model.safetensors")
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: list[Window]) -> float:
    """Return the mean loss per token (nats) over `held_out`."""
    total, count = 0.0, 0
    rows = [encode(tokenizer, *turns(w, 6), w.ends) for w in held_out]
    rows.sort(key=len)
    for i in range(0, len(rows), 64):
        ids, labels = _collate(rows[i : i + 64])
        live = int((labels >= 0).sum())
        total += _loss(model, ids, labels).item() * live
        count += live
    return total / count


def _loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss. Rows are padded on the right, so that causal attention alone keeps padding out."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _collate(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows) - 1
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        labels[i, : len(row) - 1] = torch.tensor(row[1:])
    return ids, labels


def _batches(tokenizer: Tokenizer, pages: list[Page], batch_size: int, rng: random.Random):
    """Yield batches for ever; each epoch cuts the pages into other windows and batches rows of like length."""
    while True:
        rows = [encode(tokenizer, *turns(w, rng.randint(3, 10)), w.ends) for page in pages for w in windows(page, rng)]
        rows.sort(key=lambda row: len(row) + rng.random())
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from map(_collate, batches)


def _schedule(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / (0.03 * steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
