"""Whose a failure is: every kind of error that is not ours has a class, and every class one policy that all read."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path
from typing import get_args

import aiohttp
import httpx
import pytest
import redis
import requests
import torch
import torch.distributed as dist
from huggingface_hub.errors import LocalEntryNotFoundError

from disagg_core.channel.redis.address import answered
from disagg_core.errors import (
    BadInput,
    ChannelUnavailable,
    CheckpointError,
    FailureClass,
    StoreUnavailable,
    TargetUnavailable,
    TrainingDiverged,
    classify,
)
from disagg_core.failures import POLICIES, policies_as_markdown
from disagg_core.run.attempts import RETRIED

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]


def raised(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: unhandled system error, remote process exited"),
        dist.DistNetworkError("client socket has timed out after 60000ms"),
        dist.DistStoreError("wait timeout"),
        RuntimeError("[/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.2]:4242"),
        RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        OSError(errno.ETIMEDOUT, "Connection timed out"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        OSError(errno.ENOLCK, "No locks available"),
        OSError(errno.EUCLEAN, "Structure needs cleaning"),
        OSError(errno.ENFILE, "Too many open files in system"),
        OSError(errno.EBUSY, "Device or resource busy"),
        torch.AcceleratorError("HIP error: an illegal memory access was encountered"),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
        RuntimeError("unable to write to file </torch_7>: No space left on device (28)"),
        RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64 vs 0"),
        RuntimeError("The client socket has timed out after 60s while trying to connect to (10.0.0.1, 29500)"),
        LocalEntryNotFoundError("Cannot find the requested files in the disk cache; outgoing traffic is disabled"),
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        TimeoutError("no answer"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("Server disconnected"),
        aiohttp.ServerDisconnectedError(),
        requests.exceptions.ChunkedEncodingError("incomplete read"),
        redis.ConnectionError("gone"),
        raised(ValueError("cannot read shard 7"), aiohttp.ClientPayloadError("not all data")),
        raised(CheckpointError("step-3 cannot be read"), OSError(errno.EIO, "Input/output error")),
        ChannelUnavailable("the mount"),
        ExceptionGroup("two", [ValueError("a"), OSError(errno.EIO, "Input/output error")]),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:24]}",
)
def test_what_machines_networks_and_mounts_do_is_infrastructure_and_tried_again(error: BaseException) -> None:
    assert classify(error) == "infrastructure"
    assert POLICIES["infrastructure"].retries is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "bug"),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage, Duplicate GPU detected"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "bug"),
        (PermissionError(errno.EACCES, "Permission denied"), "bug"),
        (OSError(errno.EMFILE, "Too many open files"), "bug"),
        (requests.exceptions.MissingSchema("No scheme supplied"), "bug"),
        (aiohttp.InvalidURL("hub:x"), "bug"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), "bug"),
        (KeyError("x"), "bug"),
        (BadInput("no"), "bad_input"),
        (StoreUnavailable("no"), "store_lost"),
        (TargetUnavailable("no"), "target_unavailable"),
        (TrainingDiverged("nan"), "diverged"),
    ],
)
def test_every_other_error_has_the_class_that_its_evidence_says(error: BaseException, expected: FailureClass) -> None:
    assert classify(error) == expected


@pytest.mark.parametrize(("status", "expected"), [(503, "infrastructure"), (429, "infrastructure"), (404, "bug")])
def test_an_http_answer_is_the_servers_trouble_or_our_mistake(status: int, expected: str) -> None:
    request = httpx.Request("GET", "http://hub/shard")
    answer = httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))
    assert classify(answer) == expected


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.exceptions.MasterDownError("Link with MASTER is down"),
        redis.exceptions.ClusterDownError("The cluster is down"),
        redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist"),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
        redis.ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"),
        redis.ResponseError("ERR Error running script (call to f_1): @user_script:4: -READONLY You can't write"),
        redis.ResponseError("ERR Error running script (call to f_1): @user_script:4: -OOM command not allowed"),
        redis.exceptions.TryAgainError("Multiple keys request during rehashing of slot"),
        redis.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL"),
        redis.ResponseError("ERR upstream failure"),
        redis.exceptions.MaxConnectionsError("max number of clients reached"),
        redis.ConnectionError("Connection reset by peer"),
        redis.TimeoutError("Timeout reading from socket"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_redis_that_fails_over_is_away_and_not_wrong(error: Exception) -> None:
    def command() -> None:
        raise error

    with pytest.raises(ChannelUnavailable) as away:
        answered("redis://h:1/0", command)
    assert classify(away.value) in RETRIED


@pytest.mark.parametrize(
    "error",
    [
        redis.ResponseError("unknown command 'XADD'"),
        redis.AuthenticationError("Authentication required."),
        redis.exceptions.NoPermissionError("this user has no permissions to run the 'xadd' command"),
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_redis_that_cannot_hold_a_channel_is_still_bad_input(error: Exception) -> None:
    def command() -> None:
        raise error

    with pytest.raises(BadInput):
        answered("redis://h:1/0", command)


def test_every_class_has_a_policy_and_a_way_out() -> None:
    assert set(POLICIES) == set(get_args(FailureClass))
    assert all(policy.meaning and policy.way_out for policy in POLICIES.values())


def test_the_documentation_shows_the_table_that_the_code_goes_by() -> None:
    assert policies_as_markdown() in (ROOT / "docs" / "failures.md").read_text()
