"""Where deformable attention looks, seen from outside, against numbers worked out by hand."""

import pytest
import torch
from helpers import MULTISCALE, TINY, TINY_SAP, build_tiny

from samdetr.inference.watch import cell_of, watch, watch_maps, watch_sampling
from samdetr.models.attention import LevelAttention
from samdetr.models.ops.module import MSDeformAttn
from samdetr.util.padded_images import pad_images


@pytest.fixture(scope="module")
def network():
    """Tiny, multi-scale. In both encoder layers, whatever the query is, head n looks (n + 1, -p) cells away with point
    p of every level, and the 12 points of a head count as 1 to 12."""
    network, _ = build_tiny("--enc_layers", "2", network=MULTISCALE)
    offsets = torch.tensor([[[[n + 1.0, -p] for p in range(4)] for _ in range(3)] for n in range(4)])
    with torch.no_grad():
        for layer in network.encoder.layers:
            layer.self_attention.sampling_offsets.weight.zero_()
            layer.self_attention.sampling_offsets.bias.copy_(offsets.flatten())
            layer.self_attention.attention_weights.weight.zero_()
            layer.self_attention.attention_weights.bias.copy_(torch.arange(1.0, 13.0).log().repeat(4))
    return network.eval()


@pytest.mark.parametrize(
    ("position", "centre"),
    [
        ((0.6, 0.3), (3.5 / 6, 2.5 / 8)),  # of 6 x 8 cells, that in column 3 and row 2
        ((0.5, 0.25), (3.5 / 6, 2.5 / 8)),  # a corner of four cells belongs to the last
        ((0.0, 1.0), (0.5 / 6, 7.5 / 8)),
        ((1.0, 0.0), (5.5 / 6, 0.5 / 8)),
    ],
)
def test_sampling_points_in_a_padded_image(network, position, centre):
    """An image 48 wide and 64 high in a batch 96 wide and 128 high: 6 x 8 of 12 x 16 cells, 3 x 4 of 6 x 8, 2 x 2 of
    3 x 4 (a cell counts if its left upper corner is image)."""
    torch.manual_seed(1)
    batch = pad_images([torch.randn(3, 64, 48), torch.randn(3, 128, 96)])
    with watch_sampling(network.encoder, cell_of(position)) as layers, torch.no_grad():
        network(batch)
    cells = torch.tensor([[6.0, 8.0], [3.0, 4.0], [2.0, 2.0]])
    offsets = torch.tensor([[[[n + 1.0, -p] for p in range(4)] for _ in range(3)] for n in range(4)])
    weights = (torch.arange(1.0, 13.0) / 78).view(3, 4).expand(4, 3, 4)
    assert len(layers) == 2
    for layer in layers:
        assert layer.reference.shape == (1, 3, 2)
        torch.testing.assert_close(layer.reference[0], torch.tensor([centre] * 3))
        torch.testing.assert_close(layer.points[0], torch.tensor(centre) + offsets / cells[:, None])
        torch.testing.assert_close(layer.weights[0], weights)


def test_sampling_of_a_decoder_call():
    """Queries with reference boxes, no padding given, arguments by name: the first image's chosen ones, in order."""
    torch.manual_seed(0)
    attention = MSDeformAttn(hidden_dim=8, num_levels=2, num_heads=2, num_points=3)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    reference, query = torch.rand(2, 5, 2, 4), torch.randn(2, 5, 8)
    with watch_sampling(torch.nn.ModuleList([attention]), lambda *_: torch.tensor([4, 1])) as calls:
        attention(query, reference, value=torch.randn(2, 5, 8), level_shapes=[(2, 2), (1, 1)])
    (call,) = calls
    # Offsets are in halves of the box, divided by the points; heads, levels, points, x and y in this order.
    offsets = attention.sampling_offsets(query[0, [4, 1]]).view(2, 2, 2, 3, 2)
    boxes = reference[0, [4, 1]][:, None, :, None]
    torch.testing.assert_close(call.reference, reference[0, [4, 1]])
    torch.testing.assert_close(call.points, (boxes[..., :2] + offsets * boxes[..., 2:] / 6).detach())
    weights = attention.attention_weights(query[0, [4, 1]]).view(2, 2, 6).softmax(-1)
    torch.testing.assert_close(call.weights, weights.view(2, 2, 2, 3).detach())
    assert not call.points.requires_grad


@pytest.mark.parametrize("network", [TINY, MULTISCALE, TINY_SAP], ids=["sam", "multi-scale", "sap"])
def test_maps_of_attention_in_a_padded_image(network):
    """They are what the values are summed with."""
    torch.manual_seed(1)
    detector = build_tiny(network=network)[0].eval()
    batch, chosen = pad_images([torch.randn(3, 64, 48), torch.randn(3, 128, 96)]), torch.tensor([7, 2])
    kept = watch(detector.decoder, LevelAttention, lambda attention, given, output: (attention, given, output))
    with watch_maps(detector.decoder, chosen) as maps, kept as calls, torch.no_grad():
        detector(batch)
        assert len(maps) == len(calls) == len(detector.decoder.layers)
        for seen, (attention, given, output) in zip(maps, calls):
            level = given["level"]
            values = attention.value(level.tokens[0]).unflatten(1, (4, 8))  # L, heads, channels
            summed = torch.einsum("qnl,lnc->qnc", seen.weights.flatten(2), values).flatten(1)
            torch.testing.assert_close(attention.output(summed), output[0, chosen], rtol=1e-4, atol=1e-5)
            assert seen.weights.flatten(2)[..., level.padding[0].flatten()].max() == 0
            rows, columns = (part[0][:, chosen].mT for part in given["prior"])  # heads, cells, queries
            prior = (rows[:, :, None] + columns[:, None]).exp().permute(3, 0, 1, 2)
            torch.testing.assert_close(seen.prior, prior)


def test_hooks_come_off_even_after_an_error(network):
    batch = pad_images([torch.randn(3, 64, 64)])
    with torch.no_grad():
        plain = network(batch)["pred_boxes"]
        with watch(network, MSDeformAttn, lambda *_: None) as calls:
            torch.testing.assert_close(network(batch)["pred_boxes"], plain, rtol=0, atol=0)
        with pytest.raises(IndexError), watch_sampling(network, lambda *_: torch.tensor([1_000_000])):
            network(batch)
        torch.testing.assert_close(network(batch)["pred_boxes"], plain, rtol=0, atol=0)
    assert len(calls) == 2
    assert not any(module._forward_hooks for module in network.modules())
