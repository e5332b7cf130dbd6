"""Proof that a server is the run's target: who it says it is, and its states against transformers' on a sample.

SGLang only logs a plugin that does not load, and its layer ids are easily off by one; so no server gets a prompt
before one sample of it has been compared. The reference needs only the layers up to the first captured one, of
whatever size the model is; a small model, or a thorough check (`draftline doctor`), is compared as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.engines.servers.wire import SGLANG_VERSION, ProbeReply, ServerFacts
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.store.packing import unpack
from disagg_core.target.facts import TargetFacts, model_fingerprint

WHOLE_MODEL_BYTES = 2 * 1024**3
"""Local models with fewer bytes of weights are compared as a whole, larger ones up to the first captured layer."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative error (Frobenius norm of the difference over that of the reference) by dtype.

The next layer's output differs by more: on random and trained models alike an off-by-one shows as 0.1 to 1.
"""

PROBE_TOKENS = 24


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


def reference_states(section: TargetSection, facts: TargetFacts, *, whole: bool | None = None) -> Reference:
    """Run the target with transformers on the CPU, in float32 for a float32 target and in its own dtype otherwise.

    Without `whole` it is decided by `WHOLE_MODEL_BYTES`. Otherwise only the embedding and the layers up to the first
    captured one are loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(Path(facts.model).expanduser()) if is_local(facts.model) else facts.model
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = AutoConfig.from_pretrained(source, **options)
    if whole is None:
        whole = _weights_bytes(source) <= WHOLE_MODEL_BYTES
    if not whole:
        config.get_text_config().num_hidden_layers = facts.aux_layers[0] + 1
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=getattr(torch, facts.dtype), **options)
    ids = probe_ids(facts)
    wanted = facts.aux_layers if whole else facts.aux_layers[:1]
    outputs: dict[int, Tensor] = {}
    handles = [model.get_decoder().layers[layer].register_forward_hook(_keep(outputs, layer)) for layer in wanted]
    with torch.inference_mode():
        last = model.get_decoder()(torch.tensor([ids])).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return Reference(ids, outputs, last if whole else None)


def _keep(outputs: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(_module: object, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        outputs[layer] = hidden.detach()[0].clone()

    return hook


def _weights_bytes(source: str) -> float:
    directory = Path(source)
    if not directory.is_dir():
        return float("inf")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def identity_differences(found: ServerFacts, facts: TargetFacts, section: TargetSection) -> list[str]:
    """Return, in words, in what a server differs from the run's target; empty if in nothing."""
    expected = {
        "sglang": (SGLANG_VERSION, found.sglang_version),
        "model type": (facts.model_type, found.model_type),
        "layers": (facts.num_layers, found.num_layers),
        "hidden size": (facts.hidden_size, found.hidden_size),
        "vocabulary": (facts.vocab_size, found.vocab_size),
        "dtype": (facts.dtype, found.dtype),
        "captured layers": (list(facts.aux_layers), found.aux_layers),
        "config and weights": (model_fingerprint(facts.model, section.revision), found.fingerprint),
        **{name.replace("_", " "): (True, value) for name, value in found.settings.items()},
    }
    return [f"{what}: expected {want}, found {have}" for what, (want, have) in expected.items() if want != have]


def compare_states(reply: ProbeReply, facts: TargetFacts, reference: Reference) -> list[Comparison]:
    """Return the error of each compared state of a probe against `reference`.

    Raises:
        TargetError: the reply does not hold the states that it says it holds, or they have another shape.
    """
    width, tokens = facts.hidden_size, len(reference.input_ids)
    expected = {"aux_hidden_states": (tokens, 3 * width), "last_hidden_state": (tokens, width)}
    found = {name: spec.shape for name, spec in reply.tensors.items()}
    if found != expected:
        raise TargetError(f"the probe's states: expected {expected}, found {found}")
    try:
        states = unpack(torch.frombuffer(bytearray(reply.data), dtype=torch.uint8), reply.tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a dtype, a place or bytes that are not there
        raise TargetError(f"the probe's states cannot be read ({error}) from {len(reply.data)} bytes") from error
    aux, last = states["aux_hidden_states"], states["last_hidden_state"]
    compared = []
    for place, layer in enumerate(facts.aux_layers):
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
    server: str, reply: ProbeReply, section: TargetSection, facts: TargetFacts, reference: Reference
) -> list[Comparison]:
    """Return the comparisons of a server that is the run's target.

    Raises:
        TargetError: it is not; the message names the server and everything that differs.
    """
    differences = identity_differences(reply.facts, facts, section)
    if not differences:
        compared = compare_states(reply, facts, reference)
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
