"""What an answer by majority vote is worth."""

from torch import Tensor


def majority_correct(answers: Tensor, correct: Tensor) -> Tensor:
    """Chance that the most frequent answer of a problem's samples is right; a tie goes by lot.

    maj@n, the majority voting of Wang et al., "Self-consistency improves chain of thought
    reasoning in language models" (arXiv 2203.11171).

    Args:
        answers: (P, n) integers: samples of a problem with the same number have the same answer;
            one below zero has none, and no vote.
        correct: (P, n) bool. Where samples with one answer differ, the answer is worth their mean.

    Returns:
        (P,) float64; 0 where nobody votes.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> answers = torch.tensor([[7, 7, 3], [1, 2, -1], [-1, -1, -1]])
        >>> correct = torch.tensor([[True, True, False], [False, True, False], [False] * 3])
        >>> majority_correct(answers, correct)
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if answers.shape != correct.shape:
        raise ValueError(
            "answers and correct must have one shape (problems, samples), got "
            f"{tuple(answers.shape)} and {tuple(correct.shape)}"
        )
    votes = (answers[:, :, None] == answers[:, None, :]).sum(-1) * (answers >= 0)
    # Tied answers have equally many samples, so that each weighs the same among the winners.
    wins = (votes == votes.amax(1, keepdim=True)) & (votes > 0)
    return (wins & correct).sum(1).double() / wins.sum(1).clamp(min=1)
