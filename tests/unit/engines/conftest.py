"""A server that speaks SGLang's HTTP and does as it is told: for the producer's side of the conversation."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import TargetFacts

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any] | bytes]]


class ScriptedServer:
    """Answers ``/generate`` by calling `answer`, ``/health`` by `healthy` and ``/server_info`` by `info`.

    Bytes are sent as they are. `release` ends answers that wait.
    """

    def __init__(self) -> None:
        self.answer: Answer = lambda body: (200, {"output_ids": [7], "meta_info": {}})
        self.healthy = True
        self.info: dict[str, Any] | bytes = {}
        self.requests = 0
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def do_GET(self) -> None:
                if self.path == "/server_info":
                    self._send(200, outer.info)
                else:
                    self._send(200 if outer.healthy else 503, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests += 1
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    self._send(*outer.answer(body))
                finally:
                    with outer._lock:
                        outer._now -= 1

            def _send(self, status: int, body: dict[str, Any] | bytes) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        """Be gone, for old connections as for new ones; more than once does nothing."""
        self.release.set()
        if not self._thread.is_alive():
            return
        self._http.shutdown()
        self._thread.join()
        self._http.socket.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[[], ScriptedServer]]:
    """Start scripted servers; all are stopped afterwards."""
    running: list[ScriptedServer] = []

    def start() -> ScriptedServer:
        running.append(ScriptedServer())
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def section() -> TargetSection:
    return TargetSection(model="org/target", backend="sglang", device="cpu", request_timeout_s=5.0)


@pytest.fixture
def facts() -> TargetFacts:
    return TargetFacts(
        model="org/target",
        model_type="llama",
        hidden_size=4,
        intermediate_size=8,
        num_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=2,
        vocab_size=100,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(2,),
        pad_token_id=0,
        dtype="float32",
        version="v",
    )
