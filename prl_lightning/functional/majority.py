"""Majority voting over the answers of a problem's samples."""

from torch import Tensor

from prl_lightning.functional.masks import check_same_shape


def majority_correct(answers: Tensor, correct: Tensor) -> Tensor:
    """Return the probability that a problem's most frequent answer is right; ties are drawn.

    This is maj@n: Wang et al., "Self-consistency improves chain of thought reasoning in language
    models" (arXiv 2203.11171).

    Args:
        answers: (P, n) integers, equal for equal answers of a problem; negative for no answer,
            which has no vote.
        correct: (P, n) bool. If samples with the same answer differ, the answer counts as their
            mean.

    Returns:
        (P,) float64; 0 for a problem without a vote.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> answers = torch.tensor([[7, 7, 3], [1, 2, -1], [-1, -1, -1]])
        >>> correct = torch.tensor([[True, True, False], [False, True, False], [False] * 3])
        >>> majority_correct(answers, correct)
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    check_same_shape("Pn", answers=answers, correct=correct)
    votes = (answers[:, :, None] == answers[:, None, :]).sum(-1) * (answers >= 0)
    # Tied answers have equally many samples, so each has the same weight among the winners.
    wins = (votes == votes.amax(1, keepdim=True)) & (votes > 0)
    return (wins & correct).sum(1).double() / wins.sum(1).clamp(min=1)
