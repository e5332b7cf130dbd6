"""Every error that a caller may catch. Each says what was expected, what was found, and the way out.

`failure_class` tells the attempts loop what kind of failure it is: `disagg_core.failures` has the policy of each.
"""

from __future__ import annotations

from disagg_core.failures import FailureClass as FailureClass
from disagg_core.failures import class_of_foreign


class DraftlineError(Exception):
    """Base of all errors raised on purpose by this project."""

    failure_class: FailureClass = "bug"


class BadInput(DraftlineError, ValueError):
    """Something that the user gave is wrong. Nothing was started; the message says what is allowed."""

    failure_class: FailureClass = "bad_input"


class SpecError(BadInput):
    """The run document has an unknown, ill-typed or contradictory field."""


class PromptError(BadInput):
    """A prompts file is missing, empty, or has a line that cannot be used (file and line are named)."""


class TargetError(BadInput):
    """The target model is missing, lacks what was asked of it, or cannot be read."""


class IncompatibleDraft(BadInput):
    """A draft's tensors or config do not fit: the names, shapes or dtypes that differ are listed."""


class MissingLibrary(BadInput):
    """A system library or program is missing; the message holds the command that installs it."""


class PortTaken(BadInput):
    """A port that was asked for is in use by another process."""


class Transient(DraftlineError):
    """Base of what may succeed when tried again. Only these are caught and retried."""


# --- reference channel -------------------------------------------------------------------------------------------


class ChannelError(DraftlineError):
    """Base of the reference channel's errors."""


class ChannelDamaged(ChannelError):
    """A record in the middle of the stream is not what was written: place, expected and found are named.

    Another attempt has another channel and continues from the checkpoint's cursor, so it is tried again.
    """

    failure_class: FailureClass = "store_lost"


class ChannelBusy(ChannelError):
    """The channel has a live writer (or reader) already; its host, pid and last heartbeat are named."""


class ForeignChannel(ChannelError):
    """The channel belongs to another run or attempt than the one that opens it."""


class ChannelClosed(ChannelError):
    """Published to a stream that has its end, or acknowledged what was never delivered."""


class ProducerFailed(ChannelError):
    """The writer ended the stream with a failure; `reason` is what it said."""

    def __init__(self, reason: str, failure_class: FailureClass = "bug") -> None:
        super().__init__(f"the producer failed: {reason}")
        self.reason = reason
        self.failure_class = failure_class


class ChannelStalled(ChannelError):
    """The other side made no progress for the idle timeout: which side, since when, and what it did last."""

    failure_class: FailureClass = "stalled"


class ChannelUnavailable(ChannelError, Transient):
    """The channel's server or mount cannot be reached."""

    failure_class: FailureClass = "infrastructure"


class IdentityMismatch(ChannelError):
    """A reference was captured by another target, tokenizer, vocabulary map or schema than this run's."""

    failure_class: FailureClass = "bad_input"


# --- feature store -----------------------------------------------------------------------------------------------


class StoreError(DraftlineError):
    """Base of the feature store's errors."""

    failure_class: FailureClass = "store_lost"


class StoreFull(StoreError):
    """No room came free before the deadline; used and total bytes are named. Nothing is ever evicted."""


class StoreUnavailable(StoreError, Transient):
    """The store's master or an owner cannot be reached."""


class StoreKilled(StoreError):
    """The kernel killed a process of the store for memory; the limit is named."""

    failure_class: FailureClass = "out_of_memory"


class SampleLost(StoreError):
    """The bytes of one sample are gone or damaged beyond retry: it has to be captured again."""


class StoreRejected(StoreError):
    """Mooncake refused a call with a code that only a bug explains; the call, the key and the code are named."""

    failure_class: FailureClass = "bug"


class StoreTooLarge(BadInput):
    """The store's capacity does not fit the machine; what was asked for and what is there are named."""


class StoreMisuse(StoreError):
    """The store was used after close, in a forked child, or with a reference that is not its own."""

    failure_class: FailureClass = "bug"


# --- rollout -----------------------------------------------------------------------------------------------------


class PromptRejected(DraftlineError):
    """One prompt cannot be trained on (too long, nothing to train on, refused by the template): it is counted."""


class TargetBroken(DraftlineError):
    """The target in this process fails with prompts that it captured before: only a new process can help.

    Its class is that of the error that the target raises now.
    """

    def __init__(self, message: str, failure_class: FailureClass) -> None:
        super().__init__(message)
        self.failure_class = failure_class


class TargetUnavailable(Transient):
    """No target is able to capture at present."""

    failure_class: FailureClass = "target_unavailable"


# --- training ----------------------------------------------------------------------------------------------------


class CheckpointError(DraftlineError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class CheckpointNotSaved(CheckpointError):
    """A checkpoint could not be written: the bytes it needs and those that are free are named. Older ones stay."""

    failure_class: FailureClass = "infrastructure"


class DamagedHeldOut(DraftlineError):
    """The held-out samples of a run are not there, or one of them cannot be read."""

    failure_class: FailureClass = "infrastructure"


class SampleUnusable(DraftlineError):
    """A sample arrived whole but cannot be trained on; it is quarantined with this reason."""


class TrainingDiverged(DraftlineError):
    """Loss or gradient was not finite for several windows in a row; the weights are those from before."""

    failure_class: FailureClass = "diverged"


class Preempted(DraftlineError):
    """The process was asked to stop and saved its state."""

    failure_class: FailureClass = "preempted"


class NotGoodEnough(DraftlineError):
    """Base of the judgements: the run did all its work, its draft is delivered, and what came of it does not do."""


class AccountingError(NotGoodEnough):
    """The run's numbers do not add up: which identity fails and by how much."""


class TooManyLost(NotGoodEnough):
    """More prompts or samples came to nothing than the run allows: how many, of how many, and why."""

    failure_class: FailureClass = "infrastructure"


class EvaluationFailed(NotGoodEnough):
    """Speculative decoding was not lossless, or the accept length is below the run's minimum."""


class RoleFailed(DraftlineError):
    """A role of the run ended without finishing its work."""

    def __init__(self, message: str, failure_class: FailureClass = "bug") -> None:
        super().__init__(message)
        self.failure_class = failure_class


class PeerFailed(RoleFailed):
    """Another rank of this role failed; its own word says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "infrastructure")


def classify(error: BaseException) -> FailureClass:
    """Return the failure class of `error`: its own if it is one of ours, else by the evidence that it holds.

    An error without a class of its own, ours or foreign, has that of the error that it was raised from.
    """
    if isinstance(error, BaseExceptionGroup):
        found = [classify(part) for part in error.exceptions]
        return next((failure_class for failure_class in found if failure_class != "bug"), "bug")
    failure_class = error.failure_class if isinstance(error, DraftlineError) else class_of_foreign(error)
    if failure_class == "bug" and error.__cause__ is not None:
        return classify(error.__cause__)
    return failure_class
