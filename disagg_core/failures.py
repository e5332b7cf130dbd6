"""The classes of failure: what each means, whether it is tried again, and how foreign errors are told apart.

One table, `POLICIES`, is the only place that says what happens after a failure; the loop of attempts, the report and
``docs/failures.md`` all read it. A foreign error is put into a class by evidence only: by what it is, by its errno, or
by the words that torch, NCCL and gloo are known to use. Without evidence it is a `bug`.

Torch, redis and the HTTP clients are known by the names of their classes, so that nothing of them has to be imported.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Literal

FailureClass = Literal[
    "bad_input",
    "infrastructure",
    "out_of_memory",
    "preempted",
    "target_unavailable",
    "store_lost",
    "stalled",
    "diverged",
    "bug",
]
"""Whose a failure is, and so whether another attempt makes sense."""


@dataclass(frozen=True)
class FailurePolicy:
    """What follows a failure of one class.

    `retries` failures of the class are followed by another attempt; None: as many as ``run.attempts`` allows. The
    pause before an attempt is `pause_s` seconds after the first failure of the class in a row and doubles up to
    `longest_pause_s`. Failures of classes with an `outage_s` that follow within so many seconds of the first of them
    are one outage, which uses up one of the run's attempts however often it was met.
    """

    meaning: str
    way_out: str
    retries: int | None = None
    pause_s: float = 0.0
    longest_pause_s: float = 0.0
    outage_s: float = 0.0

    @property
    def retried(self) -> bool:
        """Whether there is ever another attempt after a failure of this class."""
        return self.retries != 0

    def pause_after(self, failures: int) -> float:
        """Return the seconds to wait after so many failures of the class in a row."""
        return min(self.pause_s * 2 ** (failures - 1), self.longest_pause_s) if failures else 0.0


OUTAGE_S = 900.0
"""Somebody restarts a server or a mount comes back within this time, or it takes much longer."""

POLICIES: dict[FailureClass, FailurePolicy] = {
    "bad_input": FailurePolicy(
        "Something that was given is wrong: a field, a file, a model, a password.",
        "Change what the message names and start the run again.",
        retries=0,
    ),
    "infrastructure": FailurePolicy(
        "A machine, network, mount, GPU or server failed under the run: a rank is gone, a GPU reports an error, a "
        "disk is full, Redis fails over.",
        "Look at the machine that the message names (dmesg, nvidia-smi, df, the server's log), then Retry.",
        pause_s=15.0,
        longest_pause_s=300.0,
        outage_s=OUTAGE_S,
    ),
    "out_of_memory": FailurePolicy(
        "A GPU's memory, the machine's, or a cgroup's limit was not enough; the kernel may have killed the process.",
        "Lower training.batch_size, training.prefetch_samples, rollout.batch_tokens or data.max_tokens, switch "
        "training.activation_checkpointing on, or raise the limit.",
        retries=1,
        pause_s=5.0,
        longest_pause_s=5.0,
    ),
    "preempted": FailurePolicy(
        "A process was stopped or killed from outside.",
        "Nothing to do: the run goes on from its newest checkpoint.",
        pause_s=2.0,
        longest_pause_s=60.0,
    ),
    "target_unavailable": FailurePolicy(
        "No server of the target, or not the target itself, was able to capture for target.unavailable_timeout_s.",
        "Look at the servers (draftline doctor, their logs), then Retry.",
        pause_s=15.0,
        longest_pause_s=300.0,
        outage_s=OUTAGE_S,
    ),
    "store_lost": FailurePolicy(
        "The feature store, or samples in it, are gone, or the reference channel is damaged.",
        "Look at the store's logs; lost samples are captured again.",
        pause_s=5.0,
        longest_pause_s=300.0,
        outage_s=OUTAGE_S,
    ),
    "stalled": FailurePolicy(
        "A role did not start, or made no progress for the time that it is allowed.",
        "Look at its log, which ends with the stacks of its threads where a trainer hung; raise "
        "channel.idle_timeout_s or orchestration.stall_timeout_s where the work takes that long.",
        pause_s=5.0,
        longest_pause_s=300.0,
    ),
    "diverged": FailurePolicy(
        "Loss or gradient was not finite for several windows in a row.",
        "Lower training.learning_rate or training.max_grad_norm; the newest checkpoint is from before.",
        retries=1,
        pause_s=5.0,
        longest_pause_s=5.0,
    ),
    "bug": FailurePolicy(
        "An error that nothing explains: most likely ours.",
        "Report it with the role's log; Retry goes on from the newest checkpoint.",
        retries=1,
        pause_s=5.0,
        longest_pause_s=5.0,
    ),
}


def policies_as_markdown() -> str:
    """Return `POLICIES` as the table that stands in ``docs/failures.md``."""
    rows = ["| class | what it means | another attempt | pause | way out |", "|---|---|---|---|---|"]
    for name, policy in POLICIES.items():
        again = "never" if not policy.retried else "once" if policy.retries == 1 else "up to `run.attempts`"
        if policy.outage_s:
            again += f", failures within {policy.outage_s / 60:g} min count once"
        pause = f"{policy.pause_s:g} s" if policy.pause_s else "none"
        if policy.longest_pause_s > policy.pause_s:
            pause += f", doubling to {policy.longest_pause_s:g} s"
        cells = (f"`{name}`", policy.meaning, again, pause if policy.retried else "", policy.way_out)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def class_of_foreign(error: BaseException) -> FailureClass:
    """Return the class of an error that is not ours, by the evidence that it holds; `bug` without any."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    text = str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY & names:
        return "out_of_memory"
    if _WRONG_ADDRESS & names or isinstance(error, ssl.SSLCertVerificationError):
        return "bug"
    if isinstance(error, (socket.gaierror, ssl.SSLError)):  # their numbers are no errno
        return "infrastructure"
    if isinstance(error, OSError) and error.errno is not None:
        return _class_of_errno(error.errno)
    if (stated := _OS_ERROR.search(text)) is not None:  # of libraries written in Rust
        return _class_of_errno(int(stated[1]))
    if (status := _status_of(error)) is not None:
        return "infrastructure" if status >= 500 or status in (408, 425, 429) else "bug"
    if isinstance(error, (TimeoutError, ConnectionError)) or _INFRASTRUCTURE & names:
        return _class_of_words(text, "infrastructure")
    return _class_of_words(text, "bug") if isinstance(error, RuntimeError) else "bug"


