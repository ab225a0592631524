"""The slot label: a slot's state, seen through the final norm and the head, is to name the result of its block's step.

Knows layers and batches. Knows nothing about steps or where labels come from.

Method: after N layers, evenly spaced and the last among them, the head reads the labelled slots alone. A label of depth
d (`packing.slot_depth`) counts at the n-th of these layers for n >= min(N, d), with weight 1 / (number of such layers);
the loss is the weighted mean. So every label weighs the same, and the cost does not grow with the model's depth.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from rim_probe.anatomy import before_head, decoder_layers
from rim_probe.packing import IGNORED


def slot_layers(num_layers: int, most: int) -> list[int]:
    """Layers 1..L after which slots are read: at most `most`, evenly spaced, the last among them."""
    count = min(num_layers, most)
    return [round(n * num_layers / count) for n in range(1, count + 1)]


def slot_targets(labels: torch.Tensor, depths: torch.Tensor, count: int) -> dict:
    """What a batch is asked of its slots, from `slot_labels` and `slot_depths` [B, L] and the N layers read.

    Returns:
        `slot_places`: for each layer the places of its A_n slots in [B * L]; `slot_targets` and `slot_weights` [A], of
        all layers in order.
    """
    labels, depths = labels.flatten(), depths.flatten().clamp(max=count)
    labelled = labels != IGNORED
    places = [(labelled & (depths <= n)).nonzero()[:, 0] for n in range(1, count + 1)]
    every = torch.cat(places)
    return {
        "slot_places": tuple(places),
        "slot_targets": labels[every],
        "slot_weights": 1 / (count + 1 - depths[every]),
    }


class SlotReader:
    """Reads the states of slots while a pass lasts.

    One hook on every layer for good, which asks at each call whether and what to read: `torch.compile` compiles equal
    layers once, and takes no notice of hooks that come and go.

    Attributes:
        count: N, after how many layers slots are read.
    """

    def __init__(self, model, most: int):
        layers = decoder_layers(model)
        chosen = slot_layers(len(layers), most)
        self.count = len(chosen)
        self._before_head = before_head(model)
        self._index = {layers[number - 1]: n for n, number in enumerate(chosen)}
        self._places: Sequence[torch.Tensor] | None = None
        self._states: list[torch.Tensor] = []
        for layer in layers:
            layer.register_forward_hook(self._keep)

    @contextlib.contextmanager
    def reading(self, places: Sequence[torch.Tensor]) -> Iterator[None]:
        """Reads `slot_places` of the pass inside."""
        self._places, self._states = places, []
        try:
            yield
        finally:
            self._places, self._states = None, []

    def head_inputs(self) -> torch.Tensor:
        """What the head is to see of the slots read, [A, d]."""
        return self._before_head(torch.cat(self._states))

    @torch.compiler.disable
    def _keep(self, layer, args, output) -> None:
        n = self._index.get(layer)
        if n is not None and self._places is not None:
            states = output[0] if isinstance(output, tuple) else output  # families whose layers still return one
            self._states.append(states.flatten(0, 1)[self._places[n]])
