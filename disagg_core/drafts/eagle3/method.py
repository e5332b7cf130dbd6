"""EAGLE-3 behind the seam of draft methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.eagle3 import serving_format
from disagg_core.drafts.eagle3.batch import Eagle3Batch
from disagg_core.drafts.eagle3.batcher import Eagle3Batcher
from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.drafter import DraftChain
from disagg_core.drafts.eagle3.loss import Eagle3Loss, TttOutput
from disagg_core.drafts.eagle3.model import Eagle3Draft
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.eagle_layers import check_layers, default_layers
from disagg_core.drafts.figures import Figures, LossOutput, Ratio
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
from disagg_core.errors import IncompatibleDraft, SpecError
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

_FIRST_PREDICTED = 2
"""Index of the first token that a draft predicts."""
_log = logging.getLogger(__name__)


class LossModule(nn.Module):
    """The training-time test as the seam asks for it: divided by the window, with its figures as ratios."""

    def __init__(self, loss: Eagle3Loss) -> None:
        super().__init__()
        self.loss = loss

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts of the step that fuse; arguments are `torch.compile`'s."""
        self.loss.compile(*args, **options)

    def forward(self, batch: Eagle3Batch, normalisers: Mapping[str, Tensor]) -> LossOutput:
        """Return loss and figures of `batch`."""
        if self.loss.section.normalisation == "compat":
            micro_batches = normalisers["micro_batches"]
            output = self.loss(batch)
            context = batch.shared.context if batch.shared is not None else None
            counted = torch.full_like(micro_batches, 1 / context.size if context is not None else 1.0)
            return _loss_output(output, output.total / micro_batches, counted)
        whole = normalisers["positions"].clamp(min=1)
        output = self.loss(batch, normaliser=whole)
        return _loss_output(output, output.total, output.denominators[0], scale=whole)


def _loss_output(output: TttOutput, total: Tensor, counted: Tensor, scale: Tensor | float = 1.0) -> LossOutput:
    """Return `output` with its losses as numerators again: they were divided by `scale`, and count `counted`."""
    return LossOutput(
        total,
        {
            "loss": Ratio((output.total.detach() * scale).reshape(1), counted.reshape(1)),
            "step_losses": Ratio(output.step_losses.detach() * scale, counted.expand_as(output.step_losses)),
            "accuracies": Ratio(output.correct, output.denominators),
            "acceptance_rates": Ratio(output.accepted, output.live),
        },
    )


