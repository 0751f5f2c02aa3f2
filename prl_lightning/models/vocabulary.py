"""Compare the vocabulary of a reference with the policy's."""

from __future__ import annotations

from prl_lightning.models.loading import load_config, load_tokenizer


def check_vocabulary(policy: str, reference: str) -> None:
    """Refuse a reference whose tokens are not the policy's; reads no weights.

    Token strings are compared, not sizes alone: two vocabularies of one size can number their
    tokens differently, and the log-probabilities would be those of other tokens. The reference's
    output may be wider, which is padding that no tokenizer produces.

    Args:
        policy: Hugging Face id or folder.
        reference: Hugging Face id or folder.

    Raises:
        OSError: the reference cannot be read.
        ValueError: the vocabularies differ.
    """
    if policy == reference:
        return
    try:
        load_config(reference)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the reference {reference!r} cannot be read: {error} Name a folder that exists (`prl "
            "export` writes one from a checkpoint) or a model of the Hub."
        ) from error
    own, other = (load_tokenizer(name).get_vocab() for name in (policy, reference))
    widths = [load_config(name).get_text_config().vocab_size for name in (policy, reference)]
    if own == other and widths[0] <= widths[1]:
        return
    differing = sorted(own.items() ^ other.items(), key=lambda item: (item[1], item[0]))
    which = f", and {differing[0][0]!r} is not the same token in both" if differing else ""
    raise ValueError(
        f"the reference {reference!r} has another vocabulary than model.policy={policy!r}: "
        f"{len(other)} tokens and an output of {widths[1]}, the policy {len(own)} tokens and an "
        f"output of {widths[0]}{which}. Use a reference of the policy's family."
    )
