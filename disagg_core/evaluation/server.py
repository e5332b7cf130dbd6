"""The same measure through a running SGLang server that serves a target with a draft, from the server's own counters.

Names as in SGLang 0.5.23, in ``meta_info`` of a reply to ``POST /generate``: `spec_verify_ct` passes of the target,
`spec_num_correct_drafts` drafted tokens kept, `spec_num_proposed_drafts` drafted tokens, and
`spec_correct_drafts_histogram`, whose entry i counts the passes that kept i. SGLang's own `spec_accept_length` divides
the tokens of the reply, the prompt's pass included and the last pass cut, by the passes; ours is 1 + kept / passes, as
everywhere in this package, so that both measures can be compared. A pass in which the text ends counts whole in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from disagg_core.errors import BadInput, EvaluationFailed, TargetUnavailable
from disagg_core.evaluation.accept_length import AcceptLength, summarise
from disagg_core.evaluation.speculative import Generation, Progress


def measure_on_server(
    url: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    concurrency: int = 16,
    timeout_s: float = 120.0,
    expected: Sequence[Sequence[int]] | None = None,
    flags: str = "",
    progress: Progress | None = None,
) -> AcceptLength:
    """Let the SGLang server at `url` continue `prompts` greedily and return the accept length that it counted.

    `expected`, the plain greedy continuations, makes the result say whether the server's were the same; without it
    `lossless` is None. The number of drafted tokens is the server's. `flags` are those that make SGLang draft with the
    draft that is meant, for the error message.

    Raises:
        BadInput: no prompts, or the server refuses a request.
        TargetUnavailable: the server cannot be reached or does not answer in time.
        EvaluationFailed: the server does not draft (no counters in its replies), or they contradict each other.
    """
    if not prompts:
        raise BadInput("evaluation: expected at least one prompt, found none")
    started = time.perf_counter()
    accepted: list[list[int]] = []
    outputs: list[list[int]] = []
    drafted = 1
    with (
        httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        replies = pool.map(lambda prompt: _generate(client, prompt, max_new_tokens), prompts)
        for number, reply in enumerate(replies, start=1):
            counts, proposed = _read_counters(reply, url, flags)
            accepted.append(counts)
            outputs.append(reply["output_ids"])
            drafted = max(drafted, proposed)
            if progress is not None:
                progress(number, len(prompts))
    return summarise(
        accepted,
        draft_tokens=drafted,
        seconds=time.perf_counter() - started,
        lossless=None if expected is None else outputs == [list(tokens) for tokens in expected],
    )


@contextmanager
def decoding_on_server(
    url: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    concurrency: int = 16,
    timeout_s: float = 120.0,
    flags: str = "",
) -> Iterator[Callable[[Sequence[Sequence[int]]], list[Generation]]]:
    """Yield a function that has the SGLang server at `url` continue a batch of prompts.

    The passes of a `Generation` that it returns are in no particular order. It raises as `measure_on_server` does.
    """
    with (
        httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):

        def one(prompt: Sequence[int]) -> Generation:
            reply = _generate(client, prompt, max_new_tokens, temperature)
            return Generation(reply["output_ids"], _read_counters(reply, url, flags)[0])

        yield lambda prompts: list(pool.map(one, prompts))


def _generate(
    client: httpx.Client, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0
) -> dict[str, Any]:
    request = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": temperature, "max_new_tokens": max_new_tokens},
    }
    try:
        reply = client.post("/generate", json=request)
    except httpx.TransportError as error:
        raise TargetUnavailable(
            f"{client.base_url}: no answer to /generate ({type(error).__name__}: {error}); is the server up?"
        ) from error
    if reply.status_code >= 500:
        raise TargetUnavailable(f"{client.base_url}: /generate answered {reply.status_code}: {reply.text[:200]}")
    if reply.status_code != 200:
        raise BadInput(f"{client.base_url}: /generate refused the request ({reply.status_code}): {reply.text[:200]}")
    document: dict[str, Any] = reply.json()
    return document


def _read_counters(reply: dict[str, Any], url: str, flags: str) -> tuple[list[int], int]:
    """Return the kept tokens of each pass (in no particular order) and the tokens drafted per pass."""
    meta = reply["meta_info"]
    if meta["completion_tokens"] <= 1:
        return [], 0
    names = ("spec_verify_ct", "spec_num_correct_drafts", "spec_num_proposed_drafts", "spec_correct_drafts_histogram")
    missing = [name for name in names if name not in meta]
    if missing:
        raise EvaluationFailed(
            f"{url}: expected {missing} in meta_info, found {sorted(meta)}; start the server with a draft: "
            f"--speculative-draft-model-path <export> {flags}".rstrip()
        )
    passes, correct, proposed, histogram = (meta[name] for name in names)
    counts = [kept for kept, times in enumerate(histogram) for _ in range(times)]
    if len(counts) != passes or sum(counts) != correct or proposed % passes:
        raise EvaluationFailed(
            f"{url}: the counters contradict each other: {passes} passes with {correct} of {proposed} drafted tokens "
            f"kept, and the histogram {histogram}"
        )
    return counts, proposed // passes
