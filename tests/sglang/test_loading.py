"""What SGLang cannot run on a CPU is loaded there: its own model classes take the exported files, whole.

SGLang passes over tensors that it does not know and starts with random weights in place of those that it does not find,
so every weight of a file is a number of its own, and is looked for in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from disagg_core.engines.sglang.launch import find_sglang_python
from disagg_core.settings import get_settings
from tests.numbered import BLOCK_DRAFTS, check_taken, numbered_export, run_elsewhere
from tests.sglang.support import START_TIMEOUT_S, VOCABULARY

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_RAGGED_VERIFY_MODE": "compact", "TORCHDYNAMO_DISABLE": "1"}
"""The confidence head is left out unless the verified width may differ from row to row."""


def test_the_model_classes_take_every_tensor_and_lack_none(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    exports = {
        name: numbered_export(model_of("qwen3"), tmp_path / name, method, options | {"mask_token_id": VOCABULARY - 1})
        for name, (method, options) in BLOCK_DRAFTS.items()
    }
    results = {name: tmp_path / f"{name}.safetensors" for name in exports}
    pairs = [str(path) for name, export in exports.items() for path in (export, results[name])]

    script = Path(__file__).with_name("load_main.py")
    python = find_sglang_python(get_settings())
    run_elsewhere([str(python), str(script), *pairs], tmp_path / "load.log", ENVIRONMENT, within_s=START_TIMEOUT_S)

    for name, export in exports.items():
        check_taken(export, load_file(results[name]), shared=set())
