"""Whether torch.export traces what runs."""

import torch


def exporting() -> bool:
    """True inside torch.export, whose graphs hold PyTorch's own operators alone, for sizes that may change. PyTorch 2.6
    says only that it traces, not what for."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
