"""A stack of linear layers."""

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers of the given widths, ReLU between them: MLP(256, 256, 4) has two layers."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)
