"""The same measure through a running SGLang server that serves a target with a draft, from the server's own counters.

Names as in SGLang 0.5.23, in ``meta_info`` of a reply to ``POST /generate``: `spec_verify_ct` passes of the target,
`spec_num_correct_drafts` drafted tokens kept, `spec_num_proposed_drafts` drafted tokens, and
`spec_correct_drafts_histogram`, whose entry i counts the passes that kept i. SGLang's own `spec_accept_length` divides
the tokens of the reply, the prompt's pass included and the last pass cut, by the passes; ours is 1 + kept / passes, as
everywhere in this package, so that both measures can be compared. A pass in which the text ends counts whole in both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from disagg_core.errors import BadInput, EvaluationFailed, TargetUnavailable
from disagg_core.evaluation.accept_length import AcceptLength, summarise
from disagg_core.evaluation.speculative import Generation
from disagg_core.evaluation.turns import Decoded, decode_in_turn


class ServerDecoder:
    """Continues batches of prompts on a server, so many at a time as its pool has threads; see `decoding_on_server`.

    `draft_tokens` is the largest number of tokens that a pass was seen to draft.
    """

    def __init__(
        self,
        client: httpx.Client,
        pool: ThreadPoolExecutor,
        *,
        max_new_tokens: int,
        temperature: float,
        drafts: bool,
        flags: str,
    ) -> None:
        self._client = client
        self._pool = pool
        self._sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        self._drafts = drafts
        self._flags = flags
        self.draft_tokens = 1

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        """Return the continuations of `prompts`, in order; their passes are in no particular order."""
        return list(self._pool.map(self._continue, prompts))

    def _continue(self, prompt: Sequence[int]) -> Generation:
        started = time.perf_counter()
        reply = _generate(self._client, prompt, self._sampling)
        seconds = time.perf_counter() - started
        counts: list[int] = []
        if self._drafts:
            counts, proposed = _read_counters(reply, str(self._client.base_url), self._flags)
            self.draft_tokens = max(self.draft_tokens, proposed)
        return Generation(reply["output_ids"], counts, in_order=False, seconds=seconds)


@contextmanager
def decoding_on_server(
    url: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    concurrency: int = 16,
    timeout_s: float = 120.0,
    drafts: bool = True,
    flags: str = "",
) -> Iterator[ServerDecoder]:
    """Yield what has the SGLang server at `url` continue a batch of prompts, `concurrency` of them at a time.

    A server that does not draft, `drafts` False, has no counters, and its answers no passes. It raises as
    `measure_on_server` does.
    """
    limits = httpx.Limits(max_connections=concurrency)
    with (
        httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, limits=limits) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        yield ServerDecoder(
            client, pool, max_new_tokens=max_new_tokens, temperature=temperature, drafts=drafts, flags=flags
        )


def measure_on_server(
    url: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    concurrency: int = 16,
    timeout_s: float = 120.0,
    expected: Sequence[Sequence[int]] | None = None,
    flags: str = "",
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
    with decoding_on_server(
        url, max_new_tokens=max_new_tokens, concurrency=concurrency, timeout_s=timeout_s, flags=flags
    ) as decode:
        decoded = decode_in_turn(prompts, {url: decode}, batch_size=len(prompts))[url]
    return served_accept_length(decoded, draft_tokens=decode.draft_tokens, expected=expected)


def served_accept_length(
    decoded: Decoded, *, draft_tokens: int, expected: Sequence[Sequence[int]] | None = None
) -> AcceptLength:
    """Return what a server's counters say of `decoded`; see `measure_on_server`.

    Raises:
        EvaluationFailed: there was no pass at all.
    """
    outputs = [generation.tokens for generation in decoded.generations]
    return summarise(
        [generation.accepted for generation in decoded.generations],
        draft_tokens=draft_tokens,
        seconds=sum(decoded.seconds),
        lossless=None if expected is None else outputs == [list(tokens) for tokens in expected],
    )


def _generate(client: httpx.Client, prompt: Sequence[int], sampling: Mapping[str, float]) -> dict[str, Any]:
    try:
        reply = client.post("/generate", json={"input_ids": list(prompt), "sampling_params": sampling})
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
