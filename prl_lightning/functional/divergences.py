"""The token-wise f-divergences of the regulariser, as functions of the log-ratio.

The regulariser of Q(θ) is E_{a∼π} Σ_t f(u_t), u = π_ref/π = exp(-δ), δ = log π - log π_ref (PRL
v2, arXiv 2601.10201, Theorem 4.1). Its gradient needs two values per token: f(u_j), which counts
for all earlier tokens, and f(u_t) - f'(u_t)·u_t, which counts for the token itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from prl_lightning.functional.masks import MAX_LOG_RATIO
from prl_lightning.functional.registry import Registry

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence: reg_t = own(δ_t) + Σ_{j>t} future(δ_j).

    Both are functions of δ and not of u, so they neither overflow nor round away a small δ.

    Attributes:
        future: δ -> f(u), elementwise.
        own: δ -> f(u) - f'(u)·u, elementwise, up to a constant that does not depend on the action.
    """

    future: TensorFunction
    own: TensorFunction

    @classmethod
    def from_generator(cls, f: TensorFunction, f_prime: TensorFunction) -> "Divergence":
        """Return the divergence of a generator f and its derivative, elementwise functions of u.

        They are called with u in [e^-20, e^20] (`MAX_LOG_RATIO`), never with 0 or inf.

        Args:
            f: the generator, u -> f(u).
            f_prime: its derivative, u -> f'(u).

        Returns:
            The divergence.

        Example:
            >>> import torch
            >>> chi_square = Divergence.from_generator(lambda u: (u - 1) ** 2, lambda u: 2 * u - 2)
            >>> chi_square.own(torch.tensor([0.0]))
            tensor([0.])
        """

        def own(delta: Tensor) -> Tensor:
            u = _ratio(delta)
            return f(u) - f_prime(u) * u

        return cls(future=lambda delta: f(_ratio(delta)), own=own)


def _bounded(delta: Tensor) -> Tensor:
    return delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _ratio(delta: Tensor) -> Tensor:
    """Return u = π_ref/π = exp(-δ)."""
    return (-_bounded(delta)).exp()


def _ratio_minus_one(delta: Tensor) -> Tensor:
    """Return u - 1 without cancellation where policy and reference nearly agree."""
    return (-_bounded(delta)).expm1()


def _k3(delta: Tensor) -> Tensor:
    """Return -log u + u - 1."""
    return delta + _ratio_minus_one(delta)


def _forward_k3(delta: Tensor) -> Tensor:
    """Return u·log u - u + 1."""
    return -_bounded(delta) * _ratio(delta) - _ratio_minus_one(delta)


DIVERGENCES: Registry[Divergence] = Registry(
    "divergence",
    {
        # f = -log u. own is δ + 1; the constant 1 is dropped.
        "reverse_kl": Divergence(future=lambda delta: delta, own=lambda delta: delta),
        # f = -log u + u - 1.
        "reverse_k3": Divergence(future=_k3, own=lambda delta: delta),
        # f = log u. own is -δ - 1; the constant -1 is dropped.
        "forward_kl": Divergence(future=lambda delta: -delta, own=lambda delta: -delta),
        # f = u·log u - u + 1.
        "forward_k3": Divergence(future=_forward_k3, own=lambda delta: -_ratio_minus_one(delta)),
    },
    "register_divergence(name, f, f_prime)",
)


def register_divergence(name: str, f: TensorFunction, f_prime: TensorFunction) -> None:
    """Add a generator under a name.

    Call it in the module of your reward functions, which `rollout.rewards` of a configuration
    names. Then set `model.objective.divergence` to the name. Registering your name again replaces
    the generator.

    Args:
        name: not a divergence of the paper.
        f: the generator, an elementwise function of u = π_ref/π.
        f_prime: its derivative.

    Raises:
        ValueError: the name is built in.

    Example:
        >>> import torch
        >>> register_divergence("chi_square", lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1))
        >>> get_divergence("chi_square").future(torch.tensor([0.0]))
        tensor([0.])
    """
    DIVERGENCES.register(name, Divergence.from_generator(f, f_prime))


def get_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence of a name; a `Divergence` is returned unchanged.

    | name | f(u) | own(δ) |
    | --- | --- | --- |
    | reverse_kl | -log u | δ |
    | reverse_k3 | -log u + u - 1 | δ |
    | forward_kl | log u | -δ |
    | forward_k3 | u·log u - u + 1 | 1 - u |

    Under the policy's own samples E[log u] = -KL(π‖π_ref), so `forward_kl` with a positive beta
    rewards distance from the reference. It is in the paper, and kept for comparison.

    Args:
        divergence: a name or a `Divergence`.

    Returns:
        The divergence.

    Raises:
        ValueError: the name does not exist.
    """
    return divergence if isinstance(divergence, Divergence) else DIVERGENCES[divergence]
