"""The callback through a real Trainer, with the transformers engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import longest_row
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.functional import outcome_advantages
from prl_lightning.models.causal_lm import max_model_tokens
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import HFSampler
from prl_lightning.types import RolloutBatch
from sample_rewards import even_digits
from tiny_runs import write_prompts


class Watch(Callback):
    """Keep what each training step saw."""

    def __init__(self) -> None:
        self.batches: list[RolloutBatch] = []
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def run(
    model: Path,
    folder: Path,
    objective: Objective | None = None,
    sampler: HFSampler | None = None,
    epochs: int = 2,
    accumulate: int = 2,
    learning_rate: float = 1e-2,
    temperature: float = 1.0,
    callback: dict[str, Any] | None = None,
    **data: Any,
) -> tuple[PRLModule, Watch]:
    module = PRLModule(
        model,
        objective or Objective(beta=0.1),
        optimizer=lambda params: torch.optim.SGD(params, lr=learning_rate),
    )
    settings: dict[str, Any] = {
        "prompts_per_epoch": 4,
        "group_size": 4,
        "evaluation": Evaluation(samples=2, pass_at=(2,)),
        "max_prompt_tokens": 16,
    }
    datamodule = PromptDataModule(
        model, train=str(write_prompts(folder / "train.jsonl")), **(settings | data)
    )
    rollout = RolloutCallback(
        rewards=[even_digits],
        sampler=sampler or HFSampler(),
        temperature=temperature,
        max_new_tokens=8,
        **(callback or {}),
    )
    watch = Watch()
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[rollout, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(module, datamodule=datamodule)
    return module, watch


def parameters(module: PRLModule) -> Tensor:
    assert module.policy is not None
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


def by_completion(watch: Watch, field: str) -> dict[tuple[int, ...], Tensor]:
    """A per-token field of all batches, by the tokens of the row."""
    rows = {}
    for batch in watch.batches:
        for i, length in enumerate(batch.completion_mask.sum(1).tolist()):
            key = tuple(batch.input_ids[i, : int(batch.prompt_lengths[i]) + length].tolist())
            rows[key] = getattr(batch, field)[i]
    return rows


def test_advantages_are_those_of_whole_groups_however_the_update_is_cut(
    tied_model: str, tmp_path: Path
) -> None:
    _, watch = run(tied_model, tmp_path, epochs=1, accumulate=8)
    rewards, advantages = (
        by_completion(watch, "rewards"),
        by_completion(watch, "outcome_advantages"),
    )
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for batch in watch.batches:
        for i, length in enumerate(batch.completion_mask.sum(1).tolist()):
            prompt = batch.input_ids[i, : batch.prompt_lengths[i]].tolist()
            row = batch.input_ids[i, : int(batch.prompt_lengths[i]) + length].tolist()
            groups.setdefault(tuple(prompt), []).append(tuple(row))
    checked = 0
    for rows in groups.values():
        if len(set(rows)) == 4:  # equal completions of a group cannot be told apart here
            group = torch.stack([rewards[row] for row in rows])
            torch.testing.assert_close(
                torch.stack([advantages[row] for row in rows]), outcome_advantages(group, 4)
            )
            checked += 1
    assert checked


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_change_nothing(
    aggregation: Any, updates: int, tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(
        beta=0.1, aggregation=aggregation, max_length=8 if aggregation == "constant" else None
    )
    ends = [
        parameters(
            run(tied_model, tmp_path, objective, accumulate=accumulate, updates_per_epoch=updates)[
                0
            ]
        )
        for accumulate in (1, 2, 8)
    ]
    start = parameters(run(tied_model, tmp_path, objective, learning_rate=0.0)[0])
    assert (ends[0] - start).abs().max() > 1e-4
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-5, atol=1e-7)


def test_first_update_is_on_policy_and_the_second_is_not(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(
        tied_model, tmp_path, epochs=1, accumulate=1, updates_per_epoch=2, learning_rate=1.0
    )
    first, second = watch.batches
    assert first.old_logprobs is not None
    assert second.old_logprobs is not None
    # The engine sampled both from the policy before the first update.
    for batch in (first, second):
        mask = batch.completion_mask
        torch.testing.assert_close(
            batch.old_logprobs[mask], batch.rollout_logprobs[mask], rtol=0, atol=1e-5
        )
    assert watch.values[0]["train/ratio_max"] > 1.0


def test_one_update_needs_no_old_policy_pass(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(tied_model, tmp_path, epochs=1)
    assert all(batch.old_logprobs is None for batch in watch.batches)
    assert watch.values[0]["train/ratio_max"] == 1.0


@pytest.mark.parametrize("kl", ["reward_trajectory", "reward_step"])
def test_kl_in_the_reward_uses_the_log_ratios_at_sampling_time(
    kl: Any, tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(kl=kl, beta=5.0)
    _, watch = run(tied_model, tmp_path, objective, learning_rate=1.0, accumulate=1)
    first, second = watch.batches
    # Before the first update policy and reference are one: the KL changes nothing.
    outcome = first.outcome_advantages
    plain = outcome if outcome.ndim == 1 else outcome[:, 0]
    _, same = run(tied_model, tmp_path, Objective(kl="none"), epochs=1, accumulate=1)
    torch.testing.assert_close(plain, same.batches[0].outcome_advantages, rtol=1e-4, atol=1e-4)
    assert second.outcome_advantages.ndim == (1 if kl == "reward_trajectory" else 2)
    assert second.ref_logprobs is not None
    difference = second.old_logprobs - second.ref_logprobs
    assert difference.abs().max() > 1e-3


def test_baseline_changes_advantages_only_once_policy_and_reference_differ(
    tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(divergence="reverse_k3", baseline=True, beta=5.0)
    _, watch = run(tied_model, tmp_path, objective, learning_rate=1.0, accumulate=1)
    first, second = (batch.outcome_advantages for batch in watch.batches)
    assert first.ndim == second.ndim == 2
    mask = watch.batches[1].completion_mask
    drift = (watch.batches[1].old_logprobs - watch.batches[1].ref_logprobs)[mask].double()
    # One update a rollout: the policy that sampled is that of the update.
    assert watch.values[1]["train/kl_ref"] == pytest.approx(drift.mean().item(), rel=1e-4)
    steps = (second[:, :-1] - second[:, 1:])[mask[:, 1:]]
    # beta * mean k3 a token, the same for every token of every row.
    mean_k3 = ((-drift).exp() - 1 + drift).mean().item()
    assert steps.std() < 1e-4
    assert steps.mean().item() == pytest.approx(5.0 * mean_k3, rel=1e-3)
    assert (first[:, :-1] - first[:, 1:])[
        watch.batches[0].completion_mask[:, 1:]
    ].abs().max() < 1e-4


class StaleSampler(HFSampler):
    """An engine that loses every update but the first."""

    loads = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads += 1
        if self.loads == 1:
            super().load_weights(weights)


def test_weights_that_do_not_arrive_stop_the_run(tied_model: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"engine_gap=.*rollout\.max_engine_gap"):
        run(tied_model, tmp_path, sampler=StaleSampler(), learning_rate=1.0)


def test_user_may_allow_a_larger_gap(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(
        tied_model, tmp_path, sampler=StaleSampler(), learning_rate=1.0,
        callback={"max_engine_gap": 10.0},
    )  # fmt: skip
    assert watch.values[1]["rollout/engine_gap"] > 1e-3


class CountingSampler(HFSampler):
    """Count what the callback asks for."""

    starts = 0
    loads = 0
    calls = 0

    def start(self, model: str, max_model_tokens: int) -> None:
        self.starts += 1
        super().start(model, max_model_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads += 1
        super().load_weights(weights)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().generate(*args, **kwargs)


def test_one_start_and_one_call_a_sampling_and_no_needless_load(
    tied_model: str, tmp_path: Path
) -> None:
    sampler = CountingSampler()
    heldout = str(write_prompts(tmp_path / "heldout.jsonl", count=3, seed=1))
    run(
        tied_model,
        tmp_path,
        sampler=sampler,
        epochs=2,
        evaluation=Evaluation({"one": heldout, "two": heldout}, samples=2, pass_at=(2,)),
    )
    assert sampler.starts == 1
    # Evaluations: the sanity check and one after each epoch, both sets in one call.
    assert sampler.calls == 3 + 2
    # Sanity check and first epoch share weights; so do an epoch's evaluation and the next epoch.
    assert sampler.loads == 3


def test_logged_rollout_metrics_are_those_of_the_rollouts(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(tied_model, tmp_path, epochs=1)
    rewards = torch.cat([batch.rewards for batch in watch.batches])
    lengths = torch.cat([batch.completion_mask.sum(1) for batch in watch.batches]).float()
    finished = torch.cat([batch.finished for batch in watch.batches]).float()
    values = watch.values[0]
    assert values["rollout/reward"] == pytest.approx(rewards.mean().item())
    assert values["rollout/reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert values["rollout/completion_length"] == pytest.approx(lengths.mean().item())
    assert values["rollout/completion_length_max"] == lengths.max().item()
    assert values["rollout/cut_at_limit"] == pytest.approx(1 - finished.mean().item())
    assert values["rollout/tokens"] == lengths.sum().item()
    assert watch.batches[0].update_tokens == lengths.sum().item()
    speed = values["rollout/tokens"] / values["rollout/sampling_seconds"]
    assert values["rollout/tokens_per_second"] == pytest.approx(speed, rel=1e-3)


def test_one_temperature_samples_scores_and_trains(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(
        tied_model, tmp_path, temperature=0.5, learning_rate=0.0, epochs=1, updates_per_epoch=2
    )
    for batch in watch.batches:
        mask = batch.completion_mask
        torch.testing.assert_close(
            batch.old_logprobs[mask], batch.rollout_logprobs[mask], rtol=1e-4, atol=1e-4
        )
    assert watch.values[0]["train/ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_evaluation_samples_the_nucleus_alone(tied_model: str, tmp_path: Path) -> None:
    """So small a one has a single token; the engine's log-probabilities are not the trainer's."""
    heldout = str(write_prompts(tmp_path / "heldout.jsonl", count=3, seed=1))
    module, _ = run(
        tied_model,
        tmp_path,
        epochs=1,
        evaluation=Evaluation({"held": heldout}, samples=2, pass_at=(2,), top_p=1e-6),
    )
    rollouts = module.trainer.datamodule.eval_rollouts["held"].rollouts
    texts = [rollout.text for rollout in rollouts]
    assert len(texts) == 6
    assert texts[::2] == texts[1::2]


def test_a_row_may_be_as_long_as_the_model_takes(tied_model: str, tmp_path: Path) -> None:
    limit = max_model_tokens(tied_model)
    assert limit is not None
    data = PromptDataModule(tied_model, train="x.jsonl", max_prompt_tokens=16)
    for tokens in (limit - 16, limit - 15):
        rollout = RolloutCallback([even_digits], HFSampler(), max_new_tokens=tokens)
        if tokens + 16 == limit:
            assert longest_row(PRLModule(tied_model), data, rollout.settings) == limit
        else:
            with pytest.raises(ValueError, match=f"= {limit + 1} tokens.*takes {limit}"):
                longest_row(PRLModule(tied_model), data, rollout.settings)


@pytest.mark.parametrize(("field", "value"), [("max_new_tokens", 0), ("temperature", 0.0)])
def test_what_nothing_can_be_sampled_with_is_an_error(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"rollout\.{field}={value}"):
        RolloutCallback([even_digits], HFSampler(), **settings)
