"""Confidence interval of a mean over problems."""

import torch
from torch import Tensor

RESAMPLES = 2000


def bootstrap_interval(values: Tensor, level: float = 0.95, resamples: int = RESAMPLES) -> Tensor:
    """Return the percentile bootstrap interval of the mean over problems (Efron 1979).

    Problems are drawn with replacement, each with all of its samples. The interval covers the
    choice of problems, not the choice of samples for these problems.

    Args:
        values: (P,) or (P, M), one row per problem; the columns are resampled together.
        level: share of the resampled means inside the interval.
        resamples: number of resamples. The seed is fixed: the interval is a function of the values
            and their order.

    Returns:
        (2,) or (2, M) float64, lower and upper end; NaN without problems.

    Raises:
        ValueError: `level` is not between 0 and 1.

    Example:
        >>> bootstrap_interval(torch.tensor([1.0] * 30 + [0.0] * 70))
        tensor([0.2100, 0.3900], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1, such as 0.95.")
    count, values = len(values), values.double()
    if not count:
        return values.new_full((2, *values.shape[1:]), torch.nan)
    generator = torch.Generator(values.device).manual_seed(0)

    def resample(times: int) -> Tensor:
        shape = (times, count)
        drawn = torch.randint(count, shape, generator=generator, device=generator.device)
        return values[drawn].mean(1)

    # In chunks of a million numbers: all at once would need P times as much memory as `values`.
    chunk = max(1, 2**20 // values.numel())
    starts = range(0, resamples, chunk)
    means = torch.cat([resample(min(chunk, resamples - start)) for start in starts])
    ends = means.new_tensor([(1 - level) / 2, (1 + level) / 2])
    return means.quantile(ends, dim=0)
