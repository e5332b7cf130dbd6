"""Rebuilds the demo's target, tokenizer and prompts from nothing but the running Python's standard library.

    python infra/demo/build_demo.py                    # everything, into infra/demo
    python infra/demo/build_demo.py prompts check      # single stages
    python infra/demo/build_demo.py --out /tmp/d --steps 500 --threads 2

Stages, in order: tokenizer, target, prompts, check. `build.json` records what was measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from corpus import Page, Window, ngrams, pages, split, unshared, windows
from tokenizers import Tokenizer
from train_target import SIZES, VOCAB_SIZE, train, train_tokenizer, turns

STAGES = ("tokenizer", "target", "prompts", "check")
SEED = 20240607
TRAINING_PROMPTS = 3200
HELD_OUT_PROMPTS = 64
HELD_OUT_PER_DOCUMENT = 8
_MIN_PROMPT_WORDS = 18


def main() -> None:
    """Run the chosen stages."""
    options = _options()
    torch.set_num_threads(options.threads)
    training, held_out_pages = split(pages())
    rng = random.Random(SEED)
    held_out = unshared([w for page in held_out_pages for w in windows(page, rng)], training)
    target = options.out / "target"
    if "tokenizer" in options.stages:
        train_tokenizer(training, target)
        _record(options.out, corpus=_describe(training, held_out), python=platform.python_version())
    if "target" in options.stages:
        measured = train(
            Tokenizer.from_file(str(target / "tokenizer.json")),
            training,
            held_out,
            out_dir=target,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=SEED,
        )
        _record(options.out, target=measured | {"sizes": SIZES, "vocab_size": VOCAB_SIZE})
    if "prompts" in options.stages:
        write_prompts(training, held_out, options.out)
    if "check" in options.stages:
        _record(options.out, prompts=check_prompts(options.out))


def write_prompts(training: list[Page], held_out: list[Window], out_dir: Path) -> None:
    """Write `prompts.jsonl` and `heldout.jsonl`: a seeded choice of windows that are long enough to be continued."""
    rng = random.Random(SEED)
    candidates = _asked_once([w for page in training for w in windows(page, rng) if _long_enough(w)])
    _write(out_dir / "prompts.jsonl", rng.sample(candidates, min(TRAINING_PROMPTS, len(candidates))), rng)
    taken: Counter[str] = Counter()
    chosen: list[Window] = []
    for window in _asked_once(rng.sample(held_out, len(held_out))):
        if _long_enough(window) and taken[window.document] < HELD_OUT_PER_DOCUMENT:
            taken[window.document] += 1
            chosen.append(window)
    _write(out_dir / "heldout.jsonl", chosen[:HELD_OUT_PROMPTS], rng)


def _asked_once(candidates: list[Window]) -> list[Window]:
    """Return the windows without those that begin as another one does."""
    return list({turns(window, 4)[0]: window for window in candidates}.values())


def _long_enough(window: Window) -> bool:
    return min(len(window.text.split()), window.first + 12) >= _MIN_PROMPT_WORDS


def _write(path: Path, chosen: list[Window], rng: random.Random) -> None:
    lines = []
    for window in chosen:
        user, assistant = turns(window, rng.randint(4, 9))
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        lines.append(json.dumps({"document": window.document, "messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def check_prompts(out_dir: Path) -> dict[str, int]:
    """Check from the files alone that held-out and training prompts share no document and no eight words in a row.

    Raises:
        SystemExit: they do.
    """
    training = [json.loads(line) for line in (out_dir / "prompts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (out_dir / "heldout.jsonl").read_text().splitlines()]
    documents = {r["document"] for r in training} & {r["document"] for r in held_out}
    known = {gram for record in training for gram in ngrams(_text(record))}
    shared = [gram for record in held_out for gram in ngrams(_text(record)) if gram in known]
    if documents or shared:
        raise SystemExit(
            f"held-out prompts share documents {sorted(documents)} and {len(shared)} runs of words, "
            f"such as {shared[:1]}: expected none of either"
        )
    return {
        "training": len(training),
        "training_documents": len({r["document"] for r in training}),
        "held_out": len(held_out),
        "held_out_documents": len({r["document"] for r in held_out}),
        "shared_documents": 0,
        "shared_8_grams": 0,
    }


def _text(record: dict[str, Any]) -> str:
    """Return the documented text of a record, without the first line of the user's turn, which is a title."""
    user, assistant = (message["content"] for message in record["messages"])
    return f"{user.split(chr(10), 1)[1]} {assistant}"


def _describe(training: list[Page], held_out: list[Window]) -> dict[str, int]:
    return {
        "training_documents": len(training),
        "training_characters": sum(len(page.text) for page in training),
        "held_out_documents": len({window.document for window in held_out}),
        "held_out_windows": len(held_out),
    }


def _record(out_dir: Path, **facts: Any) -> None:
    path = out_dir / "build.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | facts, indent=2, sort_keys=True) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=STAGES, choices=[*STAGES, STAGES], metavar="stage")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
