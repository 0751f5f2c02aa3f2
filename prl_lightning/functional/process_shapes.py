"""Shapes of the process term: scaled by a length, permuted as a control, and centred."""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import suffix_sums
from prl_lightning.functional.registry import Registry

Shape = Callable[[Tensor, Tensor], Tensor]
"""(reg, mask) -> reg; see `register_shape`."""


def _plain(reg: Tensor, mask: Tensor) -> Tensor:
    return reg


def _per_remaining(reg: Tensor, mask: Tensor) -> Tensor:
    return reg / suffix_sums(mask.to(reg.dtype)).clamp(min=1)


def _per_length(reg: Tensor, mask: Tensor) -> Tensor:
    return reg / mask.sum(-1, keepdim=True).clamp(min=1)


def _shuffled(reg: Tensor, mask: Tensor) -> Tensor:
    # A permutation for each length, so that it depends on nothing but the completion.
    shuffled = torch.zeros_like(reg)
    for row, kept in enumerate(mask):
        values = reg[row, kept]
        generator = torch.Generator().manual_seed(len(values))
        order = torch.randperm(len(values), generator=generator).to(reg.device)
        shuffled[row, kept] = values[order]
    return shuffled


SHAPES: Registry[Shape] = Registry(
    "shape",
    {
        "plain": _plain,
        "per_remaining": _per_remaining,
        "per_length": _per_length,
        "shuffled": _shuffled,
    },
    "register_shape(name, function)",
)


def register_shape(name: str, function: Shape) -> None:
    """Add a shape of the process term.

    | name | the term at t of a completion of T tokens |
    | --- | --- |
    | plain | reg_t |
    | per_remaining | reg_t / (T - t), with t counted from 0 |
    | per_length | reg_t / T |
    | shuffled | the completion's values in a fixed random order, to see whether place matters |

    Only plain has the gradient of the objective in expectation.

    Args:
        name: not a built-in shape.
        function: (reg, mask) -> reg, all (B, T). The mask is bool, true on completion tokens.

    Raises:
        ValueError: the name is built in.

    Example:
        >>> from prl_lightning.functional import process_term
        >>> register_shape("half", lambda reg, mask: reg / 2)
        >>> process_term(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), shape="half")
        tensor([[2.0000, 1.5000]])
    """
    SHAPES.register(name, function)


def others_mean(reg: Tensor, completion_mask: Tensor, group_size: int) -> Tensor:
    """Return the mean term of the group's other completions at each position.

    As a baseline it is subtracted from the term. It does not depend on the completion's own tokens,
    so the expected gradient stays what it was (leave one out). Where no other completion of the
    group is as long, it is zero. With group_size = B the whole batch is one group.

    Args:
        reg: (B, T), zero outside the mask; groups contiguous.
        completion_mask: (B, T), true on completion tokens; completions start in the same column.
        group_size: G, divides B.

    Returns:
        (B, T), zero outside the mask.

    Example:
        >>> reg = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
        >>> others_mean(reg, torch.tensor([[1, 1], [1, 0], [1, 1]]), group_size=3)
        tensor([[4., 4.],
                [3., 0.],
                [2., 2.]])
    """
    groups = (len(reg) // group_size, group_size, reg.shape[-1])
    # In float64, so that the order of the completions, which depends on the ranks, does not matter.
    values, mask = reg.double().view(groups), completion_mask.view(groups).double()
    others = mask.sum(1, keepdim=True) - mask
    means = (values.sum(1, keepdim=True) - values) / others.clamp(min=1)
    return (means * mask).reshape(reg.shape).to(reg.dtype)
