"""Evaluation by CUDA graphs: what is recorded, what a replay reads and hands out, what a graph must not do."""

import pytest
import torch
from helpers import MULTISCALE, TINY, TINY_DEFORMABLE, TINY_SAP, build_tiny, call_main, error_line
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from samdetr.engine import predict
from samdetr.util import cuda_graphs
from samdetr.util.padded_images import PaddedImages, pad_images

NETWORKS = {
    "sam": [*TINY, "--smca"],
    "multiscale": MULTISCALE,
    "deformable": TINY_DEFORMABLE,
    "two-stage": [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"],
    "sap": TINY_SAP,
}


class Recorder:
    """In place of a GPU: repeats the work, and writes its outputs where the first ones lie."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, work):
        self.recorded += 1
        outputs = work()

        def replay():
            for old, new in zip(tree_leaves(outputs), tree_leaves(work()), strict=True):
                old.copy_(new)

        return replay, outputs


class Sums(nn.Module):
    """Of what is no padding."""

    def forward(self, batch):
        return {"sum": (batch.images * ~batch.padding[:, None]).sum((1, 2, 3)), "layers": [batch.padding.sum()]}


def random_batch(*sizes):
    return pad_images([torch.randn(3, *size) for size in sizes])


def test_a_size_that_comes_again_is_recorded_once(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "Recorder", lambda: recorder)
    network = Sums()
    graphed = cuda_graphs.GraphedNetwork(network, most=2)
    kept = []
    # Heights 4, 6, 8: each is recorded at its second batch, but a third one is not.
    for number, height in enumerate([4, 6, 4, 4, 6, 8, 8, 8, 4], 1):
        batch = random_batch((height, 5), (3, 4))
        outputs = graphed(batch)
        kept.append((outputs, network(batch)))
        assert recorder.recorded == {1: 0, 2: 0, 3: 1, 4: 1}.get(number, 2)
    for outputs, expected in kept:  # a later replay overwrites nothing that was handed out
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def test_inputs_stay_their_owners(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    graphed = cuda_graphs.GraphedNetwork(Sums())
    batches = [random_batch((4, 5)) for _ in range(4)]
    copies = [batch.images.clone() for batch in batches]
    for batch in batches:
        graphed(batch)
    for batch, copy in zip(batches, copies):
        assert torch.equal(batch.images, copy)


class FromTheHost(TorchFunctionMode):
    """Notes functions that take numbers of the host to the meta device, which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        inside = [x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outside = [x.device.type for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        new = function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)
        if "meta" in outside and (new or "cpu" in inside):
            self.found.append(function)
        return outputs


def test_the_mode_sees_what_comes_from_the_host():
    zeros = torch.zeros(2, device="meta")
    with FromTheHost() as mode:
        zeros.new_tensor([1.0, 2.0])
        torch.tensor([1.0], device="meta")
        torch.ones(2).to("meta", non_blocking=True)
        assert len(mode.found) == 3
        zeros.new_full((2,), 3.0) * 2 + torch.arange(2, device="meta")
        assert len(mode.found) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_read_nothing_of_the_host(name, monkeypatch):
    """A graph would read memory that is gone."""
    network = build_tiny(network=NETWORKS[name])[0].eval().to("meta")
    batch = PaddedImages(
        torch.empty(2, 3, 64, 96, device="meta"), torch.empty(2, 64, 96, dtype=torch.bool, device="meta")
    )
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad(), FromTheHost() as mode:
        outputs = network(batch)
    assert outputs["pred_boxes"].shape[0] == 2
    assert not mode.found


def test_flags(shapes, capsys):
    assert call_main(shapes, "--cuda_graphs", "--device", "cpu") == 2
    assert "--cuda_graphs needs a GPU, and the run is on cpu: leave it out" in error_line(capsys.readouterr().err)
    assert call_main(shapes, "--cuda_graphs", "--compile") == 2
    assert "--compile makes another one: pass one of them" in error_line(capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_replays_equal_the_network(name, amp):
    network = build_tiny(network=NETWORKS[name])[0].eval().cuda()
    graphed = cuda_graphs.GraphedNetwork(network)
    with torch.no_grad():
        for size in [(64, 96), (96, 64), (64, 96), (64, 96), (96, 64)]:
            batch = random_batch(size, (50, 60)).to("cuda")
            found, expected = (predict(one, batch, amp) for one in (graphed, network))
            torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=1e-3, atol=1e-3)
    assert len(graphed._graphs) == 2
