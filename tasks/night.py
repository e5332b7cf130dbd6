"""The first step of recurring training: what is new, and what is to be done about it."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from disagg_core.run.directory import RunDir
from disagg_core.run.plan import run_id_of
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings
from tasks.reporting import emit_for


@task(name="night", task_run_name="what is new", cache_policy=NO_CACHE)
def what_is_new(spec: RunSpec) -> tuple[RunSpec, str | None]:
    """Return the document that is run tonight, and why nothing is; without `recurring` the document is `spec`.

    Raises:
        BadInput: target, tokenizer or source of the prompts cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
    """
    if spec.recurring is None:
        return spec, None
    from disagg_core.recurring.preparation import prepare_night

    settings = get_settings()
    run_id = run_id_of(spec, flow_run.id)
    night = prepare_night(spec, RunDir.of(settings.runs_dir, run_id), settings)
    get_run_logger().info("run %s: %s", run_id, night.describe())
    if night.skipped is not None:
        emit_for(run_id, "skipped", reason=night.skipped)
    return night.spec, night.skipped
