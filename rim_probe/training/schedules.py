"""Weights of the readouts in the loss: lambda of stage 1 and alpha of stage 2.

Knows formulas only. `progress` s runs from 0 (start of the stage) to 1 (its end).
"""

import torch

ABSOLUTE_STEPS = 13  # the longest problem of the paper's main experiment (T <= 13)


def stage1_weights(
    schedule: str, progress: float, num_grounded: torch.Tensor, num_readouts: torch.Tensor
) -> torch.Tensor:
    """lambda_t(s) for the readouts t = 1..R of every row (L1, stage 1 of arXiv:2605.30343).

    A readout that states a step fades from 1 to 0, early steps first, one after another:
    `lambda_t(s) = clip(t - s * T, 0, 1)` with T the row's own steps (`relative`), or 13 for every row (`absolute`, the
    ablation: short problems lose their steps early), or 1 throughout (`constant`, the ablation). A readout that states
    the answer keeps weight 1, for a row must not end up without a target (our decision; the summaries are silent).

    Args:
        num_grounded: readouts that state a step, [B].
        num_readouts: readouts in the row, [B].

    Returns:
        [B, max(num_readouts)] float32; 0 beyond a row's readouts.
    """
    t = torch.arange(1, int(num_readouts.max()) + 1, device=num_readouts.device, dtype=torch.float32)
    grounded, present = num_grounded[:, None], t <= num_readouts[:, None]
    if schedule == "constant":
        fading = torch.ones(len(num_grounded), len(t), device=t.device)
    else:
        span = torch.full_like(grounded, ABSOLUTE_STEPS) if schedule == "absolute" else grounded + 1
        fading = (t - progress * span).clamp(0, 1)
    return torch.where(t <= grounded, fading, 1.0) * present


def stage2_weights(num_readouts: torch.Tensor) -> torch.Tensor:
    """alpha_k = 2k / (K (K + 1)) for the readouts of every row, [B] -> [B, max K] (L2, stage 2)."""
    k = torch.arange(1, int(num_readouts.max()) + 1, device=num_readouts.device, dtype=torch.float32)
    total = num_readouts[:, None].float()
    return 2 * k / (total * (total + 1)) * (k <= total)
