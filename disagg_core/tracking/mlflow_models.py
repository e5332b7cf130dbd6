"""The champion in MLflow's model registry: a version of the registered model for each that was promoted, one alias.

The gate's promotions go there with their runs (`disagg_core.tracking.mlflow_run`); those by hand, and rollbacks, with
the command that makes them. What a move is mirrored to stands in the document of the run that made the version.
"""

from __future__ import annotations

import os
from typing import Any

from disagg_core.errors import DraftlineError, FailureClass
from disagg_core.registry.versions import Version
from disagg_core.run_spec.results import TrackingSection
from disagg_core.tracking.trackers import check_trackers

CHAMPION = "champion"
"""The alias of the champion's version."""
RUN_ID = "draftline.run_id"
"""The tag of a run's id, on runs and versions."""
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""What MLflow's client is told where somebody else asks again: by itself it keeps at it for minutes."""
_SOURCE = "draftline.source"


class MirrorFailed(DraftlineError):
    """MLflow's registry was not told of a move of the champion, which has happened all the same."""

    failure_class: FailureClass = "infrastructure"


def mirror_champion(version: Version, source: str) -> str | None:
    """Make the champion, however it became that, the one of MLflow's registry too; return the model's name there.

    `source` is where the version lies. None where the document of its run asks for no mirror.

    Raises:
        MissingLibrary: mlflow is not installed here.
        BadInput: the server has no address here.
        MirrorFailed: the server does not answer, or refuses.
    """
    section = TrackingSection.model_validate(version.provenance.document.get("tracking", {})).mlflow
    if section is None or section.registered_model is None:
        return None
    check_trackers(TrackingSection(tensorboard=False, mlflow=section))
    os.environ.update({name: value for name, value in IMPATIENT.items() if name not in os.environ})
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client: Any = MlflowClient(section.uri)
    run_id = version.provenance.run_id
    try:
        experiment = client.get_experiment_by_name(section.experiment)
        run = find_run(client, experiment.experiment_id, run_id) if experiment is not None else None
        make_champion(client, section.registered_model, source=source, label=version.label, run_id=run_id, run=run)
    except MlflowException as error:
        raise MirrorFailed(
            f"MLflow's model {section.registered_model} was not told that {version.label} is the champion: {error}; "
            "draftline drafts mirror tells it again"
        ) from error
    return section.registered_model


def find_run(client: Any, experiment_id: str, run_id: str) -> str | None:
    """Return MLflow's id of the run of ours that is called `run_id`; None if the server has none."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_ID}` = '{run_id}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def make_champion(client: Any, model: str, *, source: str, label: str, run_id: str, run: str | None) -> None:
    """Make the version at `source` one of the registered model, if it is not, and the champion among them.

    Args:
        client: of MLflow.
        model: name of the registered model, which is made if there is none.
        source: where the version lies.
        label: what it is called in our registry.
        run_id: of our run that made it.
        run: what MLflow calls that run, if it has it.
    """
    if not client.search_registered_models(f"name = '{model}'", max_results=1):
        client.create_registered_model(model, description="Drafts that draftline has promoted")
    known = client.search_model_versions(f"name = '{model}' and tag.`{_SOURCE}` = '{source}'", max_results=1)
    if known:
        version = known[0].version
    else:
        # A server refuses a directory as the source of a version, so it gets a scheme of ours.
        address = source if "://" in source else f"draftline:{source}"
        tags = {_SOURCE: source, "draftline.version": label, RUN_ID: run_id}
        made = client.create_model_version(model, source=address, run_id=run, tags=tags, await_creation_for=0)
        version = made.version
    client.set_registered_model_alias(model, CHAMPION, version)
