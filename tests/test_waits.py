"""A training step never waits for a GPU; benchmarks/fake_cuda detects waits without one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from micro_batch import OBJECTIVES, WithoutTrainer, micro_batch
from prl_lightning.functional import delimiter_steps
from waits import Waits

WAITS: dict[str, Callable[[Tensor], object]] = {
    "a value": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "all values": lambda x: x.tolist(),
    "a move": lambda x: x.cpu(),
    "a comparison": lambda x: torch.equal(x, x),
    "reading by a mask": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.clone().index_put_((x > 0,), x[:2]),
    "places": lambda x: x.nonzero(),
    "repeats": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
    "different values": lambda x: x.unique(),
    "numbers from the host": lambda x: torch.tensor([1.0], device=x.device),
}
NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "an index": lambda x: x[torch.tensor([0, 2])],
    "a choice by a mask": lambda x: torch.where(x > 0, x, 0.0),
    "a fill by a mask": lambda x: x.masked_fill(x > 0, 0.0),
    "repeats of known size": lambda x: x.repeat_interleave(torch.ones(3).long(), output_size=3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_never_waits(
    tied_model: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Without a GPU the package also reads values, for checks: pretend that there is one.
    monkeypatch.setattr(Tensor, "is_cuda", True)
    module = WithoutTrainer(tied_model, OBJECTIVES[name])
    module.configure_model()
    batch = micro_batch(module.objective)
    with Waits() as waits:
        loss = module.training_step(batch, 0)
        loss.backward()
    # Lightning divides by the number of micro-batches.
    assert module.logged["train/loss"] * module.trainer.accumulate_grad_batches == loss
    assert waits.found == []


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_are_detected_and_nothing_else(name: str) -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    with Waits() as waits:
        (WAITS | NO_WAITS)[name](values)
    assert bool(waits.found) == (name in WAITS)


def test_a_wait_in_the_backward_pass_is_detected() -> None:
    values = torch.ones(3, requires_grad=True)
    product = values * 2
    product.register_hook(lambda gradient: gradient * gradient.sum().item())
    with Waits() as waits:
        product.sum().backward()
    assert len(waits.found) == 1


def test_a_wait_is_reported_with_its_line() -> None:
    with Waits() as waits:
        delimiter_steps(torch.tensor([[4, 1, 4]]), torch.ones(1, 3), torch.zeros(5))
    (wait,) = waits.found
    assert wait.startswith("_local_scalar_dense at functional/steps.py:")
