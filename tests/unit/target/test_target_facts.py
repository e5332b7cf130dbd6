import pytest

from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import target_version

pytestmark = pytest.mark.unit


def test_two_commits_of_a_hub_model_are_two_versions() -> None:
    target = TargetSection(model="org/model")
    versions = {target_version(target, {"hidden_size": 8}, commit=commit) for commit in (None, "a" * 40, "b" * 40)}
    assert len(versions) == 3


def test_a_branch_and_the_commit_it_stands_for_are_one_version() -> None:
    pinned = TargetSection(model="org/model", revision="a" * 40)
    branch = TargetSection(model="org/model", revision="main")
    commit = "a" * 40
    assert target_version(pinned, {}, commit=commit) == target_version(branch, {}, commit=commit)
