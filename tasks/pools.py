"""The work pools of a run, looked at before it starts: are there workers, deployments and free slots for its roles?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound

from disagg_core.errors import DraftlineError, FailureClass
from disagg_core.processes.retry import wait_until
from disagg_core.run_spec.document import RunSpec

_LOOK_S = 10.0
"""Workers that were started together with the run have registered by then; a slot may come free."""
_POLL_S = 1.0


class PoolsNotReady(DraftlineError):
    """A role of the run would find no worker, no deployment or no free slot; each pool and the way out are named."""

    failure_class: FailureClass = "infrastructure"


def check_pools(spec: RunSpec, *, trained: bool = False, in_turn: bool = True, timeout_s: float = _LOOK_S) -> None:
    """Check that the roles of a run can start on their work pools, within `timeout_s` seconds.

    Of a run that is `trained` only the evaluation is left. One that is not `in_turn` yet waits for other runs of ours
    (`tasks.run_slot`), which may hold the slots that it needs.

    Raises:
        PoolsNotReady: they cannot.
    """
    faults: list[str] = []
    with get_client(sync_client=True) as client:

        def ready() -> bool:
            faults[:] = _faults(client, spec, trained, in_turn)
            return not faults

        if not wait_until(ready, timeout_s=timeout_s, every_s=_POLL_S):
            raise PoolsNotReady("; ".join(faults))


def _faults(client: SyncPrefectClient, spec: RunSpec, trained: bool, in_turn: bool) -> Iterator[str]:
    pools = spec.orchestration.pools
    roles: list[tuple[str, str]] = []
    at_once: Counter[str] = Counter()
    if not trained:
        roles += [("rollout-producer", pools.rollout), ("train-consumer", pools.train)]
        at_once[pools.rollout] += 1
        at_once[pools.train] += spec.training.nodes
    if spec.evaluation.measured:
        roles.append(("draft-evaluation", pools.rollout))
        at_once[pools.rollout] = max(1, at_once[pools.rollout])
    for pool, slots in at_once.items():
        yield from _pool_faults(client, pool, slots, in_turn)
    for flow, pool in roles:
        try:
            client.read_deployment_by_name(f"{flow}/{pool}")
        except ObjectNotFound:
            yield f"there is no deployment {flow}/{pool}; register it: draftline register"


def _pool_faults(client: SyncPrefectClient, name: str, slots: int, in_turn: bool) -> Iterator[str]:
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        yield f"there is no work pool {name}; register it (draftline register), or name another in orchestration.pools"
        return
    if pool.is_paused:
        yield f"the work pool {name} is paused; resume it: prefect work-pool resume {name}"
    elif not (pool.is_push_pool or pool.is_managed_pool):
        workers = client.read_workers_for_work_pool(name)
        if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
            yield f"the work pool {name} has no worker online; start one: prefect worker start --pool {name}"
    taken = (pool.active_slots or 0) if in_turn else 0
    free = None if pool.concurrency_limit is None else pool.concurrency_limit - taken
    if free is not None and free < slots:
        yield (
            f"the work pool {name} has {free} of {pool.concurrency_limit} slots free, this run needs {slots} at once: "
            f"wait for the runs that hold them, or raise the limit: prefect work-pool set-concurrency-limit {name} N"
        )
