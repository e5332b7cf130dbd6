"""The watch over recurring training: what calls for another draft becomes an event. Pool ``orchestrator``."""

from __future__ import annotations

from prefect import flow
from prefect.events import emit_event
from prefect.logging import get_run_logger

from disagg_core.run_spec.document import RunSpec
from tasks.watch import look, remember


@flow(name="draft-watch", flow_run_name="watch over {spec.run.name}")
def draft_watch(spec: RunSpec, server: str | None = None, drop: float = 0.1) -> list[str]:
    """Emit ``draftline.target.changed``, ``draftline.data.arrived`` and ``draftline.accept_length.dropped``.

    `spec` is the document of recurring training. `server` is an SGLang or vLLM server that serves the champion, whose
    metrics are read: its accept length has dropped if it is lower than the champion's by more than the share `drop`.
    What lasts is told once, not at every look. Returns the names of the events.
    """
    sightings = look(spec, server, drop)
    for sighting in sightings:
        get_run_logger().info("%s: %s", sighting.event, sighting.reason)
        emit_event(
            event=sighting.event,
            resource={
                "prefect.resource.id": f"draftline.draft.{sighting.target}",
                "prefect.resource.name": spec.run.name,
            },
            payload={"reason": sighting.reason},
        )
    remember(spec, sightings)
    return [sighting.event for sighting in sightings]
