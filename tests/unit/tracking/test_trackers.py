"""Which trackers a document asks for, and what is said before the run if one cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from disagg_core.errors import BadInput, MissingLibrary, SpecError
from disagg_core.run_spec.results import TrackingSection
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.tracking.trackers import check_trackers, trackers_of

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"


def tracking(*overrides: str) -> TrackingSection:
    return load_spec(DEMO, overrides).tracking


def test_tensorboard_is_written_unless_told_otherwise() -> None:
    assert trackers_of(tracking()) == ["tensorboard"]
    assert trackers_of(tracking("tracking.tensorboard=false", "tracking.wandb.mode=offline")) == ["wandb"]


def test_what_is_asked_for_and_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tracking("tracking.wandb.mode=offline", "tracking.mlflow.uri=http://127.0.0.1:5000")
    check_trackers(asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibrary, match=r"tensorboard, wandb, mlflow.*pip install 'draftline\[wandb,mlflow\]'"):
        check_trackers(asked)
    with pytest.raises(MissingLibrary, match="pip install tensorboard"):
        check_trackers(tracking())


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tracking("tracking.mlflow.experiment=drafts")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BadInput, match=r"tracking\.mlflow: expected a uri, or MLFLOW_TRACKING_URI"):
        check_trackers(asked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_trackers(asked)


def test_no_secret_stands_in_the_document_and_no_setting_is_without_effect() -> None:
    with pytest.raises(SpecError, match="a password was found"):
        tracking("tracking.mlflow.uri=https://me:open-sesame@mlflow.example")
    with pytest.raises(SpecError, match=r"tracking\.mlflow\.registered_model .* expected registry\.publish"):
        tracking("tracking.mlflow.registered_model=tiny")
    with pytest.raises(SpecError, match="api_key"):
        tracking("tracking.wandb.api_key=0123456789")
