"""Split completions into steps (PRL v1, arXiv 2601.10201).

Steps are described by `step_ends`, bool (B, T), true on each step's last token. The last completion
token always ends a step. Only tokens inside the completion mask count, so neither padding nor holes
in the middle change the steps.
"""

import torch
from torch import Tensor

from prl_lightning.functional.masks import check_same_shape


def fixed_length_steps(completion_mask: Tensor, length: int) -> Tensor:
    """Split into steps of `length` completion tokens; the last one may be shorter.

    Token n of a completion (from 1, over the mask) ends a step if n mod length = 0 or n = T_i.
    `length=1` is the token form (PRL v2). PRL v1 uses 256.

    Args:
        completion_mask: (B, T), true on completion tokens.
        length: tokens in a step, at least 1.

    Returns:
        step_ends, bool (B, T).

    Raises:
        ValueError: `length` is below 1.

    Example:
        >>> fixed_length_steps(torch.tensor([[1, 1, 1, 0]]), 2)
        tensor([[False,  True,  True, False]])
    """
    if length < 1:
        raise ValueError(f"length={length}: a step has at least 1 token.")
    mask = completion_mask.bool()
    return mask & (mask.cumsum(-1) % length == 0) | last_tokens(mask)


def delimiter_steps(
    completion_ids: Tensor, completion_mask: Tensor, is_delimiter: Tensor
) -> Tensor:
    """Split into steps that end at delimiter tokens, such as newlines or blank lines (PRL v1).

    Token t ends a step if is_delimiter[a_t], or if it is the last of its completion. The delimiters
    are a table over the vocabulary instead of one id, because tokenizers merge a newline with its
    neighbours.

    Args:
        completion_ids: (B, T) token ids; not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        is_delimiter: bool (V,), by token id.

    Returns:
        step_ends, bool (B, T).

    Raises:
        ValueError: the shapes disagree or a completion token is outside the table.

    Example:
        >>> ids, mask = torch.tensor([[4, 1, 4, 0]]), torch.tensor([[1, 1, 1, 0]])
        >>> delimiter_steps(ids, mask, torch.tensor([False, True, False, False, False]))
        tensor([[False,  True,  True, False]])
    """
    mask = completion_mask.bool()
    check_same_shape("BT", completion_ids=completion_ids, completion_mask=mask)
    strange = mask & ((completion_ids < 0) | (completion_ids >= len(is_delimiter)))
    # Reading this flag would wait for a GPU. There, the indexing below fails by itself.
    if not strange.is_cuda and strange.any():
        raise ValueError(
            f"completion_ids has token {completion_ids[strange][0].item()}, but is_delimiter has "
            f"{len(is_delimiter)} entries: pass one per row of the model's embedding."
        )
    ids = torch.where(mask, completion_ids, torch.zeros_like(completion_ids))
    return mask & is_delimiter.bool()[ids] | last_tokens(mask)


def last_tokens(completion_mask: Tensor) -> Tensor:
    """Mark the last completion token of each row; an empty row has none.

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
    """Set v_t := v_e with e the first step end at or after t: one value for all tokens of a step.

    The search is for the position e and not for a non-zero value, so 0.0 is a value like any other.

    Args:
        values: (B, T).
        completion_mask: (B, T), true on completion tokens.
        step_ends: bool (B, T); ends outside the mask are ignored.

    Returns:
        (B, T), zero outside the mask.

    Raises:
        ValueError: the shapes of step_ends and the mask differ.

    Example:
        >>> values, mask = torch.tensor([[3.0, 0.0, 5.0]]), torch.ones(1, 3)
        >>> take_at_step_end(values, mask, torch.tensor([[False, True, False]]))
        tensor([[0., 0., 5.]])
    """
    mask = completion_mask.bool()
    check_same_shape("BT", step_ends=step_ends, completion_mask=mask)
    if mask.numel() == 0:
        return values
    last = mask.shape[-1] - 1
    ends = step_ends.bool() & mask | last_tokens(mask)
    positions = torch.arange(last + 1, device=mask.device).expand(mask.shape)
    next_end = positions.masked_fill(~ends, last).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(mask, values.gather(-1, next_end), torch.zeros_like(values))
