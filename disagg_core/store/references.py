"""Which references a store makes and which it accepts: run, attempt, schema, versions and layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from disagg_core.contracts import IDENTITY_FIELDS, SCHEMA_VERSION, RunIdentity, SampleRef
from disagg_core.errors import BadInput, StoreMisuse
from disagg_core.store.packing import Layout, check_layout

Metadata = Mapping[str, str | int | float | bool | None]

_REGEX_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}])")


@dataclass(frozen=True)
class NewSample:
    """One sample to be put; the fields mean what they mean in `MooncakeFeatureStore.put`."""

    sample_id: str
    tensors: Mapping[str, Tensor]
    source_task_id: str
    num_tokens: int
    metadata: Metadata = field(default_factory=dict)


def make_reference(
    sample: NewSample, layout: Layout, key: str, crc: int | None, identity: RunIdentity, uri: str
) -> SampleRef:
    """Return the reference of a sample that is stored under `key` of the store at `uri`."""
    return SampleRef(
        sample_id=sample.sample_id,
        run_id=identity.run_id,
        attempt=identity.attempt,
        source_task_id=sample.source_task_id,
        feature_store_uri=uri,
        key=key,
        size_bytes=layout.size_bytes,
        crc32=crc,
        feature_specs=layout.specs,
        strategy=identity.strategy,
        schema_version=SCHEMA_VERSION,
        target_model_version=identity.target_model_version,
        draft_weight_version=identity.draft_weight_version,
        tokenizer_version=identity.tokenizer_version,
        vocab_map_version=identity.vocab_map_version,
        num_tokens=sample.num_tokens,
        metadata=dict(sample.metadata),
    )


def check_identity(identity: RunIdentity, namespace: str) -> None:
    """Refuse to store what was captured for another run or attempt.

    Raises:
        StoreMisuse: `identity` is not of `namespace`.
    """
    if f"{identity.run_id}/{identity.attempt}" != namespace:
        raise StoreMisuse(
            f"expected an identity of {namespace}, found run {identity.run_id!r} attempt {identity.attempt}; "
            "open a store with the namespace of the attempt"
        )


def check_key(ref: SampleRef, namespace: str) -> None:
    """Refuse a reference whose key, run or attempt is not of `namespace`.

    Raises:
        StoreMisuse: with what was expected and what was found.
    """
    if not ref.key.startswith(f"{namespace}/") or f"{ref.run_id}/{ref.attempt}" != namespace:
        raise StoreMisuse(
            f"sample {ref.sample_id}: expected a reference of {namespace}, found run {ref.run_id!r} attempt "
            f"{ref.attempt} with key {ref.key}; a reference lives as long as its attempt"
        )


def check_reference(ref: SampleRef, namespace: str, expected: RunIdentity | None) -> None:
    """Refuse a reference that this store may not read.

    Raises:
        StoreMisuse: it is of another run or attempt.
        BadInput: it is of another schema, its versions are not those of `expected`, or its layout disagrees with its
            size.
    """
    check_key(ref, namespace)
    if ref.schema_version != SCHEMA_VERSION:
        raise BadInput(
            f"sample {ref.sample_id}: expected schema version {SCHEMA_VERSION}, found {ref.schema_version}; "
            "run the same version of draftline on both sides"
        )
    for name in IDENTITY_FIELDS if expected is not None else ():
        wanted, found = getattr(expected, name), getattr(ref, name)
        if found != wanted:
            raise BadInput(
                f"sample {ref.sample_id}: expected {name} {wanted!r}, found {found!r}; producer and consumer of a run "
                "must use the same target, tokenizer and vocabulary map"
            )
    check_layout(ref)


def pattern_of(prefix: str) -> str:
    """Return the regular expression (ECMAScript, as Mooncake reads it) of all keys whose first parts are `prefix`."""
    escaped = _REGEX_SPECIAL.sub(r"\\\1", prefix.rstrip("/"))
    return f"^{escaped}/"
