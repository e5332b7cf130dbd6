"""Accept length from the counters of an SGLang server: what is read from its replies, and what is made of bad ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from disagg_core.errors import BadInput, EvaluationFailed, TargetUnavailable
from disagg_core.evaluation.server import decoding_on_server, measure_on_server

pytestmark = pytest.mark.unit

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server on loopback that answers /generate; yields its URL and the requests that came."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, **request})
            status, document = answer(request)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", requests
        finally:
            http.shutdown()
            thread.join()


def reply(histogram: list[int], draft_tokens: int, **changes: Any) -> dict[str, Any]:
    """A reply as SGLang 0.5.23 builds it (`_calculate_spec_decoding_metrics` of its tokenizer manager)."""
    passes, correct = sum(histogram), sum(kept * times for kept, times in enumerate(histogram))
    meta = {
        "id": "1",
        "finish_reason": {"type": "length", "length": 20},
        "prompt_tokens": 4,
        "completion_tokens": 1 + passes + correct,
        "spec_accept_rate": correct / (passes * draft_tokens),
        "spec_accept_length": (1 + passes + correct) / passes,
        "spec_num_correct_drafts": correct,
        "spec_num_proposed_drafts": passes * draft_tokens,
        "spec_verify_ct": passes,
        "spec_correct_drafts_histogram": histogram,
    }
    return {"text": "", "output_ids": [7, 8], "meta_info": {**meta, **changes}}


def test_the_servers_counters_give_the_accept_length() -> None:
    histograms = {1: [2, 1, 0, 1], 2: [0, 0, 2]}

    with server(lambda request: (200, reply(histograms[request["input_ids"][0]], 3))) as (url, requests):
        result = measure_on_server(url, [[1, 5], [2]], max_new_tokens=20, expected=[[7, 8], [7, 8]])

    assert {request["path"] for request in requests} == {"/generate"}
    assert requests[0]["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 20}
    assert (result.target_passes, result.tokens, result.draft_tokens) == (6, 14, 3)
    assert result.accept_length == pytest.approx(14 / 6)
    assert result.per_position == pytest.approx([4 / 6, 3 / 6, 1 / 6])
    assert result.lossless is True


def test_other_tokens_than_the_targets_are_not_lossless() -> None:
    with server(lambda _: (200, reply([1, 1], 1))) as (url, _):
        assert measure_on_server(url, [[1]], expected=[[7, 9]]).lossless is False
        assert measure_on_server(url, [[1]]).lossless is None


def without_counters() -> dict[str, Any]:
    answer = reply([1], 3)
    answer["meta_info"] = {key: value for key, value in answer["meta_info"].items() if not key.startswith("spec_")}
    answer["meta_info"]["completion_tokens"] = 20
    return answer


@pytest.mark.parametrize(
    ("status", "document", "error", "words"),
    [
        (200, without_counters(), EvaluationFailed, "--speculative-algorithm EAGLE3"),
        (200, reply([1, 1], 3, spec_num_correct_drafts=2), EvaluationFailed, "contradict each other"),
        (200, reply([1], 3, completion_tokens=1), EvaluationFailed, "at least one target pass"),
        (400, {"error": "too long"}, BadInput, "refused the request.*too long"),
        (503, {"error": "loading"}, TargetUnavailable, "answered 503"),
    ],
    ids=["no draft", "contradiction", "no pass", "refused", "unavailable"],
)
def test_answers_that_cannot_be_used(status: int, document: Any, error: type[Exception], words: str) -> None:
    with server(lambda _: (status, document)) as (url, _), pytest.raises(error, match=words):
        measure_on_server(url, [[1, 2]], flags="--speculative-algorithm EAGLE3")


def test_the_hint_needs_no_method() -> None:
    with server(lambda _: (200, without_counters())) as (url, _), pytest.raises(EvaluationFailed) as caught:
        measure_on_server(url, [[1, 2]])

    assert str(caught.value).endswith("start the server with a draft: --speculative-draft-model-path <export>")


def test_no_server_there() -> None:
    with server(lambda _: (200, {})) as (url, _):
        pass

    with pytest.raises(TargetUnavailable, match="is the server up"):
        measure_on_server(url, [[1]], timeout_s=5)


def test_a_server_answers_batches_of_a_suite_with_its_counters() -> None:
    with (
        server(lambda request: (200, reply([1, 0, request["input_ids"][0]], 3))) as (url, requests),
        decoding_on_server(url, max_new_tokens=20, temperature=0.5) as decode,
    ):
        first, second = decode([[1, 5], [2]])
        third = decode([[3]])
    assert (first.accepted, second.accepted, first.tokens) == ([0, 2], [0, 2, 2], [7, 8])
    assert [generation.accepted for generation in third] == [[0, 2, 2, 2]]
    assert requests[0]["sampling_params"] == {"temperature": 0.5, "max_new_tokens": 20}
    assert decode.draft_tokens == 3
    assert not first.in_order
    assert first.seconds is not None


def test_a_server_without_a_draft_has_no_counters() -> None:
    with (
        server(lambda _: (200, without_counters())) as (url, _),
        decoding_on_server(url, max_new_tokens=20, drafts=False) as decode,
    ):
        (found,) = decode([[1, 5]])
    assert (found.tokens, found.accepted) == ([7, 8], [])
