"""Metrics of evaluation and training, as torchmetrics classes over the functional ones.

States are float64, so that a metric does not depend on how its samples are cut into batches,
micro-batches or ranks. A metric without samples computes NaN, after torchmetrics' warning that
`update` was never called.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prl_lightning.functional import bootstrap_interval, majority_correct, pass_at_k


class _OverProblems(Metric):
    """Mean of one number per problem, with a bootstrap interval over problems."""

    is_differentiable = False
    full_state_update = False

    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)  # also for the empty state of a rank without a problem
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the mean over all problems, a float64 scalar; NaN without problems."""
        return self._of_problems().mean(0)

    def interval(self, level: float = 0.95) -> Tensor:
        """Return a confidence interval of the mean over problems; see `bootstrap_interval`.

        Args:
            level: share of the resampled means that lie inside.

        Returns:
            (2,) float64, lower and upper end: the same on every rank (a collective under DDP), on
            every device, and for every cut of the problems into batches.
        """
        # On the CPU, because a seed gives other random numbers on each kind of device.
        values = self.per_problem().cpu()
        order = (values.sum(1) if values.ndim > 1 else values).argsort()
        return bootstrap_interval(values[order], level).to(self.device)

    def per_problem(self) -> Tensor:
        """Return what was added on all ranks, one row per problem; a collective under DDP."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._of_problems()

    def _add(self, values: Tensor) -> None:
        self.values.append(values.to(self.device, torch.float64))

    def _of_problems(self) -> Tensor:
        """Return all values; torchmetrics keeps a list, or one tensor after a sync of ranks."""
        parts = [self.values] if isinstance(self.values, Tensor) else self.values
        return torch.cat([*parts, torch.empty(0, dtype=torch.float64, device=self.device)])


class MeanOverProblems(_OverProblems):
    """Mean of one number per problem, such as the length of its completions.

    Args:
        **kwargs: torchmetrics' arguments of every metric.

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


class _Share(_OverProblems):
    """A mean of values between 0 and 1, where 1 is best."""

    higher_is_better = True


class _OfCounts(_Share):
    """A function of the number of correct samples of a problem, defined by a subclass."""

    def update(self, num_correct: Tensor, num_samples: int | Tensor) -> None:
        """Add P problems.

        Args:
            num_correct: (P,) integers, number of correct samples of each problem.
            num_samples: Number of samples, one for all problems or (P,) integers.

        Raises:
            ValueError: If a count is above its number of samples, or there are too few samples.
        """
        num_correct = num_correct.to(self.device)
        num_samples = torch.as_tensor(num_samples, device=self.device).expand(num_correct.shape)
        wrong = (num_correct < 0) | (num_correct > num_samples)
        if wrong.any():
            raise ValueError(
                "num_correct must lie between 0 and num_samples, got "
                f"{num_correct[wrong][0].item()} of {num_samples[wrong][0].item()}"
            )
        self._add(self._values(num_correct, num_samples))

    def _values(self, num_correct: Tensor, num_samples: Tensor) -> Tensor:
        raise NotImplementedError


class PassAtK(_OfCounts):
    r"""pass@k: the chance that at least one of k samples of a problem is correct, over problems.

    Uses all n samples of a problem: $1 - \binom{n-c}{k} / \binom{n}{k}$ with c correct ones, which
    is unbiased (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Args:
        k: Number of samples.
        **kwargs: torchmetrics' arguments of every metric.

    Raises:
        ValueError: If k is less than 1.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([0, 1, 2]), num_samples=4)  # 0, 3 and 5 pairs of 6
        >>> metric.compute()
        tensor(0.4444, dtype=torch.float64)
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k of pass@k must be at least 1, got {k}")
        self.k = k

    def _values(self, num_correct: Tensor, num_samples: Tensor) -> Tensor:
        return pass_at_k(num_samples, num_correct, self.k)


class PassCurve(_OfCounts):
    """pass@k for every k from 1 to the number of samples.

    Args:
        max_k: The last k; at most the number of samples of a problem.
        **kwargs: torchmetrics' arguments of every metric.

    Raises:
        ValueError: If max_k is below 1.

    Example:
        >>> curve = PassCurve(max_k=3)
        >>> curve.update(torch.tensor([0, 1]), num_samples=3)
        >>> curve.compute()
        tensor([0.1667, 0.3333, 0.5000], dtype=torch.float64)
    """

    def __init__(self, max_k: int, **kwargs: Any) -> None:
        if max_k < 1:
            raise ValueError(f"max_k of the pass@k curve must be at least 1, got {max_k}")
        super().__init__(**kwargs)
        self.max_k = max_k

    def _of_problems(self) -> Tensor:
        return super()._of_problems().view(-1, self.max_k)

    def _values(self, num_correct: Tensor, num_samples: Tensor) -> Tensor:
        k = torch.arange(1, self.max_k + 1, device=self.device)
        # Flat, because torchmetrics joins it with an empty one-dimensional state.
        return pass_at_k(num_samples[:, None], num_correct[:, None], k).flatten()


class MeanAtN(_OfCounts):
    """mean@n: the share of a problem's n samples that is correct, averaged over problems.

    Equal to pass@1.

    Args:
        **kwargs: torchmetrics' arguments of every metric.

    Example:
        >>> metric = MeanAtN()
        >>> metric.update(torch.tensor([0, 1, 2]), num_samples=4)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def _values(self, num_correct: Tensor, num_samples: Tensor) -> Tensor:
        if bool((num_samples < 1).any()):
            raise ValueError("mean@n needs at least 1 sample a problem, got 0")
        return num_correct.double() / num_samples


class MajorityAtN(_Share):
    """maj@n: the share of problems whose majority answer is correct; ties are averaged.

    Args:
        **kwargs: torchmetrics' arguments of every metric.

    Example:
        >>> metric = MajorityAtN()
        >>> metric.update(torch.tensor([[7, 7, 3]]), torch.tensor([[True, True, False]]))
        >>> metric.update(torch.tensor([[1, 2, -1]]), torch.tensor([[False, True, False]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def update(self, answers: Tensor, correct: Tensor) -> None:
        """Add P problems.

        Args:
            answers: (P, n), equal for equal answers; negative for no answer.
            correct: (P, n) bool.

        Raises:
            ValueError: If the shapes differ.
        """
        self._add(majority_correct(answers, correct))


class MeanStd(Metric):
    """Mean and population standard deviation of a quantity over all tokens.

    The standard deviation is computed from the sum of squares in float64, which is exact enough
    while the mean is below 10^6 standard deviations.

    Args:
        **kwargs: torchmetrics' arguments of every metric.

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
            values: Any shape.
            mask: The same shape; `None` counts every value. What is masked may be NaN.

        Raises:
            ValueError: If the shapes differ.
        """
        if mask is not None:
            if mask.shape != values.shape:
                raise ValueError(
                    f"values and mask must have one shape, got {tuple(values.shape)} and "
                    f"{tuple(mask.shape)}"
                )
            # Zeros instead of a selection, whose size the host would have to wait for on a GPU.
            values = torch.where(mask.bool(), values, torch.zeros_like(values))
        values = values.detach().double()
        self.count += values.numel() if mask is None else mask.bool().sum()
        self.total += values.sum()
        self.total_squares += values.square().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `mean` and `std` of all values, float64 scalars; NaN without values."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean.square()
        # Rounding can leave it just below zero; clamp keeps a NaN.
        return {"mean": mean, "std": variance.clamp(min=0.0).sqrt()}
