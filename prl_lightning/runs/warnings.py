"""Warnings of libraries that are not about a user's run."""

from __future__ import annotations

import warnings

# Each with the reason.
IRRELEVANT_WARNINGS = (
    # vLLM has its own process group; the values logged here are already reduced over ranks.
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`",
    # On purpose: dropout in the trainer but not in the engine would make two policies.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # On purpose: the rest of an update's micro-batches, with data.micro_batch_tokens.
    r"train_dataloader yielded None",
    # `prl check` passes its own arguments to the parser.
    r"LightningCLI's args parameter is intended to run from within Python",
    # An internal matter of Lightning and torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # In packages that reasoning-gym imports.
    r'"is" with a literal',
    # Of vLLM, about itself.
    r"`torch\.distributed\.reduce_op` is deprecated",
)


def hide_irrelevant_warnings() -> None:
    """Ignore them in this process; for the command, and for programs that make a Trainer."""
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message)
