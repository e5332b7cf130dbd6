"""What answers at the metrics port may be anything: it is either read, or refused by name."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_core.errors import StoreUnavailable
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView

pytestmark = pytest.mark.unit


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], MasterView]]:
    """A web server that is no Mooncake master: it answers every path with the bytes given."""
    body = b""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"127.0.0.1:{server.server_port}"

    def answer(found: bytes) -> MasterView:
        nonlocal body
        body = found
        return MasterView(StoreEndpoints(master_address=address, metrics_address=address))

    yield answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_segments_are_read_whether_their_numbers_are_written_as_numbers_or_strings(
    answering: Callable[[bytes], MasterView],
) -> None:
    segment = {"segment_name": "a", "size_bytes": "64", "allocator_used_bytes": 3, "status": "OK", "more": None}
    (found,) = answering(json.dumps({"segments": [segment], "total": 1}).encode()).segments()
    assert (found.name, found.size_bytes, found.used_bytes, found.status) == ("a", 64, 3, "OK")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(
        st.binary(max_size=60),
        st.sampled_from([b"{}", b"[]", b"null", b'{"segments": 3}', b'{"segments": [{"segment_name": "a"}]}']),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["segments", "x"]), inner),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_rubbish_is_refused_by_name(answering: Callable[[bytes], MasterView], body: bytes) -> None:
    master = answering(body)
    assert not master.is_ready()
    with pytest.raises(StoreUnavailable, match="metrics port"):
        master.health()
    try:
        assert master.segments() == []  # an empty list of segments is no rubbish
    except StoreUnavailable as error:
        assert "metrics port" in str(error)  # noqa: PT017 - either outcome is right
