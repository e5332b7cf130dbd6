"""Checking everything that can be checked before a GPU is held, and fixing the plan of the run."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_plan
from disagg_core.run.plan import RunPlan, run_id_of
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings
from tasks.heartbeat import check_heartbeat
from tasks.pools import check_pools


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
def preflight(spec: RunSpec) -> RunPlan:
    """Resolve the run document into a plan and write it into the run's directory.

    Of a run whose training is complete the plan is the one that is there: nothing is read, captured or trained again.
    One that the gate has decided about needs no pool either.

    Raises:
        BadInput: something in the spec, the prompts, the target, the store or this process cannot work; nothing was
            started.
    """
    from disagg_core.checks.preflight import prepare_run

    def beats() -> None:
        check_heartbeat(get_current_settings().flows.heartbeat_frequency)

    run_id = run_id_of(spec, flow_run.id)
    run_dir = RunDir.of(get_settings().runs_dir, run_id)
    if run_dir.completion.is_file():
        get_run_logger().info("run %s: the training is complete; what is left is archive and evaluation", run_id)
        beats()
        plan = read_plan(run_dir)
        if not run_dir.gate.is_file():
            check_pools(plan.spec, trained=True, in_turn=False)
    else:
        plan = prepare_run(spec, run_id, get_settings(), also=(beats, lambda: check_pools(spec, in_turn=False)))
    plan.dir.report.unlink(missing_ok=True)  # of an earlier process of this run, which was cut off
    get_run_logger().info(
        "run %s: %s prompts, %s steps, in %s", run_id, plan.total_prompts, plan.total_steps, plan.root
    )
    return plan
