"""Evaluation of batches of a few sizes as CUDA graphs: the host starts a whole network at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from samdetr.util.padded_images import PaddedImages

Outputs = dict[str, Any]
MOST = 32  # graphs: each keeps the memory of its outputs, all share that of what lies between


class GraphedNetwork(nn.Module):
    """The network, in evaluation, without gradients. Its weights must stay where they are.

    The first batch of a size runs as usual, which also sets up what a graph cannot record: kernels that are compiled on
    first use, choices of cuDNN. The second is recorded; from then on only its images are exchanged.

    Args:
        network: takes PaddedImages alone.
        most: sizes that are recorded; batches of further ones run as usual.
    """

    def __init__(self, network: nn.Module, *, most: int = MOST) -> None:
        super().__init__()
        self.network, self.most = network, most
        self._record = Recorder()
        self._seen: Counter[tuple] = Counter()
        self._graphs: dict[tuple, tuple[Callable[[], None], Outputs, PaddedImages]] = {}

    def forward(self, batch: PaddedImages) -> Outputs:
        size = (*batch.images.shape, batch.images.dtype, batch.images.stride())
        if size not in self._graphs:
            self._seen[size] += 1
            if self._seen[size] == 1 or len(self._graphs) == self.most:
                return self.network(batch)
            inputs = PaddedImages(batch.images.clone(), batch.padding.clone())
            self._graphs[size] = (*self._record(lambda: self.network(inputs)), inputs)
        replay, outputs, inputs = self._graphs[size]
        inputs.images.copy_(batch.images)
        inputs.padding.copy_(batch.padding)
        replay()
        return tree_map(Tensor.clone, outputs)


class Recorder:
    """Makes graphs that share memory. Each overwrites what the others computed, so outputs must be copied at once."""

    def __init__(self) -> None:
        self._pool: Any = None  # that of the first graph

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """`work` as a graph, under the autocast that is on: a function that repeats it, and where its outputs then
        lie."""
        graph, device = torch.cuda.CUDAGraph(), "cuda"
        # The casts of weights that autocast keeps would lie in the graph's memory, which it overwrites.
        with (
            torch.autocast(
                device,
                dtype=torch.get_autocast_dtype(device),
                enabled=torch.is_autocast_enabled(device),
                cache_enabled=False,
            ),
            torch.cuda.graph(graph, pool=self._pool),
        ):
            outputs = work()
        self._pool = graph.pool()
        return graph.replay, outputs
