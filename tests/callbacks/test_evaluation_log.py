"""The files of an evaluation, and the cache that keeps completions from being sampled twice."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prl_lightning.callbacks.evaluation_log import results_table
from prl_lightning.cli import main
from prl_lightning.evaluation.metrics import MeanAtN, PassAtK
from prl_lightning.evaluation.results import Estimate, SetResults
from prl_lightning.models.loading import load_tokenizer
from prl_lightning.runs.files import read_evaluations
from prl_lightning.runs.tables import read_table
from prl_lightning.sampling import (
    HFSampler,
    Progress,
    SamplingConfig,
    SubprocessSampler,
    VLLMSampler,
    sample_cache,
)
from prl_lightning.sampling.sample_cache import SampleCache, fingerprint
from prl_lightning.types import Completion, Prompt
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

CONFIG = SamplingConfig(n=2, temperature=1.0, max_new_tokens=4, stop_token_ids=(1,))


EVEN, ODD = "sample_rewards.even_digits", "sample_rewards.odd_digits"
MATH = "prl_lightning.rewards.MathReward"
LAST_DIGIT = (
    "{class_path: prl_lightning.rewards.RegexMatch, init_args: {pattern: '([0-4])[^0-9]*$'}}"
)
REWARDS = [EVEN, ODD, MATH, LAST_DIGIT]


class CountingSampler(HFSampler):
    """Record the number of prompts of each call; fail on request, as a preempted machine does.

    A signal comes after so many groups, in the middle of a call.
    """

    sampled: list[int] = []
    fails_after: int | None = None
    terminated_after: int | None = None

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        if len(self.sampled) == self.fails_after:
            raise KeyboardInterrupt
        self.sampled.append(len(prompts))
        groups = 0

        def terminated(finished: Mapping[int, list[Completion]], tokens: int) -> None:
            nonlocal groups
            groups += len(finished)
            assert on_progress is not None
            on_progress(finished, tokens)
            if finished and groups == self.terminated_after:
                os.kill(os.getpid(), signal.SIGTERM)

        return super().generate(prompts, config, terminated)


def validate(model: str, folder: Path, *args: str) -> None:
    overrides = tiny_overrides(model, folder, f"{__name__}.CountingSampler")
    main(["validate", "--config", str(ARITHMETIC), *overrides, *args])


def results(folder: Path, version: int) -> dict[str, Any]:
    file = folder / "run" / f"version_{version}" / "evaluation.json"
    found: dict[str, Any] = json.loads(file.read_text())["sets"]["tiny"]
    return found


def samples(folder: Path, version: int) -> list[dict[str, Any]]:
    return read_table(folder / "run" / f"version_{version}" / "samples.parquet")


class Evaluated(NamedTuple):
    folder: Path
    sampled: list[int]  # prompts of each call of the engine
    output: str


@pytest.fixture(scope="module")
def evaluated(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Evaluations of the same weights: one for each entry of REWARDS."""
    folder = tmp_path_factory.mktemp("evaluated")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(CountingSampler, "sampled", [])
        for rewards in REWARDS:
            validate(tied_model, folder, f"--rollout.rewards=[{rewards}]")
        return Evaluated(folder, CountingSampler.sampled, output.getvalue())


def test_validate_writes_results_table_and_samples(evaluated: Evaluated, tied_model: str) -> None:
    folder, version = evaluated.folder, REWARDS.index(MATH)
    found = results(folder, version)
    assert set(found["metrics"]) == {"mean@4", "pass@2", "maj@4", "no_answer", "length"}
    table = (folder / "run" / f"version_{version}" / "evaluation.md").read_text()
    assert all(cell in evaluated.output for cell in table.split("|"))
    columns = "| set | problems | mean@4 | pass@2 | maj@4 | no_answer | length |"
    assert table.splitlines()[0] == columns
    rows = samples(folder, version)
    lengths = torch.tensor([row["length"] for row in rows]).double()
    assert found["metrics"]["length"][0] == pytest.approx(lengths.mean().item())
    assert [(row["set"], row["problem"], row["sample"]) for row in rows] == [
        ("tiny", problem, sample) for problem in range(5) for sample in range(4)
    ]
    asked = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert [row["reference_answer"] for row in rows[::4]] == [one["answer"] for one in asked]
    tokenizer = load_tokenizer(tied_model)
    for row in rows:
        text = tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert (text, len(row["token_ids"])) == (row["completion"], row["length"])


