"""The DFlash2 draft: DFlash with a convolution around each sublayer and a selector that walks over candidates.

A fresh draft's convolutions and selector do nothing: it computes what DFlash does with the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts import flex
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.model import DecoderLayer, DFlashDraft
from disagg_core.drafts.dflash2.config import DFlash2Config
from disagg_core.drafts.linear import Linear


class GroupedDynamicCausalConv(nn.Module):
    """A convolution over the slots of a block before a sublayer, and another after it.

    Each tap of each channel is a learned weight plus a correction that is shared by a group of channels and made, for
    both convolutions, of the sublayer's normed input: ``y[s] = sum_t (base[t] + delta[s, t]) x[s - t]``, where x is 0
    before the block's first slot.
    """

    def __init__(self, hidden: int, taps: int, group: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        self.kernel_projection = Linear(hidden, 2 * taps * (hidden // group))
        self._taps = taps

    def reset_parameters(self) -> None:
        """Let each slot through as it is."""
        nn.init.zeros_(self.kernel_projection.weight)
        with torch.no_grad():
            self.base_kernel.zero_()
            self.base_kernel[:, 0] = 1.0

    def forward(self, normed: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``[..., K, H]``: `sublayer` between the two convolutions, of slots ``[..., K, H]``."""
        corrections = self.kernel_projection(normed).unflatten(-1, (2, self._taps, -1))
        (base_before, base_after), (before, after) = self.base_kernel.unbind(), corrections.unbind(-3)
        return _convolved(sublayer(_convolved(normed, base_before, before)), base_after, after)


def _convolved(x: Tensor, base: Tensor, corrections: Tensor) -> Tensor:
    if not flex.compiles(x.device):
        return convolved(x, base, corrections)
    flex.rows_vary(x, corrections)
    result: Tensor = flex.compiled(convolved)(x, base, corrections)
    return result


def convolved(x: Tensor, base: Tensor, corrections: Tensor) -> Tensor:
    """Return the convolution over the slots ``[..., K, H]`` of `x`, of the same shape.

    Args:
        x: the slots.
        base: each channel's own weights ``[taps, H]``.
        corrections: what is added to those of a group of channels, ``[..., K, taps, groups]``.
    """
    slots, (taps, groups) = x.shape[-2], corrections.shape[-2:]
    grouped, weights = (torch.unflatten(part, -1, (groups, -1)) for part in (x, base))
    result: Tensor = (weights[0] + corrections[..., 0, :, None]) * grouped
    for tap in range(1, min(taps, slots)):
        earlier = F.pad(grouped[..., : slots - tap, :, :], (0, 0, 0, 0, tap, 0))
        result = result + (weights[tap] + corrections[..., tap, :, None]) * earlier
    return result.flatten(-2)


class CandidateSelector(nn.Module):
    """Scores a slot's candidates by the token before it: ``logit + <predecessor * (P h), successor>``."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.hidden_projection = Linear(config.hidden_size, config.selector_rank)

    def reset_parameters(self, std: float) -> None:
        """Let the logits stand alone: what depends on the predecessor is drawn, the successors' part is 0."""
        nn.init.normal_(self.predecessor_codebook, std=std)
        nn.init.zeros_(self.successor_codebook)

    def forward(self, hidden: Tensor, before: Tensor, candidate_ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores ``[..., C]``.

        Args:
            hidden: states after the final norm, ``[..., H]``.
            before: the token before each slot, ``[...]`` int64.
            candidate_ids: ``[..., C]`` int64.
            logits: of the candidates, ``[..., C]``.
        """
        gate = F.embedding(before, self.predecessor_codebook) * self.hidden_projection(hidden)
        successors = F.embedding(candidate_ids, self.successor_codebook)
        scores: Tensor = logits + (successors @ gate.unsqueeze(-1)).squeeze(-1).to(logits.dtype)
        return scores


class DFlash2Layer(DecoderLayer):
    """DFlash's layer with a convolution around attention and MLP."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__(config)
        sizes = (config.hidden_size, config.conv_kernel_size, config.conv_group_size)
        self.attention_conv = GroupedDynamicCausalConv(*sizes)
        self.mlp_conv = GroupedDynamicCausalConv(*sizes)

    def around_attention(self, normed: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the attention's output between two convolutions."""
        output: Tensor = self.attention_conv(normed, attention)
        return output

    def around_mlp(self, normed: Tensor) -> Tensor:
        """Return the MLP's output between two convolutions."""
        output: Tensor = self.mlp_conv(normed, self.mlp)
        return output


class DFlash2Draft(DFlashDraft):
    """A DFlash2 draft model; see `DFlashDraft`."""

    method = "dflash2"
    config_type: type[DFlashConfig] = DFlash2Config
    layer_type = DFlash2Layer
    config: DFlash2Config
    candidate_selector: CandidateSelector

    def add_parts(self) -> None:
        """Add the selector."""
        self.candidate_selector = CandidateSelector(self.config)

    def reset_parameters(self) -> None:
        """Draw fresh weights for DFlash's part; convolutions and selector do nothing."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, GroupedDynamicCausalConv):
                module.reset_parameters()
        self.candidate_selector.reset_parameters(self.config.initializer_range)
