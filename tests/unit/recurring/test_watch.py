"""What a serving engine says of its drafts, read from its metrics."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from disagg_core.errors import TargetUnavailable
from disagg_core.recurring.watch import accept_length_of, served_accept_length

pytestmark = pytest.mark.unit

SGLANG = """\
# HELP sglang:spec_accept_length The average acceptance length of speculative decoding.
# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{engine_type="unified",model_name="m",tp_rank="0"} 2.5
sglang:spec_accept_length{engine_type="unified",model_name="m",tp_rank="1"} 3.5
sglang:num_running_reqs{model_name="m"} 4.0
"""
VLLM = """\
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 700.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 240.0
vllm:spec_decode_num_accepted_tokens_created{engine="0",model_name="m"} 1.7e+09
"""


@contextmanager
def serving(text: str) -> Iterator[str]:
    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("text", "length"), [(SGLANG, 3.0), (VLLM, 3.4)], ids=["sglang", "vllm"])
def test_both_engines_are_understood(text: str, length: float) -> None:
    with serving(text) as url:
        assert served_accept_length(url) == pytest.approx(length)


def test_a_server_that_has_not_decoded_yet_says_nothing() -> None:
    assert accept_length_of("sglang:spec_accept_length 0.0\n", "x") is None
    assert accept_length_of("vllm:spec_decode_num_drafts_total 0.0\n", "x") is None


def test_a_server_without_a_draft_or_without_metrics_is_named() -> None:
    with serving("sglang:num_running_reqs 4.0\n") as url, pytest.raises(TargetUnavailable, match="found neither"):
        served_accept_length(url)
    with pytest.raises(TargetUnavailable, match="does not answer"):
        served_accept_length("http://127.0.0.1:1")
