"""Metrics of evaluation and training: torchmetrics classes of functions in `functional`.

States are float64, so a metric does not depend on how its samples are split into batches,
micro-batches or ranks. A metric without samples computes NaN, after the warning of torchmetrics
that `update` was never called.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prl_lightning.functional import bootstrap_interval, majority_correct, pass_at_k


class _OverProblems(Metric):
    """Mean of one or several numbers per problem, with a bootstrap interval over problems."""

    is_differentiable = False
    full_state_update = False

    values: list[Tensor]

    def __init__(self, shape: tuple[int, ...] = (), **kwargs: Any) -> None:
        """Create an empty metric; ``shape`` is that of a problem's numbers."""
        super().__init__(**kwargs)
        self.shape = shape
        self.set_dtype(torch.float64)  # also for the empty state of a rank without a problem
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the mean over all problems, float64; NaN without problems."""
        return self._of_problems().mean(0)

    def interval(self, level: float = 0.95) -> Tensor:
        """Return a confidence interval of the mean over problems; see `bootstrap_interval`.

        Args:
            level: share of the resampled means inside the interval.

        Returns:
            float64, lower and upper end in the first dimension. It is the same on every rank (a
            collective under DDP), on every device, and for every split of the problems into
            batches.
        """
        # On the CPU, because each kind of device draws other random numbers from one seed.
        values = self.per_problem().cpu()
        order = (values.sum(1) if values.ndim > 1 else values).argsort()
        return bootstrap_interval(values[order], level).to(self.device)

    def per_problem(self) -> Tensor:
        """Return the values of all ranks, one row per problem; a collective under DDP."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._of_problems()

    def _add(self, values: Tensor) -> None:
        # Flat, because torchmetrics joins it with the empty one-dimensional state of other ranks.
        self.values.append(values.to(self.device, torch.float64).flatten())

    def _of_problems(self) -> Tensor:
        """Return all values; torchmetrics keeps a list, or one tensor after a sync of ranks."""
        parts = [self.values] if isinstance(self.values, Tensor) else self.values
        empty = torch.empty(0, dtype=torch.float64, device=self.device)
        return torch.cat([*parts, empty]).view(-1, *self.shape)


class MeanOverProblems(_OverProblems):
    """Mean of one number per problem, such as the length of its completions.

    Args:
        **kwargs: arguments of torchmetrics.Metric.

    Example:
        >>> metric = MeanOverProblems()
        >>> metric.update(torch.tensor([3.0, 5.0]))
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    def update(self, values: Tensor) -> None:
        """Add P problems.

        Args:
            values: (P,) numbers.
        """
        self._add(values)


class PassAtK(_OverProblems):
    r"""pass@k over problems: the probability that one of k samples of a problem is correct.

    Uses all n samples of a problem: $1 - \binom{n-c}{k} / \binom{n}{k}$ with c correct ones, which
    is unbiased (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Args:
        k: number of samples, or several: `range(1, n + 1)` computes the curve of pass@k.
        **kwargs: arguments of torchmetrics.Metric.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([0, 1, 2]), num_samples=4)  # 0, 3 and 5 pairs of 6
        >>> metric.compute()
        tensor(0.4444, dtype=torch.float64)
        >>> curve = PassAtK(range(1, 4))
        >>> curve.update(torch.tensor([0, 1]), num_samples=3)
        >>> curve.compute()
        tensor([0.1667, 0.3333, 0.5000], dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, k: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(() if isinstance(k, int) else (len(k),), **kwargs)
        self.k = torch.tensor(k)

    def update(self, num_correct: Tensor, num_samples: int | Tensor) -> None:
        """Add P problems.

        Args:
            num_correct: (P,) integers, number of correct samples of each problem.
            num_samples: number of samples, one for all problems or (P,) integers.

        Raises:
            ValueError: a count is not between 0 and its number of samples, or k is not between 1
                and the number of samples.
        """
        correct, samples = (
            torch.as_tensor(count, device=self.device)[..., None]
            for count in (num_correct, num_samples)
        )
        self._add(pass_at_k(samples, correct, self.k.to(self.device)))


class MeanAtN(PassAtK):
    """mean@n: the share of a problem's n samples that is correct, averaged over problems.

    This is pass@1.

    Args:
        **kwargs: arguments of torchmetrics.Metric.

    Example:
        >>> metric = MeanAtN()
        >>> metric.update(torch.tensor([0, 1, 2]), num_samples=4)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(k=1, **kwargs)


class MajorityAtN(_OverProblems):
    """maj@n: the share of problems whose majority answer is correct; ties are averaged.

    Args:
        **kwargs: arguments of torchmetrics.Metric.

    Example:
        >>> metric = MajorityAtN()
        >>> metric.update(torch.tensor([[7, 7, 3]]), torch.tensor([[True, True, False]]))
        >>> metric.update(torch.tensor([[1, 2, -1]]), torch.tensor([[False, True, False]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, answers: Tensor, correct: Tensor) -> None:
        """Add P problems.

        Args:
            answers: (P, n), equal for equal answers; negative for no answer.
            correct: (P, n) bool.

        Raises:
            ValueError: the shapes differ.
        """
        self._add(majority_correct(answers, correct))


class MeanStd(Metric):
    """Mean and population standard deviation of a quantity over all tokens.

    The standard deviation is computed from the sum of squares in float64. This is precise if the
    mean is below 10^6 standard deviations.

    Args:
        **kwargs: arguments of torchmetrics.Metric.

    Example:
        >>> metric = MeanStd()
        >>> metric.update(torch.tensor([[1.0, 3.0], [2.0, 99.0]]), torch.tensor([[1, 1], [1, 0]]))
        >>> metric.compute()["mean"], metric.compute()["std"]
        (tensor(2., dtype=torch.float64), tensor(0.8165, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    count: Tensor
    total: Tensor
    total_squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", "total", "total_squares"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values where the mask is not zero.

        Args:
            values: any shape.
            mask: the same shape; `None` counts every value. Masked values may be NaN.

        Raises:
            ValueError: the shapes differ.
        """
        mask = torch.ones_like(values) if mask is None else mask
        if mask.shape != values.shape:
            raise ValueError(
                f"values has shape {tuple(values.shape)} and mask {tuple(mask.shape)}: pass equal "
                "shapes."
            )
        # Zeros instead of a selection: the host would wait for a GPU to count the selected values.
        values = torch.where(mask.bool(), values, torch.zeros_like(values)).detach().double()
        self.count += mask.bool().sum()
        self.total += values.sum()
        self.total_squares += values.square().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `mean` and `std` of all values, float64 scalars; NaN without values."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean.square()
        # Rounding can make it slightly negative; clamp keeps NaN.
        return {"mean": mean, "std": variance.clamp(min=0.0).sqrt()}
