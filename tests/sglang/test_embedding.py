"""What SGLang gives a draft that has no embedding of its own, and for which targets, asked of its own classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_core.engines.sglang.launch import find_sglang_python
from disagg_core.settings import get_settings
from tests.numbered import run_elsewhere
from tests.sglang.support import START_TIMEOUT_S
from tests.sglang.test_loading import ENVIRONMENT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]


def test_gemma_4s_embedding_module_multiplies_and_gemma_3_has_no_drafts_of_blocks(tmp_path: Path) -> None:
    script, found = Path(__file__).with_name("embedding_main.py"), tmp_path / "found.json"
    command = [str(find_sglang_python(get_settings())), str(script), str(found)]
    run_elsewhere(command, tmp_path / "embedding.log", ENVIRONMENT, within_s=START_TIMEOUT_S)

    said = json.loads(found.read_text())
    assert said.pop("factor") == pytest.approx([8.0, 8.0])
    assert said == {"gemma4": True, "gemma3": False, "qwen3": True}
