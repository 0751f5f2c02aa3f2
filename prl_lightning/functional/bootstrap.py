"""How sure a mean over problems is."""

import torch
from torch import Tensor

RESAMPLES = 2000


def bootstrap_interval(values: Tensor, level: float = 0.95, resamples: int = RESAMPLES) -> Tensor:
    """Percentile bootstrap interval of the mean over problems (Efron 1979).

    Problems are drawn with replacement, each with all of its samples: the interval says what other
    problems of the kind would give, not what other samples of these would.

    Args:
        values: (P,) or (P, M), one row a problem; the columns are drawn together.
        level: share of the resampled means that lie inside.
        resamples: how often P problems are drawn; always with the same random numbers, so that the
            interval is a function of the values and their order.

    Returns:
        (2,) or (2, M) float64, lower and upper end; NaN without a problem.

    Raises:
        ValueError: `level` is not between 0 and 1.

    Example:
        >>> bootstrap_interval(torch.tensor([1.0] * 30 + [0.0] * 70))
        tensor([0.2100, 0.3900], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must lie between 0 and 1, such as 0.95")
    values = values.double()
    if not len(values):
        return values.new_full((2, *values.shape[1:]), torch.nan)
    generator = torch.Generator(values.device).manual_seed(0)
    # One at a time: P numbers in memory instead of P times the resamples.
    means = torch.stack([values[_draw(len(values), generator)].mean(0) for _ in range(resamples)])
    ends = means.new_tensor([(1 - level) / 2, (1 + level) / 2])
    return means.quantile(ends, dim=0)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=generator, device=generator.device)
