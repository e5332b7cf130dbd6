"""Any tensors, packed and unpacked, come back bit for bit; a layout that lies about itself is refused."""

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.contracts import FeatureSpec, SampleRef
from disagg_core.errors import BadInput
from disagg_core.store.packing import ALIGNMENT, DTYPES, check_layout, pack_into, plan_layout, unpack

pytestmark = pytest.mark.unit


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits, every one of them a value of the dtype."""
    bits = torch.randint(
        0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return (bits[..., 0] & 1).bool() if dtype is torch.bool else bits.view(dtype).squeeze(-1)


def packed(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, SampleRef]:
    layout = plan_layout(tensors)
    buffer = torch.full((layout.size_bytes,), 0xAB, dtype=torch.uint8)
    pack_into(buffer, tensors, layout)
    return buffer, reference(layout.specs, layout.size_bytes)


def reference(specs: dict[str, FeatureSpec], size: int) -> SampleRef:
    return SampleRef(
        sample_id="s000000001", run_id="run", attempt=1, source_task_id="s000000001", feature_store_uri="mooncake://m",
        key="run/1/s000000001/k", size_bytes=size, crc32=0, feature_specs=specs, strategy="eagle3", schema_version=1,
        target_model_version="t", draft_weight_version=0, tokenizer_version="k", vocab_map_version="v", num_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(name: str) -> None:
    tensors = {
        "plain": random_tensor(DTYPES[name], (5, 7), 0),
        "scalar": random_tensor(DTYPES[name], (), 1),
        "empty": random_tensor(DTYPES[name], (0, 3), 2),
        "transposed": random_tensor(DTYPES[name], (4, 6), 3).t(),
        "strided": random_tensor(DTYPES[name], (8, 6), 4)[::2, 1::2],
    }
    buffer, ref = packed(tensors)
    check_layout(ref)
    for key, tensor in unpack(buffer, ref.feature_specs).items():
        assert tensor.dtype == tensors[key].dtype
        assert tensor.shape == tensors[key].shape
        assert raw_bytes(tensor) == raw_bytes(tensors[key])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=6
    )
)
def test_any_mix_of_tensors_comes_back(rows: list[tuple[str, list[int], bool]]) -> None:
    tensors = {}
    for index, (dtype, shape, transposed) in enumerate(rows):
        tensor = random_tensor(DTYPES[dtype], tuple(shape), index)
        tensors[f"f{index}"] = tensor.mT if transposed and tensor.dim() >= 2 else tensor
    buffer, ref = packed(tensors)
    again, _ = packed(tensors)
    check_layout(ref)
    assert ref.size_bytes % ALIGNMENT == 0
    assert ref.size_bytes > 0
    assert torch.equal(buffer, again), "the gaps hold what was there before"
    views = unpack(buffer, ref.feature_specs)
    assert list(views) == list(tensors)
    for key, view in views.items():
        assert raw_bytes(view) == raw_bytes(tensors[key])
        assert view.data_ptr() % ALIGNMENT == buffer.data_ptr() % ALIGNMENT or not view.numel()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(3, 3).to_sparse(),
        [1, 2, 3],
    ],
    ids=["complex", "sparse", "list"],
)
def test_what_cannot_be_stored_is_named(value: object) -> None:
    with pytest.raises(BadInput, match="aux"):
        plan_layout({"aux": value})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"offset": 64}, "offset 0"),
        ({"nbytes": 99}, "40 bytes at offset 0"),
        ({"shape": (11,)}, "44 bytes"),
        ({"shape": (-1,)}, "extents"),
        ({"dtype": "float33"}, "float33"),
        ({"dtype": "float64"}, "80 bytes"),
    ],
)
def test_a_layout_that_disagrees_with_itself_is_refused(change: dict[str, object], complaint: str) -> None:
    _, ref = packed({"aux": torch.zeros(10)})
    wrong = msgspec.structs.replace(ref.feature_specs["aux"], **change)
    with pytest.raises(BadInput, match=complaint):
        check_layout(msgspec.structs.replace(ref, feature_specs={"aux": wrong}))


def test_a_layout_that_disagrees_with_the_size_is_refused() -> None:
    _, ref = packed({"aux": torch.zeros(10)})
    with pytest.raises(BadInput, match=r"64 bytes.* 128"):
        check_layout(msgspec.structs.replace(ref, size_bytes=128))
