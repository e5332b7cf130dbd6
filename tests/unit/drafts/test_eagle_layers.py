"""Which layers of a target an EAGLE-3 draft reads."""

from __future__ import annotations

import pytest

from disagg_core.drafts.eagle_layers import check_layers, default_layers
from disagg_core.errors import TargetError

pytestmark = pytest.mark.unit


def test_capture_layers_are_the_usual_ones_and_never_the_last() -> None:
    assert default_layers(32) == (1, 15, 28)
    assert default_layers(36) == (1, 17, 32)
    for layers in range(4, 40):
        low, middle, high = default_layers(layers)
        assert 0 <= low < middle < high <= layers - 2
        assert check_layers((low, middle, high), layers) == (low, middle, high)
    with pytest.raises(TargetError, match="at least 4"):
        default_layers(3)


@pytest.mark.parametrize("layers", [(1, 2), (1, 2, 3, 4), (0, 0, 2), (3, 2, 1), (-1, 0, 1), (1, 17, 35)])
def test_anything_but_three_layers_of_the_target_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match="three ascending layer ids from 0 to 34") as refusal:
        check_layers(layers, 36)
    assert str(list(layers)) in str(refusal.value)
