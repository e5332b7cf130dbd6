"""The vocabulary map between a target and a draft: which target tokens the draft can propose.

`t2d` marks the target's tokens that are in the draft vocabulary, `d2t` holds for each draft token the **offset** to
its target id. Draft ids ascend with target ids. The version is a hash of the map's content, so that equal maps have
equal versions; the hash of the inputs it was counted from is stored beside it, to tell when it can be reused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from disagg_core.drafts.tensor_files import save_tensors
from disagg_core.errors import BadInput


@dataclass(frozen=True)
class VocabMap:
    """One vocabulary map; make it with `from_counts`, `identity` or `load`."""

    t2d: Tensor  # [V] bool
    d2t: Tensor  # [K] int64, target id minus draft id
    version: str
    inputs_version: str = ""

    @property
    def target_ids(self) -> Tensor:
        """The target's ids of the draft tokens, ``[K]`` int64, ascending."""
        return self.d2t + torch.arange(self.d2t.numel())

    @classmethod
    def from_counts(
        cls, counts: Tensor, draft_vocab_size: int, inputs_version: str = "", always: Sequence[int] = ()
    ) -> VocabMap:
        """Return the map of the `draft_vocab_size` most frequent tokens, those in `always` before all others.

        Equal counts are decided by the smaller id, which also fills up with the smallest unused ids when fewer tokens
        were seen.

        Args:
            counts: ``[V]`` occurrences of each target token where the loss mask is 1.
            draft_vocab_size: K.
            inputs_version: hash of what was counted.
            always: ids of tokens that a draft must be able to propose, such as those that end a turn.

        Raises:
            BadInput: K is not between 1 and V.
        """
        if not 1 <= draft_vocab_size <= counts.numel():
            raise BadInput(
                f"draft.vocab_size: expected 1 to {counts.numel()} (the target's vocabulary), found {draft_vocab_size}"
            )
        ranked = counts.cpu().clone()
        ranked[list(always)] = ranked.max() + 1
        order = torch.sort(ranked, descending=True, stable=True).indices
        return cls._of_ids(order[:draft_vocab_size].sort().values, counts.numel(), inputs_version)

    @classmethod
    def identity(cls, vocab_size: int) -> VocabMap:
        """Return the map of a draft that has the target's whole vocabulary."""
        return cls._of_ids(torch.arange(vocab_size), vocab_size, "")

    @classmethod
    def from_offsets(cls, d2t: Tensor, vocab_size: int) -> VocabMap:
        """Return the map whose draft tokens have these offsets, as a draft's files hold them.

        Args:
            d2t: ``[K]`` int64, target id minus draft id, of ascending target ids.
            vocab_size: V.
        """
        return cls._of_ids(d2t + torch.arange(d2t.numel()), vocab_size, "")

    @classmethod
    def _of_ids(cls, ids: Tensor, vocab_size: int, inputs_version: str) -> VocabMap:
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids] = True
        d2t = ids - torch.arange(ids.numel())
        return cls(t2d, d2t, _content_hash(t2d, d2t), inputs_version)

    def save(self, path: Path) -> None:
        """Write the map as a safetensors file, by atomic rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"version": self.version, "inputs_version": self.inputs_version}
        save_tensors({"t2d": self.t2d, "d2t": self.d2t}, draft, metadata)
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> VocabMap:
        """Read what `save` wrote.

        Raises:
            BadInput: there is no such file, or its content is not what its version says.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                t2d, d2t = file.get_tensor("t2d"), file.get_tensor("d2t")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"vocabulary map: cannot read {path}: {error}; delete it to derive it again") from error
        found = _content_hash(t2d, d2t)
        if metadata.get("version") != found:
            raise BadInput(
                f"vocabulary map: {path}: expected version {metadata.get('version')}, found content {found}; "
                "delete it to derive it again"
            )
        return cls(t2d, d2t, found, metadata.get("inputs_version", ""))


def version_of(maps: Sequence[VocabMap]) -> str:
    """Return the version of what the drafts of a run can propose: of one map its own, of several a hash of theirs."""
    versions = [known.version for known in maps]
    if len(versions) == 1:
        return versions[0]
    return hashlib.sha256(":".join(versions).encode()).hexdigest()[:16]


def count_tokens(
    samples: Iterable[tuple[Tensor, Tensor]], vocab_size: int, progress: Callable[[int], None] = lambda counted: None
) -> Tensor:
    """Return how often each token occurs where the loss mask is 1, int64 ``[vocab_size]``.

    `samples` are token ids and loss masks, both ``[tokens]``; one with an id that is not the target's is left out, as
    it is from the capture. `progress` is told how many went by so far.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for number, (ids, mask) in enumerate(samples, start=1):
        if not bool(((ids < 0) | (ids >= vocab_size)).any()):
            counts += torch.bincount(ids[mask != 0].long(), minlength=vocab_size)
        progress(number)
    return counts


def derive_vocab_map(
    path: Path,
    counts: Callable[[], Tensor],
    *,
    vocab_size: int,
    draft_vocab_size: int,
    inputs_version: str,
    always: Sequence[int] = (),
) -> VocabMap:
    """Return the map at `path` if it was derived from the same inputs, else derive it, write it and return it.

    Args:
        path: of the map's file.
        counts: called only when they are needed; gives occurrences of each token, ``[V]``. With K == V they are not.
        vocab_size: V.
        draft_vocab_size: K.
        inputs_version: hash of everything that `counts` depends on.
        always: ids of tokens that are in the map however rare they are.

    Raises:
        BadInput: the file at `path` is damaged, or K is not between 1 and V.
    """
    if path.exists():
        known = VocabMap.load(path)
        sizes = (known.t2d.numel(), known.d2t.numel())
        if known.inputs_version == inputs_version and sizes == (vocab_size, draft_vocab_size):
            return known
    whole = draft_vocab_size == vocab_size
    found = torch.zeros(vocab_size, dtype=torch.int64) if whole else counts()
    vocab_map = VocabMap.from_counts(found, draft_vocab_size, inputs_version, always)
    vocab_map.save(path)
    return vocab_map


def _content_hash(t2d: Tensor, d2t: Tensor) -> str:
    digest = hashlib.sha256(f"{t2d.numel()}:{d2t.numel()}:".encode())
    digest.update(t2d.to(torch.uint8).numpy().tobytes())
    digest.update(d2t.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]
