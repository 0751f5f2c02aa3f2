"""What a run costs: the sizes of an epoch, estimates of memory and time."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Trainer

from prl_lightning.checks.contradictions import is_available
from prl_lightning.checks.duration import describe_duration
from prl_lightning.checks.memory import describe_memory
from prl_lightning.data import PromptDataModule
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings


def describe(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    gpu: str | None = None,
) -> str:
    """Describe the sizes of an epoch, the memory of a rank and the time of an iteration as text.

    Args:
        trainer: number of ranks, precision, limits of the run.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling.
        gpu: whose time is estimated, such as "H100"; by default this machine's hardware.

    Raises:
        ConfigurationError: the GPU is not known.
    """
    on_gpu = gpu is not None or trainer.strategy.root_device.type == "cuda"
    rollout.sampler.follow(str(trainer.precision), on_gpu)
    lines = []
    if data.train_sources:
        longest = data.max_prompt_tokens + rollout.max_new_tokens
        completions = rollout.refill * data.prompts_per_epoch * data.group_size
        epochs = trainer.max_epochs or 0
        lines += [
            f"epoch      {data.sizes(trainer)}",
            *_refilled(data, rollout),
            f"tokens     at most {completions} x ({data.max_prompt_tokens} + "
            f"{rollout.max_new_tokens}) = {completions * longest:,} an epoch",
            f"run        {epochs} epochs x {data.updates_per_epoch} = "
            f"{epochs * data.updates_per_epoch} updates"
            if epochs > 0
            else f"run        until trainer.max_steps={trainer.max_steps} or max_time",
        ]
    else:
        lines.append("training   none: data.train is not set, which prl fit needs")
    sets = ", ".join(data.eval_sources) or "none"
    lines.append(f"evaluation {sets}: {data.evaluation.samples} samples a prompt")
    if is_available(module.policy_name, data):
        lines += describe_memory(trainer, module, data, rollout, on_gpu)
        if data.train_sources:
            lines += describe_duration(trainer, module, data, rollout, gpu)
    else:
        lines.append(
            f"memory     and time are unknown until data.prepare has created {module.policy_name}"
        )
    return "\n".join(lines)


def _refilled(data: PromptDataModule, rollout: RolloutSettings) -> Iterator[str]:
    if rollout.refill > 1:
        prompts = rollout.refill * data.prompts_per_epoch
        yield (
            f"refill     at most {rollout.refill} x {data.prompts_per_epoch} = {prompts} prompts x "
            f"{data.group_size} completions sampled an epoch"
        )
