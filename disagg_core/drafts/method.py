"""The seam between the house and a draft method: what a method answers, and nothing else in the house asks which it is.

A method is a folder of `disagg_core.drafts` with an ``options.py`` (its section of the run document, which loads no
torch) and a ``method.py`` whose ``METHOD`` is a `DraftMethod`; one line in the registry makes it known. The contract
tests in ``tests/contract/drafts`` run over every registered method.

The way of a sample through a method: `DraftMethod.capture` says what the target gives up for it; a `Batcher` makes
batches of samples and draws whatever is random in a step; the loss module turns a batch into a `LossOutput`;
`DraftMethod.figures` says what its sums mean. The way of a draft: `DraftMethod.config_for` a target,
`DraftMethod.model` of a config, `DraftModel.attach` to the target's frozen parts; a `Drafter` proposes tokens with it;
`DraftMethod.written` and `DraftMethod.read` carry it to serving engines and back.

Three promises hold the rest of the house together:

- **Sums, not means.** A loss is a ratio of sums over an optimizer window on all ranks. What a window divides by is
  known before its first backward pass (`Batcher.normalisers`), so that padding, the shape of micro-batches and the
  number of ranks change nothing; every figure leaves as numerator and denominator and is divided once, at the end.
- **Randomness is a function of (seed, sample id).** A sample id differs from epoch to epoch, so nothing else is
  needed, and a resumed run draws what an undisturbed one would have drawn.
- **A draft that lacks a frozen part refuses to compute**: it raises `IncompatibleDraft` instead of training on zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.context import Context
from disagg_core.drafts.figures import Figures, Ratio
from disagg_core.drafts.formats import ExportRequest as ExportRequest
from disagg_core.drafts.formats import ServingFormat as ServingFormat
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts


@dataclass(frozen=True)
class FrozenParts:
    """What a draft takes from its target and never trains."""

    embedding: Tensor  # [V, H_t]
    lm_head: Tensor  # [V, H_t]; last hidden state @ lm_head.T are the target's logits, but for their bound
    logit_cap: float | None = None
    """Bound c of the target's logits, which are ``c * tanh(z / c)``."""
    logit_scale: float = 1.0
    """Factor that `lm_head` holds and the target's own LM head, which an engine gives a draft, does not."""
    embedding_scale: float = 1.0
    """Factor on `embedding` in what an engine gives a draft that has none of its own."""


@dataclass(frozen=True)
class Sample:
    """One captured sample of T tokens, on the CPU: the tensors of `Capture.features`, by name."""

    sample_id: str
    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])


class Batch(Protocol):
    """A batch of samples, padded or packed, made by a `Batcher` and read by the method's loss module only."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with the tensors that are computed with on `device`."""

    def moved(self) -> Sequence[Tensor]:
        """Return the tensors that `to` moves."""


class Batcher(ABC):
    """Makes a method's batches from samples, on the CPU and in background threads: thread-safe, and without state.

    What is random in a step is drawn here, by `sample_id` (see the module's docstring).
    """

    by_length: bool = True
    """Whether samples of like length may share a micro-batch; False where the loss depends on which ones do."""

    @abstractmethod
    def collate(
        self, samples: Sequence[Sample], *, multiple_of: int = 1, packed: bool = False, pin: bool = False
    ) -> Batch:
        """Return `samples`, at least one, as a batch; with `pin`, what leaves host memory is in pinned memory.

        Each is padded on the right to a multiple of `multiple_of` tokens; `packed`, one follows the other in a row that
        is padded so. The loss and its gradients are the same, and those of the samples one by one: nothing of a sample
        sees, or is shifted into, another.
        """

    def shared(self, batch: Batch, context: Context, *, pin: bool = False) -> Batch:
        """Return the part of `batch`, packed and in host memory, that this rank of `context` computes.

        Losses, figures and gradients of the parts of all its ranks add up to those of `batch`, whose counts still are
        what `trainable_positions` and `normalisers` say of it.

        Raises:
            IncompatibleDraft: the method has no such part (`DraftMethod.context_parallel`); plans with it are refused.
        """
        raise IncompatibleDraft(f"{type(self).__name__}: expected batches that ranks can share, found none")

    @abstractmethod
    def dummy(self) -> Batch:
        """Return a short batch for a rank without samples of its own; its loss is finite and gets multiplied by 0."""

    @abstractmethod
    def trainable_positions(self, batch: Batch) -> int:
        """Return how many positions of `batch` the loss looks at. A batch with none is not computed."""

    @abstractmethod
    def normalisers(self, batch: Batch | None) -> dict[str, float]:
        """Return what `batch` adds to each number that the window's loss is divided by; None is one without samples."""


