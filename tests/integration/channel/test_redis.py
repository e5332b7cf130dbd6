"""What only the Redis backend has: a server that can refuse, forget, be cut off, and must not fill up."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.redis.backend import RedisBackend
from disagg_core.errors import BadInput, ChannelDamaged, ChannelUnavailable
from tests.ports import free_port
from tests.unit.channel.kit import ids, make_ref, make_refs, names, totals_of

pytestmark = pytest.mark.integration

Server = Callable[..., contextlib.AbstractContextManager[int]]


def test_what_is_acknowledged_is_trimmed_and_nothing_else(redis_port: int, client: redis.Redis) -> None:
    url = f"redis://127.0.0.1:{redis_port}/0?channel=trimmed"
    with StreamingRefChannel(url) as writer, StreamingRefChannel(url) as reader:
        writer.publish_many(make_refs(10))
        refs = reader.poll(10)
        reader.ack(refs[:4])
        assert client.xlen("draftline:{trimmed}:refs") == 6
        assert list(writer.published_sample_ids()) == names(10)
        writer.close(totals_of(make_refs(10)))
        reader.ack(refs[4:])
        assert reader.poll(1) == []
        assert reader.totals == totals_of(make_refs(10))
    with StreamingRefChannel(url) as late:
        assert (late.published, late.in_flight_remote(), late.totals) == (10, 0, totals_of(make_refs(10)))


def test_channels_of_runs_attempts_and_databases_do_not_meet(redis_port: int) -> None:
    server = f"redis://127.0.0.1:{redis_port}"
    for database, attempt in ((0, 1), (0, 2), (1, 1)):
        with StreamingRefChannel(f"{server}/{database}", run_id="meet", attempt=attempt) as channel:
            channel.publish(make_ref(database * 10 + attempt, run_id="meet", attempt=attempt))
    with StreamingRefChannel(f"{server}/1", run_id="meet", attempt=1) as reader:
        assert ids(reader.poll(9)) == names(11, 12)


def test_a_channel_is_kept_for_a_week_after_its_last_heartbeat(redis_port: int, client: redis.Redis) -> None:
    with StreamingRefChannel(f"redis://127.0.0.1:{redis_port}/0?channel=kept") as channel:
        channel.publish(make_ref(0))
        channel.ack(channel.poll(1))
    keys = list(client.scan_iter("draftline:{kept}:*"))
    assert len(keys) >= 5
    assert all(6 * 86400 < client.ttl(key) <= 7 * 86400 for key in keys)


def test_the_password_is_needed_and_used(server: Server) -> None:
    with server("--requirepass", "open sesame") as port:
        url = f"redis://127.0.0.1:{port}/2"
        for password in (None, SecretStr("wrong")):
            with pytest.raises(BadInput, match="DRAFTLINE_REDIS_PASSWORD") as raised:
                StreamingRefChannel(url, password=password).claim_writer()
            assert "wrong" not in str(raised.value).partition("refused us")[0]
        with StreamingRefChannel(url, password=SecretStr("open sesame")) as channel:
            channel.publish(make_ref(0))
            assert channel.poll(1) == make_refs(1)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-made certificate for 127.0.0.1 (server.crt, server.key), which is its own authority."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "server.key", "-out", "server.crt"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "server.crt"


def test_tls_with_a_certificate_of_ones_own(server: Server, certificate: Path, tmp_path: Path) -> None:
    port = free_port()
    plain = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file",
               str(tmp_path / "server.key"), "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no",
               "--requirepass", "pw"]  # fmt: skip
    with server(*options, port=plain):
        url = f"rediss://127.0.0.1:{port}/0"
        with StreamingRefChannel(url, ca=certificate, password=SecretStr("pw")) as channel:
            channel.publish_many(make_refs(3))
            assert ids(channel.poll(5)) == names(3)
        backend = RedisBackend(url, run_id="local", attempt=1, password=SecretStr("pw"), reconnect_s=0)
        with pytest.raises(ChannelUnavailable, match=r"(?i)certificate"):
            StreamingRefChannel(url, backend=backend).claim_writer()  # an authority that it does not know
    with pytest.raises(BadInput, match="write rediss://"):
        StreamingRefChannel(f"redis://127.0.0.1:{plain}/0", ca=certificate)
    with pytest.raises(BadInput, match="is no file"):
        StreamingRefChannel(url, ca=tmp_path / "none.crt")


def test_a_server_that_goes_away_for_a_while_costs_nothing_but_time(tmp_path: Path, server: Server) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    # Only here the server keeps its data, as one in use should.
    keep = ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path)]
    with StreamingRefChannel(url) as writer, StreamingRefChannel(url) as reader:
        with server(*keep, port=port):
            writer.publish_many(make_refs(5))
            first = reader.poll(3)
        with server(*keep, port=port):
            reader.ack(first)
            writer.publish_many(make_refs(5, 8))
            assert ids(reader.poll(9)) == names(3, 8)
            assert writer.in_flight_remote() == 5


def test_a_server_that_forgot_is_damage_by_name(server: Server) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with StreamingRefChannel(url) as writer, StreamingRefChannel(url) as reader:
        with server(port=port):
            writer.publish_many(make_refs(5))
            reader.poll(3)
        with server(port=port):
            with pytest.raises(ChannelDamaged, match="the server lost"):
                writer.publish(make_ref(5))
            with pytest.raises(ChannelDamaged, match="the server lost"):
                reader.poll(3)


def test_a_server_that_stays_away_is_unavailable(tmp_path: Path) -> None:
    backend = RedisBackend(f"redis://127.0.0.1:{free_port()}/0", run_id="local", attempt=1, reconnect_s=0.3)
    with pytest.raises(ChannelUnavailable, match=r"cannot be used.*check the server"):
        StreamingRefChannel("", backend=backend).claim_writer()


def test_an_entry_that_was_changed_or_removed_is_damage(redis_port: int, client: redis.Redis) -> None:
    for name, spoil in (
        ("changed", lambda key: (client.xdel(key, "3-0"), client.xadd(key, {"r": b"{}"}, "9-0"))),
        ("removed", lambda key: client.xdel(key, "3-0")),
    ):
        url = f"redis://127.0.0.1:{redis_port}/0?channel={name}"
        with StreamingRefChannel(url) as writer, StreamingRefChannel(url) as reader:
            writer.publish_many(make_refs(5))
            spoil(f"draftline:{{{name}}}:refs")
            assert ids(reader.poll(10)) == names(1)
            with pytest.raises(ChannelDamaged, match="where record 3 should be"):
                reader.poll(10)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_may_evict_the_stream_is_refused(server: Server, policy: str) -> None:
    evicting = server("--maxmemory", "50mb", "--maxmemory-policy", policy)
    with (
        evicting as port,
        StreamingRefChannel(f"redis://127.0.0.1:{port}/0") as channel,
        pytest.raises(BadInput, match="set noeviction"),
    ):
        channel.claim_writer()


def test_a_full_server_is_transient_and_doubles_nothing(server: Server) -> None:
    with server() as port, redis.Redis(port=port) as client:
        backend = RedisBackend(f"redis://127.0.0.1:{port}/0", run_id="local", attempt=1, reconnect_s=0.1)
        with StreamingRefChannel("", backend=backend) as writer:
            writer.publish_many(make_refs(3))
            client.config_set("maxmemory", "1mb")
            with pytest.raises(ChannelUnavailable, match=r"(?i)memory"):
                writer.publish_many(make_refs(3, 6))
            client.config_set("maxmemory", "0")
            writer.publish_many(make_refs(3, 6))
            assert list(writer.published_sample_ids()) == names(6)


def test_an_answer_that_is_lost_does_not_double_a_batch(redis_port: int) -> None:
    url = f"redis://127.0.0.1:{redis_port}/0?channel=lost-answer"
    with StreamingRefChannel(url) as writer:
        writer.publish(make_ref(0))
        backend = writer._backend
        script, sent = backend._append, []

        def lose_the_first_answer(**given: object) -> object:
            answer = script(**given)
            sent.append(answer)
            if len(sent) == 1:
                raise redis.TimeoutError("the answer never came")
            return answer

        backend._append = lose_the_first_answer
        writer.publish_many(make_refs(1, 4))
        assert len(sent) == 2
        assert list(writer.published_sample_ids()) == names(4)
        assert writer.published == 4


@pytest.mark.parametrize("acknowledged", [1, 3, 4], ids=["a part of it", "all of it but one", "all of it"])
def test_an_append_whose_answer_was_lost_is_not_doubled_and_hangs_nobody_when_it_was_acknowledged_meanwhile(
    redis_port: int, acknowledged: int
) -> None:
    """Redis ran the append, the producer's link stayed down, and the consumer, whose link is fine, went on."""
    url = f"redis://127.0.0.1:{redis_port}/0?channel=lost-answer-{acknowledged}"
    backend = RedisBackend(url, run_id="local", attempt=1, reconnect_s=0.1)
    with StreamingRefChannel(url, backend=backend) as writer, StreamingRefChannel(url) as reader:
        writer.publish_many(make_refs(1))
        run_append = backend._append

        def lost_answer(**call: object) -> None:
            run_append(**call)
            raise redis.ConnectionError("the answer was lost")

        backend._append = lost_answer
        with pytest.raises(ChannelUnavailable):
            writer.publish_many(make_refs(1, 4))
        refs = reader.poll(10)
        reader.ack(refs[:acknowledged], step=1)
        backend._append = run_append

        writer.publish_many(make_refs(1, 4))
        writer.publish_many(make_refs(4, 6))
        writer.close(totals_of(make_refs(6)))

        assert ids(refs) + ids(reader.poll(10)) == names(6)
        assert reader.totals == totals_of(make_refs(6))


def test_a_primary_that_becomes_a_replica_is_waited_for(server: Server) -> None:
    """A fail-over without a change of address: the server takes no writes until it is a primary again."""
    port = free_port()
    with server(port=port), redis.Redis(port=port) as admin:
        url = f"redis://127.0.0.1:{port}/0"
        backend = RedisBackend(url, run_id="local", attempt=1, reconnect_s=0.2)
        with StreamingRefChannel(url, backend=backend) as writer:
            writer.publish_many(make_refs(2))
            admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
            with pytest.raises(ChannelUnavailable, match="does it fail over"):
                writer.publish_many(make_refs(2, 4))
            admin.execute_command("REPLICAOF", "NO", "ONE")
            writer.publish_many(make_refs(2, 4))
            assert list(writer.published_sample_ids()) == names(4)
