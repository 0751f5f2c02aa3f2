import math
import multiprocessing
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
from torchmetrics import Metric

from prl_lightning.evaluation.metrics import (
    MajorityAtN,
    MeanAtN,
    MeanOverProblems,
    MeanStd,
    PassAtK,
)


def pass_at_k_by_enumeration(num_samples: int, num_correct: int, k: int) -> Fraction:
    """The share of the subsets of k samples that hold a correct one, by looking at each."""
    samples = [True] * num_correct + [False] * (num_samples - num_correct)
    subsets = [any(subset) for subset in combinations(samples, k)]
    return Fraction(sum(subsets), len(subsets))


def test_pass_at_k_is_the_mean_of_an_enumeration_of_subsets() -> None:
    """For one k and for several at once; mean@n is pass@1."""
    problems = [(n, c) for n in range(7, 9) for c in range(n + 1)]
    samples, correct = torch.tensor(problems).T
    expected = [
        float(sum(pass_at_k_by_enumeration(*problem, k) for problem in problems) / len(problems))
        for k in range(1, 8)
    ]
    curve = PassAtK(range(1, 8))
    curve.update(correct, samples)
    assert curve.compute().dtype == torch.float64
    assert curve.compute().tolist() == pytest.approx(expected, rel=1e-12)
    for k, metric in ((1, MeanAtN()), (2, PassAtK(2)), (7, PassAtK(7))):
        metric.update(correct, samples)
        assert metric.compute().item() == pytest.approx(expected[k - 1], rel=1e-12)
        assert metric.interval().tolist() == pytest.approx(curve.interval()[:, k - 1].tolist())


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
    """Arguments of rank `rank`; of uneven size, and empty for the last rank."""
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
    "curve": lambda: PassAtK(range(1, 9)),
    "mean": MeanAtN,
    "majority": MajorityAtN,
    "number": MeanOverProblems,
    "std": MeanStd,
}


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


@pytest.mark.process
def test_three_processes_compute_what_one_computes(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["prl_lightning.evaluation.metrics"])
    mp.start_processes(compute_on_rank, (str(tmp_path),), nprocs=3, start_method="forkserver")
    for kind, make in METRICS.items():
        whole = make()
        for rank in range(2):
            whole.update(*updates(kind, rank))
        for rank in range(3):
            value, *interval = torch.load(tmp_path / f"{rank}.pt")[kind]
            torch.testing.assert_close(value, whole.compute(), rtol=1e-14, atol=0)
            for ends in interval:
                torch.testing.assert_close(ends, whole.interval(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("metric", "correct", "samples", "message"),
    [
        (PassAtK(8), [1, 2], [16, 4], "k=8: .*num_samples=4"),
        (PassAtK(0), [1], [4], "k=0"),
        (MeanAtN(), [0], [0], "num_samples=0"),
        (MeanAtN(), [1, -1], [4, 4], "num_correct=-1: .*num_samples=4"),
        (PassAtK(2), [1, 5], [4, 4], "num_correct=5: .*num_samples=4"),
    ],
)
def test_impossible_counts_are_errors(
    metric: PassAtK, correct: list[int], samples: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(correct), torch.tensor(samples))


@pytest.mark.parametrize("kind", METRICS)
def test_metric_that_saw_nothing_is_nan_with_a_warning(kind: str) -> None:
    with pytest.warns(UserWarning, match="``update`` method"):
        result = METRICS[kind]().compute()
    values = result.values() if isinstance(result, dict) else [result]
    assert all(value.isnan().all() for value in values)


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
    """A float32 sum of a million would have lost the fourth digit already."""
    metric = MeanStd()
    for _ in range(1000):
        metric.update(torch.full((1000,), 0.1))
    assert metric.compute()["mean"].item() == pytest.approx(torch.tensor(0.1).item(), rel=1e-9)
    assert metric.compute()["std"].item() < 1e-6


def test_mean_std_refuses_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"values has shape \(2, 3\) and mask \(2,\)"):
        MeanStd().update(torch.zeros(2, 3), torch.ones(2))


def test_an_interval_does_not_depend_on_the_order_of_the_problems() -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(0))
    intervals = []
    for order in (values, values.flip(0)):
        metric = MeanOverProblems()
        metric.update(order)
        intervals.append(metric.interval())
    assert torch.equal(*intervals)
    low, high = intervals[0]
    assert values.min() < low < values.mean() < high < values.max()


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
