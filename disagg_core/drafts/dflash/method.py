"""DFlash behind the seam of draft methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash import serving_format
from disagg_core.drafts.dflash.batch import BlockBatcher, DFlashBatcher
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.drafter import BlockDrafter
from disagg_core.drafts.dflash.loss import DFlashLoss
from disagg_core.drafts.dflash.model import DFlashDraft
from disagg_core.drafts.dflash.options import BlockDraftSection, BlockShapeSection, DFlashSection
from disagg_core.drafts.figures import Figures, Ratio
from disagg_core.drafts.mask_token import mask_token_of, spare_tokens_of
from disagg_core.drafts.method import (
    DraftConfig,
    Drafter,
    DraftMethod,
    DraftModel,
    DraftVocabulary,
    ExportRequest,
    FrozenParts,
)
from disagg_core.drafts.sampling import Sampler
from disagg_core.drafts.simulated import simulated_accept_length
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput, IncompatibleDraft, TargetError
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

_NOT_IN_SGLANG = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "qwen2", "qwen2_moe"})
"""Widely used families whose models lack ``set_dflash_layers_to_capture`` in SGLang 0.5.23."""


class DFlash(DraftMethod):
    """DFlash (https://arxiv.org/abs/2602.06036): one pass of the draft proposes a whole block."""

    name = "dflash"
    title = DFlashSection.title
    formats = serving_format.FORMATS
    context_parallel = True
    draft_type: ClassVar[type[DFlashDraft]] = DFlashDraft
    """What a draft of the method is; its config's type goes with it."""
    slots_without_proposal: ClassVar[int] = 1
    """Slots of a block that propose nothing: the one of the token emitted last."""

    def capture(self, options: DraftSection, num_layers: int, layers: tuple[int, ...] | None) -> Capture:
        """Return the layers, by default as many as the draft has; the last hidden state for the teacher's labels."""
        section = _section(options)
        chosen = default_layers(num_layers, section.num_layers) if layers is None else layers
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] > num_layers - 2:
            raise TargetError(
                f"target.aux_layers: expected ascending layer ids from 0 to {num_layers - 2} (the target has "
                f"{num_layers} layers and the last cannot be captured), found {list(chosen)}"
            )
        return Capture(tuple(chosen), last_hidden_state=self.needs_last_state(section))

    def needs_last_state(self, section: BlockShapeSection) -> bool:
        """Tell whether the loss needs the target's last hidden state."""
        return _with_loss(section).loss.label == "teacher"

    def check(self, options: DraftSection, facts: TargetFacts, *, max_tokens: int, draft_tokens: int) -> None:
        """Refuse a block that no sample or evaluation fits, sizes that do not fit each other, a bad mask token."""
        section = _section(options)
        capture = self.capture(section, facts.num_layers, None)
        if section.init_from is not None:
            return  # the draft that is continued has the sizes
        faults = []
        if section.block_size > max_tokens:
            faults.append(
                f"draft.block_size: expected at most data.max_tokens ({max_tokens}), found {section.block_size}"
            )
        idle = self.slots_without_proposal
        if draft_tokens > section.block_size - idle:
            bound = f"draft.block_size{f' - {idle}' if idle else ''} ({section.block_size - idle})"
            faults.append(f"evaluation.draft_tokens: expected at most {bound}, found {draft_tokens}")
        for attempt in (self._check_mask_token, self._check_sizes):
            try:
                attempt(section, facts, capture)
            except BadInput as error:
                faults.append(str(error))
        if faults:
            raise BadInput("; ".join(faults))

    def _check_mask_token(self, section: BlockShapeSection, facts: TargetFacts, capture: Capture) -> None:
        _mask_token(section, facts)

    def _check_sizes(self, section: BlockShapeSection, facts: TargetFacts, capture: Capture) -> None:
        self._config(section.model_copy(update={"mask_token_id": 0}), facts, capture, 0)

    def unserved(self, facts: TargetFacts) -> str | None:
        """Name SGLang, for families of targets that it cannot capture the layers of for drafts of blocks."""
        if facts.model_type not in _NOT_IN_SGLANG:
            return None
        return f"SGLang 0.5.23 cannot serve a {self.title} draft for a {facts.model_type} target"

    def vocabulary(self, options: DraftSection, facts: TargetFacts) -> DraftVocabulary:
        """Return the target's whole vocabulary."""
        return DraftVocabulary(facts.vocab_size)

    def untrainable(self, loss_mask: Sequence[int]) -> str | None:
        """Return that a block can begin nowhere, if that is so."""
        if any(first and second for first, second in pairwise(loss_mask)):
            return None
        return "no two neighbouring tokens are trained on, so no block can begin"

    def config_for(
        self, options: DraftSection, facts: TargetFacts, capture: Capture, draft_vocab_size: int
    ) -> DFlashConfig:
        """Return the config of a fresh draft; sizes that are not given are the target's.

        Raises:
            IncompatibleDraft: the sizes do not fit, or the vocabulary is not the target's.
            BadInput: there is no mask token; see `mask_token_of`.
        """
        section = _section(options)
        if draft_vocab_size != facts.vocab_size:
            raise IncompatibleDraft(
                f"a {self.title} draft has the target's whole vocabulary: expected {facts.vocab_size}, "
                f"found {draft_vocab_size}"
            )
        return self._config(section, facts, capture, _mask_token(section, facts))

    def _config(
        self, section: BlockShapeSection, facts: TargetFacts, capture: Capture, mask_token_id: int
    ) -> DFlashConfig:
        return self.draft_type.config_type.for_target(facts, section, capture, mask_token_id)

    def model(self, config: DraftConfig) -> DFlashDraft:
        """Return a fresh draft."""
        assert isinstance(config, DFlashConfig)
        return self.draft_type(config)

    def continued(
        self, config: DraftConfig, state: Mapping[str, Tensor], facts: TargetFacts, capture: Capture, vocab: VocabMap
    ) -> DFlashDraft:
        """Return a draft with the weights of a published one; its config says the factor that it is trained with.

        Raises:
            IncompatibleDraft: it was made for a target of other sizes or other layers.
        """
        assert isinstance(config, DFlashConfig)
        self.check_made_for(config, facts, capture)
        draft = self.model(config.with_scale_of(facts))
        draft.load_serving_state_dict(state)
        return draft

    def check_made_for(self, config: DFlashConfig, facts: TargetFacts, capture: Capture) -> None:
        """Check that a published draft reads this target as it is captured.

        Raises:
            IncompatibleDraft: each difference is named.
        """
        wanted = {
            "hidden_size": (facts.hidden_size, config.hidden_size),
            "vocab_size": (facts.vocab_size, config.vocab_size),
            "target_layer_ids": (capture.layers, config.target_layer_ids),
            "num_target_layers": (facts.num_layers, config.num_target_layers or facts.num_layers),
        }
        faults = [f"{key}: expected {one}, found {other}" for key, (one, other) in wanted.items() if one != other]
        if faults:
            raise IncompatibleDraft(f"draft.init_from: the draft was made for another target: {'; '.join(faults)}")

    def parameters(self, config: DraftConfig) -> int:
        """Return how many parameters are trained."""
        assert isinstance(config, DFlashConfig)
        return sum(prod(shape) for shape in serving_format.expected_shapes(self.draft_type, config).values())

    def mask_token(self, config: DraftConfig) -> int:
        """Return the token of the slots to be filled."""
        assert isinstance(config, DFlashConfig)
        return config.mask_token_id

    def logit_rows(self, options: DraftSection, config: DraftConfig, tokens: int) -> int:
        """Return those of every block's proposals; a block begins at no more than all tokens but the last."""
        return min(_section(options).anchors, max(0, tokens - 1)) * self.most_draft_tokens(config)

    def batcher(self, options: DraftSection, config: DraftConfig, *, seed: int) -> BlockBatcher:
        """Return what makes the batches and draws their blocks."""
        assert isinstance(config, DFlashConfig)
        return DFlashBatcher(_with_loss(options), config, seed=seed)

    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> nn.Module:
        """Return the loss module."""
        assert isinstance(draft, DFlashDraft)
        section = _with_loss(options)
        return DFlashLoss(draft, parts, section.loss, activation_checkpointing=activation_checkpointing)

    def figures(self, ratios: Mapping[str, Ratio]) -> Figures:
        """Return each ratio, and the accept length that the accuracies make likely."""
        values = {name: ratio.value() for name, ratio in ratios.items()}
        figures: Figures = {name: value if name.endswith("accuracies") else value[0] for name, value in values.items()}
        return {**figures, "simulated_accept_length": simulated_accept_length(values["accuracies"])}

    def most_draft_tokens(self, config: DraftConfig) -> int:
        """Return as many as a block has slots that propose."""
        assert isinstance(config, DFlashConfig)
        return config.block_size - self.slots_without_proposal

    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter of blocks."""
        assert isinstance(draft, DFlashDraft)
        return BlockDrafter(draft, sampler, prompts, states, first)

    def recognises(self, document: Mapping[str, Any]) -> bool:
        """Tell a config by its architecture, its own keys or its speculators type."""
        return serving_format.recognises(document, self.draft_type.config_type, self.name)

    def read(
        self, document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> tuple[DFlashConfig, dict[str, Tensor]]:
        """Return config and tensors of a draft in either format, or of a checkpoint."""
        return serving_format.read(document, tensors, self.draft_type, source)

    def written(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config document and tensors in `request`'s format."""
        assert isinstance(config, DFlashConfig)
        return serving_format.written(config, tensors, self.name, request, parts)

    def server_flags(self, draft_tokens: int) -> str:
        """Return the flags that SGLang needs to draft blocks."""
        return serving_format.server_flags(draft_tokens)


def default_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Return the decoder layers that are captured by default for a draft of `count` layers, ascending.

    From the second to the third but last, evenly: ``round(1 + i (L - 4) / (count - 1))``, the middle one for a single
    one. Where these collide, as many as there are, spread over all but the last.

    Raises:
        TargetError: the target has fewer than two layers.
    """
    if num_layers < 2:
        raise TargetError(
            f"expected a target of at least 2 decoder layers (the last is never captured), found {num_layers}"
        )
    if count == 1:
        return (min(num_layers // 2, num_layers - 2),)
    chosen = sorted({round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)})
    if len(chosen) == count and chosen[0] >= 0:
        return tuple(chosen)
    fewer = min(count, num_layers - 1)
    return tuple(round(i * (num_layers - 2) / max(1, fewer - 1)) for i in range(fewer))


def _mask_token(section: BlockShapeSection, facts: TargetFacts) -> int:
    return mask_token_of(section.mask_token_id, facts, spare_tokens_of(facts))


def _section(options: DraftSection) -> BlockShapeSection:
    assert isinstance(options, BlockShapeSection)
    return options


def _with_loss(options: DraftSection) -> BlockDraftSection:
    assert isinstance(options, BlockDraftSection)
    return options


METHOD = DFlash()
