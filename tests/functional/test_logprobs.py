import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import prl_lightning.functional.logprobs as logprobs_file
from prl_lightning.functional import token_logprobs

from .batches import assert_close, quick, value_and_slope


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log_softmax + gather, over all logits at once."""
    logits = scale * (hidden @ weight.T)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def inputs(
    tokens: int, vocabulary: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@quick
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 12),
    width=st.integers(1, 5),
    max_logits=st.none() | st.integers(1, 40),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
    cap=st.sampled_from([None, 1.5, 30.0]),
    seed=st.integers(0, 1000),
)
def test_token_logprobs_is_log_softmax_and_gather(
    tokens: int,
    vocabulary: int,
    width: int,
    max_logits: int | None,
    temperature: float,
    scale: float,
    cap: float | None,
    seed: int,
) -> None:
    hidden, weight, targets = inputs(tokens, vocabulary, width, seed)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, max_logits, scale, cap)
    want, want_entropy = reference(hidden, weight, targets, temperature, scale, cap)
    assert_close(logprobs, want)
    assert_close(entropy, want_entropy.detach())
    assert not entropy.requires_grad
    upstream = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    got = grad((logprobs * upstream).sum(), (hidden, weight))
    for found, expected in zip(got, grad((want * upstream).sum(), (hidden, weight)), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_the_wanted_gradient_is_computed(trained: tuple[bool, bool]) -> None:
    hidden, weight, targets = inputs(7, 5, 3)
    want = grad(reference(hidden, weight, targets, 1.0)[0].sum(), (hidden, weight))
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    logprobs, _ = token_logprobs(hidden, weight, targets, max_logits=10)
    with Recorder() as recorder:
        logprobs.sum().backward()
    for tensor, is_trained, expected in zip((hidden, weight), trained, want, strict=True):
        assert (tensor.grad is not None) == is_trained
        if tensor.grad is not None:
            assert_close(tensor.grad, expected)
    # Of 3 x 3. One product a block to make the logits again, one for the gradient: none for the
    # other.
    assert recorder.products == 3 * 2 * 2


def test_nothing_is_kept_under_no_grad() -> None:
    with torch.no_grad():
        assert token_logprobs(*inputs(4, 5, 3))[0].grad_fn is None


@pytest.mark.parametrize("max_logits", [None, 1])  # in one block, and in one each
@pytest.mark.parametrize("peak", [1e4, -1e4])
def test_large_logits_do_not_overflow(peak: float, max_logits: int | None) -> None:
    hidden, weight = torch.tensor([[peak]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1]), max_logits=max_logits)
    assert entropy.item() == 0
    assert value_and_slope(logprobs, hidden) == ((-2e4, -2) if peak > 0 else (0, 0))


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "autocast"),
    [(BF16, BF16, False), (BF16, F32, False), (BF16, F32, True), (F32, F32, True)],
)
def test_bfloat16_is_close_to_float64(
    dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    hidden, weight, targets = inputs(40, 30, 16, dtype=dtype)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logprobs, entropy = token_logprobs(hidden, weight, targets, 0.8, max_logits=70)
    assert logprobs.dtype == entropy.dtype == torch.float32
    got = grad(logprobs.sum(), (hidden, weight))
    assert [found.dtype for found in got] == [dtype, weight_dtype]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    want, want_entropy = reference(*exact, targets, 0.8)
    # Logits of size 10 to 20 in bfloat16 are off by up to 2^-9 of that, over the temperature.
    torch.testing.assert_close(logprobs.double(), want, rtol=0, atol=0.15)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=0.15)
    for found, expected in zip(got, grad(want.sum(), exact), strict=True):
        assert (found.double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "product"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_autocast_is_used_but_for_float64(dtype: torch.dtype, product: torch.dtype) -> None:
    hidden, weight, targets = inputs(40, 30, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = token_logprobs(hidden, weight, targets)
    assert torch.equal(found, token_logprobs(hidden.to(product), weight.to(product), targets)[0])


@pytest.mark.parametrize(("is_fast", "low", "high"), [(True, 1e-4, 1e-2), (False, 0.0, 1e-6)])
def test_weight_gradient_is_not_rounded_where_bfloat16_is_slow(
    is_fast: bool, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the float64 product of the same factors, from the same rounded logits."""
    monkeypatch.setattr(logprobs_file, "has_bf16_instructions", lambda: is_fast)
    hidden, weight, targets = inputs(40, 30, 16, dtype=BF16)
    weight = weight.detach().float().requires_grad_()
    found, _ = token_logprobs(hidden, weight, targets, max_logits=70)
    (got,) = grad(found.sum(), weight)
    with torch.no_grad():
        logits = (hidden @ weight.to(BF16).T).double()
        slopes = torch.nn.functional.one_hot(targets, len(weight)) - logits.softmax(-1)
        want = slopes.T @ hidden.double()
    assert low <= (got.double() - want).norm() / want.norm() < high


