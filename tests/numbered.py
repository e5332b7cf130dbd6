"""Exports in which every weight is a number of its own, so that it shows where a model class has put each of them."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disagg_core.drafts.export import VerifierInfo, export_draft
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.processes.tree import describe_exit, spawn, stop_tree, tail
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.draft import draft_sections
from disagg_core.target.facts import read_target_facts

LAYERS = (0, 2, 4)
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Modules of the engines that hold several of a file's."""


_BLOCKS = {"block_size": 5, "num_layers": 2}
BLOCK_DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("dflash", _BLOCKS),
    "dflash2": ("dflash2", _BLOCKS | {"conv_group_size": 8, "selector_rank": 6, "selector_top_k": 4}),
    "dspark": ("dspark", _BLOCKS | {"markov_rank": 6}),
    "dspark-gated": ("dspark", _BLOCKS | {"markov_rank": 6, "markov_head_type": "gated"}),
    "dspark-rnn": ("dspark", _BLOCKS | {"markov_rank": 6, "markov_head_type": "rnn"}),
}
"""Small drafts of every kind that proposes blocks: method and options, without a mask token."""


def numbered_export(
    target: Path, directory: Path, method_name: str, options: dict[str, Any], format: str = "sglang"
) -> Path:
    """Write a fresh draft for `target` in `format`, float32, its weights and the target's parts numbered from 1."""
    method = method_of(method_name)
    section = draft_sections()[method_name].model_validate(options)
    target_section = TargetSection(model=str(target), dtype="float32", device="cpu")
    facts = read_target_facts(target_section)
    capture = method.capture(section, facts.num_layers, LAYERS)
    size = method.vocabulary(section, facts).size
    draft = method.model(method.config_for(section, facts, capture, size))
    parts = FrozenParts(*(torch.zeros(facts.vocab_size, facts.hidden_size) for _ in range(2)))
    draft.attach(parts, VocabMap.from_counts(torch.arange(facts.vocab_size) % 7, size))
    state = {name: tensor.clone() for name, tensor in draft.serving_state_dict().items()}
    number([*state.values(), parts.embedding, parts.lm_head])
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    save_file(state, checkpoint / "draft.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(draft.config.to_dict()))
    known = method.formats[format]
    return export_draft(
        checkpoint,
        directory / format,
        format,
        dtype="float32",
        verifier=VerifierInfo.of(target_section) if known.names_target else None,
        parts=parts if known.holds_parts else None,
        draft_tokens=4,
    ).path


def number(tensors: list[Tensor]) -> None:
    """Number the elements of all floating-point `tensors` from 1, none twice; fp32 tells them apart up to 2**24."""
    last = 0
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(last + 1, last + 1 + tensor.numel()).view(tensor.shape))
            last += tensor.numel()
    assert last < 2**24


def check_taken(export: Path, loaded: Mapping[str, Tensor], *, shared: set[str]) -> None:
    """Check that a model class has each tensor of `export` where its name says, whole and in order, and nothing else.

    `loaded` are the class's parameters, NaN where nothing was loaded. `shared` are those that it gets from elsewhere.
    The mask of a reduced vocabulary is passed over: the map says the same.
    """
    written = load_file(export / "model.safetensors")
    written.pop("t2d", None)
    expected: dict[str, list[Tensor]] = {}
    for name in loaded:
        own = name.removeprefix("model.")
        if own not in shared:
            expected[name] = [written.pop(part) for part in file_names(own)]
    assert written == {}, f"tensors that no parameter has: {sorted(written)}"
    for name, tensors in expected.items():
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        assert torch.equal(loaded[name], whole.to(loaded[name].dtype).reshape(loaded[name].shape)), name


def run_elsewhere(command: list[str], log: Path, environment: Mapping[str, str], *, within_s: float) -> None:
    """Run `command` in a process that has ended when this returns, with all that it started; fail if it did."""
    process = spawn(command, log, environment={**environment, "PYTHONUNBUFFERED": "1"}, death_signal=signal.SIGKILL)
    try:
        code = process.wait(within_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"{command[1]} did not end within {within_s:g} s; the end of {log}:\n{tail(log)}"
        ) from error
    finally:
        stop_tree(process, grace_s=3.0)
    assert code == 0, f"{describe_exit(code)}; the end of {log}:\n{tail(log)}"


def file_names(parameter: str) -> list[str]:
    """Return the tensors of a file that make up `parameter` of an engine's model."""
    if parameter == "draft_id_to_target_id":
        return ["d2t"]
    for fused, parts in FUSED.items():
        if f".{fused}." in parameter:
            return [parameter.replace(f".{fused}.", f".{part}.") for part in parts]
    return [parameter]
