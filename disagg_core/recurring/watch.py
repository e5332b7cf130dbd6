"""What calls for another draft: a target that changed, data that arrived, a server that accepts less than it did."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx

from disagg_core.errors import TargetUnavailable
from disagg_core.recurring.night import assess
from disagg_core.recurring.preparation import situation_of
from disagg_core.registry.references import open_registry, registry_name
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import Settings

_TIMEOUT_S = 10.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(?P<value>[-+.\deE]+|NaN|[-+]?Inf)")


@dataclass(frozen=True)
class Sighting:
    """An event that is to be emitted, of which target, and what was seen."""

    event: str
    target: str
    reason: str


def watch(spec: RunSpec, settings: Settings, server: str | None, drop: float) -> list[Sighting]:
    """Return what calls for another draft than the champion: nothing where there is none, which a first night makes.

    Raises:
        BadInput: target, tokenizer or source of the prompts cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
        TargetUnavailable: the server does not answer, or has no metrics of speculative decoding.
    """
    registry, target = open_registry(spec, settings), registry_name(spec)
    champion = registry.champion()
    if champion is None:
        return []
    seen = []
    situation = situation_of(spec)
    if differences := situation.differences(champion.provenance):
        seen.append(Sighting("draftline.target.changed", target, "; ".join(differences)))
    night = assess(spec, registry, situation, cache=settings.home / "sources")
    if night.skipped is None and night.fresh is None:
        seen.append(Sighting("draftline.data.arrived", target, f"{night.new} prompts since {champion.label}"))
    expected = champion.provenance.accept_length
    if server is not None and expected is not None:
        found = served_accept_length(server)
        if found is not None and found < expected * (1 - drop):
            reason = f"{found:.3f} on {server}, {expected:.3f} when {champion.label} was promoted"
            seen.append(Sighting("draftline.accept_length.dropped", target, reason))
    return seen


def served_accept_length(url: str) -> float | None:
    """Return the accept length that a server says of itself, by its Prometheus metrics; None before it decoded.

    SGLang has it as a gauge (``sglang:spec_accept_length``), vLLM as counters of drafts and of accepted tokens.

    Raises:
        TargetUnavailable: the server does not answer, or has no metrics of speculative decoding.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", timeout=_TIMEOUT_S, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise TargetUnavailable(
            f"{url}/metrics does not answer: {error}; SGLang has it with --enable-metrics"
        ) from error
    return accept_length_of(answer.text, url)


def accept_length_of(metrics: str, url: str) -> float | None:
    """Return the accept length in the text of a server's metrics; several engines of one server together.

    Raises:
        TargetUnavailable: there is none.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for line in metrics.splitlines():
        if (sample := _SAMPLE.match(line)) is not None:
            name = sample["name"].removesuffix("_total")
            sums[name] = sums.get(name, 0.0) + float(sample["value"])
            counts[name] = counts.get(name, 0) + 1
    gauge = "sglang:spec_accept_length"
    if gauge in sums:
        return sums[gauge] / counts[gauge] or None
    drafts, accepted = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
    if drafts in sums:
        return 1 + sums.get(accepted, 0.0) / sums[drafts] if sums[drafts] else None
    raise TargetUnavailable(f"{url}/metrics: expected {gauge} or {drafts}, found neither: is a draft served there?")