class DraftConfig(Protocol):
    """Sizes and conventions of a draft; each method has its own."""

    @property
    def vocab_size(self) -> int:
        """The target's vocabulary V."""

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the draft can propose, K; V where the method knows no reduced vocabulary."""

    @property
    def target_hidden_size(self) -> int:
        """Width H_t of the target."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The target's layers that the draft reads; None where its files do not say."""

    def with_layers(self, layers: tuple[int, ...]) -> DraftConfig:
        """Return the config of the same draft, said to read these `layers`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a serving engine reads it, in plain JSON values."""


class DraftModel(nn.Module, ABC):
    """A draft model. Its trainable parameters are fp32 masters; the target's parts that it uses are frozen."""

    method: ClassVar[str]
    """Name of the method that the draft is of."""
    config: DraftConfig

    @abstractmethod
    def attach(self, parts: FrozenParts, vocab_map: VocabMap | None = None) -> None:
        """Take the target's `parts`, without a copy where that is possible, and the vocabulary map if there is one.

        Raises:
            IncompatibleDraft: their sizes are not those of the config.
        """

    @abstractmethod
    def serving_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps: all of the draft, nothing of the target.

        A part of the state dict, under the same names: training gathers and shards the tensors by them.
        """

    @abstractmethod
    def load_serving_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `serving_state_dict` returned.

        Raises:
            IncompatibleDraft: tensors are missing, unknown or misshapen; all of them are named.
        """


class Drafter(ABC):
    """Proposes tokens for a batch of sequences while the target verifies them; one for each decoding.

    Rows of the batch have unlike lengths. `states` are the draft's layers as the target captured them, padded on the
    left after the prefill and in step with the verified tokens afterwards.
    """

    @abstractmethod
    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Return up to `count` tokens for each row, to follow the token that was emitted last.

        `lengths` [batch] are the tokens in the target's cache, which the token emitted last is not among.
        """

    @abstractmethod
    def follow(self, states: Tensor, drafted: DraftedTokens, accepted: Tensor, own: Tensor, lengths: Tensor) -> None:
        """Advance past what the target kept, and drop the rest.

        Args:
            states: [batch, k + 1, layers * H_t], of the token emitted last and of the drafted ones.
            drafted: what `propose` returned.
            accepted: [batch], how many drafted tokens stand.
            own: [batch], the target's own token after them.
            lengths: [batch], tokens in the target's cache before the pass.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""


@dataclass(frozen=True)
class DraftVocabulary:
    """Which tokens a draft can propose: `size` of the target's V; a reduced one is counted over `sampled_prompts`."""

    size: int
    sampled_prompts: int = 0


