"""Products of linear layers by oneDNN against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from prl_lightning.onednn import use_onednn


def computed(layer: nn.Linear, rows: Tensor, grad: Tensor) -> list[Tensor | None]:
    layer.zero_grad()
    rows = rows.clone().requires_grad_(rows.requires_grad)
    output = layer(rows)
    output.backward(grad)
    return [output.detach(), rows.grad, layer.weight.grad, getattr(layer.bias, "grad", None)]


def operators(layer: nn.Linear, rows: Tensor) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(rows)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("shape", [(7, 5), (1, 7, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "rows", "weight"])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool, frozen: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=bias)
    rows, grad = torch.randn(shape), torch.randn(*shape[:-1], 4)
    rows.requires_grad_(frozen != "rows")
    layer.weight.requires_grad_(frozen != "weight")
    expected = computed(layer, rows, grad)
    use_onednn(layer)
    assert "mkldnn::_linear_pointwise" in operators(layer, rows)
    for ours, theirs in zip(computed(layer, rows, grad), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_other_precisions_are_left_to_torch() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(5, 4, dtype=dtype)
        rows = torch.randn(7, 5, dtype=dtype)
        expected = layer(rows)
        use_onednn(layer)
        assert torch.equal(layer(rows), expected)
    layer = nn.Linear(5, 4)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(7, 5)).dtype == torch.bfloat16


def test_a_subclass_keeps_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return 2 * super().forward(rows)

    layer = Doubled(5, 4)
    rows = torch.randn(7, 5)
    expected = layer(rows)
    use_onednn(layer)
    assert torch.equal(layer(rows), expected)
