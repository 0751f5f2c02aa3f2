import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from prl_lightning.evaluation.metrics import (
    MajorityAtN,
    MeanAtN,
    MeanOverProblems,
    MeanStd,
    PassAtK,
    PassCurve,
)


def pass_at_k_by_enumeration(num_samples: int, num_correct: int, k: int) -> Fraction:
    """The share of the subsets of k samples that hold a correct one, by looking at each."""
    samples = [True] * num_correct + [False] * (num_samples - num_correct)
    subsets = [any(subset) for subset in combinations(samples, k)]
    return Fraction(sum(subsets), len(subsets))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_pass_at_k_is_the_mean_of_an_enumeration_of_subsets(k: int) -> None:
    problems = [(n, c) for n in range(k, 8) for c in range(n + 1)]
    metric = PassAtK(k)
    samples, correct = torch.tensor(problems).T
    metric.update(correct, samples)
    expected = sum(pass_at_k_by_enumeration(n, c, k) for n, c in problems) / len(problems)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(float(expected), rel=1e-12)


def test_pass_at_k_by_hand() -> None:
    metric = PassAtK(k=2)
    metric.update(torch.tensor([0, 1, 3, 4]), num_samples=4)
    # No pair of 6, 3 of 6 (with the correct one), all 6 (one wrong sample makes no pair), all 6.
    assert metric.compute().item() == pytest.approx((0 + 1 / 2 + 1 + 1) / 4, rel=1e-12)


def test_mean_at_n_by_hand_and_as_pass_at_1() -> None:
    correct, samples = torch.tensor([0, 1, 3]), torch.tensor([2, 4, 3])
    mean, first = MeanAtN(), PassAtK(k=1)
    mean.update(correct, samples)
    first.update(correct, samples)
    assert mean.compute().item() == pytest.approx((0 + 1 / 4 + 1) / 3, rel=1e-15)
    assert first.compute().item() == pytest.approx(mean.compute().item(), rel=1e-12)


def test_maj_at_n_by_hand() -> None:
    """Over two updates: right; a tie of right and wrong; wrong; nobody votes."""
    metric = MajorityAtN()
    metric.update(torch.tensor([[4, 4, 9], [4, 9, -1]]), torch.tensor([[1, 1, 0], [1, 0, 0]]) > 0)
    metric.update(torch.tensor([[9, 9, 4], [-1] * 3]), torch.tensor([[0, 0, 1], [0] * 3]) > 0)
    assert metric.compute().item() == pytest.approx((1 + 1 / 2 + 0 + 0) / 4, rel=1e-15)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_no_cut_into_batches_changes_the_metric(counts: list[int], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(counts)) for cut in cuts), len(counts)]
    whole, cut = PassAtK(k=8), PassAtK(k=8)
    whole.update(torch.tensor(counts), 16)
    for start, end in zip(edges, edges[1:], strict=False):
        cut.update(torch.tensor(counts[start:end], dtype=torch.long), 16)  # some are empty
    torch.testing.assert_close(cut.compute(), whole.compute(), rtol=1e-14, atol=0)


def updates(kind: str, rank: int) -> tuple[Tensor, ...]:
    """What rank `rank` sees; of uneven size, and the last rank sees nothing."""
    generator = torch.Generator().manual_seed(rank)
    size = (5, 3, 0)[rank]
    if kind == "std":
        values = torch.randn(size, 4, generator=generator) * 3 + 7
        return values, torch.rand(size, 4, generator=generator) < 0.6
    if kind == "majority":
        answers = torch.randint(-1, 3, (size, 5), generator=generator)
        return answers, answers == 1
    if kind == "number":
        return (torch.rand(size, generator=generator) * 100,)
    return torch.randint(0, 9, (size,), generator=generator), torch.tensor(8)


METRICS: dict[str, Callable[[], Metric]] = {
    "pass": lambda: PassAtK(k=4),
    "curve": lambda: PassCurve(max_k=8),
    "mean": MeanAtN,
    "majority": MajorityAtN,
    "number": MeanOverProblems,
    "std": MeanStd,
}


@pytest.mark.parametrize("kind", METRICS)
def test_states_merged_over_uneven_ranks_equal_one_instance_on_all(kind: str) -> None:
    ranks = [METRICS[kind]() for _ in range(3)]
    whole = METRICS[kind]()
    for rank, metric in enumerate(ranks):
        metric.update(*updates(kind, rank))
        whole.update(*updates(kind, rank))
    assert not torch.equal(states(ranks[0]), states(whole))
    ranks[0].merge_state(ranks[1])
    ranks[0].merge_state(ranks[2])
    torch.testing.assert_close(states(ranks[0]), states(whole), rtol=1e-15, atol=0)
    torch.testing.assert_close(ranks[0].compute(), whole.compute(), rtol=1e-14, atol=0)


def states(metric: Metric) -> Tensor:
    """All of them in one row; of problems, whatever their order."""
    values = [getattr(metric, name) for name in metric._defaults]
    return torch.cat([torch.cat(v).sort()[0] if isinstance(v, list) else v[None] for v in values])


