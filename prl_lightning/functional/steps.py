"""Cut completions into steps (PRL v1, arXiv 2601.10201): which tokens end one.

Steps are described by `step_ends`, bool (B, T), true on each step's last token. The last completion
token always ends a step. Tokens are counted over the completion mask, so padding on either side and
holes in the middle change nothing.
"""

import torch
from torch import Tensor


def fixed_length_steps(completion_mask: Tensor, length: int) -> Tensor:
    """Steps of `length` completion tokens; the last one may be shorter.

    Token number n of a completion (from 1, over the mask) ends a step when n mod length = 0 or
    n = T_i. `length=1` is the token form (PRL v2). PRL v1 uses 256.

    Args:
        completion_mask: (B, T), true on completion tokens.
        length: tokens in a step, at least 1.

    Returns:
        step_ends, bool (B, T).

    Raises:
        ValueError: if `length` is below 1.

    Example:
        >>> fixed_length_steps(torch.tensor([[1, 1, 1, 0]]), 2)
        tensor([[False,  True,  True, False]])
    """
    if length < 1:
        raise ValueError(f"length is {length}: a step has at least 1 token")
    mask = completion_mask.bool()
    return mask & (mask.cumsum(-1) % length == 0) | last_tokens(mask)


def delimiter_steps(
    completion_ids: Tensor, completion_mask: Tensor, is_delimiter: Tensor
) -> Tensor:
    """Steps that end at delimiter tokens, such as newlines or blank lines (PRL v1).

    Token t ends a step when is_delimiter[a_t], or when it is the last of its completion. Which
    tokens delimit is a table over the whole vocabulary, not one id, because tokenizers merge a
    newline with its neighbours.

    Args:
        completion_ids: (B, T) token ids; outside the mask they are not read.
        completion_mask: (B, T), true on completion tokens.
        is_delimiter: bool (V,), by token id.

    Returns:
        step_ends, bool (B, T).

    Raises:
        ValueError: if the shapes disagree or a completion token is outside the table.

    Example:
        >>> ids, mask = torch.tensor([[4, 1, 4, 0]]), torch.tensor([[1, 1, 1, 0]])
        >>> delimiter_steps(ids, mask, torch.tensor([False, True, False, False, False]))
        tensor([[False,  True,  True, False]])
    """
    mask = completion_mask.bool()
    if completion_ids.shape != mask.shape:
        raise ValueError(
            f"completion_ids has shape {tuple(completion_ids.shape)} and completion_mask "
            f"{tuple(mask.shape)}: pass both as (B, T)"
        )
    strange = mask & ((completion_ids < 0) | (completion_ids >= len(is_delimiter)))
    # A GPU would have to be waited for; there the index below fails by itself.
    if not strange.is_cuda and strange.any():
        raise ValueError(
            f"completion_ids holds {completion_ids[strange][0].item()} but is_delimiter has "
            f"{len(is_delimiter)} entries: give it one for every row of the model's embedding"
        )
    if mask.numel() == 0 or len(is_delimiter) == 0:
        return mask
    ids = torch.where(mask, completion_ids, torch.zeros_like(completion_ids))
    return mask & is_delimiter.bool()[ids] | last_tokens(mask)


def last_tokens(completion_mask: Tensor) -> Tensor:
    """True on the last completion token of each row, nowhere in an empty row.

    Args:
        completion_mask: (B, T), true on completion tokens.

    Returns:
        bool (B, T).

    Example:
        >>> last_tokens(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]))
        tensor([[False, False,  True, False],
                [False, False, False, False]])
    """
    mask = completion_mask.bool()
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


def take_at_step_end(values: Tensor, completion_mask: Tensor, step_ends: Tensor) -> Tensor:
    """v_t := v_e with e the first step end at or after t: one value for all tokens of a step.

    The position e is searched, never the value, so a value of 0.0 at a step's end is kept like any
    other.

    Args:
        values: (B, T).
        completion_mask: (B, T), true on completion tokens.
        step_ends: bool (B, T); ends outside the mask are ignored.

    Returns:
        (B, T), zero outside the mask.

    Raises:
        ValueError: if step_ends is not of the mask's shape.

    Example:
        >>> values, mask = torch.tensor([[3.0, 0.0, 5.0]]), torch.ones(1, 3)
        >>> take_at_step_end(values, mask, torch.tensor([[False, True, False]]))
        tensor([[0., 0., 5.]])
    """
    mask = completion_mask.bool()
    if step_ends.shape != mask.shape:
        raise ValueError(
            f"step_ends has shape {tuple(step_ends.shape)} and completion_mask "
            f"{tuple(mask.shape)}: pass both as (B, T)"
        )
    if mask.numel() == 0:
        return values
    last = mask.shape[-1] - 1
    ends = step_ends.bool() & mask | last_tokens(mask)
    positions = torch.arange(last + 1, device=mask.device).expand(mask.shape)
    next_end = positions.masked_fill(~ends, last).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(mask, values.gather(-1, next_end), torch.zeros_like(values))
