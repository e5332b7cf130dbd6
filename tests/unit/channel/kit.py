"""What the tests of the reference channel share: references, identities of dead processes, bounded waits, a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from disagg_core.channel.liveness import ProcessIdentity
from disagg_core.contracts import FeatureSpec, SampleRef, StreamTotals, sample_id_of

_SPECS = {
    name: FeatureSpec(shape=(512, 2048), dtype="bfloat16", offset=place * 2048, nbytes=2048)
    for place, name in enumerate(("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"))
}
_dead_pids = count(1 << 23)  # above the kernel's largest pid


def make_ref(ordinal: int, *, run_id: str = "local", attempt: int = 1, **changes: object) -> SampleRef:
    fields: dict[str, object] = {
        "sample_id": sample_id_of(ordinal),
        "run_id": run_id,
        "attempt": attempt,
        "source_task_id": sample_id_of(ordinal),
        "feature_store_uri": "mooncake://127.0.0.1:50051",
        "key": f"{run_id}/{attempt}/{ordinal}",
        "size_bytes": 1000 + ordinal % 7,
        "crc32": 12345,
        "feature_specs": _SPECS,
        "strategy": "eagle3",
        "schema_version": 1,
        "target_model_version": "target-1",
        "draft_weight_version": 0,
        "tokenizer_version": "tok-1",
        "vocab_map_version": "vocab-1",
        "num_tokens": 512,
    }
    return SampleRef(**{**fields, **changes})  # type: ignore[arg-type]


def make_refs(*ordinals: int, **fields: object) -> list[SampleRef]:
    return [make_ref(ordinal, **fields) for ordinal in range(*ordinals)]  # type: ignore[arg-type]


def totals_of(refs: Iterable[SampleRef], rejected: int = 0) -> StreamTotals:
    sizes = [ref.size_bytes for ref in refs]
    return StreamTotals(refs=len(sizes), bytes=sum(sizes), prompts=len(sizes) + rejected, rejected=rejected)


def ids(refs: Iterable[SampleRef]) -> list[str]:
    return [ref.sample_id for ref in refs]


def names(*ordinals: int) -> list[str]:
    return [sample_id_of(ordinal) for ordinal in range(*ordinals)]


def dead_process() -> ProcessIdentity:
    """A process of this machine that is not running, a different one each time."""
    return replace(ProcessIdentity.mine(), pid=next(_dead_pids))


def elsewhere() -> ProcessIdentity:
    """A process on a machine that we cannot look into."""
    return replace(ProcessIdentity.mine(), host="other-host", boot="another-boot", pid=next(_dead_pids))


@dataclass
class FakeClock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def drain(poll: Callable[[int], Sequence[SampleRef]], at_once: int = 7) -> list[SampleRef]:
    """Poll until nothing more comes."""
    found: list[SampleRef] = []
    while refs := poll(at_once):
        found += refs
    return found
