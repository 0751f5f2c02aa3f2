"""Padding, precision, shapes and suffix sums of (B, T) tensors.

Shape letters, here and everywhere: B completions, G group, T tokens, V vocabulary, H hidden.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on a log-ratio where it is exponentiated, and only there.

A token drawn from π has log π/π_ref < -20 with a probability below e^-20 = 2e-9 (sum π over the
tokens where π < e^-20 π_ref), so samples almost never reach the bound. Without it, one such token
overflows float32. With it, u = e^20 = 4.9e8 can be summed over any completion, and squared in a
gradient norm, far inside the range of float32 and bfloat16.
"""


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in a dtype fit for sums: float64 stays, everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def keep_tokens(values: Tensor, completion_mask: Tensor, name: str) -> Tensor:
    """Return values on completion tokens and exact zeros elsewhere, in float32 or float64.

    The mask selects instead of multiplying: NaN * 0 is NaN, in the value and in the gradient.

    Args:
        values: (B, T) of any dtype.
        completion_mask: (B, T), true on completion tokens; bool or 0/1.
        name: what error messages call `values`.

    Returns:
        (B, T).

    Raises:
        ValueError: the two are not of the same (B, T).

    Example:
        >>> keep_tokens(torch.tensor([[1.0, float("nan")]]), torch.tensor([[1, 0]]), "x")
        tensor([[1., 0.]])
    """
    check_same_shape("BT", **{name: values, "completion_mask": completion_mask})
    values = at_least_float32(values)
    return torch.where(completion_mask.bool(), values, torch.zeros_like(values))


def check_same_shape(letters: str, **tensors: Tensor) -> None:
    """Check that tensors have one shape.

    Args:
        letters: one per dimension, such as "BT".
        **tensors: by the names that the error message calls them.

    Raises:
        ValueError: the shapes differ or have another number of dimensions.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(
        len(shape) != len(letters) for shape in shapes.values()
    ):
        found = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found}: pass both as ({', '.join(letters)}).")


def suffix_sums(values: Tensor) -> Tensor:
    """Return S_t = Σ_{j≥t} x_j along the last dimension.

    The sum runs from the right, so S_t never contains an earlier token. Total minus prefix would
    round away small late terms after a large early one.

    Args:
        values: (..., T).

    Returns:
        (..., T).

    Example:
        >>> suffix_sums(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[6., 5., 3.]])
    """
    return values.flip(-1).cumsum(-1).flip(-1)


def later_sums(values: Tensor) -> Tensor:
    """Return Σ_{j>t} x_j along the last dimension: the suffix sum without the token's own term.

    Args:
        values: (..., T).

    Returns:
        (..., T).

    Example:
        >>> later_sums(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[5., 3., 0.]])
    """
    # Shifted instead of S_t - x_t, which rounds away the rest when x_t is large.
    return torch.nn.functional.pad(suffix_sums(values)[..., 1:], (0, min(1, values.shape[-1])))


def discounted_later_sums(values: Tensor, completion_mask: Tensor, discount: float) -> Tensor:
    """Return Σ_{j>t} γ^n x_j, with n the number of completion tokens after t up to j.

    Tokens outside the mask have no step: they neither add nor discount.

    The recurrence y_t = γ·(x_{t+1} + y_{t+1}) is computed by doubling: log2(T) additions of a
    shifted tensor, each of terms that are already summed, instead of T steps or a division by γ^t.

    Args:
        values: (B, T), zero outside the mask.
        completion_mask: (B, T), true on completion tokens.
        discount: γ, from 0 to 1.

    Returns:
        (B, T), meaningless outside the mask.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 9.0, 4.0]])
        >>> mask = torch.tensor([[True, True, False, True]])
        >>> discounted_later_sums(torch.where(mask, x, 0.0), mask, discount=0.5)
        tensor([[2., 2., 2., 0.]])
    """
    if discount == 1:
        return later_sums(values)
    # Of the next token: what it adds, discounted, and the discount of all that follows it.
    decay = torch.ones_like(values).masked_fill(completion_mask.bool(), discount)
    decay, sums = _shifted(decay, 1), _shifted(decay * values, 1)
    step = 1
    while step < values.shape[-1]:
        sums = sums + decay * _shifted(sums, step)
        decay = decay * _shifted(decay, step)
        step *= 2
    return sums


def _shifted(values: Tensor, places: int) -> Tensor:
    """Move values to the left and fill with zeros."""
    return torch.nn.functional.pad(values[..., places:], (0, min(places, values.shape[-1])))