def test_weight_gradient_of_many_blocks_is_summed_in_float32() -> None:
    """512 equal gradients of 1/2, added one by one in bfloat16, stop growing at 128."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(512).long(), max_logits=1)
    assert grad(logprobs.sum(), weight)[0].tolist() == [[256.0], [-256.0]]


def test_hidden_gradient_of_many_blocks_is_summed_in_float32() -> None:
    """1,023 equal gradients of -1/1024, added one by one in bfloat16, stop falling at -1/4."""
    hidden = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight[0] = 0
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(1).long(), max_logits=1)
    assert grad(logprobs.sum(), hidden)[0].item() == -1


class Recorder(TorchDispatchMode):
    """Counts matrix products, and sees the size and number of large tensors alive at once."""

    def __init__(self, large: int = 10**9) -> None:
        super().__init__()
        self.large = large
        self.products = self.largest = self.most_alive = 0
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += any(name in str(func) for name in ("mm.", "mm_."))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.large:
                    self._alive.append(weakref.ref(tensor))
        tensors = [found for ref in self._alive if (found := ref()) is not None]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.most_alive = max(self.most_alive, len(storages))
        return out


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.7, None), (0.7, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_one_block_of_logits_exists(
    dtype: torch.dtype, temperature: float, cap: float | None
) -> None:
    tokens, vocabulary, width = 96, 1000, 4
    hidden, weight, targets = inputs(tokens, vocabulary, width, dtype=dtype)
    block = 89 * 89  # as near as it gets to a square of 8,000
    assert block > vocabulary * width > tokens * width  # so a block of logits is the largest
    with Recorder(large=block) as forward:
        logprobs, _ = token_logprobs(
            hidden, weight, targets, temperature, max_logits=8_000, cap=cap
        )
    with Recorder(large=block) as backward:
        logprobs.sum().backward()
    for pass_ in (forward, backward):
        assert pass_.largest == block
        assert 1 <= pass_.most_alive <= 2
    # The recorder does see what the plain way allocates.
    with Recorder(large=block) as plain:
        reference(hidden, weight, targets, temperature)[0].sum().backward()
    assert plain.largest == tokens * vocabulary
    assert plain.most_alive >= 2


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "logits", "block"),
    [
        (64, 1000, 5_000, (64, 78)),  # all tokens, a part of the vocabulary
        (64, 1000, 500, (22, 22)),  # a square, if all tokens would make it narrow
        (64, 1000, 10**6, (1000, 1000)),
        (0, 3, 1, (1, 1)),
    ],
)
def test_automatic_blocks_bound_the_logits(
    tokens: int,
    vocabulary: int,
    logits: int,
    block: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert logprobs_file._block(tokens, vocabulary, logits) == block
    monkeypatch.setitem(logprobs_file._BLOCK_LOGITS, "cpu", logits)
    hidden, weight, targets = inputs(tokens, vocabulary, 1)
    with Recorder() as recorder:
        token_logprobs(hidden, weight, targets)[0].sum().backward()
    assert recorder.largest == max(vocabulary, min(tokens, block[0]) * min(vocabulary, block[1]))


def test_a_gpu_has_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on the meta device, which runs the same code and computes nothing."""
    monkeypatch.setitem(logprobs_file._BLOCK_LOGITS, "meta", 8_000)
    monkeypatch.setitem(logprobs_file._BLOCK_LOGITS, "cpu", 4_000)
    products: dict[str, int] = {}
    for device in ("cpu", "meta"):
        hidden, weight, targets = (x.detach().to(device) for x in inputs(32, 1000, 2))
        with Recorder() as recorder:
            token_logprobs(hidden, weight, targets)
        products[device] = recorder.products
    assert products == {"cpu": 8, "meta": 4}
    assert logprobs_file._BLOCK_LOGITS["cuda"] == 2**27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"max_logits": 0}, "max_logits=0"),
        ({"cap": 0.0}, "cap=0.0"),
        ({"targets": torch.zeros(3).long()}, r"targets \(3,\)"),
        ({"head_weight": torch.zeros(5, 9)}, r"hidden has shape \(4, 3\), head_weight \(5, 9\)"),
        ({"hidden": torch.zeros(2, 2, 3)}, r"hidden has shape \(2, 2, 3\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets = inputs(4, 5, 3)
    arguments = {"hidden": hidden, "head_weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)
