"""The mathematics of Process Reward Learning, as pure functions of tensors; needs torch alone."""

from prl_lightning.functional.advantages import outcome_advantages, register_advantage
from prl_lightning.functional.aggregation import Aggregation, aggregate
from prl_lightning.functional.bootstrap import bootstrap_interval
from prl_lightning.functional.divergences import Divergence, get_divergence, register_divergence
from prl_lightning.functional.engine_correction import EngineCorrection
from prl_lightning.functional.kl import kl_estimate, kl_loss
from prl_lightning.functional.logprobs import token_logprobs
from prl_lightning.functional.losses import (
    LossInputs,
    dual_clip,
    policy_loss,
    register_loss,
)
from prl_lightning.functional.majority import majority_correct
from prl_lightning.functional.masks import MAX_LOG_RATIO
from prl_lightning.functional.pass_at_k import pass_at_k
from prl_lightning.functional.process import (
    prl_advantages,
    process_baseline,
    process_rewards,
    process_term,
)
from prl_lightning.functional.process_shapes import others_mean, register_shape
from prl_lightning.functional.shaped_rewards import (
    decoupled_rewards,
    kl_in_reward_step,
    kl_in_reward_trajectory,
)
from prl_lightning.functional.steps import delimiter_steps, fixed_length_steps

__all__ = [
    "MAX_LOG_RATIO",
    "Aggregation",
    "Divergence",
    "EngineCorrection",
    "LossInputs",
    "aggregate",
    "bootstrap_interval",
    "decoupled_rewards",
    "delimiter_steps",
    "dual_clip",
    "fixed_length_steps",
    "get_divergence",
    "kl_estimate",
    "kl_in_reward_step",
    "kl_in_reward_trajectory",
    "kl_loss",
    "majority_correct",
    "others_mean",
    "outcome_advantages",
    "pass_at_k",
    "policy_loss",
    "prl_advantages",
    "process_baseline",
    "process_rewards",
    "process_term",
    "register_advantage",
    "register_divergence",
    "register_loss",
    "register_shape",
    "token_logprobs",
]
