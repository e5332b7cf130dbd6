"""The plain records that every room passes around: prompts, sample references, identities and totals.

Nothing here holds or imports a tensor. The records travel through the reference channel as JSON, so they are
`msgspec` structs: frozen, strict about unknown fields, and fast enough for a stream of references.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

SCHEMA_VERSION = 1
"""Version of `SampleRef`. A reader refuses a reference of any other version."""
IDENTITY_FIELDS = ("strategy", "target_model_version", "tokenizer_version", "vocab_map_version")
"""The versions that a reference carries, and that must equal those of the `RunIdentity` that it is read under."""


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of each dtype that a target may compute in."""


@dataclass(frozen=True)
class Capture:
    """What is captured of a target for each token of a sample: a draft method says it, every engine does it.

    `layers` are decoder layers by 0-based index, ascending; of each the output is taken, the residual stream after the
    layer (Hugging Face's ``hidden_states[layer + 1]``). `last_hidden_state` adds the state after the final norm, from
    which the target's logits follow.
    """

    layers: tuple[int, ...]
    last_hidden_state: bool

    def features(self, tokens: int, hidden_size: int, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each tensor of a sample of `tokens` tokens, by name, in the order of packing.

        ``input_ids`` [T] int32, ``loss_mask`` [T] uint8, ``aux_hidden_states`` [T, layers * H] (the layers side by
        side, low to high) and, where it is captured, ``last_hidden_state`` [T, H], both in the target's dtype.
        """
        features: dict[str, tuple[tuple[int, ...], str]] = {
            "input_ids": ((tokens,), "int32"),
            "loss_mask": ((tokens,), "uint8"),
            "aux_hidden_states": ((tokens, len(self.layers) * hidden_size), dtype),
        }
        if self.last_hidden_state:
            features["last_hidden_state"] = ((tokens, hidden_size), dtype)
        return features

    def bytes_per_token(self, hidden_size: int, dtype: str) -> int:
        """Return the stored bytes of one token: int32 id, uint8 mask, and a state for each thing captured."""
        return 4 + 1 + (len(self.layers) + self.last_hidden_state) * hidden_size * DTYPE_BYTES[dtype]


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one tensor lies inside a sample's packed buffer.

    `dtype` is torch's name without the ``torch.`` prefix (``bfloat16``); `offset` and `nbytes` are in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class SampleRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tensor-free reference to one captured sample in the feature store.

    `feature_specs` describes the packed buffer of `size_bytes` bytes stored under `key` of the store at
    `feature_store_uri`; `crc32` is zlib's checksum of that buffer, or None when checksums are switched off.
    `sample_id` is the same in every attempt of a run; `key` is fresh for every try to store the sample.
    `metadata` is for people: nothing may depend on it.
    """

    sample_id: str
    run_id: str
    attempt: int
    source_task_id: str
    feature_store_uri: str
    key: str
    size_bytes: int
    crc32: int | None
    feature_specs: dict[str, FeatureSpec]
    strategy: str
    schema_version: int
    target_model_version: str
    draft_weight_version: int
    tokenizer_version: str
    vocab_map_version: str
    num_tokens: int
    metadata: dict[str, str | int | float | bool | None] = {}


class PromptTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt, tokenised, as leased to a rollout worker.

    `ordinal` is its place in the run's seeded order over all epochs and the root of its sample id. `input_ids` and
    `loss_mask` have the same length; the mask holds 1 where a token may be trained on. With generation switched on
    `input_ids` end where the target continues, and `continuation` holds how it did if that is known already.
    """

    ordinal: int
    source: str
    input_ids: list[int]
    loss_mask: list[int]
    continuation: list[int] | None = None

    @property
    def sample_id(self) -> str:
        """The id of the sample that is captured from the prompt."""
        return sample_id_of(self.ordinal)


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be equal between the process that captured a sample and the one that trains on it."""

    run_id: str
    attempt: int
    strategy: str
    target_model_version: str
    tokenizer_version: str
    vocab_map_version: str
    draft_weight_version: int
    capture: Capture
    dtype: str


class StreamTotals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the end-of-stream record says: everything that the producer did in its attempt.

    `prompts` counts those taken in this attempt, so that ``prompts == refs + rejected`` at a clean end;
    `bytes` is the sum of the references' `size_bytes`.
    """

    refs: int
    bytes: int
    prompts: int
    rejected: int


def sample_id_of(ordinal: int) -> str:
    """Return the sample id of the prompt at `ordinal`: the same in every attempt."""
    return f"s{ordinal:09d}"


def ordinal_of(sample_id: str) -> int:
    """Return the prompt ordinal that `sample_id` was made from.

    Raises:
        ValueError: the id was not made by `sample_id_of`.
    """
    if not (sample_id.startswith("s") and sample_id[1:].isdigit()):
        raise ValueError(f"expected a sample id such as s000000001, found {sample_id!r}")
    return int(sample_id[1:])


def assert_no_tensors(obj: object) -> None:
    """Raise `TypeError`, with the path to it, if `obj` holds anything but plain, tensor-free data.

    Guards the control plane: what passes may be encoded as JSON without moving sample data through it.
    """
    for path, leaf in _leaves(obj, "ref"):
        if not isinstance(leaf, (str, int, float, bool, type(None))):
            raise TypeError(
                f"{path} holds a {type(leaf).__module__}.{type(leaf).__qualname__}; the reference channel carries "
                "metadata only: put tensors into the feature store and publish the reference"
            )


def _leaves(obj: Any, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(obj, msgspec.Struct):
        for name in obj.__struct_fields__:
            yield from _leaves(getattr(obj, name), f"{path}.{name}")
    elif isinstance(obj, Mapping):
        for key, value in obj.items():
            yield from _leaves(key, f"{path} key")
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for position, value in enumerate(obj):
            yield from _leaves(value, f"{path}[{position}]")
    else:
        yield path, obj
