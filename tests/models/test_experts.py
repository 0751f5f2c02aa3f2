"""The experts of a mixture compute in autocast's precision, and as transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from observer import Observer
from own_logits import assert_equal_gradients
from prl_lightning.models.causal_lm import LogprobModel
from random_models import batch_of, random_model

pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has linear experts")
KINDS = ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral"]


class Products(Observer):
    """Dtypes of inputs and weights of grouped matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped: set[torch.dtype] = set()

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if "grouped_mm" in func.name():
            self.grouped |= {args[0].dtype, args[1].dtype}


def trained(kind: str, implementation: str | None = None) -> tuple[LogprobModel, set[torch.dtype]]:
    """A model with gradients, and the dtypes of its grouped matmuls."""
    # Every token takes every expert: rounding could change a choice among them.
    model = LogprobModel(random_model(kind, head_dim=16, num_experts_per_tok=8))
    if implementation is not None:
        model.causal_lm.set_experts_implementation(implementation)
    with Products() as products:
        model(batch_of([3, 1, 4]))[0].sum().backward()
    return model, products.grouped


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_in_autocasts_precision_or_as_transformers_own(kind: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_dtypes = trained(kind)
    exact, exact_dtypes = trained(kind)
    theirs, _ = trained(kind, "eager")
    assert (low_dtypes, exact_dtypes) == ({torch.bfloat16}, {torch.float32})
    assert_equal_gradients(exact, theirs)
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    experts = {name: p.grad for name, p in low.named_parameters() if ".experts." in name}
    assert len(experts) == 4
    for name, gradient in experts.items():
        assert gradient.dtype == torch.float32
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert 1e-4 < error < 0.1, name  # rounding is visible, and no more than that


def test_another_implementation_of_experts_is_kept() -> None:
    model = random_model("qwen3_moe")
    model.set_experts_implementation("eager")
    assert LogprobModel(model).causal_lm.config._experts_implementation == "eager"
