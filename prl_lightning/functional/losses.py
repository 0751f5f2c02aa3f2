"""The policy loss: a registry of functions of the importance ratio and the advantage."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prl_lightning.functional.aggregation import TOKEN_MEAN, Aggregation, aggregate
from prl_lightning.functional.masks import MAX_LOG_RATIO, keep_tokens
from prl_lightning.functional.process import per_token
from prl_lightning.functional.registry import Registry


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from: tensors (B, T), zero outside the mask, and the clip range.

    Attributes:
        policy_logprobs: log π, with gradient.
        log_ratio: log ρ = log π - log π_old, with gradient.
        advantages: A, detached.
        mask: bool, true on completion tokens.
        clip_low: ε_low.
        clip_high: ε_high.
    """

    policy_logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    clip_low: float
    clip_high: float

    @property
    def ratio(self) -> Tensor:
        """ρ of each token, with log ρ bounded to ±`MAX_LOG_RATIO`."""
        return _bounded_exp(self.log_ratio)


TokenLoss = Callable[[LossInputs], tuple[Tensor, Tensor]]
"""inputs -> (losses, is_clipped), both (B, T); see `register_loss`."""


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    surrogate: str = "clip",
    aggregation: Aggregation = TOKEN_MEAN,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregate a loss per token of the importance ratio ρ = π/π_old and the advantage A.

    | surrogate | loss of a token | source |
    | --- | --- | --- |
    | clip | -min(ρ·A, clip(ρ)·A) | PPO, arXiv 1707.06347; ε_low ≠ ε_high: DAPO, arXiv 2503.14476 |
    | gspo | -min(s_t·A, clip(s_t)·A), s_t = π·sg(s/π) | arXiv 2507.18071, Eq. 13 and 14 |
    | cispo | -sg(clip(ρ))·A·log π | arXiv 2506.13585, Eq. 4 and 5 |
    | dual_clip | min(loss of clip, -3·A) where A < 0, else clip | arXiv 1912.09729, Eq. 5 |

    clip(x) keeps x between 1 - ε_low and 1 + ε_high, and sg stops the gradient. With the advantages
    of `prl_advantages`, clip is the loss of PRL (arXiv 2601.10201).

    gspo's ratio is the sequence's, s = exp(mean_t log ρ_t) over its completion tokens, so that a
    sequence is clipped as a whole. Its clip range is three orders of magnitude narrower than that
    of a token's ratio (section 5.1 of the paper: 3e-4 and 4e-4). Advantages may differ between
    tokens; with one advantage per sequence and the aggregation sequence_mean, the gradient is that
    of GSPO's Eq. 5.

    log ρ is bounded to ±`MAX_LOG_RATIO`, so that ρ·A stays finite; beyond it the gradient is zero,
    but for cispo.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        old_logprobs: log π_old, the policy that sampled, (B, T); detached here.
        advantages: (B, T), or (B,) for one per completion; detached here.
        completion_mask: (B, T), true on completion tokens; nothing is read outside it.
        clip_low: ε_low.
        clip_high: ε_high.
        surrogate: a name of the table, or a registered one.
        aggregation: by default the token mean of this batch alone.
        token_weights: (B, T), multiplies each token's loss; see `EngineCorrection`.

    Returns:
        The loss, a scalar, and its stats, detached scalars over the completion tokens:
        `clip_fraction` (share of tokens where clipping changes the loss or its weight),
        `ratio_mean` and `ratio_max` (of ρ). Without tokens they are 0, 1 and 1.

    Raises:
        ValueError: shapes disagree, the surrogate is unknown, or see `aggregate`.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0]])
        >>> loss, stats = policy_loss(old, old, torch.tensor([0.5]), torch.ones(1, 2))
        >>> loss, stats["clip_fraction"]
        (tensor(-0.5000), tensor(0.))
    """
    policy = keep_tokens(policy_logprobs, completion_mask, "policy_logprobs")
    old = keep_tokens(old_logprobs.detach(), completion_mask, "old_logprobs")
    weight = per_token(advantages.detach(), completion_mask, "advantages")
    inputs = LossInputs(policy, policy - old, weight, completion_mask.bool(), clip_low, clip_high)
    losses, is_clipped = LOSSES[surrogate](inputs)
    if token_weights is not None:
        losses = losses * keep_tokens(token_weights.detach(), completion_mask, "token_weights")
    loss = aggregate(losses, completion_mask, aggregation)
    return loss, _ratio_stats(inputs.ratio.detach(), is_clipped.detach(), inputs.mask)


def _clip(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    return _clipped(inputs.ratio, inputs)


def _gspo(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    log_ratio = inputs.log_ratio
    mean = log_ratio.sum(-1, keepdim=True) / inputs.mask.sum(-1, keepdim=True).clamp(min=1)
    # The value is the sequence's, the gradient the token's.
    return _clipped(_bounded_exp(mean.detach() + (log_ratio - log_ratio.detach())), inputs)


def _cispo(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    ratio = inputs.ratio.detach()
    weight = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    return -weight * inputs.advantages * inputs.policy_logprobs, weight != ratio


def dual_clip(inputs: LossInputs, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """Bound the loss of `clip` by bound·|A| where A < 0; see `policy_loss`.

    Args:
        inputs: of the loss.
        bound: c > 1 of the paper, which sets 3. For another value register a partial function.

    Returns:
        Losses and whether either clipping changes them, (B, T).

    Example:
        >>> from functools import partial
        >>> register_loss("dual_clip_5", partial(dual_clip, bound=5.0))
        >>> policy, old = torch.tensor([[9.0]]).log(), torch.tensor([[0.0]])
        >>> policy_loss(policy, old, -torch.ones(1), torch.ones(1, 1), surrogate="dual_clip_5")[0]
        tensor(5.)
    """
    losses, is_clipped = _clip(inputs)
    limit = torch.where(inputs.advantages < 0, -bound * inputs.advantages, torch.inf)
    return torch.minimum(losses, limit), is_clipped | (losses > limit)


def _clipped(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    plain = -ratio * inputs.advantages
    clipped = -ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high) * inputs.advantages
    return torch.maximum(plain, clipped), clipped > plain


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


LOSSES: Registry[TokenLoss] = Registry(
    "surrogate",
    {"clip": _clip, "gspo": _gspo, "cispo": _cispo, "dual_clip": dual_clip},
    "register_loss(name, function)",
)


def register_loss(name: str, function: TokenLoss) -> None:
    """Add a loss per token.

    Call it in the module of your reward functions, which `rollout.rewards` of a configuration
    names. Then set `model.objective.surrogate` to the name. Registering your name again replaces
    the function.

    Args:
        name: not a built-in loss.
        function: `LossInputs` -> (losses, is_clipped), both (B, T). `is_clipped` is bool and only
            counted, in `clip_fraction`. Values outside the completion mask are ignored.

    Raises:
        ValueError: the name is built in.

    Example:
        >>> register_loss("plain", lambda x: (-x.ratio * x.advantages, x.ratio > 1 + x.clip_high))
        >>> policy, old = torch.tensor([[2.0]]).log(), torch.tensor([[0.0]])
        >>> policy_loss(policy, old, torch.ones(1), torch.ones(1, 1), surrogate="plain")[0]
        tensor(-2.)
    """
    LOSSES.register(name, function)


def _ratio_stats(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Compute the stats over the tokens inside the mask; without any, those of a ratio of 1."""
    # Sums over all entries: selecting those inside the mask would wait for the GPU to count them.
    count = mask.sum()
    zero, one = torch.zeros_like(ratio), ratio.new_ones(())
    # The ratio is positive, so the 0 outside the mask is never the maximum.
    largest = torch.where(mask, ratio, zero).amax() if mask.numel() else one
    return {
        "clip_fraction": (is_clipped & mask).to(ratio.dtype).sum() / count.clamp(min=1),
        "ratio_mean": torch.where(count > 0, torch.where(mask, ratio, zero).sum() / count, one),
        "ratio_max": torch.where(count > 0, largest, one),
    }
