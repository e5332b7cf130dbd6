"""The checksum on several threads is zlib's, for every length."""

import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagg_core.store import checksum
from disagg_core.store.checksum import PART, combine, crc32, crc32_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [0, 1, PART - 1, PART, 2 * PART, 3 * PART + 17, 7 * PART - 1])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_it_is_zlibs_number(length: int, threads: int) -> None:
    data = random.Random(length).randbytes(length)
    with ThreadPoolExecutor(4) as executor:
        assert crc32(memoryview(data), executor, threads) == zlib.crc32(data)
        assert crc32(memoryview(bytearray(data)), executor, threads) == zlib.crc32(data)


def test_it_is_zlibs_number_with_and_without_libdeflate(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(200_000)
    for offset in (0, 1, 7, 100):
        assert crc32_of(memoryview(bytearray(data))[offset:]) == zlib.crc32(data[offset:])
    monkeypatch.setattr(checksum, "_libdeflate_crc32", None)
    assert crc32_of(memoryview(bytearray(data))) == zlib.crc32(data)


def test_two_checksums_combine() -> None:
    rng = random.Random(0)
    for _ in range(50):
        first, second = rng.randbytes(rng.randrange(200)), rng.randbytes(rng.randrange(5000))
        assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
