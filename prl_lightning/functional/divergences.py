"""The token-wise f-divergences of the regulariser, as functions of the log-ratio.

Q(θ) regularises with E_{a∼π} Σ_t f(u_t), u = π_ref/π = exp(-δ), δ = log π - log π_ref (PRL v2,
arXiv 2601.10201, Theorem 4.1). Its gradient needs two numbers a token: what the token costs those
before it, f(u_j), and what it costs itself, f(u_t) - f'(u_t)·u_t.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from prl_lightning.functional.masks import MAX_LOG_RATIO

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence: reg_t = own(δ_t) + Σ_{j>t} future(δ_j).

    Written in δ rather than u, so that neither overflows nor loses a small δ in rounding.

    Attributes:
        future: δ -> f(u), elementwise.
        own: δ -> f(u) - f'(u)·u, elementwise, up to a constant that no action changes.
    """

    future: TensorFunction
    own: TensorFunction

    @classmethod
    def from_generator(cls, f: TensorFunction, f_prime: TensorFunction) -> "Divergence":
        """The divergence of a generator f and its derivative, both elementwise functions of u.

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
    """The ratio u = π_ref/π = exp(-δ)."""
    return (-_bounded(delta)).exp()


def _ratio_minus_one(delta: Tensor) -> Tensor:
    """The ratio less one, exact also where policy and reference nearly agree."""
    return (-_bounded(delta)).expm1()


def _k3(delta: Tensor) -> Tensor:
    """-log u + u - 1."""
    return delta + _ratio_minus_one(delta)


def _forward_k3(delta: Tensor) -> Tensor:
    """u·log u - u + 1."""
    return -_bounded(delta) * _ratio(delta) - _ratio_minus_one(delta)


_PAPER: dict[str, Divergence] = {
    # f = -log u. own is δ + 1; the 1 is dropped.
    "reverse_kl": Divergence(future=lambda delta: delta, own=lambda delta: delta),
    # f = -log u + u - 1.
    "reverse_k3": Divergence(future=_k3, own=lambda delta: delta),
    # f = log u. own is -δ - 1; the -1 is dropped.
    "forward_kl": Divergence(future=lambda delta: -delta, own=lambda delta: -delta),
    # f = u·log u - u + 1.
    "forward_k3": Divergence(future=_forward_k3, own=lambda delta: -_ratio_minus_one(delta)),
}
_divergences = dict(_PAPER)


def register_divergence(name: str, f: TensorFunction, f_prime: TensorFunction) -> None:
    """Make a generator available under a name, to `process_term` and to configs.

    Registering one's own name again replaces it, as a notebook cell run twice does; the names of
    the paper cannot be taken.

    Args:
        name: what to call it.
        f: the generator, an elementwise function of u = π_ref/π.
        f_prime: its derivative.

    Raises:
        ValueError: if the name is one of the paper's.

    Example:
        >>> register_divergence("chi_square", lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1))
        >>> "chi_square" in divergence_names()
        True
    """
    if name in _PAPER:
        raise ValueError(f"name is '{name}', a divergence of the paper: choose another name")
    _divergences[name] = Divergence.from_generator(f, f_prime)


def divergence_names() -> list[str]:
    """Every name `get_divergence` knows: the paper's, then the registered ones."""
    return list(_divergences)


def get_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence of that name; a `Divergence` is returned as it is.

    | name | f(u) | own(δ) |
    | --- | --- | --- |
    | reverse_kl | -log u | δ |
    | reverse_k3 | -log u + u - 1 | δ |
    | forward_kl | log u | -δ |
    | forward_k3 | u·log u - u + 1 | 1 - u |

    Under the policy's own samples E[log u] = -KL(π‖π_ref), so `forward_kl` with a positive beta
    rewards distance from the reference. It is the paper's, kept for comparison.

    Args:
        divergence: a name or a `Divergence`.

    Returns:
        The divergence.

    Raises:
        ValueError: if nothing has that name.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if divergence not in _divergences:
        raise ValueError(
            f"divergence is '{divergence}', which is none of {', '.join(_divergences)}: use one of "
            "these or register_divergence(name, f, f_prime)"
        )
    return _divergences[divergence]
