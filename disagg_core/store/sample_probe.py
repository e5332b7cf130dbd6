"""One sample through a store and back: the check before a run, and of `draftline doctor`."""

from __future__ import annotations

import time

import torch

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.errors import SampleLost
from disagg_core.store.mooncake import MooncakeFeatureStore

_NUMBERS = 4096


def round_trip(store: MooncakeFeatureStore) -> float:
    """Put a small sample into `store`, read it back, compare it, and remove it; return the seconds that took.

    It goes the way that samples go, with the client's protocol and checksum, to an owner's memory and back. The
    namespace of `store` is the client's own, so a probe leaves nothing that a run could meet.

    Raises:
        SampleLost: the sample was lost, or did not come back as it was put, or could not be removed.
        StoreUnavailable: the master or an owner does not answer.
        StoreFull: there is no room for it.
    """
    run_id, _, attempt = store.namespace.rpartition("/")
    identity = RunIdentity(
        run_id=run_id,
        attempt=int(attempt),
        strategy="probe",
        target_model_version="",
        tokenizer_version="",
        vocab_map_version="",
        draft_weight_version=0,
        capture=Capture((0,), last_hidden_state=False),
        dtype="int32",
    )
    sample = torch.randint(-(2**31), 2**31, (_NUMBERS,), dtype=torch.int32)
    began = time.perf_counter()
    ref = store.put("s000000000", {"probe": sample}, identity=identity, source_task_id="probe", num_tokens=1)
    try:
        found = store.get(ref)["probe"]
    finally:
        store.release(ref)
    spent = time.perf_counter() - began
    where = f"the store at {store.endpoints.master_address}"
    if not torch.equal(found, sample):
        raise SampleLost(f"{where}: a sample came back changed; expected {_NUMBERS} numbers as they were put")
    if left := store.key_count():
        raise SampleLost(f"{where}: expected the sample to be gone after its removal, found {left} keys of it")
    return spent
