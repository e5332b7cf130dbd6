"""Proof that a server is the run's target: who it says it is, and its states against transformers' on a sample.

SGLang only logs a plugin that does not load, and its layer ids are easily off by one; so no server gets a prompt
before one sample of it has been compared. The reference needs only the layers up to the first captured one, of
whatever size the model is; a small model, or a thorough check (`draftline doctor`), is compared as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.contracts import Capture
from disagg_core.engines.servers.wire import SGLANG_VERSION, ProbeReply, ServerFacts
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.store.packing import unpack
from disagg_core.target.facts import TargetFacts, model_fingerprint
from disagg_core.target.layers import LayerStates
from disagg_core.target.loading import load_target

WHOLE_MODEL_BYTES = 2 * 1024**3
"""Local models with fewer bytes of weights are compared as a whole, larger ones up to the first captured layer."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative error (Frobenius norm of the difference over that of the reference) by dtype.

The next layer's output differs by more: on random and trained models alike an off-by-one shows as 0.1 to 1.
"""

PROBE_TOKENS = 24
_ROOM_TO_GENERATE = 2


@dataclass(frozen=True)
class Reference:
    """What transformers gives for `input_ids`: layer number -> output [T, H]; `last` [T, H] if it was computed."""

    input_ids: list[int]
    layers: dict[int, Tensor]
    last: Tensor | None


@dataclass(frozen=True)
class Comparison:
    """One compared state: relative error against transformers and the largest absolute difference."""

    name: str
    relative: float
    largest: float


def probe_ids(facts: TargetFacts) -> list[int]:
    """Return the tokens of the probe: spread over the vocabulary, the same for every server."""
    step = max(1, facts.vocab_size // (PROBE_TOKENS + 1))
    length = min(PROBE_TOKENS, facts.max_position_embeddings - 2)
    return [(3 + position * step) % facts.vocab_size for position in range(length)]


def reference_states(
    section: TargetSection, facts: TargetFacts, capture: Capture, *, whole: bool | None = None
) -> Reference:
    """Run the target with transformers on the CPU, in its own dtype.

    Without `whole` it is decided by `WHOLE_MODEL_BYTES`. Otherwise only the embedding and the layers up to the first
    captured one are loaded.

    Raises:
        TargetError: the weights cannot be read.
    """
    if whole is None:
        whole = _weights_bytes(section.model) <= WHOLE_MODEL_BYTES
    wanted = Capture(capture.layers if whole else capture.layers[:1], last_hidden_state=whole)
    on_cpu = section.model_copy(update={"device": "cpu"})
    states = LayerStates(load_target(on_cpu, facts, num_layers=None if whole else wanted.layers[0] + 1), wanted)
    ids = probe_ids(facts)
    with torch.inference_mode():
        states.decoder.module(input_ids=torch.tensor([ids]))
    layers = {layer: state[0] for layer, state in zip(wanted.layers, states.layers, strict=True)}
    last = None if states.last is None else states.last[0]
    states.close()
    return Reference(ids, layers, last)


def _weights_bytes(model: str) -> float:
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return float("inf")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def identity_differences(
    found: ServerFacts, section: TargetSection, facts: TargetFacts, capture: Capture, *, max_tokens: int = 0
) -> list[str]:
    """Return, in words, in what a server differs from what the run needs; empty if in nothing.

    `max_tokens` is the longest sample: a server takes a prompt only where the token it has to generate fits as well.
    """
    expected = {
        "sglang": (SGLANG_VERSION, found.sglang_version),
        "model type": (facts.model_type, found.model_type),
        "layers": (facts.num_layers, found.num_layers),
        "hidden size": (facts.hidden_size, found.hidden_size),
        "vocabulary": (facts.vocab_size, found.vocab_size),
        "dtype": (facts.dtype, found.dtype),
        "captured layers": (list(capture.layers), found.aux_layers),
        "config and weights": (model_fingerprint(facts.model, section.revision), found.fingerprint),
        **{name.replace("_", " "): (True, value) for name, value in found.settings.items()},
    }
    differences = [f"{what}: expected {want}, found {have}" for what, (want, have) in expected.items() if want != have]
    longest = max_tokens + _ROOM_TO_GENERATE
    if found.context_length < longest:
        differences.append(
            f"context length: expected at least {longest} (data.max_tokens + {_ROOM_TO_GENERATE}), found "
            f"{found.context_length}; start it with --context-length {longest} or more"
        )
    return differences


def compare_states(reply: ProbeReply, facts: TargetFacts, capture: Capture, reference: Reference) -> list[Comparison]:
    """Return the error of each compared state of a probe against `reference`.

    A server sends its last hidden state whether `capture` wants it or not: it proves the whole model.

    Raises:
        TargetError: the reply does not hold the states that it says it holds, or they have another shape.
    """
    width, tokens = facts.hidden_size, len(reference.input_ids)
    expected = {"aux_hidden_states": (tokens, len(capture.layers) * width), "last_hidden_state": (tokens, width)}
    found = {name: spec.shape for name, spec in reply.tensors.items()}
    if found != expected:
        raise TargetError(f"the probe's states: expected {expected}, found {found}")
    try:
        states = unpack(torch.frombuffer(bytearray(reply.data), dtype=torch.uint8), reply.tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a dtype, a place or bytes that are not there
        raise TargetError(f"the probe's states cannot be read ({error}) from {len(reply.data)} bytes") from error
    aux, last = states["aux_hidden_states"], states["last_hidden_state"]
    compared = []
    for place, layer in enumerate(capture.layers):
        if layer in reference.layers:
            states_of_layer = aux[:, place * width : (place + 1) * width]
            compared.append(_compare(f"output of layer {layer}", states_of_layer, reference.layers[layer]))
    if reference.last is not None:
        compared.append(_compare("last hidden state", last, reference.last))
    return compared


def _compare(name: str, found: Tensor, expected: Tensor) -> Comparison:
    difference = found.double() - expected.double()
    relative = float(difference.norm() / expected.double().norm().clamp_min(1e-12))
    return Comparison(name, relative, float(difference.abs().max()))


def check_probe(
    server: str,
    reply: ProbeReply,
    section: TargetSection,
    facts: TargetFacts,
    capture: Capture,
    reference: Reference,
    max_tokens: int = 0,
) -> list[Comparison]:
    """Return the comparisons of a server that is the run's target and takes samples of `max_tokens`.

    Raises:
        TargetError: it is not; the message names the server and everything that differs.
    """
    differences = identity_differences(reply.facts, section, facts, capture, max_tokens=max_tokens)
    if not differences:
        compared = compare_states(reply, facts, capture, reference)
        limit = TOLERANCE[facts.dtype]
        differences = [
            f"{entry.name}: expected transformers' within {limit:g}, found a relative error of {entry.relative:.3g}"
            for entry in compared
            if not entry.relative <= limit
        ]
        if not differences:
            return compared
    raise TargetError(
        f"{server} is not the run's target: {'; '.join(differences)}; start it with this run's model and the flags in "
        "infra/sglang/README.md"
    )
