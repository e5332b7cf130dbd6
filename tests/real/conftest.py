"""The tier with a real model: collected only where its marker is asked for, because the model must be fetched first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.tokenizer import load_tokenizer
from tests.kit.runs import ROOT, draftline, home

__all__ = ["draftline", "home"]

DOCUMENT = ROOT / "infra" / "runs" / "smollm2.yaml"
PROMPTS = ROOT / "infra" / "smollm2" / "prompts.jsonl"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked_for = re.search(r"(?<!not )\breal\b", config.option.markexpr or "")
    return None if asked_for else True


@pytest.fixture
def spec() -> RunSpec:
    """The run document of the model."""
    return load_spec(DOCUMENT, [])


@pytest.fixture
def facts(spec: RunSpec) -> TargetFacts:
    return read_target_facts(spec.target)


@pytest.fixture
def chats(spec: RunSpec) -> list[PromptTask]:
    """The first prompts of the file, in the model's own chat template, up to where it answers."""
    tokenizer = load_tokenizer(spec.target)
    tasks = []
    for ordinal, line in enumerate(PROMPTS.read_text().splitlines()[:64]):
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tasks.append(PromptTask(ordinal=ordinal, source=f"x:{ordinal}", input_ids=ids, loss_mask=[0] * len(ids)))
    return tasks
