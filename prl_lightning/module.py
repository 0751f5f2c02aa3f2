"""PRLModule: policy, frozen reference and the loss of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import inf
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation.metrics import MeanStd
from prl_lightning.evaluation.results import SetMetrics, SetResults
from prl_lightning.functional import get_divergence, kl_estimate, process_rewards
from prl_lightning.functional.masks import keep_tokens
from prl_lightning.models.causal_lm import (
    load_policy,
    load_reference,
    load_tokenizer,
    named_weights,
)
from prl_lightning.models.lora import adapters_off
from prl_lightning.models.sharding import (
    exclude_frozen,
    full,
    load_on_ranks,
    sharding_of,
    total_norm,
)
from prl_lightning.models.step_splitter import StepSplitter
from prl_lightning.objective import Objective
from prl_lightning.types import RolloutBatch


class PRLModule(LightningModule):
    """Train a policy by Process Reward Learning, or by what the papers compare it with.

    Args:
        policy: Hugging Face id or folder of the causal LM to train.
        objective: the method; see Objective.
        reference: Hugging Face id or folder of the reference; by default the policy as it starts.
        track_reference: keep a reference even if the objective needs none, to log the drift.
        lora: train a LoRA adapter with these arguments of ``peft.LoraConfig``, such as
            ``{r: 16, target_modules: all-linear}``. The reference is then the policy with the
            adapter off, unless another one is named.
        gradient_checkpointing: compute activations twice instead of keeping them.
        compile: compile the blocks of policy and reference, by torch.compile.
        temperature: of sampling and of every log-probability in the loss.
        optimizer: called with the parameters.
        lr_scheduler: called with the optimizer; steps once an update.
        pass_at: the k of pass@k, at most ``data.eval_group_size``; pass@1 is mean@n.
        solved_at: an evaluation completion counts as correct from this reward on, the weighted sum
            of all reward functions.
    """

    def __init__(
        self,
        policy: str,
        objective: Objective = Objective(),  # noqa: B008  (frozen)
        reference: str | None = None,
        track_reference: bool = False,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        pass_at: tuple[int, ...] = (8,),
        solved_at: float = 0.5,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"model.temperature={temperature}: must be above 0.")
        self.policy_name = policy
        self.reference_name = reference or policy
        self.objective = objective
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.keeps_reference = objective.needs_reference or track_reference
        self.temperature = temperature
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.pass_at = pass_at
        self.solved_at = solved_at
        self.policy: torch.nn.Module | None = None
        self.reference: torch.nn.Module | None = None
        self.process_term = MeanStd()
        self.eval_metrics = torch.nn.ModuleList()  # a set may have any name, a module may not
        self._eval_names: list[str] = []
        self.eval_results: dict[str, SetResults] = {}
        self.loaded_at: dict[str, int] = {}  # step and epoch of the checkpoint that was loaded
        self._gradient_norm: Tensor | None = None
        exclude_frozen(self)

    # Loading

    def configure_model(self) -> None:
        """Load policy and reference; a strategy that shards does it from here."""
        if self.policy is not None:
            return
        self.splitter = StepSplitter(self.objective.steps, load_tokenizer(self.policy_name))
        policy = partial(
            load_policy,
            self.policy_name,
            self.lora,
            self.gradient_checkpointing,
            self.compile_blocks,
        )
        sharding = sharding_of(self)
        self.policy = load_on_ranks(policy, sharding, keep_root=True)
        shares_weights = self.lora is not None and self.reference_name == self.policy_name
        if self.keeps_reference and not shares_weights:
            reference = partial(load_reference, self.reference_name, self.compile_blocks)
            self.reference = load_on_ranks(reference, sharding, keep_root=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name what the weights belong to, for ``prl export``."""
        checkpoint["policy_origin"] = {"name": self.policy_name, "lora": self.lora}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note its step, and say where it is of another policy before its weights do not fit."""
        self.loaded_at = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        origin = checkpoint.get("policy_origin")
        if origin and origin != {"name": self.policy_name, "lora": self.lora}:
            rank_zero_warn(
                f"The checkpoint is of policy {origin['name']} with lora={origin['lora']}, and "
                f"model.policy={self.policy_name}, model.lora={self.lora}. If they are not the "
                "same, give this run a trainer.default_root_dir of its own."
            )

    def configure_optimizers(self) -> Any:
        """The optimizer of the policy, and a schedule stepped once an update."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # Training

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        ref_logprobs = batch.ref_logprobs
        if ref_logprobs is None and self.keeps_reference:
            ref_logprobs = self.score(batch, "reference")
        policy_logprobs, entropy = self.loaded_policy(batch, self.temperature)
        step_ends = self.splitter(batch.completion_ids, batch.completion_mask)
        loss, stats = self.objective.loss(policy_logprobs, ref_logprobs, batch, step_ends)

        # Lightning averages over micro-batches and ranks; the loss is already a share of the sum.
        loss = loss * self.trainer.accumulate_grad_batches * self.trainer.world_size
        self._log_train({"ratio_max": stats.pop("ratio_max")}, weight=1, reduce_fx="max")
        tokens = batch.num_tokens
        by_token = {"entropy": entropy, "advantage": stats.pop("advantage")}
        if "process_term" in stats:
            self.process_term.update(stats.pop("process_term"), batch.completion_mask)
        if ref_logprobs is not None:
            on_policy = policy_logprobs.detach()
            by_token["kl_ref_k3"] = kl_estimate(on_policy, ref_logprobs, "k3")
            drift = _token_mean(kl_estimate(on_policy, ref_logprobs, "k1"), batch, tokens)
            self._log_train({"kl_ref": drift}, weight=tokens, prog_bar=True)
        means = {name: _token_mean(value, batch, tokens) for name, value in by_token.items()}
        self._log_train(stats | means, weight=tokens)
        self._log_train({"loss": loss.detach()}, weight=1)
        return loss

    @torch.no_grad()
    def score(
        self,
        batch: RolloutBatch,
        model: Literal["policy", "reference"],
        temperature: float | None = None,
    ) -> Tensor:
        """Log-probabilities (B, T) of a batch, without gradient.

        Args:
            batch: on this module's device.
            model: whose log-probabilities.
            temperature: the module's own by default.
        """
        scorer = self.loaded_policy
        weights: AbstractContextManager[None] = nullcontext()
        if model == "reference" and self.reference is not None:
            scorer = self.reference
        elif model == "reference":
            weights = adapters_off(scorer)
        with self.trainer.precision_plugin.forward_context(), weights:
            logprobs: Tensor = scorer(batch, temperature or self.temperature)[0]
        return logprobs

    def weights(
        self, dtype: torch.dtype | None = None, as_in_file: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under their Hugging Face names, for an engine; a collective.

        Args:
            dtype: see ``named_weights``.
            as_in_file: see there.
        """
        return named_weights(self.loaded_policy, dtype, as_in_file)

    def gradient_norm(self) -> Tensor:
        """Norm of this update's gradient as backward left it, computed once; a collective."""
        if self._gradient_norm is None:
            self._gradient_norm = total_norm(self.loaded_policy)
        return self._gradient_norm

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, by the norm that is there already.

        Lightning would compute it again, cannot under FSDP1, and refuses fused optimizers under
        bf16-mixed, where there is nothing to unscale.
        """
        norm, self._gradient_norm = self._gradient_norm, None
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        by_norm = gradient_clip_algorithm in (None, "norm") and not is_scaled
        if gradient_clip_val and by_norm and norm is not None:
            clip_grads_with_norm_(self.loaded_policy.parameters(), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the gradient, before any clipping; a skipped update has none."""
        if any(p.grad is not None for p in self.loaded_policy.parameters()):
            self._log_train({"grad_norm": full(self.gradient_norm())}, weight=1)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and let the gradient go: the engine that samples next can use its memory."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        """Log the process term over all tokens of the iteration.

        Not in ``on_train_epoch_end``: by then the progress bar of the first rank alone is reducing
        what was logged, and a collective of ours would meet one of Lightning's.
        """
        if self.trainer.is_last_batch and self.process_term.update_called:
            moments = self.process_term.compute()
            self._log_train({f"process_term_{k}": v.float() for k, v in moments.items()}, weight=1)
            self.process_term.reset()

    @property
    def loaded_policy(self) -> torch.nn.Module:
        """The policy, sharded as the strategy has it; an error before it is loaded."""
        if self.policy is None:
            raise RuntimeError("the policy is loaded in configure_model, by the Trainer")
        return self.policy

    def _log_train(self, values: dict[str, Tensor], weight: int, **options: Any) -> None:
        """Log one value an epoch, which is one iteration."""
        self.log_dict(
            {f"train/{name}": value for name, value in values.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            # Lightning averages the weights over ranks as integers, rounding down.
            batch_size=weight * self.trainer.world_size,
            **options,
        )

    # Evaluation: the callback samples, a step only counts

    def setup(self, stage: str) -> None:
        """Make the metrics of every evaluation set, on the device of this rank.

        Raises:
            ValueError: see ``check_metrics``.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_metrics(data)
        self._eval_names = list(data.eval_rollouts)
        self.eval_metrics = torch.nn.ModuleList(
            SetMetrics(data.eval_group_size, self.pass_at, self.solved_at) for _ in self._eval_names
        )
        # FSDP1 moves nothing but what it shards, and would log and feed batches on the CPU.
        self.to(self.trainer.strategy.root_device)

    def check_metrics(self, data: PromptDataModule) -> None:
        """Look whether what is asked for can be computed.

        Args:
            data: knows the number of samples.

        Raises:
            ValueError: a k of ``pass_at`` is larger than the number of samples, or nobody has
                registered the divergence.
        """
        get_divergence(self.objective.divergence)
        too_large = [k for k in self.pass_at if k > data.eval_group_size]
        if too_large and data.eval_sources:
            raise ValueError(
                f"model.pass_at has {too_large}, but data.eval_group_size={data.eval_group_size} "
                "samples a prompt. Raise eval_group_size or leave those k out."
            )

    def validation_step(self, batch: RolloutBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what one prompt's group has right."""
        cast(SetMetrics, self.eval_metrics[dataloader_idx]).update(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the results of every set."""
        self._log_eval("val")

    def on_test_epoch_end(self) -> None:
        """Log the results of every set."""
        self._log_eval("test")

    def _log_eval(self, stage: str) -> None:
        # Every rank computes them over all ranks.
        results = {
            name: cast(SetMetrics, metrics).results()
            for name, metrics in zip(self._eval_names, self.eval_metrics, strict=True)
        }
        # A sanity check of some batches is not an evaluation; of all, it is the base model's.
        is_partial = self.trainer.sanity_checking and self.trainer.num_sanity_val_steps != inf
        self.eval_results = {} if is_partial else results
        values = {
            f"{stage}/{name}/{metric}": estimate.mean
            for name, results in self.eval_results.items()
            for metric, estimate in results.metrics.items()
        }
        if self.trainer.sanity_checking:
            # Lightning drops these values.
            for logger in self.trainer.loggers if values else ():
                logger.log_metrics(values, step=0)
        else:
            self.log_dict(values)
        solved = [results.pass_curve["pass"][0] for results in self.eval_results.values()]
        if solved:
            self.log("pass@1", sum(solved) / len(solved), prog_bar=True, logger=False)

    def predict_step(
        self, batch: RolloutBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor] | None:
        """What ``inspect`` says of one prompt's sampled group; None for a padding prompt."""
        inspected = self.inspect(batch)
        return None if batch.is_padding else inspected

    @torch.no_grad()
    def inspect(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Every quantity of the method at each token, as the loss would have it.

        Args:
            batch: with its outcome advantages, on this module's device.

        Returns:
            ``policy_logprobs``, ``advantages`` and ``step_ends`` (bool, nowhere True in the token
            form), with a reference ``ref_logprobs`` and ``process_rewards`` (v2 Eq. 5.4), each
            (B, T).
        """
        policy_logprobs = self.score(batch, "policy")
        ref_logprobs = self.score(batch, "reference") if self.keeps_reference else None
        step_ends = self.splitter(batch.completion_ids, batch.completion_mask)
        _, stats = self.objective.loss(policy_logprobs, ref_logprobs, batch, step_ends)
        found = {
            "policy_logprobs": policy_logprobs,
            "advantages": stats["advantage"],
            "step_ends": torch.zeros_like(batch.completion_mask)
            if step_ends is None
            else step_ends,
        }
        if ref_logprobs is not None:
            found["ref_logprobs"] = ref_logprobs
            found["process_rewards"] = process_rewards(
                batch.rewards,
                policy_logprobs - ref_logprobs,
                batch.completion_mask,
                self.objective.beta,
            )
        return found


def _token_mean(values: Tensor, batch: RolloutBatch, tokens: int) -> Tensor:
    """Mean of (B, T) values over a micro-batch's completion tokens, of which there are so many.

    Weighted by their number, an epoch's mean is that of all its tokens.
    """
    return keep_tokens(values, batch.completion_mask, "values").sum() / tokens
