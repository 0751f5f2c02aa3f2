"""Metrics of evaluation and training, as torchmetrics classes over the functional ones.

All states are sums in float64, added over ranks (`dist_reduce_fx="sum"`): what a metric computes
does not depend on how its samples are cut into batches, micro-batches or ranks.
A metric that saw nothing computes NaN, after torchmetrics' warning that `update` was never called.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prl_lightning.functional import majority_correct, pass_at_k


class _MeanOverProblems(Metric):
    """Mean of one number a problem."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    num_problems: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", default=zero, dist_reduce_fx="sum")
        self.add_state("num_problems", default=zero.clone(), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean over all problems seen, a float64 scalar; NaN if there were none."""
        return self.total / self.num_problems

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several over time; see `torchmetrics.Metric.plot`.

        Args:
            val: A computed value or a list of them; `None` computes it now.
            ax: Axes of matplotlib to draw on; `None` makes new ones.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def _add(self, values: Tensor) -> None:
        self.total += values.sum(dtype=torch.float64)
        self.num_problems += values.numel()


class _OfCounts(_MeanOverProblems):
    """A function of how many of a problem's samples are correct; a subclass says which."""

    def update(self, num_correct: Tensor, num_samples: int | Tensor) -> None:
        """Add P problems.

        Args:
            num_correct: How many of each problem's samples are correct, (P,).
            num_samples: How many samples each problem has: one number, or (P,).

        Raises:
            ValueError: If a problem has fewer samples than the metric needs, or more correct ones
                than samples.
        """
        num_correct = torch.as_tensor(num_correct, device=self.total.device)
        num_samples = torch.as_tensor(num_samples, device=self.total.device).expand_as(num_correct)
        wrong = (num_correct < 0) | (num_correct > num_samples)
        if bool(wrong.any()):
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
        k: How many samples.
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


class MajorityAtN(_MeanOverProblems):
    """maj@n: the share of problems that a vote of their n samples gets right; ties go by lot.

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
            answers: (P, n), which samples of a problem have the same answer; below zero, none.
            correct: (P, n) bool.

        Raises:
            ValueError: If the shapes differ.
        """
        self._add(majority_correct(answers, correct).to(self.total.device))


class MeanStd(Metric):
    """Mean and population standard deviation of a quantity, as one would log over all tokens.

    The standard deviation comes from the sum of squares, in float64: exact enough while the mean is
    not above some 10^6 standard deviations.

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
            values = values[mask.bool()]
        values = values.detach().double()
        self.count += values.numel()
        self.total += values.sum()
        self.total_squares += values.square().sum()

    def compute(self) -> dict[str, Tensor]:
        """`mean` and `std` of all values seen, float64 scalars; NaN if there were none."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean.square()
        # Rounding can leave it just below zero; clamp keeps a NaN.
        return {"mean": mean, "std": variance.clamp(min=0.0).sqrt()}