def test_no_line_of_the_screen_is_wider_than_a_terminal() -> None:
    names = ("mean@16", "pass@4", "pass@16", "maj@16", "no_answer", "length")
    metrics = {name: Estimate(0.125, 0.0625, 0.25) for name in names}
    results = {name: SetResults(500, 16, metrics, {}) for name in ("olympiad_bench", "aime24")}
    lines = results_table(results, 80).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.strip("| ").split(" | ") for line in lines if line.startswith("| set")]
    assert len(heads) > 1
    assert [name for head in heads for name in head[1:]] == ["problems", *names]
    assert sum(line.startswith("| aime24") for line in lines) == len(heads)
    whole = results_table(results).splitlines()
    assert results_table(results, len(whole[0]) + 1000).splitlines() == whole
    assert len(whole) == 4
    # A cell that is wider than the terminal stands alone.
    assert all(line.count("|") == 3 for line in results_table(results, 5).splitlines() if line)


def test_votes_and_missing_answers_are_those_of_the_samples(evaluated: Evaluated) -> None:
    """Counted here by a loop; a tie counts as a share."""
    version = REWARDS.index(LAST_DIGIT)
    rows = samples(evaluated.folder, version)
    votes = []
    for problem in range(5):
        group = [row for row in rows if row["problem"] == problem and row["answer_group"] >= 0]
        sizes = Counter(row["answer_group"] for row in group)
        first = [answer for answer, size in sizes.items() if size == max(sizes.values())]
        right = {row["answer_group"] for row in group if row["reward"] >= 0.5}
        votes.append(len(right & set(first)) / len(first) if first else 0.0)
    without = sum(row["answer_group"] < 0 for row in rows) / len(rows)
    found = results(evaluated.folder, version)["metrics"]
    assert 0 < without < 1
    assert 0 < sum(votes) < 5
    assert found["no_answer"][0] == pytest.approx(without)
    assert found["maj@4"][0] == pytest.approx(sum(votes) / 5)


def test_results_are_those_of_the_samples(evaluated: Evaluated) -> None:
    rewards = [row["reward"] for row in samples(evaluated.folder, 0)]
    correct = (torch.tensor(rewards).view(5, 4) >= 0.5).sum(1)
    assert 0 < correct.sum() < 20
    for name, metric in (("mean@4", MeanAtN()), ("pass@2", PassAtK(2))):
        metric.update(correct, 4)
        expected = [metric.compute().item(), *metric.interval().tolist()]
        assert results(evaluated.folder, 0)["metrics"][name] == pytest.approx(expected)


def test_other_rewards_score_the_same_samples(evaluated: Evaluated) -> None:
    assert evaluated.sampled == [5]
    texts = [[row["completion"] for row in samples(evaluated.folder, v)] for v in (0, 1, 2, 3)]
    assert all(some == texts[0] for some in texts)
    first, second = (results(evaluated.folder, v)["metrics"]["mean@4"][0] for v in (0, 1))
    assert second == pytest.approx(1 - first)  # one is right where the other is wrong