class Eagle3(DraftMethod):
    """EAGLE-3 (https://arxiv.org/abs/2503.01840): one decoder layer that drafts token by token from its own states."""

    name = "eagle3"
    title = Eagle3Section.title
    formats = serving_format.FORMATS
    context_parallel = True

    def capture(self, options: DraftSection, num_layers: int, layers: tuple[int, ...] | None) -> Capture:
        """Return three layers and the last hidden state, which the teacher's logits are made from."""
        chosen = check_layers(layers, num_layers) if layers is not None else default_layers(num_layers)
        return Capture(chosen, last_hidden_state=True)

    def check(self, options: DraftSection, facts: TargetFacts, *, max_tokens: int, draft_tokens: int) -> None:
        """Make the config once, which refuses sizes that do not fit."""
        self.config_for(
            options, facts, self.capture(options, facts.num_layers, None), self.vocabulary(options, facts).size
        )

    def vocabulary(self, options: DraftSection, facts: TargetFacts) -> DraftVocabulary:
        """Return the given size, or the target's vocabulary.

        Raises:
            SpecError: the size is above the target's.
        """
        assert isinstance(options, Eagle3Section)
        size = options.vocab_size or facts.vocab_size
        if size > facts.vocab_size:
            raise SpecError(f"draft.vocab_size: expected at most the target's {facts.vocab_size}, found {size}")
        return DraftVocabulary(size, options.vocab_sample)

    def untrainable(self, loss_mask: Sequence[int]) -> str | None:
        """Position t reads token t + 1 and predicts token t + 2, so the first two tokens teach nothing."""
        if len(loss_mask) < _FIRST_PREDICTED + 1:
            return f"expected at least {_FIRST_PREDICTED + 1} tokens, found {len(loss_mask)}"
        if not any(loss_mask[_FIRST_PREDICTED:]):
            return "no position to train on: the loss mask is zero after truncation to data.max_tokens"
        return None

    def config_for(
        self, options: DraftSection, facts: TargetFacts, capture: Capture, draft_vocab_size: int
    ) -> Eagle3Config:
        """Return the config of a fresh draft; sizes that are not given are the target's."""
        assert isinstance(options, Eagle3Section)
        sized = options.model_copy(update={"vocab_size": draft_vocab_size})
        return Eagle3Config.for_target(facts, sized, capture.layers)

    def model(self, config: DraftConfig) -> Eagle3Draft:
        """Return a fresh draft."""
        assert isinstance(config, Eagle3Config)
        return Eagle3Draft(config)

    def fresh(self, options: DraftSection, config: DraftConfig) -> Eagle3Draft:
        """Return a fresh draft, whose LM head waits for the target's if `options` say so."""
        assert isinstance(options, Eagle3Section)
        draft = self.model(config)
        if options.head_init == "target":
            draft.start_with_targets_head()
        return draft

    def continued(
        self, config: DraftConfig, state: Mapping[str, Tensor], facts: TargetFacts, capture: Capture, vocab: VocabMap
    ) -> Eagle3Draft:
        """Return a published draft to train on; where its vocabulary is another, LM head rows follow their tokens."""
        assert isinstance(config, Eagle3Config)
        found = (config.target_hidden_size, config.vocab_size, config.layers or capture.layers)
        expected = (facts.hidden_size, facts.vocab_size, capture.layers)
        if found != expected:
            raise IncompatibleDraft(
                f"draft.init_from: expected target width, vocabulary and captured layers {expected}, found {found}"
            )
        draft = Eagle3Draft(
            config.model_copy(update={"draft_vocab_size": len(vocab.d2t), "aux_layer_ids": capture.layers})
        )
        known, wanted = state["t2d"].nonzero().flatten(), vocab.target_ids  # target ids, ascending
        row_of = torch.full((config.vocab_size,), -1, dtype=torch.int64)
        row_of[known] = torch.arange(len(known))
        rows = row_of[wanted]  # row of each draft token in the imported LM head; -1 where it had none
        if "lm_head.weight" not in state:  # it takes the target's rows when it is attached
            draft.load_serving_state_dict({**state, "t2d": vocab.t2d, "d2t": vocab.d2t})
            return draft
        head = draft.lm_head.weight.detach().clone()
        head[rows >= 0] = state["lm_head.weight"][rows[rows >= 0]]
        if not torch.equal(known, wanted):
            _log.warning("the draft to continue has another vocabulary; %d rows start afresh", int((rows < 0).sum()))
        draft.load_serving_state_dict({**state, "lm_head.weight": head, "t2d": vocab.t2d, "d2t": vocab.d2t})
        return draft

    def parameters(self, config: DraftConfig) -> int:
        """Return the number of trained weights; the vocabulary map is none."""
        assert isinstance(config, Eagle3Config)
        shapes = serving_format.expected_shapes(config)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in ("d2t", "t2d"))

    def logit_rows(self, options: DraftSection, config: DraftConfig, tokens: int) -> int:
        """Return those of all test steps; each has one position fewer than the one before."""
        assert isinstance(options, Eagle3Section)
        return sum(max(0, tokens - _FIRST_PREDICTED - step) for step in range(options.ttt_length))

    def batcher(self, options: DraftSection, config: DraftConfig, *, seed: int) -> Eagle3Batcher:
        """Return the padding of samples; nothing is drawn."""
        assert isinstance(options, Eagle3Section)
        return Eagle3Batcher(options.loss, config.target_hidden_size, options.ttt_length)

    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> LossModule:
        """Return the training-time test over `draft`."""
        assert isinstance(draft, Eagle3Draft)
        assert isinstance(options, Eagle3Section)
        return LossModule(
            Eagle3Loss(
                draft,
                parts.lm_head,
                options.loss,
                options.ttt_length,
                logit_cap=parts.logit_cap,
                activation_checkpointing=activation_checkpointing,
            )
        )

    def figures(self, ratios: Mapping[str, Ratio]) -> Figures:
        """Return loss, losses and accuracies by test step, and what they promise."""
        values = {name: ratio.value() for name, ratio in ratios.items()}
        return {
            **values,
            "loss": values["loss"][0],
            "simulated_accept_length": simulated_accept_length(values["accuracies"]),
        }

    def most_draft_tokens(self, config: DraftConfig) -> None:
        """A chain has no bound."""
        return

    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter of chains."""
        assert isinstance(draft, Eagle3Draft)
        return DraftChain(draft, sampler, prompts, states, first)

    def recognises(self, document: Mapping[str, Any]) -> bool:
        """Tell an EAGLE-3 config by its architecture or speculators type."""
        return serving_format.recognises(document)

    def read(
        self, document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> tuple[Eagle3Config, dict[str, Tensor]]:
        """Return config and tensors of a draft in any of the formats, or of a checkpoint."""
        return serving_format.read(document, tensors, source)

    def written(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config document and tensors in `request`'s format."""
        assert isinstance(config, Eagle3Config)
        return serving_format.written(config, tensors, request, parts)

    def server_flags(self, draft_tokens: int) -> str:
        """Return the flags that SGLang needs together to draft chains."""
        return serving_format.server_flags(draft_tokens)


METHOD = Eagle3()
