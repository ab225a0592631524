"""Compact arrays: how fitted probes of a model of many layers stay small enough to lie beside it.

Method: a decoder whose arrays take at most `PLAIN_BYTES` is stored as it is. A larger one is stored in 8 bits a number,
with one scale for every `GROUP` numbers (block-wise quantisation: Dettmers et al. 2022, arXiv:2110.02861, with a linear
code). Where that does not suffice its decoder says which numbers it leaves out, and what that costs.

Knows arrays and bytes. Knows nothing of what they mean.
"""

from collections.abc import Iterable, Mapping

import numpy as np

PLAIN_BYTES = 2**21
GROUP = 128
_STEPS = 127  # of an int8, the same up and down


def is_large(arrays: Iterable[np.ndarray]) -> bool:
    """Whether the arrays of a decoder, as float32, are too large to be stored as they are."""
    return 4 * sum(array.size for array in arrays) > PLAIN_BYTES


def packed(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """An array in 8 bits a number: the codes under its name, float32 scales [groups] beside them."""
    groups = _groups(np.asarray(array, np.float32))
    scale = np.abs(groups).max(1, initial=0) / _STEPS
    codes = np.rint(groups / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8)
    return {name: codes.reshape(-1)[: array.size].reshape(array.shape), f"{name}.scale": scale.astype(np.float32)}


def unpacked(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The array of that name, float32 where it was packed and as it is where it was not.

    Raises:
        KeyError: there is none. ValueError: codes and scales that do not fit together.
    """
    array = np.asarray(tensors[name])
    if f"{name}.scale" not in tensors:
        return array
    values = _groups(array.astype(np.float32)) * np.asarray(tensors[f"{name}.scale"])[:, None]
    return values.reshape(-1)[: array.size].reshape(array.shape)


def rounded(array: np.ndarray) -> np.ndarray:
    """The array as it comes back after packing."""
    return unpacked(packed("array", array), "array")


def _groups(array: np.ndarray) -> np.ndarray:
    """All numbers in rows of `GROUP`, zeros at the end."""
    flat = array.reshape(-1)
    return np.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