def test_an_interrupted_evaluation_continues_and_other_settings_are_sampled_anew(
    evaluated: Evaluated, tied_model: str, untied_model: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(CountingSampler, "sampled", [])
    monkeypatch.setattr("prl_lightning.rollouts.engine_link.PART", 8)  # two prompts of four
    monkeypatch.setattr(CountingSampler, "fails_after", 1)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        validate(tied_model, tmp_path)
    monkeypatch.setattr(CountingSampler, "fails_after", None)
    validate(tied_model, tmp_path)
    assert CountingSampler.sampled == [2, 2, 1]
    assert results(tmp_path, 1) == results(evaluated.folder, 0)
    validate(tied_model, tmp_path, "--evaluation.temperature=0.9")
    validate(untied_model, tmp_path)
    assert CountingSampler.sampled == [2, 2, 1] * 3


def test_stops_end_evaluated_completions_which_are_sampled_anew(
    evaluated: Evaluated, tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards do not see the text that ended a completion."""
    monkeypatch.setattr(CountingSampler, "sampled", [])
    free, tokenizer = samples(evaluated.folder, 0), load_tokenizer(tied_model)
    text, index = tokenizer.decode(free[0]["token_ids"][2:4]), free[-1]["token_ids"][1]
    stops = json.dumps([text, index])
    validate(tied_model, evaluated.folder, f"--rollout.stop={stops}")
    assert CountingSampler.sampled == [5]
    version = len(REWARDS)
    for whole, row in zip(free, samples(evaluated.folder, version), strict=True):
        ids = whole["token_ids"]
        starts = [ids[: end + 1] for end in range(len(ids))]
        is_end = [ids[-1] == index or text in tokenizer.decode(ids) for ids in starts]
        end = is_end.index(True) + 1 if True in is_end else None
        assert row["token_ids"] == ids[:end]
        assert text not in row["completion"]
        assert row["finished"] or not end
    file = evaluated.folder / "run" / f"version_{version}" / "evaluation.json"
    assert json.loads(file.read_text())["sampling"]["stop"] == [text, index]


def test_a_greedy_evaluation_says_what_its_metrics_are(tied_model: str, tmp_path: Path) -> None:
    said = r"evaluation\.temperature=0.*4 completions.*pass@k and maj@4"
    with pytest.warns(UserWarning, match=said):
        validate(tied_model, tmp_path, "--evaluation.temperature=0")
    found = results(tmp_path, 0)["metrics"]
    assert found["pass@2"] == found["mean@4"]
    rows = samples(tmp_path, 0)
    assert all(len({tuple(row["token_ids"]) for row in rows[i : i + 4]}) == 1 for i in (0, 4, 16))
    table = (tmp_path / "run" / "version_0" / "evaluation.md").read_text()
    assert re.search(said, table)


def test_sigterm_ends_an_evaluation_at_once_and_keeps_the_finished_groups(
    evaluated: Evaluated,
    tied_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them, of a single call of the engine."""
    monkeypatch.setattr(CountingSampler, "sampled", [])
    monkeypatch.setattr(CountingSampler, "terminated_after", 2)
    before = signal.getsignal(signal.SIGTERM)
    one_by_one = "--rollout.sampler.init_args.batch_size=4"
    with pytest.raises(SystemExit) as stopped:
        validate(tied_model, tmp_path, one_by_one)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"{tmp_path / 'run' / 'samples'}" in caplog.text
    monkeypatch.setattr(CountingSampler, "terminated_after", None)
    validate(tied_model, tmp_path, one_by_one)
    assert CountingSampler.sampled == [5, 3]
    assert results(tmp_path, 1) == results(evaluated.folder, 0)


def test_an_evaluation_records_what_it_evaluated(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    assert not (tmp_path / "run" / "version_0" / "samples.parquet").exists()
    assert not (tmp_path / "run" / "samples").exists()
    checkpoint = next((tmp_path / "run").rglob("last.ckpt"))
    link = tmp_path / "link.ckpt"
    link.symlink_to(checkpoint)
    validate(tied_model, tmp_path, f"--ckpt_path={link}", "--evaluation.top_p=0.9")
    validate(tied_model, tmp_path)
    lines = [
        json.loads(line)
        for version in (0, 1, 2)
        for line in (tmp_path / f"run/version_{version}/evaluations.jsonl").read_text().splitlines()
    ]
    for evaluation in lines:
        del evaluation["sets"]
    sampling = {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8}
    base = {
        "step": 0,
        "epoch": 0,
        "stage": "val",
        "policy": tied_model,
        "checkpoint": None,
        "sampling": sampling,
        "rewards": ["even_digits"],
        "solved_at": 0.5,
    }
    loaded = {
        "step": 2,
        "epoch": 2,  # a checkpoint of the end of a run names the next epoch
        "checkpoint": str(checkpoint.resolve()),
        "sampling": sampling | {"top_p": 0.9},
    }
    during_fit = [base, base | {"step": 1}, base | {"step": 2, "epoch": 1}]
    assert lines == [*during_fit, base | loaded, base]


def test_a_sanity_check_of_some_batches_is_not_an_evaluation(
    tied_model: str, tmp_path: Path
) -> None:
    fit(*tiny_overrides(tied_model, tmp_path), "--trainer.num_sanity_val_steps=2")
    run = tmp_path / "run" / "version_0"
    evaluations, _ = read_evaluations(run / "evaluations.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [1, 2]
    assert len(metrics_of(tmp_path)["val/tiny/mean@4"]) == 2


def test_the_fingerprint_changes_with_one_weight_or_the_engine() -> None:
    def weights(change: float) -> Iterable[tuple[str, Tensor]]:
        yield "first", torch.zeros(3)
        yield "second", torch.tensor([1.0, 2.0 + change])

    sampler = HFSampler()
    same = [fingerprint(iter(weights(0)), sampler, CONFIG) for _ in range(2)]
    assert same[0] == same[1]
    assert fingerprint(iter(weights(1e-6)), sampler, CONFIG) != same[0]
    # A subprocess changes nothing, another engine does.
    assert fingerprint(iter(weights(0)), SubprocessSampler(sampler), CONFIG) == same[0]
    plain, quantized = VLLMSampler(), VLLMSampler(engine_args={"quantization": "fp8"})
    others = [fingerprint(iter(weights(0)), other, CONFIG) for other in (plain, quantized)]
    assert len({same[0], *others}) == 3


def test_groups_are_written_once_a_minute_and_bad_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(sample_cache, "monotonic", lambda: now)
    prompts = [Prompt([3], "a", seed=row) for row in range(4)]
    group = [Completion([5, 1], [-0.1, -0.2], finished=True)]
    told: list[int] = []

    def refuse_empty(groups: list[list[Completion]], of: list[Prompt]) -> None:
        if not all(groups):
            raise RuntimeError("an empty group")

    def kept() -> list[bool]:
        cache = SampleCache(tmp_path, rank=0)
        return [prompt in cache for prompt in prompts]

    cache = SampleCache(tmp_path, rank=0)
    note = lambda finished, tokens: told.append(tokens)  # noqa: E731
    with cache.keeping(prompts, refuse_empty, note) as keep:
        keep({2: group}, 2)
        assert not any(kept())
        now = sample_cache.WRITE_SECONDS
        keep({}, 7)
        assert kept() == [False, False, True, False]
        keep({0: group}, 2)
        assert kept() == [False, False, True, False]
        with pytest.raises(RuntimeError, match="an empty group"):
            keep({1: []}, 0)
    assert kept() == [True, False, True, False]
    assert told == [2, 7, 2]


def test_the_cache_returns_what_was_added(tmp_path: Path) -> None:
    prompts = [Prompt([3, 4], "a", seed=1), Prompt([3, 4], "a", seed=2)]
    groups = [
        [Completion([5, 1], [-0.1, -1.2345678901234567], finished=True)] * 2,
        [Completion([6], [-3.5], finished=False)] * 2,
    ]
    SampleCache(tmp_path, rank=0).add(prompts[:1], groups[:1])
    SampleCache(tmp_path, rank=1).add(prompts[1:], groups[1:])
    read = SampleCache(tmp_path, rank=0)
    assert [read[prompt] for prompt in prompts] == groups
    assert Prompt([3, 4], "a", seed=3) not in read
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "part-00000-00000.parquet",
        "part-00001-00000.parquet",
    ]
    # Two concurrent evaluations have both sampled a prompt: it keeps one group.
    part = tmp_path / "part-00000-00000.parquet"
    part.with_name("part-00000-00001.parquet").write_bytes(part.read_bytes())
    assert SampleCache(tmp_path, rank=0)[prompts[0]] == groups[0]
