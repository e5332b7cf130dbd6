import pytest

from disagg_core.drafts.registry import method_names
from tests.contract.drafts.kit import Case


@pytest.fixture(params=method_names())
def case(request: pytest.FixtureRequest) -> Case:
    """One registered draft method after the other."""
    return Case.of(request.param)
