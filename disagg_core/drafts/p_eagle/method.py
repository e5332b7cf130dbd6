"""P-EAGLE behind the seam of draft methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disagg_core.contracts import Capture
from disagg_core.drafts.eagle_layers import check_layers, default_layers
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
from disagg_core.drafts.p_eagle import serving_format
from disagg_core.drafts.p_eagle.batch import AHEAD, PEagleBatcher
from disagg_core.drafts.p_eagle.config import PEagleConfig
from disagg_core.drafts.p_eagle.drafter import ParallelDrafter
from disagg_core.drafts.p_eagle.loss import PEagleLoss
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.drafts.p_eagle.sampling import kept_at
from disagg_core.drafts.sampling import Sampler
from disagg_core.drafts.simulated import simulated_accept_length
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft, SpecError
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

_log = logging.getLogger(__name__)


class PEagle(DraftMethod):
    """P-EAGLE (https://arxiv.org/abs/2602.01469): EAGLE-3's inputs, and all tokens drafted in one pass."""

    name = "p_eagle"
    title = PEagleSection.title
    formats = serving_format.FORMATS
    context_parallel = True

    def capture(self, options: DraftSection, num_layers: int, layers: tuple[int, ...] | None) -> Capture:
        """Return three layers and the last hidden state, which the teacher's logits are made from."""
        chosen = check_layers(layers, num_layers) if layers is not None else default_layers(num_layers)
        return Capture(chosen, last_hidden_state=True)

    def check(self, options: DraftSection, facts: TargetFacts, *, max_tokens: int, draft_tokens: int) -> None:
        """Refuse sizes that do not fit, depths that no sample has, and proposals beyond the depths."""
        assert isinstance(options, PEagleSection)
        size, depths = self.vocabulary(options, facts).size, options.depths
        if options.init_from is not None:
            return  # the draft in there has sizes, depths and a mask token of its own
        if depths + AHEAD > max_tokens:
            raise SpecError(
                f"draft.depths: expected at most {max_tokens - AHEAD} with samples of up to {max_tokens} tokens "
                f"(data.max_tokens), found {depths}"
            )
        if draft_tokens > depths:
            raise SpecError(
                f"evaluation.draft_tokens: expected at most {depths}, which draft.depths lets the draft propose at "
                f"once, found {draft_tokens}"
            )
        self.config_for(options, facts, self.capture(options, facts.num_layers, None), size)

    def vocabulary(self, options: DraftSection, facts: TargetFacts) -> DraftVocabulary:
        """Return the given size, or the target's vocabulary.

        Raises:
            SpecError: the size is above the target's.
        """
        assert isinstance(options, PEagleSection)
        size = options.vocab_size or facts.vocab_size
        if size > facts.vocab_size:
            raise SpecError(f"draft.vocab_size: expected at most the target's {facts.vocab_size}, found {size}")
        return DraftVocabulary(size, options.vocab_sample)

    def untrainable(self, loss_mask: Sequence[int]) -> str | None:
        """Position t reads token t + 1 and predicts token t + 2, so the first two tokens teach nothing."""
        if len(loss_mask) <= AHEAD:
            return f"expected at least {AHEAD + 1} tokens, found {len(loss_mask)}"
        if not any(loss_mask[AHEAD:]):
            return "no position to train on: the loss mask is zero after truncation to data.max_tokens"
        return None

    def config_for(
        self, options: DraftSection, facts: TargetFacts, capture: Capture, draft_vocab_size: int
    ) -> PEagleConfig:
        """Return the config of a fresh draft; sizes that are not given are the target's."""
        assert isinstance(options, PEagleSection)
        mask_token_id = mask_token_of(options.mask_token_id, facts, spare_tokens_of(facts))
        return PEagleConfig.for_target(facts, options, capture.layers, draft_vocab_size, mask_token_id)

    def model(self, config: DraftConfig) -> PEagleDraft:
        """Return a fresh draft."""
        assert isinstance(config, PEagleConfig)
        return PEagleDraft(config)

    def continued(
        self, config: DraftConfig, state: Mapping[str, Tensor], facts: TargetFacts, capture: Capture, vocab: VocabMap
    ) -> PEagleDraft:
        """Return a published draft to train on; where its vocabulary is another, LM head rows follow their tokens."""
        assert isinstance(config, PEagleConfig)
        found = (config.hidden_size, config.vocab_size, config.layers or capture.layers)
        expected = (facts.hidden_size, facts.vocab_size, capture.layers)
        if found != expected:
            raise IncompatibleDraft(
                f"draft.init_from: expected target width, vocabulary and captured layers {expected}, found {found}"
            )
        draft = PEagleDraft(
            config.model_copy(update={"draft_vocab_size": len(vocab.d2t), "aux_layer_ids": capture.layers})
        )
        known, wanted = state["t2d"].nonzero().flatten(), vocab.target_ids  # target ids, ascending
        row_of = torch.full((config.vocab_size,), -1, dtype=torch.int64)
        row_of[known] = torch.arange(len(known))
        rows = row_of[wanted]  # row of each draft token in the imported LM head; -1 where it had none
        head = draft.lm_head.weight.detach().clone()
        head[rows >= 0] = state["lm_head.weight"][rows[rows >= 0]]
        if not torch.equal(known, wanted):
            _log.warning("the draft to continue has another vocabulary; %d rows start afresh", int((rows < 0).sum()))
        draft.load_serving_state_dict({**state, "lm_head.weight": head, "t2d": vocab.t2d, "d2t": vocab.d2t})
        return draft

    def parameters(self, config: DraftConfig) -> int:
        """Return the number of trained weights; the vocabulary map is none, the embedding is."""
        assert isinstance(config, PEagleConfig)
        shapes = serving_format.expected_shapes(config)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in serving_format.MAPS)

    def mask_token(self, config: DraftConfig) -> int:
        """Return the token of the slots to be filled."""
        assert isinstance(config, PEagleConfig)
        return config.mask_token_id

    def logit_rows(self, options: DraftSection, config: DraftConfig, tokens: int) -> int:
        """Return those that the sampling keeps of all depths, of a sample that is trained on everywhere."""
        assert isinstance(options, PEagleSection)
        assert isinstance(config, PEagleConfig)
        valid = max(0, tokens - AHEAD)
        later = (kept_at(depth, valid, options.retention, options.least_retention) for depth in range(1, config.depths))
        return valid + sum(later)

    def batcher(self, options: DraftSection, config: DraftConfig, *, seed: int) -> PEagleBatcher:
        """Return what pads samples and draws their rows."""
        assert isinstance(options, PEagleSection)
        assert isinstance(config, PEagleConfig)
        return PEagleBatcher(options, config, seed=seed)

    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> PEagleLoss:
        """Return the loss of all depths over `draft`."""
        assert isinstance(draft, PEagleDraft)
        return PEagleLoss(
            draft, parts.lm_head, logit_cap=parts.logit_cap, activation_checkpointing=activation_checkpointing
        )

    def figures(self, ratios: Mapping[str, Ratio]) -> Figures:
        """Return loss, losses and accuracies by depth, and what they promise."""
        values = {name: ratio.value() for name, ratio in ratios.items()}
        return {
            **values,
            "loss": values["loss"][0],
            "simulated_accept_length": simulated_accept_length(values["accuracies"]),
        }

    def most_draft_tokens(self, config: DraftConfig) -> int:
        """Return the depths that were trained."""
        assert isinstance(config, PEagleConfig)
        return config.depths

    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter of parallel proposals."""
        assert isinstance(draft, PEagleDraft)
        return ParallelDrafter(draft, sampler, prompts, states, first)

    def recognises(self, document: Mapping[str, Any]) -> bool:
        """Tell a P-EAGLE config by its speculators type."""
        return serving_format.recognises(document)

    def read(
        self, document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> tuple[PEagleConfig, dict[str, Tensor]]:
        """Return config and tensors of an export or a checkpoint."""
        return serving_format.read(document, tensors, source)

    def written(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config document and tensors in speculators format; nothing in it is the target's."""
        assert isinstance(config, PEagleConfig)
        return serving_format.written(config, tensors, request)

    def server_flags(self, draft_tokens: int) -> str:
        """Return nothing: SGLang serves no such draft."""
        return ""


METHOD = PEagle()
