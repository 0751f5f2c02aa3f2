"""The unbiased estimator of pass@k."""

import torch
from torch import Tensor


def pass_at_k(num_samples: int | Tensor, num_correct: int | Tensor, k: int | Tensor) -> Tensor:
    """Return 1 - C(n - c, k)/C(n, k): the chance that k of n samples have one of the c correct.

    Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374), Eq. 1. With
    s = min(c, k) and l = max(c, k) the fraction is Π_{j<s} (1 - l/(n - j)). It is computed as a sum
    of logarithms, so there are no factorials, and small results keep their precision.

    Args:
        num_samples: n, an integer or a tensor of them.
        num_correct: c, in [0, n].
        k: in [1, n]. The three broadcast.

    Returns:
        float64, of the broadcast shape.

    Raises:
        ValueError: c or k is out of range.

    Example:
        >>> pass_at_k(4, torch.tensor([0, 1, 4]), 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    c = torch.as_tensor(num_correct)
    n = torch.as_tensor(num_samples, device=c.device)
    size = torch.as_tensor(k, device=c.device)
    shape = (n + c + size).shape
    n, c, size = n.expand(shape), c.expand(shape), size.expand(shape)
    _check_range(c, 0, n, "num_correct", "count correct samples only")
    _check_range(size, 1, n, "k", "sample more, or lower k")
    if n.numel() == 0:
        return n.double()
    fewer, more = torch.minimum(c, size), torch.maximum(c, size)
    j = torch.arange(int(fewer.max()), device=n.device)
    # If k samples cannot all be wrong, one factor is 0; the later ones are negative and clamped.
    share = (more[..., None] / (n[..., None] - j).clamp(min=1).double()).clamp(max=1)
    terms = torch.where(j < fewer[..., None], torch.log1p(-share), 0.0)
    return 0.0 - torch.expm1(terms.sum(-1))  # not -expm1, which makes -0.0


def _check_range(values: Tensor, low: int, high: Tensor, name: str, fix: str) -> None:
    wrong = (values < low) | (values > high)
    if wrong.any():
        value, most = values[wrong][0].item(), high[wrong][0].item()
        raise ValueError(f"{name}={value}: outside {low} to num_samples={most}; {fix}.")
