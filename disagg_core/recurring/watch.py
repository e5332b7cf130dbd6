"""What calls for another draft: a target that changed, data that arrived, a server that accepts less than it did."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import httpx

from disagg_core.errors import TargetUnavailable
from disagg_core.recurring.night import Night, Situation, assess
from disagg_core.recurring.preparation import situation_of
from disagg_core.recurring.sighting import Marks, Sighting, Told
from disagg_core.registry.references import open_registry, registry_name
from disagg_core.registry.versions import Version
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import Settings

_TIMEOUT_S = 10.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(?P<value>[-+.\deE]+|NaN|[-+]?Inf)")


def watch(spec: RunSpec, settings: Settings, server: str | None, drop: float) -> list[Sighting]:
    """Return what calls for another draft than the champion and was not told yet; see `remember`.

    Nothing where there is no champion, which a first night makes. What is over is told anew when it comes back.

    Raises:
        BadInput: target, tokenizer or source of the prompts cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
        TargetUnavailable: the server does not answer, or has no metrics of speculative decoding.
    """
    assert spec.recurring is not None
    registry = open_registry(spec, settings)
    champion = registry.champion()
    if champion is None:
        return []
    look = _Look(registry_name(spec), champion)
    situation = situation_of(spec)
    look.at_target(situation)
    look.at_data(assess(spec, registry, situation, cache=settings.home / "sources"))
    if server is not None:
        look.at_server(server, served_accept_length(server), drop)
    marks = Marks(registry.place)
    for condition in look.over:
        marks.clear(condition)
    return [seen for seen in look.seen if marks.is_news(seen, worth_telling=spec.recurring.min_new_prompts)]


def remember(spec: RunSpec, settings: Settings, told: Sequence[Sighting]) -> None:
    """Keep in the registry what was told, so that it is not told again while it lasts.

    Raises:
        StorageFailed, StorageUnusable: the registry does not answer.
    """
    marks = Marks(open_registry(spec, settings).place)
    for sighting in told:
        marks.keep(sighting)


class _Look:
    """What a look at target, data and server finds: conditions that call for another draft, and those that are over."""

    def __init__(self, target: str, champion: Version) -> None:
        self.seen: list[Sighting] = []
        self.over: list[str] = []
        self._target = target
        self._champion = champion

    def at_target(self, situation: Situation) -> None:
        """See whether the champion was made for something else than the document says by now."""
        differences = "; ".join(situation.differences(self._champion.provenance))
        self._take("draftline.target.changed", differences, Told(about=f"{self._champion.label}: {differences}"))

    def at_data(self, night: Night) -> None:
        """See whether there are enough new prompts."""
        enough = night.skipped is None and night.fresh is None
        label, reason = self._champion.label, f"{night.new} prompts since {self._champion.label}" if enough else ""
        self._take("draftline.data.arrived", reason, Told(about=label, prompts=night.mark.prompts))

    def at_server(self, url: str, found: float | None, drop: float) -> None:
        """See whether a server accepts less than the champion did; one that has not decoded yet says nothing."""
        expected = self._champion.provenance.accept_length
        if expected is None or found is None:
            return
        label, reason = self._champion.label, ""
        if found < expected * (1 - drop):
            reason = f"{found:.3f} on {url}, {expected:.3f} when {label} was promoted"
        of_server = hashlib.sha256(url.encode()).hexdigest()[:12]
        self._take("draftline.accept_length.dropped", reason, Told(about=f"{label} on {url}"), of_server)

    def _take(self, event: str, reason: str, told: Told, part: str = "") -> None:
        """Take a condition that lasts, for a `reason`, or is over, without one."""
        condition = f"{event}-{part}" if part else event
        if reason:
            self.seen.append(Sighting(event, self._target, reason, condition, told))
        else:
            self.over.append(condition)


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
