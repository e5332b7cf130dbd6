"""The records of the control plane: they carry metadata only, and refuse everything else."""

from __future__ import annotations

import msgspec
import pytest
import torch

from disagg_core.contracts import FeatureSpec, SampleRef, assert_no_tensors, ordinal_of, sample_id_of

pytestmark = pytest.mark.unit


def a_ref(**changes: object) -> SampleRef:
    fields = {
        "sample_id": sample_id_of(7),
        "run_id": "run",
        "attempt": 1,
        "source_task_id": "prompts.jsonl:8",
        "feature_store_uri": "mooncake://127.0.0.1:50051",
        "key": "run/1/s000000007/abc",
        "size_bytes": 64,
        "crc32": 5,
        "feature_specs": {"input_ids": FeatureSpec(shape=(4,), dtype="int32", offset=0, nbytes=16)},
        "strategy": "eagle3",
        "schema_version": 1,
        "target_model_version": "t",
        "draft_weight_version": 0,
        "tokenizer_version": "k",
        "vocab_map_version": "v",
        "num_tokens": 4,
    }
    return SampleRef(**{**fields, **changes})


def test_a_ref_survives_the_wire() -> None:
    ref = a_ref(metadata={"server": "a", "seconds": 0.5})
    assert msgspec.json.decode(msgspec.json.encode(ref), type=SampleRef) == ref


def test_a_ref_with_an_unknown_field_is_refused() -> None:
    document = msgspec.to_builtins(a_ref()) | {"surprise": 1}
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.convert(document, SampleRef)


def test_a_tensor_anywhere_is_found_and_its_place_is_named() -> None:
    assert_no_tensors(a_ref())
    with pytest.raises(TypeError, match=r"ref\.metadata\['hidden'\] holds a torch.Tensor"):
        assert_no_tensors(a_ref(metadata={"hidden": torch.zeros(1)}))


@pytest.mark.parametrize("ordinal", [0, 9, 123456789, 10**9])
def test_a_sample_id_leads_back_to_its_prompt(ordinal: int) -> None:
    assert ordinal_of(sample_id_of(ordinal)) == ordinal


@pytest.mark.parametrize("name", ["", "7", "s", "sx", "t000000001"])
def test_other_names_are_no_sample_ids(name: str) -> None:
    with pytest.raises(ValueError, match="expected a sample id"):
        ordinal_of(name)
