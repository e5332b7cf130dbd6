"""Where a loaded target's layers are, and how their outputs are taken: by forward hooks, and nothing else is kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.errors import TargetError
from disagg_core.target.text_model import DEPTH, value_of


@dataclass(frozen=True)
class Decoder:
    """The text model inside a causal language model, and the parts of it that a capture reads.

    `module` goes from token ids to the state after `norm`: calling it leaves out the LM head.
    """

    module: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


def find_decoder(model: nn.Module) -> Decoder:
    """Return the decoder of `model`, a causal language model of transformers, inside a wrapper or not.

    It is the module that owns the input embedding beside a stack of layers; its final norm is the last norm that it
    owns besides (an embedding's own comes first).

    Raises:
        TargetError: it is built in a way that is not known.
    """
    causal: Any = model
    embedding = causal.get_input_embeddings()
    depth = value_of(causal.config.get_text_config(), *DEPTH)
    owners = [module for module in model.modules() if any(part is embedding for part in module.children())]
    for module in owners:
        stacks = [part for part in module.children() if isinstance(part, nn.ModuleList) and len(part) == depth]
        norms = [part for part in module.children() if "norm" in type(part).__name__.lower()]
        if len(stacks) == 1 and norms:
            return Decoder(module, stacks[0], getattr(module, "norm", norms[-1]))
    found = [name for owner in owners for name, _ in owner.named_children()]
    raise TargetError(
        f"{type(model).__name__}: expected a decoder with one stack of {depth} layers and one final norm beside the "
        f"embedding, found {', '.join(found) or 'no module that owns the embedding'}"
    )


class LayerStates:
    """The states of a `Capture` that the model's last forward pass left behind.

    The model is not changed but for its hooks, which `close` removes. Of a model that is spread over several GPUs each
    state lies where its layer does. States are kept until the next pass or `clear`, and belong to one thread at a time.

    Args:
        model: a causal language model of transformers.
        capture: which layers, and whether the state after the final norm too.

    Raises:
        TargetError: the model is built in a way that is not known, or lacks a layer.
    """

    def __init__(self, model: Any, capture: Capture) -> None:
        self.decoder = find_decoder(model)
        depth = len(self.decoder.layers)
        if missing := [layer for layer in capture.layers if not 0 <= layer < depth]:
            raise TargetError(
                f"{type(model).__name__}: expected layers from 0 to {depth - 1} to capture, found {missing}"
            )
        skipped = set(getattr(model.config.get_text_config(), "cross_attention_layers", ()))
        self._layers = [self.decoder.layers[_that_runs(layer, skipped)] for layer in capture.layers]
        self._ends = [self.decoder.module] if capture.last_hidden_state else []
        self._states: dict[nn.Module, Tensor] = {}
        self._hooks = [module.register_forward_hook(self._keep) for module in (*self._layers, *self._ends)]

    @property
    def layers(self) -> list[Tensor]:
        """The output of each captured layer, low to high, [batch, tokens, H]."""
        return [self._states[layer] for layer in self._layers]

    @property
    def last(self) -> Tensor | None:
        """The state after the final norm, [batch, tokens, H]; None where it is not captured."""
        return self._states[self._ends[0]] if self._ends else None

    def clear(self) -> None:
        """Let go of the states."""
        self._states.clear()

    def close(self) -> None:
        """Remove the hooks and let go of the states."""
        for hook in self._hooks:
            hook.remove()
        self.clear()

    def _keep(self, module: nn.Module, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._states[module] = output if isinstance(output, Tensor) else output[0]


def _that_runs(layer: int, skipped: Collection[int]) -> int:
    """Return the layer whose output the state after `layer` is: layers that look at pictures are skipped for text."""
    while layer in skipped and layer > 0:
        layer -= 1
    return layer