class DraftMethod(ABC):
    """One draft method. `options` are always of the method's own section."""

    name: ClassVar[str]
    """As in ``draft.method``."""
    title: ClassVar[str]
    """For people; its section's."""
    formats: ClassVar[Mapping[str, ServingFormat]]
    """The serving formats that `written` knows, by name; the first is the default."""
    continues: ClassVar[tuple[str, ...]] = ()
    """Other methods whose published drafts this one goes on from; see `adopted`."""
    context_parallel: ClassVar[bool] = False
    """Whether ranks can share a sample's positions; see `Batcher.shared`."""

    # --- what of the target, and which samples ----------------------------------------------------------------------

    @abstractmethod
    def capture(self, options: DraftSection, num_layers: int, layers: tuple[int, ...] | None) -> Capture:
        """Return what is captured of a target of `num_layers` decoder layers; `layers` is the document's choice.

        The last layer is never captured: SGLang cannot.

        Raises:
            TargetError: the target lacks the layers, or the choice does not fit the method.
        """

    @abstractmethod
    def check(self, options: DraftSection, facts: TargetFacts, *, max_tokens: int, draft_tokens: int) -> None:
        """Refuse what cannot work for this target, samples up to `max_tokens` and evaluation with `draft_tokens`.

        Raises:
            BadInput: each option that does not fit is named, with what is allowed.
        """

    def unserved(self, facts: TargetFacts) -> str | None:
        """Return which engine cannot serve such a draft for this target, in words, or None where none is known."""
        return None

    @abstractmethod
    def vocabulary(self, options: DraftSection, facts: TargetFacts) -> DraftVocabulary:
        """Return the draft's vocabulary."""

    @abstractmethod
    def untrainable(self, loss_mask: Sequence[int]) -> str | None:
        """Return why a sample with this `loss_mask` teaches the draft nothing, or None if it can be trained on."""

    # --- the draft --------------------------------------------------------------------------------------------------

    @abstractmethod
    def config_for(
        self, options: DraftSection, facts: TargetFacts, capture: Capture, draft_vocab_size: int
    ) -> DraftConfig:
        """Return the config of a fresh draft.

        Raises:
            IncompatibleDraft: sizes that were given do not fit each other or the target.
        """

    @abstractmethod
    def model(self, config: DraftConfig) -> DraftModel:
        """Return a draft with fresh fp32 weights, drawn from torch's global generator; nothing is attached yet."""

    def fresh(self, options: DraftSection, config: DraftConfig) -> DraftModel:
        """Return a draft to train from the start, whose weights begin as `options` say; by default `model`'s."""
        return self.model(config)

    def adopted(
        self, options: DraftSection, config: DraftConfig, state: Mapping[str, Tensor]
    ) -> tuple[DraftConfig, dict[str, Tensor]]:
        """Return a published draft, `config` and `state` as `read` returned them, as one of this method.

        A draft of a method that this one `continues` comes back as the draft of this method that computes the same, bit
        for bit: what is added does nothing yet.

        Raises:
            IncompatibleDraft: the options do not fit it.
        """
        return config, dict(state)

    @abstractmethod
    def continued(
        self, config: DraftConfig, state: Mapping[str, Tensor], facts: TargetFacts, capture: Capture, vocab: VocabMap
    ) -> DraftModel:
        """Return a draft to train on from a published one, `config` and `state` as `read` returned them.

        Raises:
            IncompatibleDraft: it was made for a target of other sizes or other layers.
        """

    @abstractmethod
    def parameters(self, config: DraftConfig) -> int:
        """Return how many trainable parameters a draft of `config` has, without making one."""

    @abstractmethod
    def logit_rows(self, options: DraftSection, config: DraftConfig, tokens: int) -> int:
        """Return of how many rows at most the loss makes draft logits for a sample of `tokens` tokens."""

    def mask_token(self, config: DraftConfig) -> int | None:
        """Return the token that stands where one is to be drafted, and in no sample; None where there is none."""
        return None

    # --- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def batcher(self, options: DraftSection, config: DraftConfig, *, seed: int) -> Batcher:
        """Return what makes the batches; `seed` is the run's."""

    @abstractmethod
    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> nn.Module:
        """Return the loss module over `draft`: ``module(batch, normalisers)`` is a `LossOutput`.

        `normalisers` are the window's sums of what `Batcher.normalisers` returned, fp32 scalars on the device. Every
        parameter of the draft is used inside ``forward``, for FSDP's sake. ``module.compile(...)`` compiles what pays.
        """

    @abstractmethod
    def figures(self, ratios: Mapping[str, Ratio]) -> Figures:
        """Return the figures of a step from the `ratios` summed over its window and all ranks.

        ``loss`` (float), ``accuracies`` (by drafted position) and ``simulated_accept_length`` (float) are always there.
        """

    # --- decoding ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def most_draft_tokens(self, config: DraftConfig) -> int | None:
        """Return how many tokens a draft can propose at once; None where there is no bound."""

    @abstractmethod
    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter that starts from the target's prefill of `prompts`.

        Args:
            draft: attached, on the target's device and in its dtype.
            sampler: chooses the tokens.
            prompts: token ids, unlike lengths.
            states: [batch, longest, layers * H_t], padded on the left.
            first: [batch], the token that follows each prompt.
        """

    # --- serving formats --------------------------------------------------------------------------------------------

    @abstractmethod
    def recognises(self, document: Mapping[str, Any]) -> bool:
        """Tell whether ``config.json`` `document` is of a draft of this method, in any format."""

    @abstractmethod
    def read(
        self, document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> tuple[DraftConfig, dict[str, Tensor]]:
        """Return config and tensors (fp32, serving names, as `DraftModel.load_serving_state_dict` takes them).

        Raises:
            IncompatibleDraft: it computes something else than this project's drafts, or tensors are missing, unknown or
                misshapen; `source` and every fault are named.
        """

    @abstractmethod
    def written(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return ``config.json`` and the tensors of an export, from `tensors` as `read` returned them, cast already.

        `parts` are the target's, for formats that have room for them; `IncompatibleDraft` where they do not fit.
        """

    @abstractmethod
    def server_flags(self, draft_tokens: int) -> str:
        """Return SGLang's flags for serving such a draft with `draft_tokens` proposals a pass; empty if it cannot."""