def _class_of_errno(number: int) -> FailureClass:
    if number == errno.ENOMEM:
        return "out_of_memory"
    return "infrastructure" if number in _MACHINES_ERRNO else "bug"


def _class_of_words(text: str, otherwise: FailureClass) -> FailureClass:
    for failure_class, words in _WORDS:
        if words.search(text):
            return failure_class
    return otherwise


def _status_of(error: BaseException) -> int | None:
    """Return the status of an HTTP answer that `error` is about; httpx, requests and aiohttp each have a place."""
    answer = getattr(error, "response", None)
    for status in (getattr(error, "status", None), getattr(answer, "status_code", None)):
        if isinstance(status, int) and status >= 100:
            return status
    return None


_OUT_OF_MEMORY = {"torch.OutOfMemoryError"}

_INFRASTRUCTURE = {
    "torch.distributed.DistError",
    "torch.AcceleratorError",
    "httpx.TransportError",
    "aiohttp.client_exceptions.ClientError",
    "requests.exceptions.RequestException",
    "urllib3.exceptions.HTTPError",
    "http.client.HTTPException",
    "redis.exceptions.ConnectionError",
    "redis.exceptions.TimeoutError",
    "redis.exceptions.ReadOnlyError",
    "redis.exceptions.MasterDownError",
    "redis.exceptions.ClusterDownError",
    "redis.exceptions.TryAgainError",
    "redis.exceptions.OutOfMemoryError",
    "huggingface_hub.errors.LocalEntryNotFoundError",
    "huggingface_hub.errors.FileMetadataError",
    "concurrent.futures.process.BrokenProcessPool",
}

_WRONG_ADDRESS = {
    "requests.exceptions.MissingSchema",
    "requests.exceptions.InvalidSchema",
    "requests.exceptions.InvalidURL",
    "aiohttp.client_exceptions.InvalidURL",
    "urllib3.exceptions.LocationValueError",
}
"""What HTTP clients say of an address that nobody could reach, though they count it as trouble on the way."""

_MACHINES_ERRNO = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENODEV,
    errno.ENXIO,
    errno.EREMOTEIO,
    errno.ENOLINK,
    errno.ETIMEDOUT,
    errno.EPIPE,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ECOMM,
    errno.EPROTO,
    errno.EADDRNOTAVAIL,
    errno.ENOBUFS,
    errno.ENOLCK,
    errno.EKEYEXPIRED,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.ENODATA,
    errno.ETIME,
    errno.ENOMEDIUM,
    errno.EBUSY,
    errno.ENFILE,
    errno.EAGAIN,
}
"""What a mount, a disk, a network or a whole machine fails with, and no process by its own limits and rights."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")

_WORDS: tuple[tuple[FailureClass, re.Pattern[str]], ...] = (
    ("out_of_memory", re.compile(r"out of memory|(can't|cannot) allocate memory|ALLOC_FAILED|bad_alloc", re.I)),
    ("bug", re.compile(r"device-side assert|no kernel image|invalid device function|ncclInvalid|duplicate gpu", re.I)),
    (
        "infrastructure",
        re.compile(
            r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (has )?timed? ?out|"
            r"timed? ?out waiting|waiting for send/recv|no route to host|network is unreachable|"
            r"nccl|gloo|cuda error|hip error|cublas_status|cudnn_status|uncorrectable ecc|unspecified launch failure|"
            r"no (cuda|hip) gpus|cuda driver|cuda unknown error|nvml|"
            r"failed writing file|unexpected pos|iostream error|no space left|quota exceeded|input/output error|"
            r"stale (nfs )?file handle|read-only file system",
            re.I,
        ),
    ),
)
"""What errors of torch say, the most telling first: many are a bare RuntimeError."""
