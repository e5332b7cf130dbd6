"""What vLLM cannot run on a CPU is loaded there: its own model classes take the exported files, whole.

Every weight of a file is a number of its own, and is looked for in the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.numbered import BLOCK_DRAFTS, check_taken, numbered_export, run_elsewhere
from tests.vllm.support import ENVIRONMENT, MASK, VLLM_PYTHON, Target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (method, options | {"mask_token_id": MASK})
    for name, (method, options) in BLOCK_DRAFTS.items()
    if "markov_head_type" not in options
}
"""vLLM knows DSpark's vanilla head only."""
CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {"vocab_size": 256}),
    "p_eagle": ("p_eagle", {"vocab_size": 256, "depths": 4, "num_layers": 2, "mask_token_id": MASK}),
}
OF_THE_TARGET = {"embed_tokens.weight", "lm_head.weight"}
FROM_ELSEWHERE = {
    "eagle3": {"embed_tokens.weight"},  # of the target, whose width the draft has
    "p_eagle": {"layers.1.hidden_norm.weight"},  # of no use to layers after the first
}
MASK_EMBEDDING = {"mask_embedding"}
"""Taken from a file of its own, where a draft has one; else the mask token's row of the embedding."""


def loaded(target: Target, exports: dict[str, Path], directory: Path) -> dict[str, dict[str, Any]]:
    """The parameters of the model classes after each of `exports` was loaded, by name."""
    results = {name: directory / f"{name}.result" for name in exports}
    pairs = [str(path) for name, export in exports.items() for path in (export, results[name])]
    command = [str(VLLM_PYTHON), str(Path(__file__).with_name("load_main.py")), str(target.path), *pairs]
    run_elsewhere(command, directory / "load.log", ENVIRONMENT, within_s=400.0)
    return {name: load_file(result) for name, result in results.items()}


def test_the_model_classes_take_every_tensor_of_z_labs_format_and_lack_none(target: Target, tmp_path: Path) -> None:
    exports = {name: numbered_export(target.path, tmp_path / name, *of) for name, of in LOADED.items()}

    for name, parameters in loaded(target, exports, tmp_path).items():
        check_taken(exports[name], parameters, shared=OF_THE_TARGET | MASK_EMBEDDING)


def test_the_model_classes_take_every_tensor_of_the_speculators_format_and_lack_none(
    target: Target, tmp_path: Path
) -> None:
    drafts = {**LOADED, **CHAINS}
    exports = {name: numbered_export(target.path, tmp_path / name, *of, "speculators") for name, of in drafts.items()}

    for name, parameters in loaded(target, exports, tmp_path).items():
        check_taken(exports[name], parameters, shared=FROM_ELSEWHERE.get(name, MASK_EMBEDDING))
