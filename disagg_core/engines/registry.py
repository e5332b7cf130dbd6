"""What runs a target, by the run document's ``target.backend``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from disagg_core.contracts import Capture
from disagg_core.drafts.together import untrainable
from disagg_core.engines.contract import Target
from disagg_core.engines.generation import Sampling
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.outgoing import allocate_plain
from disagg_core.target.facts import TargetFacts


def target_of(
    spec: RunSpec,
    facts: TargetFacts,
    capture: Capture,
    *,
    store: MooncakeFeatureStore | None,
    log_dir: Path,
    while_waiting: Callable[[], None] = lambda: None,
) -> Target:
    """Return the target that a run document asks for; nothing is loaded or started yet.

    Its samples hold what `capture` says and are for `store`; without one it can only generate. Servers log to
    `log_dir`; `while_waiting` is called while they start, and raises what is to end that.
    """
    refuses = partial(untrainable, spec.all_drafts)
    if spec.target.backend == "sglang":
        from disagg_core.engines.sglang.target import SGLangTarget

        assert store is not None, "servers write to a store"
        return SGLangTarget(
            spec.target,
            facts,
            capture,
            store=store,
            store_section=spec.store,
            max_tokens=spec.data.max_tokens,
            log_dir=log_dir,
            settings=get_settings(),
            generate=spec.data.generate,
            seed=spec.run.seed,
            untrainable=refuses,
            while_waiting=while_waiting,
        )
    sampling = None
    if spec.data.generate is not None:
        sampling = Sampling.of(
            spec.data.generate, max_tokens=spec.data.max_tokens, seed=spec.run.seed, untrainable=refuses
        )
    return TransformersTarget(
        spec.target,
        facts,
        capture,
        batch_tokens=spec.rollout.batch_tokens,
        sampling=sampling,
        allocate=store.allocate if store is not None else allocate_plain,
    )