def compute_on_rank(rank: int, folder: str) -> None:
    """The last of three ranks has seen nothing, not even a call of `update`."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    results = {}
    for kind, make in METRICS.items():
        metric = make()
        if rank < 2:
            metric.update(*updates(kind, rank))
        results[kind] = [metric.compute()]
        if kind != "std":
            results[kind] += [metric.interval()]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_compute_what_one_computes(tmp_path: Path) -> None:
    mp.spawn(compute_on_rank, args=(str(tmp_path),), nprocs=3)
    for kind, make in METRICS.items():
        whole = make()
        for rank in range(2):
            whole.update(*updates(kind, rank))
        for rank in range(3):
            value, *interval = torch.load(tmp_path / f"{rank}.pt")[kind]
            torch.testing.assert_close(value, whole.compute(), rtol=1e-14, atol=0)
            for ends in interval:
                torch.testing.assert_close(ends, whole.interval(), rtol=1e-14, atol=0)


def test_fewer_samples_than_k_is_an_error_that_names_both() -> None:
    metric = PassAtK(k=8)
    with pytest.raises(ValueError, match=r"k is 8.*num_samples\D*4.*lower k"):
        metric.update(torch.tensor([1, 2]), torch.tensor([16, 4]))
    with pytest.raises(ValueError, match="k of pass@k must be at least 1, got 0"):
        PassAtK(k=0)
    with pytest.raises(ValueError, match="mean@n needs at least 1 sample a problem, got 0"):
        MeanAtN().update(torch.tensor([0]), 0)


@pytest.mark.parametrize("count", [-1, 5])
@pytest.mark.parametrize("metric", [PassAtK(k=2), MeanAtN()])
def test_impossible_counts_are_an_error(metric: Metric, count: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and num_samples, got {count} of 4"):
        metric.update(torch.tensor([1, count]), 4)


@pytest.mark.parametrize("kind", METRICS)
def test_metric_that_saw_nothing_is_nan_with_a_warning(kind: str) -> None:
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        result = METRICS[kind]().compute()
    values = result.values() if isinstance(result, dict) else [result]
    assert all(value.isnan().all() for value in values)


def test_reset_forgets() -> None:
    metric = MeanAtN()
    metric.update(torch.tensor([4]), 4)
    metric.reset()
    metric.update(torch.tensor([1]), 4)
    assert metric.compute().item() == 0.25


def test_mean_std_by_hand_without_what_is_masked() -> None:
    metric = MeanStd()
    values = torch.tensor([[2.0, 4.0, math.nan], [4.0, 4.0, 1e30]], requires_grad=True)
    metric.update(values, torch.tensor([[1, 1, 0], [1, 1, 0]]))
    metric.update(torch.tensor([5.0, 5.0, 7.0, 9.0]))
    result = metric.compute()
    # 2, 4, 4, 4, 5, 5, 7, 9: mean 40/8, squared deviations 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32.
    assert (result["mean"].item(), result["std"].item()) == (5.0, 2.0)
    assert not result["mean"].requires_grad


def test_mean_std_keeps_its_digits_over_many_equal_values() -> None:
    metric = MeanStd()
    for _ in range(1000):
        metric.update(torch.full((1000,), 0.1))
    result = metric.compute()
    # A float32 sum of a million would have lost the fourth digit already.
    assert result["mean"].item() == pytest.approx(torch.tensor(0.1).item(), rel=1e-9)
    assert result["std"].item() < 1e-6


def test_mean_std_refuses_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2,\)"):
        MeanStd().update(torch.zeros(2, 3), torch.ones(2))


def test_metrics_form_a_collection() -> None:
    collection = MetricCollection({"mean@4": MeanAtN(), "pass@2": PassAtK(k=2)})
    collection.update(torch.tensor([1, 4]), num_samples=4)
    assert {name: round(value.item(), 12) for name, value in collection.compute().items()} == {
        "mean@4": 0.625,
        "pass@2": 0.75,
    }
    metric = collection["pass@2"]
    assert metric.higher_is_better
    assert not metric.is_differentiable


def test_the_curve_is_pass_at_each_k() -> None:
    counts = torch.tensor([0, 2, 5, 8])
    curve = PassCurve(max_k=8)
    curve.update(counts, 8)
    for k in range(1, 9):
        alone = PassAtK(k)
        alone.update(counts, 8)
        assert curve.compute()[k - 1].item() == pytest.approx(alone.compute().item(), rel=1e-14)
        assert curve.interval()[:, k - 1].tolist() == pytest.approx(alone.interval().tolist())


def test_an_interval_does_not_depend_on_the_order_of_the_problems() -> None:
    there, back = MeanOverProblems(), MeanOverProblems()
    values = torch.tensor([0.0, 3.0, 1.0, 7.0])
    there.update(values)
    for value in values.flip(0):
        back.update(value[None])
    assert torch.equal(there.interval(), back.interval())
    low, high = there.interval().tolist()
    assert 0 <= low < 2.75 < high <= 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_interval_is_the_same_on_every_device() -> None:
    """A GPU has other random numbers for the same seed."""
    values = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.125])
    intervals = []
    for device in ("cpu", "cuda"):
        metric = MeanOverProblems().to(device)
        metric.update(values.to(device))
        intervals.append(metric.interval().cpu())
    assert torch.equal(*intervals)
