"""PRLModule: policy, frozen reference and the loss of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from prl_lightning.evaluation.metrics import MeanStd
from prl_lightning.evaluation.results import SetMetrics, SetResults
from prl_lightning.functional import kl_estimate, process_rewards
from prl_lightning.functional.masks import keep_tokens
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy, load_tokenizer
from prl_lightning.models.references import MOVING, References
from prl_lightning.models.sharding import (
    exclude_frozen,
    full,
    is_offloading,
    load_on_ranks,
    sharding_of,
    total_norm,
)
from prl_lightning.models.step_splitter import StepSplitter
from prl_lightning.objective import Objective
from prl_lightning.references import MeanKL, Reference
from prl_lightning.runs.checkpoint_files import read_checkpoint, read_weights
from prl_lightning.runs.hyperparameters import arguments_of, make_plain
from prl_lightning.types import RolloutBatch


class PRLModule(LightningModule):
    """Train a policy by Process Reward Learning or one of the papers' baselines.

    Args:
        policy: Hugging Face id or folder of the causal LM to train.
        objective: the method; see Objective.
        reference: Hugging Face id or folder of the reference; by default the initial policy.
        track_reference: keep a reference even if the objective needs none, to log the KL to it.
        lora: train a LoRA adapter with these arguments of ``peft.LoraConfig``, such as
            ``{r: 16, target_modules: all-linear}``. The reference is then the policy with the
            adapter off, unless ``reference`` is set.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
        compile: compile the blocks of policy and reference with torch.compile.
        optimizer: called with the parameters.
        lr_scheduler: called with the optimizer; steps once per update.
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
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        make_plain(self)
        self.policy_name = policy
        self.reference_name = reference or policy
        # The short form, for messages if there are references by name as well.
        self.other_reference = (reference and f"model.reference={reference!r}") or (
            "model.track_reference=true" if track_reference else ""
        )
        self.references = References(
            _references(objective, reference, track_reference), policy, lora is not None
        )
        self.objective = objective
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.policy: torch.nn.Module | None = None
        self.process_term = MeanStd()
        self.mean_kl = MeanKL()  # steers the betas that have a target
        self.eval_metrics: dict[str, SetMetrics] = {}  # no submodules: a set may have any name
        self.eval_results: dict[str, SetResults] = {}
        self.loaded_at: dict[str, int] = {}  # step and epoch of the loaded checkpoint
        self._gradient_norm: Tensor | None = None
        exclude_frozen(self, but=f"references.models.{MOVING}")

    # Loading

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **arguments: Any
    ) -> Self:
        """Make a module from a checkpoint, with its weights. No code of the file is run.

        Args:
            checkpoint_path: one file, or the folder that ``fsdp2`` writes.
            map_location: the device.
            arguments: replace the checkpoint's.

        Raises:
            ValueError: the optimizer or the schedule is none that the program has imported.
            pickle.UnpicklingError: loading it could run code.
        """
        path = Path(checkpoint_path)
        checkpoint = read_checkpoint(path)
        saved = checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY]
        kept = {name: value for name, value in saved.items() if name not in arguments}
        module = cls(**arguments_of(kept), **arguments)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(read_weights(path, checkpoint, module.state_dict()))
        return module.to(map_location)

    def configure_model(self) -> None:
        """Load policy and reference, sharded if the strategy shards."""
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
        self.references.load(sharding, self.compile_blocks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the betas that follow a target."""
        checkpoint["steered_betas"] = self.objective.steered_betas
        checkpoint["kl_totals"] = self.mean_kl.totals

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record its step, take its betas, and warn if it is a checkpoint of another policy."""
        self.loaded_at = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        self.objective = self.objective.with_betas(checkpoint.get("steered_betas", {}))
        totals = checkpoint.get("kl_totals", [])
        if len(totals) == len(self.objective.named_references) + 1:  # else there were others
            self.mean_kl.totals = totals
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        theirs = saved and (saved["policy"], saved["lora"])
        if theirs and theirs != (self.policy_name, self.lora):
            rank_zero_warn(
                f"model.policy={self.policy_name}, model.lora={self.lora}, but the checkpoint has "
                f"policy={theirs[0]}, lora={theirs[1]}. If these are different models, give this "
                "run another trainer.default_root_dir."
            )

    def configure_optimizers(self) -> Any:
        """Create the optimizer of the policy and its schedule, which steps once per update."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # Training

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch."""
        ref_logprobs = batch.ref_logprobs
        if ref_logprobs is None and self.references:
            ref_logprobs = self.score_references(batch)
        policy_logprobs, entropy = self.loaded_policy(batch)
        step_ends = self.splitter(batch.completion_ids, batch.completion_mask)
        loss, stats = self.objective.loss(policy_logprobs, ref_logprobs, batch, step_ends)
        # Weighted by tokens, these add up to the update's loss, however it is cut.
        share = loss.detach() * batch.update_tokens / max(1, batch.num_tokens)
        self._log_step(batch, stats | {"entropy": entropy, "loss": share})
        if ref_logprobs is not None:
            self._log_drift(batch, policy_logprobs.detach(), ref_logprobs)
        # Undo Lightning's mean over micro-batches and ranks: their losses add up to the update's.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _log_step(self, batch: RolloutBatch, stats: dict[str, Tensor]) -> None:
        """Log a micro-batch's stats: scalars as they are, (B, T) tensors as a mean over tokens."""
        # An update whose completions are all left out of the loss has no tokens, and the loss 0.
        weight = batch.num_tokens if batch.update_tokens else 1
        self._log_train({"loss": stats.pop("loss")}, weight)
        self._log_train({"ratio_max": stats.pop("ratio_max")}, weight=1, reduce_fx="max")
        if "process_term" in stats:
            self.process_term.update(stats.pop("process_term"), batch.completion_mask)
        means = {name: _token_mean(v, batch) if v.ndim else v for name, v in stats.items()}
        self._log_train(means, weight=batch.num_tokens)

    def _log_drift(self, batch: RolloutBatch, policy: Tensor, references: Tensor) -> None:
        """Log estimates of the KL per token: to the first reference, and to the others by name."""
        k1, k3 = (
            [_token_mean(kl_estimate(policy, one, k), batch) for one in references.unbind(-1)]
            for k in ("k1", "k3")
        )
        if self.objective.steered_betas:
            self.mean_kl.add(policy[..., None] - references, batch.completion_mask)
        self._log_train({"kl_ref": k1[0]}, weight=batch.num_tokens, prog_bar=True)
        self._log_train({"kl_ref_k3": k3[0]}, weight=batch.num_tokens)
        if len(k1) > 1:
            named = {
                f"kl_ref/{name}": kl for name, kl in zip(self.references.settings, k1, strict=True)
            }
            self._log_train(named, weight=batch.num_tokens)

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> Tensor:
        """Compute the policy's log-probabilities (B, T) of a batch without gradient.

        Args:
            batch: on this module's device.
        """
        with self.trainer.precision_plugin.forward_context():
            logprobs: Tensor = self.loaded_policy(batch)[0]
        return logprobs

    @torch.no_grad()
    def score_references(self, batch: RolloutBatch) -> Tensor:
        """Compute the references' log-probabilities (B, T, K) of a batch.

        Args:
            batch: on this module's device.

        Raises:
            RuntimeError: there is none.
        """
        if not self.references:
            raise RuntimeError("no reference is loaded: set model.track_reference")
        with self.trainer.precision_plugin.forward_context():
            return self.references.score(batch, self.loaded_policy)

    def weights(
        self, dtype: torch.dtype | None = None, as_in_file: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the policy's weights under their Hugging Face names; a collective.

        Args:
            dtype: see ``named_weights``.
            as_in_file: see ``named_weights``.
        """
        return named_weights(self.loaded_policy, dtype, as_in_file)

    @property
    def scales_gradient(self) -> bool:
        """Whether a gradient scaler (16-mixed) multiplies the gradient, and skips on overflow."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def gradient_norm(self) -> Tensor:
        """Return the norm of this update's unclipped gradient, computed once; a collective."""
        if self._gradient_norm is None:
            self._gradient_norm = total_norm(self.loaded_policy)
        return self._gradient_norm

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer is configured, with the norm that is already computed.

        Lightning's clipping computes the norm again, does not work under FSDP1, and refuses fused
        optimizers under bf16-mixed although nothing has to be unscaled there.
        """
        norm, self._gradient_norm = self._gradient_norm, None
        by_norm = gradient_clip_algorithm in (None, "norm") and not self.scales_gradient
        if gradient_clip_val and by_norm and norm is not None:
            clip_grads_with_norm_(self.loaded_policy.parameters(), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm before clipping; a skipped update has no gradient."""
        if any(p.grad is not None for p in self.loaded_policy.parameters()):
            self._log_train({"grad_norm": full(self.gradient_norm())}, weight=1)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step and free the gradient, so that the engine can use its memory.

        The iteration ends here, before a callback can save: each checkpoint then has the betas and
        the moving references of the update that comes next.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        steers = bool(self.objective.steered_betas)
        if steers:
            self.mean_kl.end_update()
        if self.trainer.is_last_batch:
            self.references.follow(self.loaded_policy, epoch + 1)
            if steers:
                self._steer()

    def _steer(self) -> None:
        """Log the iteration's betas, and take those of the next one."""
        betas, is_one = self.objective.steered_betas, len(self.objective.named_references) == 1
        named = {"beta" if is_one else f"beta/{name}": beta for name, beta in betas.items()}
        self._log_train(named, weight=1, reduce_fx="max")  # equal on all ranks
        self.objective = self.objective.steered(self.mean_kl.end_iteration())

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        """Log the process term over all tokens of the iteration.

        Not in ``on_train_epoch_end``: there only rank 0's progress bar reduces logged values, and
        our collective would be matched with one of Lightning's.
        """
        if self.trainer.is_last_batch and self.process_term.update_called:
            moments = self.process_term.compute()
            self._log_train({f"process_term_{k}": v.float() for k, v in moments.items()}, weight=1)
            self.process_term.reset()

    @property
    def loaded_policy(self) -> torch.nn.Module:
        """The policy, sharded if the strategy shards; an error before it is loaded."""
        if self.policy is None:
            raise RuntimeError("the policy is not loaded: the Trainer loads it in configure_model")
        return self.policy

    def _log_train(self, values: Mapping[str, Tensor | float], weight: int, **options: Any) -> None:
        """Log one value per epoch, which is one iteration."""
        self.log_dict(
            {f"train/{name}": value for name, value in values.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            # Lightning averages the weights over ranks as integers, rounding down.
            batch_size=weight * self.trainer.world_size,
            **options,
        )

    # Evaluation: the callback samples, a step only updates the metrics

    def setup(self, stage: str) -> None:
        """Create the metrics of every evaluation set, on the device of this rank."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        device = self.trainer.strategy.root_device
        self.eval_metrics = {
            name: SetMetrics(data.evaluation).to(device) for name in data.eval_buffers
        }
        # FSDP1 moves only what it shards; batches and logged values would stay on the CPU. A later
        # stage must not move a policy that is offloaded.
        if self.policy is None or not is_offloading(self.trainer.strategy):
            self.to(device)

    def validation_step(self, batch: RolloutBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one prompt's group to the metrics of its set."""
        list(self.eval_metrics.values())[dataloader_idx].update(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the results of every set."""
        stage = "test" if self.trainer.testing else "val"
        # Every rank computes them over all ranks.
        self.eval_results = {name: set_.results() for name, set_ in self.eval_metrics.items()}
        values = {
            f"{stage}/{name}/{metric}": estimate.mean
            for name, results in self.eval_results.items()
            for metric, estimate in results.metrics.items()
        }
        if self.trainer.sanity_checking:
            # The evaluation of the initial policy. Lightning logs nothing of a sanity check.
            for logger in self.trainer.loggers if values else ():
                logger.log_metrics(values, step=0)
        else:
            self.log_dict(values)
        solved = [results.pass_curve["pass"][0] for results in self.eval_results.values()]
        if solved:
            self.log("pass@1", sum(solved) / len(solved), prog_bar=True, logger=False)

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(
        self, batch: RolloutBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor] | None:
        """Inspect one prompt's sampled group; None for a padding prompt."""
        inspected = self.inspect(batch)
        return None if batch.is_padding else inspected

    @torch.no_grad()
    def inspect(
        self, batch: RolloutBatch, policy_logprobs: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute every quantity of the method at each token, as the loss does.

        Args:
            batch: with its outcome advantages, on this module's device.
            policy_logprobs: (B, T), of an earlier policy; by default they are computed.

        Returns:
            ``policy_logprobs``, ``advantages`` and ``step_ends`` (bool, nowhere True in the token
            form), and with references ``ref_logprobs`` of the first one and ``process_rewards`` (v2
            Eq. 5.4), each (B, T).
        """
        if policy_logprobs is None:
            policy_logprobs = self.score(batch)
        ref_logprobs = self.score_references(batch) if self.references else None
        step_ends = self.splitter(batch.completion_ids, batch.completion_mask)
        _, stats = self.objective.loss(policy_logprobs, ref_logprobs, batch, step_ends)
        inspected = {
            "policy_logprobs": policy_logprobs,
            "advantages": stats["advantage"],
            "step_ends": torch.zeros_like(batch.completion_mask)
            if step_ends is None
            else step_ends,
        }
        if ref_logprobs is not None:
            inspected["ref_logprobs"] = ref_logprobs[..., 0]
            betas = [one.beta for one in self.objective.named_references.values()]
            log_ratios = policy_logprobs[..., None] - ref_logprobs
            inspected["process_rewards"] = process_rewards(
                batch.rewards, log_ratios @ log_ratios.new_tensor(betas), batch.completion_mask, 1.0
            )
        return inspected


def _references(objective: Objective, model: str | None, track: bool) -> dict[str, Reference]:
    """Return the references by name; the short form has one."""
    if objective.references or not (objective.needs_reference or track):
        return objective.references
    return {"reference": replace(objective.short_reference, model=model)}


def _token_mean(values: Tensor, batch: RolloutBatch) -> Tensor:
    """Average (B, T) values over the sampled tokens of a micro-batch.

    Logged with the number of tokens as the weight, so that the mean of an epoch is over its tokens.
    """
    return keep_tokens(values, batch.completion_mask, "values").sum() / max(1, batch.num_tokens)
