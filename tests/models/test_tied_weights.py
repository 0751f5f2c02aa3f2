"""The gradient of a tied weight, against autograd's sum of the gradients of both uses."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM

from prl_lightning.models.tied_weights import embed_tied, is_tied

IDS = torch.tensor([[3, 0, 3, 5, 0, 3]])  # token 3 three times, and 0 may be padding


def loss_of(embedded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two uses as a head, so that autograd sums their gradients before ours."""
    logits = embedded.tanh() @ weight.T
    return (logits.log_softmax(-1) * torch.arange(7.0)).sum() + (embedded @ weight.exp().T).sum()


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_gradient_is_the_sum_of_both_uses(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4, padding_idx, dtype=torch.float64)
    with torch.no_grad():
        embedding.weight[0] = 0.5  # of padding, torch initializes zeros
    loss_of(embedding(IDS), embedding.weight).backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    for passes in (1, 2):  # the second is added to the first
        embedded, weight = embed_tied(embedding, IDS)
        torch.testing.assert_close(embedded, embedding(IDS), atol=0, rtol=0)
        loss_of(embedded, weight).backward()
        torch.testing.assert_close(embedding.weight.grad, passes * expected)


class Operations(TorchDispatchMode):
    """Record the names of what torch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


def test_no_second_gradient_of_the_size_of_the_vocabulary_is_made() -> None:
    embedding = nn.Embedding(7, 4)
    dense = "embedding_dense_backward.default"
    for lookup, is_dense in ((lambda: (embedding(IDS), embedding.weight), True),
                             (lambda: embed_tied(embedding, IDS), False)):  # fmt: skip
        loss = loss_of(*lookup())
        with Operations() as operations:
            loss.backward()
        assert (dense in operations.names) == is_dense
        assert "mm.default" in operations.names


def test_only_a_plain_embedding_that_is_the_head_counts_as_tied(
    tied_model: str, untied_model: str
) -> None:
    tied, untied = (Qwen2ForCausalLM.from_pretrained(name) for name in (tied_model, untied_model))
    assert is_tied(tied)
    assert not is_tied(untied)
    assert not is_tied(tied.bfloat16())  # sums in the weight's dtype
    assert not is_tied(tied.float().to("meta"))  # not a CPU

    class Scaled(nn.Embedding):
        pass

    scaled = Qwen2ForCausalLM.from_pretrained(tied_model)
    other = Scaled(*scaled.get_input_embeddings().weight.shape)
    other.weight = scaled.get_input_embeddings().weight
    scaled.set_input_embeddings(other)
    assert not is_tied(scaled)
