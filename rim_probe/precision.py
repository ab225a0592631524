"""The precision a model computes in: bfloat16 where the hardware multiplies it faster, float32 elsewhere.

Knows devices and the clock. Knows nothing about models but how many weights they have.
"""

import time
from functools import cache

import torch

SMALL_MODEL = 20_000_000  # weights; below, products are too small to gain by bfloat16 or by more threads of a CPU
_FASTER = 2.0  # times as fast as float32 a product in bfloat16 must be on a CPU
_SIZE = {"cuda": 8192, "cpu": 2048}


def default_dtype(device: torch.device, weights: int) -> torch.dtype:
    """bfloat16 on a GPU, and for models of 20 million weights or more on a CPU that is fast in it; else float32."""
    if device.type == "cuda" or (device.type == "cpu" and weights >= SMALL_MODEL and cpu_is_fast_in_bfloat16()):
        return torch.bfloat16
    return torch.float32


@cache
def cpu_is_fast_in_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX512_BF16 or AMX) and a product shows that they are used.

    The product takes a tenth of a second, once in a process.
    """
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and matrix_rate("cpu", torch.bfloat16) >= _FASTER * matrix_rate("cpu", torch.float32)


@cache
def matrix_rate(device_type: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of random numbers here and now; measured once in a process.

    Draws from a generator of its own.
    """
    size = _SIZE[device_type]
    generator = torch.Generator(device_type).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device_type).to(dtype) for _ in range(2))
    times = []
    for _ in range(2):
        torch.mm(left, right)
    for _ in range(5):
        synchronize(device_type)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device_type)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def synchronize(device_type: str) -> None:
    """Waits for a GPU, whose work is asynchronous; on a CPU there is nothing to wait for."""
    if device_type == "cuda":
        torch.cuda.synchronize()
