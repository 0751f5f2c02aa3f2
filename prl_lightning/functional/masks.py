"""Padding, precision and suffix sums: what the whole of `functional` does with a (B, T) tensor.

Shape letters, here and everywhere: B completions, G group, T tokens, V vocabulary, H hidden.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on a log-ratio where it is exponentiated, and only there.

A token drawn from π has log π/π_ref < -20 with probability under e^-20 = 2e-9 (sum π over the
tokens where π < e^-20 π_ref), so sampling all but never meets the bound. Without it one such
token makes float32 overflow; with it u = e^20 = 4.9e8 can be summed over any completion, and
squared in a gradient norm, far inside float32 and bfloat16.
"""


def at_least_float32(values: Tensor) -> Tensor:
    """Values in a dtype fit for sums: float64 stays, everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def keep_tokens(values: Tensor, completion_mask: Tensor, name: str) -> Tensor:
    """Values on completion tokens, exact zeros elsewhere, in float32 or float64.

    Selection, not multiplication: a NaN or inf in the padding must not survive as NaN * 0, in the
    value or in the gradient.

    Args:
        values: (B, T) of any dtype.
        completion_mask: (B, T), true on completion tokens; bool or 0/1.
        name: what `values` is called in the error message.

    Returns:
        (B, T).

    Raises:
        ValueError: if the two are not of the same (B, T).

    Example:
        >>> keep_tokens(torch.tensor([[1.0, float("nan")]]), torch.tensor([[1, 0]]), "x")
        tensor([[1., 0.]])
    """
    if completion_mask.ndim != 2 or values.shape != completion_mask.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and completion_mask "
            f"{tuple(completion_mask.shape)}: pass both as (B, T)"
        )
    values = at_least_float32(values)
    return torch.where(completion_mask.bool(), values, torch.zeros_like(values))


def check_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Raise a ValueError that names both tensors if their shapes differ.

    Args:
        first: (B, T).
        second: (B, T).
        first_name: what `first` is called in the error message.
        second_name: what `second` is called in the error message.

    Raises:
        ValueError: if the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} "
            f"{tuple(second.shape)}: pass both as (B, T)"
        )


def suffix_sums(values: Tensor) -> Tensor:
    """S_t = Σ_{j≥t} x_j along the last dimension.

    Summed from the right, so that S_t never contains an earlier token: total minus prefix would
    lose the small late terms beside a large early one.

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
    """Σ_{j>t} x_j along the last dimension: the suffix sum without the token's own term.

    Args:
        values: (..., T).

    Returns:
        (..., T).

    Example:
        >>> later_sums(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[5., 3., 0.]])
    """
    # Shifted rather than S_t - x_t, which rounds away the rest when x_t is large.
    return torch.nn.functional.pad(suffix_sums(values)[..., 1:], (0, min(1, values.shape[-1])))
