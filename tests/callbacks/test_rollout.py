"""The callback through a real Trainer, with the transformers engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import longest_row
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.functional import outcome_advantages
from prl_lightning.models.loading import load_tokenizer, max_model_tokens
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import HFSampler
from sample_rewards import even_digits
from tiny_runs import write_prompts
from trainer_runs import train, weights_of

pytestmark = pytest.mark.process


def parameters(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


def test_advantages_are_those_of_whole_groups_however_the_update_is_cut(
    tied_model: str, tmp_path: Path
) -> None:
    _, watch = train(tied_model, tmp_path, epochs=1, accumulate=8)
    groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for batch in watch.batches:
        rows = zip(
            batch.input_ids, batch.prompt_lengths, batch.rewards, batch.outcome_advantages,
            strict=True,
        )  # fmt: skip
        for ids, length, reward, advantage in rows:
            groups.setdefault(tuple(ids[:length].tolist()), []).append((reward, advantage))
    assert [len(group) for group in groups.values()] == [4] * 4
    for group in groups.values():
        rewards, advantages = map(torch.stack, zip(*group, strict=True))
        torch.testing.assert_close(advantages, outcome_advantages(rewards, 4))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_micro_batches_change_nothing(aggregation: Any, tied_model: str, tmp_path: Path) -> None:
    limit = 8 if aggregation == "constant" else None
    objective = Objective(beta=0.1, aggregation=aggregation, max_length=limit)
    ends = []
    for accumulate in (1, 4):
        options: dict[str, Any] = {"accumulate": accumulate, "updates_per_epoch": 2, "epochs": 1}
        module, watch = train(tied_model, tmp_path, objective=objective, **options)
        ends.append(parameters(weights_of(module)))
    assert (ends[0] - parameters(watch.weights[0])).abs().max() > 1e-4
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("learning_rate", [0.0, 1.0])
def test_one_temperature_samples_scores_and_trains(
    learning_rate: float, tied_model: str, tmp_path: Path
) -> None:
    _, watch = train(
        tied_model,
        tmp_path,
        rollout={"temperature": 0.5},
        learning_rate=learning_rate,
        epochs=1,
        accumulate=1,
        updates_per_epoch=2,
    )
    for batch in watch.batches:  # all are sampled from the policy before the first update
        assert batch.temperature == 0.5
        assert batch.old_logprobs is not None
        gap = (batch.old_logprobs - batch.rollout_logprobs)[batch.completion_mask]
        assert gap.abs().max() < 1e-4
    # The second update is off-policy if the first one has changed the weights.
    ratio = watch.values[0]["train/ratio_max"]
    assert ratio > 1.01 if learning_rate else ratio == pytest.approx(1.0, abs=1e-4)


def test_training_ends_completions_at_stops_and_trains_on_the_token_that_stopped(
    tied_model: str, tmp_path: Path
) -> None:
    _, free = train(tied_model, tmp_path, epochs=1)
    digits = [str(digit) for digit in range(10)]
    texts = {"".join(pair) for pair in itertools.product(digits, digits)}
    rollout = {"stop": [*texts, 2]}
    _, watch = train(tied_model, tmp_path, epochs=1, rollout=rollout)
    tokenizer = load_tokenizer(tied_model)
    finished = 0
    for batch in watch.batches:
        for ids, mask, is_done in zip(
            batch.completion_ids, batch.completion_mask, batch.finished, strict=True
        ):
            row = ids[mask].tolist()
            assert 2 not in row[:-1]
            assert not any(map(tokenizer.decode(row[:-1]).count, texts))
            stops = row[-1] in (tokenizer.eos_token_id, 2) or tokenizer.decode(row)[-2:] in texts
            assert is_done == stops
            finished += int(stops)
    assert finished > sum(int(batch.finished.sum()) for batch in free.batches)


def test_one_update_needs_no_old_policy_and_logs_its_rollouts(
    tied_model: str, tmp_path: Path
) -> None:
    _, watch = train(tied_model, tmp_path, epochs=1)
    assert all(batch.old_logprobs is None for batch in watch.batches)
    rewards = torch.cat([batch.rewards for batch in watch.batches])
    lengths = torch.cat([batch.completion_lengths for batch in watch.batches]).double()
    finished = torch.cat([batch.finished for batch in watch.batches]).double()
    values = watch.values[0]
    expected = {
        "train/ratio_max": 1.0,
        "rollout/reward": rewards.mean().item(),
        "rollout/reward_std": rewards.std(correction=0).item(),
        "rollout/completion_length": lengths.mean().item(),
        "rollout/completion_length_max": lengths.max().item(),
        "rollout/cut_at_limit": 1 - finished.mean().item(),
        "rollout/tokens": lengths.sum().item(),
        "rollout/tokens_per_second": lengths.sum().item() / values["rollout/sampling_seconds"],
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert watch.batches[0].update_tokens == lengths.sum().item()


@pytest.mark.parametrize("kl", ["reward_trajectory", "reward_step"])
def test_kl_in_the_reward_uses_the_log_ratios_at_sampling_time(
    kl: Any, tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(kl=kl, beta=5.0)
    _, watch = train(tied_model, tmp_path, objective=objective, learning_rate=1.0, accumulate=1)
    first, second = watch.batches
    # Before the first update policy and reference are equal, and the KL is zero.
    outcome = first.outcome_advantages
    plain = outcome if outcome.ndim == 1 else outcome[:, 0]
    expected = outcome_advantages(first.rewards, 4)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    assert second.outcome_advantages.ndim == (1 if kl == "reward_trajectory" else 2)
    assert second.old_logprobs is not None
    assert second.ref_logprobs is not None
    log_ratios = second.old_logprobs - second.ref_logprobs[..., 0]
    assert log_ratios.abs().max() > 1e-3
    if kl == "reward_trajectory":
        shaped = second.rewards - 5.0 * (log_ratios * second.completion_mask).sum(1)
        expected = outcome_advantages(shaped, 4)
        torch.testing.assert_close(second.outcome_advantages, expected, rtol=1e-4, atol=1e-4)


def test_baseline_changes_advantages_only_once_policy_and_reference_differ(
    tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(divergence="reverse_k3", baseline=True, beta=5.0)
    _, watch = train(tied_model, tmp_path, objective=objective, learning_rate=1.0, accumulate=1)
    steps = [
        (batch.outcome_advantages[:, :-1] - batch.outcome_advantages[:, 1:])[
            batch.completion_mask[:, 1:]
        ]
        for batch in watch.batches
    ]
    assert steps[0].abs().max() < 1e-4
    batch = watch.batches[1]
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    drift = (batch.old_logprobs - batch.ref_logprobs[..., 0])[batch.completion_mask].double()
    # With one update per iteration, the policy that sampled is the one of the update.
    assert watch.values[1]["train/kl_ref"] == pytest.approx(drift.mean().item(), rel=1e-4)
    # beta times the mean k3 of a token, the same for every token.
    mean_k3 = ((-drift).exp() - 1 + drift).mean().item()
    assert steps[1].std() < 1e-4
    assert steps[1].mean().item() == pytest.approx(5.0 * mean_k3, rel=1e-3)


class CountingSampler(HFSampler):
    """Count the calls; optionally lose the weights of every update."""

    def __init__(self, is_stale: bool = False) -> None:
        super().__init__()
        self.is_stale = is_stale
        self.starts = self.loads = self.calls = 0

    def start(self, model: str, max_model_tokens: int) -> None:
        self.starts += 1
        super().start(model, max_model_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads += 1
        if self.loads == 1 or not self.is_stale:
            super().load_weights(weights)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().generate(*args, **kwargs)


def test_weights_that_do_not_arrive_stop_the_run_unless_the_user_allows_it(
    tied_model: str, tmp_path: Path
) -> None:
    stale: dict[str, Any] = {"sampler": CountingSampler(is_stale=True), "learning_rate": 1.0}
    with pytest.raises(RuntimeError, match=r"engine_gap=.*rollout\.max_engine_gap"):
        train(tied_model, tmp_path, **stale)
    stale["sampler"] = CountingSampler(is_stale=True)
    _, watch = train(tied_model, tmp_path, rollout={"max_engine_gap": 10.0}, **stale)
    assert watch.values[1]["rollout/engine_gap"] > 1e-3


def test_one_start_one_call_per_sampling_and_no_needless_load(
    tied_model: str, tmp_path: Path
) -> None:
    sampler = CountingSampler()
    held = str(write_prompts(tmp_path / "held.jsonl", count=3, seed=1))
    # So small a nucleus has a single token, and the engine's log-probabilities differ from the
    # trainer's.
    sets = Evaluation({"one": held, "two": held}, samples=2, pass_at=(2,), top_p=1e-6)
    sanity = {"num_sanity_val_steps": -1}
    module, _ = train(tied_model, tmp_path, sampler=sampler, evaluation=sets, trainer=sanity)
    assert sampler.starts == 1
    # Evaluations: the sanity check and one after each epoch, both sets in one call.
    assert sampler.calls == 3 + 2
    # Sanity check and first epoch share weights, as do an epoch's evaluation and the next epoch.
    assert sampler.loads == 3
    texts = [r.text for r in module.trainer.datamodule.eval_buffers["two"].rollouts]
    assert len(texts) == 6
    assert texts[::2] == texts[1::2]


@pytest.mark.parametrize(("reward", "mend"), [(0.0, "easier"), (1.0, "harder")])
def test_groups_without_signal_are_a_hint_said_once(
    reward: float, mend: str, tied_model: str, tmp_path: Path
) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [reward] * len(completions)

    with pytest.warns(UserWarning, match="groups_without_signal") as caught:
        train(tied_model, tmp_path, rewards=[same], epochs=2)
    said = [str(one.message) for one in caught if "groups_without_signal" in str(one.message)]
    assert len(said) == 1
    for words in (
        "rollout/groups_without_signal=1.00",
        f"{mend} prompts",
        "data.group_size",
        "set rollout.refill",
    ):
        assert words in said[0]


class SlowStart(HFSampler):
    """Its start takes an hour, by the clock of the test."""

    clock = 0.0

    def start(self, model: str, max_model_tokens: int) -> None:
        SlowStart.clock += 3600
        super().start(model, max_model_tokens)


def test_the_first_sampling_time_is_without_the_engines_start(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + SlowStart.clock)
    _, watch = train(tied_model, tmp_path, sampler=SlowStart(), epochs=1)
    assert watch.values[0]["rollout/weights_seconds"] >= 3600
    assert watch.values[0]["rollout/sampling_seconds"] < 3600


def test_a_row_may_be_as_long_as_the_model_takes(tied_model: str) -> None:
    limit = max_model_tokens(tied_model)
    assert limit is not None
    data = PromptDataModule(tied_model, train="x.jsonl", max_prompt_tokens=16)
    fits, exceeds = (
        RolloutCallback([even_digits], HFSampler(), max_new_tokens=tokens).settings
        for tokens in (limit - 16, limit - 15)
    )
    assert longest_row(PRLModule(tied_model), data, fits) == limit
    with pytest.raises(ValueError, match=rf"{limit + 1}.*{limit}"):
        longest_row(PRLModule(tied_model), data, exceeds)


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", 0.0), ("temperature", 0.009)]
)
def test_settings_without_samples_are_errors(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"rollout\.{field}={value}"):
        RolloutCallback([even_digits], HFSampler(), **settings)
