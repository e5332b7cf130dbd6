"""A run again, from its archived document: the same document, and proof that it would meet the same world.

What a document cannot say for ever is fixed by what the run was planned with: a hub model's commit stands in the
document, a continued draft becomes the version that the champion was then. The data, the target and the tokenizer are
compared with what they were before anything is started: with another one the run would be another.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from disagg_core.errors import BadInput
from disagg_core.report.differences import compare
from disagg_core.run.known import OtherVersion
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import parse_spec, with_overrides
from disagg_core.storage.place import Place

_WORLD = {"target", "tokenizer_version", "data", "total_prompts"}


class NotRepeatable(BadInput):
    """A run cannot be repeated here: what is not as it was is named, with what it was."""


def archived_plan(place: Place) -> RunPlan:
    """Return the plan of the run whose archive or directory is at `place`.

    Raises:
        BadInput: there is none.
        OtherVersion: another version of draftline wrote it.
    """
    try:
        return RunPlan.model_validate_json(place.read("run.json"))
    except FileNotFoundError:
        raise BadInput(f"{place.url}: expected a run's archive with run.json, found none") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise OtherVersion(
            f"{place.url}/run.json: written by another version of draftline ({where}: {first['msg']}); repeat it with "
            "that one"
        ) from error


def repeated_spec(plan: RunPlan, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the document that runs what `plan` has run, changed by `overrides` (``section.key=value``).

    Raises:
        SpecError: an override does not fit.
    """
    document = plan.spec.model_dump(mode="json")
    for draft in [document["draft"]] if document["draft"] is not None else document["drafts"]:
        continued = plan.warm_starts.get(draft["init_from"] or "")
        if continued is not None:
            draft["init_from"] = continued.pinned
    return parse_spec(with_overrides(document, overrides), source=f"the document of run {plan.run_id}")


def check_repeats(known: RunPlan, planned: RunPlan) -> None:
    """Check that `planned` would read and train on what `known` did.

    Raises:
        NotRepeatable: the target, the tokenizer, or the data is another; each difference is named.
    """
    was, now = (plan.model_dump(mode="json", include=_WORLD) for plan in (known, planned))
    differences = compare(was, now)
    if differences:
        listed = "; ".join(f"{found.what}: expected {found.one}, found {found.other}" for found in differences)
        raise NotRepeatable(
            f"run {known.run_id} cannot be repeated here: {listed}. Put it back as it was, or change what is meant to "
            "differ with --set, and it is a run of its own"
        )
