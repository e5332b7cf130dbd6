"""The evaluation of a run's draft on the SGLang server that serves it, beside servers without a draft and with another.

Whether drafting pays depends on the load: a pass over many sequences costs what its tokens cost. So everything is
measured at each of ``evaluation.server.concurrency``, and the servers take turns batch by batch. A batch is of
twice as many requests as run at once, so that the load holds while the first are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from disagg_core.evaluation.accept_length import AcceptLength
from disagg_core.evaluation.server import ServerDecoder, decoding_on_server, served_accept_length
from disagg_core.evaluation.slices import SuiteResult, measured_prompts, results_of
from disagg_core.evaluation.turns import PLAIN, decode_in_turn
from disagg_core.recurring.candidate import INCUMBENT
from disagg_core.roles.evaluation import PROMPTS_FILE, pinned_prompts, read_prompts, result_file, write_result
from disagg_core.roles.suites import measure_suites
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.results import HELD_OUT

_BATCH = 2
"""Requests of a batch, in units of the concurrency."""
_DRAFT = "draft"


class Servers(NamedTuple):
    """Addresses of SGLang servers of one target: with the draft, without one, with the draft to compare with."""

    draft: str
    plain: str | None = None
    incumbent: str | None = None

    def others(self) -> dict[str, str]:
        """Return those to compare with, by the names that results have."""
        given = {PLAIN: self.plain, INCUMBENT: self.incumbent}
        return {name: url for name, url in given.items() if url is not None}


def run_server_evaluation(plan: RunPlan, servers: Servers, name: str, draft: str | None = None) -> dict[str, Any]:
    """Measure the draft that a server serves on the run's held-out prompts and suites; the result file is `name`'s.

    What stands at its top is of the first concurrency; ``by_concurrency`` has the suites at each. `draft` names the one
    that is served, of a run with several.

    Raises:
        PromptError, DataChanged, BadInput: see `read_prompts` and `measure_suites`.
        TargetUnavailable, EvaluationFailed: see `measure_on_server`.
    """
    output: Path = result_file(plan, name)
    prompts = read_prompts(plan.dir.evaluation / PROMPTS_FILE, plan.spec.evaluation.prompts, pinned_prompts(plan))
    loads = plan.spec.evaluation.server.concurrency or (plan.spec.target.server_concurrency,)
    results: list[AcceptLength] = []
    by_load: dict[int, dict[str, SuiteResult]] = {}
    for concurrency in loads:
        result, by_load[concurrency] = _measured(plan, servers, prompts, draft, concurrency)
        results.append(result)
    origin = {
        "server": servers.draft,
        "servers": servers.others(),
        "concurrency": loads[0],
        "by_concurrency": {
            str(load): {suite: asdict(found) for suite, found in suites.items()} for load, suites in by_load.items()
        },
    }
    return write_result(output, results[0], origin, by_load[loads[0]])


def _measured(
    plan: RunPlan, servers: Servers, prompts: list[list[int]], draft: str | None, concurrency: int
) -> tuple[AcceptLength, dict[str, SuiteResult]]:
    """Return the draft's result on the held-out prompts at one concurrency, and its figures by suite."""
    section, references, size = plan.spec.evaluation, tuple(servers.others()), _BATCH * concurrency
    with _decoders(plan, servers, draft, concurrency, temperature=0.0) as decoders:
        decoded = decode_in_turn(prompts, decoders, batch_size=size)
        result = served_accept_length(decoded[_DRAFT], draft_tokens=decoders[_DRAFT].draft_tokens)
    measured = {name: measured_prompts(prompts, found) for name, found in decoded.items()}
    suites = {HELD_OUT: results_of(measured, references)[_DRAFT]}
    with _decoders(plan, servers, draft, concurrency, temperature=section.suite_temperature) as decoders:
        found = measure_suites(plan, decoders, references, batch_size=size, by_category=False)
    return result, {**suites, **found[_DRAFT]}


@contextmanager
def _decoders(
    plan: RunPlan, servers: Servers, draft: str | None, concurrency: int, *, temperature: float
) -> Iterator[Mapping[str, ServerDecoder]]:
    """Yield what decodes on each of the servers, by name."""
    section, target = plan.spec.evaluation, plan.spec.target
    flags = plan.draft(draft).method.server_flags(section.draft_tokens)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                decoding_on_server(
                    url,
                    max_new_tokens=section.max_new_tokens,
                    temperature=temperature,
                    concurrency=concurrency,
                    timeout_s=target.request_timeout_s,
                    drafts=name != PLAIN,
                    flags=flags,
                )
            )
            for name, url in {_DRAFT: servers.draft, **servers.others()}.items()
        }
