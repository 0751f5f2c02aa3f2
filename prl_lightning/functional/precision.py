"""What a processor multiplies at full speed."""

import torch


def has_bf16_instructions() -> bool:
    """Whether the CPU computes in bfloat16; True if this version of torch cannot tell."""
    read = getattr(torch.cpu, "get_capabilities", None)
    features = {} if read is None else read()
    known = [has for name, has in features.items() if "bf16" in name]
    return any(known) if known else True
