"""The network: what its predictions may depend on, that every kind of batch trains, how it starts, its backbone."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import from_flags
from parity import extract
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from samdetr.models.backbone import RESNETS, Backbone
from samdetr.models.encoder import DeformableEncoder, DenseEncoder
from samdetr.models.feature_levels import FeatureLevel, InputProjection
from samdetr.models.layers import LayerSizes
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.sam_detr.decoder import SAMDecoder, SAMDecoderLayer
from samdetr.models.sam_detr.official_weights import from_official
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.util.padded_images import PaddedImages, pad_images

NETWORK = (
    "--backbone resnet18 --backbone_level 4 --hidden_dim 32 --nheads 4 --dim_feedforward 48 --enc_layers 2 "
    "--dec_layers 3 --num_queries 6 --smca"
)
SCALES = {"one scale": "", "three scales": "--backbone_level 5 --multiscale --dec_layers 5"}
every_scale = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks here are too small for more to help


def build(flags: str = ""):
    """Network and criterion; box heads are not the zeros that they start with, so that boxes move."""
    detector, criterion, _ = from_flags(f"{NETWORK} {flags}".split())
    for head in detector.decoder.box_heads:
        nn.init.normal_(head.layers[-1].weight, std=0.3)
    look_around(detector)
    return detector, criterion


def look_around(network: nn.Module) -> None:
    """Let deformable attention depend on what it attends; its offsets and weights start as constants."""
    for module in network.modules():
        if isinstance(module, MSDeformAttn):
            nn.init.normal_(module.sampling_offsets.weight, std=0.3)
            nn.init.normal_(module.attention_weights.weight, std=0.3)


def layers_of(outputs: dict) -> list[dict[str, Tensor]]:
    return [*outputs["aux_outputs"], outputs]


def objects(*labels: int) -> dict[str, Tensor]:
    boxes = 0.2 + 0.4 * torch.rand(len(labels), 4)
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


# ---- What predictions depend on


def test_the_output_dict():
    detector, _ = build("--dec_layers 4 --num_queries 5")
    outputs = detector(pad_images([torch.randn(3, 64, 48), torch.randn(3, 50, 70)]))
    assert outputs.keys() == {"pred_logits", "pred_boxes", "aux_outputs"}
    layers = layers_of(outputs)
    assert len(layers) == 4
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 5, 91)
        assert layer["pred_boxes"].shape == (2, 5, 4)
        assert (layer["pred_boxes"] >= 0).all()
        assert (layer["pred_boxes"] <= 1).all()


@every_scale
def test_images_of_a_batch_do_not_see_each_other(scales):
    detector, _ = build(scales)
    detector.double().eval()
    images = [torch.randn(3, 64, 96, dtype=torch.float64) for _ in range(3)]
    together = detector(pad_images(images))
    for index, image in enumerate(images):
        for joint, alone in zip(layers_of(together), layers_of(detector(pad_images([image])))):
            for name in alone:
                if name != "aux_outputs":
                    torch.testing.assert_close(joint[name][[index]], alone[name], rtol=0, atol=1e-10)


@every_scale
def test_permuted_queries_permute_the_outputs(scales):
    detector, _ = build(scales)
    detector.double().eval()
    batch = pad_images([torch.randn(3, 64, 96, dtype=torch.float64), torch.randn(3, 96, 50, dtype=torch.float64)])
    before = layers_of(detector(batch))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        detector.decoder.reference_boxes.copy_(detector.decoder.reference_boxes[order].clone())
    for old, new in zip(before, layers_of(detector(batch))):
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(new[name], old[name][:, order], rtol=0, atol=1e-10)
            assert (old[name][:, 1:] - old[name][:, :1]).abs().amax((0, 2)).min() > 1e-3  # the queries do differ


def transformer(*, num_levels: int = 1, norm: bool = False) -> nn.Sequential:
    """Projection, encoder and decoder on given feature maps, as three modules; reference boxes are not refined."""
    sizes = LayerSizes(hidden_dim=32, num_heads=4, feedforward_dim=48, dropout=0.0)
    aligner = SemanticsAligner(hidden_dim=32, num_heads=4, predict_scales=True)
    layer = SAMDecoderLayer(sizes, aligner=aligner)
    attended = (0, 0) if num_levels == 1 else range(num_levels)
    parts = [
        InputProjection(in_channels=[8] * num_levels, hidden_dim=32, norm=norm),
        DenseEncoder(sizes, num_layers=2)
        if num_levels == 1
        else DeformableEncoder(sizes, num_layers=2, num_levels=num_levels),
        SAMDecoder(layer=layer, num_queries=5, num_classes=7, levels=attended),
    ]
    network = nn.Sequential(*parts).double().eval()
    look_around(network)
    return network


def pyramid(height: int, width: int, num_levels: int = 1) -> list[Tensor]:
    """Random feature maps (8, H, W), each half as high and wide as the one before."""
    return [torch.randn(8, height >> level, width >> level, dtype=torch.float64) for level in range(num_levels)]


# Reference boxes as cx, cy, w, h: four that end half a cell or more before the right and the bottom border of a map of
# 5 x 5 or more cells, and one that reaches over both.
INSIDE = [[0.3, 0.4, 0.5, 0.6], [0.1, 0.1, 0.9, 0.5], [0.6, 0.6, 0.5, 0.5], [0.45, 0.45, 0.9, 0.9]]
ACROSS = [0.8, 0.7, 0.6, 0.8]


def predict(network: nn.Sequential, maps: list[Tensor], boxes: list, *, size: tuple[int, int]) -> Tensor:
    """Every layer's logits (layers, Q, classes) of one image's maps, the first padded to another size by random
    features and the others likewise."""
    project, encoder, decoder = network
    height, width = size
    padded = pyramid(height, width, len(maps))
    padding = torch.ones(1, height, width, dtype=torch.bool)
    padding[:, : maps[0].shape[1], : maps[0].shape[2]] = False
    for whole, features in zip(padded, maps):
        whole[:, : features.shape[1], : features.shape[2]] = features
    decoder.reference_boxes = nn.Parameter(torch.tensor(boxes, dtype=torch.float64).logit())
    with torch.no_grad():
        levels = encoder(project([features[None] for features in padded], padding))
        return torch.cat([layer["pred_logits"] for layer in decoder(levels)])


@pytest.mark.parametrize(
    ("num_levels", "size", "padded_size", "tolerance"),
    [
        # The share of the map that is image is a float32 number, as in the reference: 5/8, 6/8 are exact, 6/9 is not.
        (1, (5, 6), (8, 8), 1e-10),
        (1, (5, 6), (16, 6), 1e-10),
        (1, (5, 6), (7, 9), 1e-5),
        (1, (5, 6), (6, 11), 1e-5),
        # So are the places around which deformable attention looks, (x + 0.5) / image's cells * share: exact for powers
        # of two alone.
        (3, (32, 32), (64, 64), 1e-10),
        (3, (32, 32), (32, 256), 1e-10),
        (3, (24, 20), (32, 32), 1e-5),
        (3, (24, 20), (36, 44), 1e-5),
    ],
)
def test_padding_does_not_matter_where_boxes_stay_inside(num_levels, size, padded_size, tolerance):
    """Behind the backbone, without a GroupNorm, nothing but RoIAlign sees padding, and only within half a cell of the
    right or bottom border: there it takes what the encoder made of padded cells, as the reference does, where an image
    without padding has its last row or column repeated. That is kept. (Deformable attention takes padded cells for
    zeros, which is what it sees beyond the map.)"""
    network, maps = transformer(num_levels=num_levels), pyramid(*size, num_levels)
    alone = predict(network, maps, INSIDE, size=size)
    padded = predict(network, maps, INSIDE, size=padded_size)
    torch.testing.assert_close(padded, alone, rtol=0, atol=tolerance)

    # A box across the border: its own query differs in the first layer; self-attention passes that on to the others.
    alone = predict(network, maps, [*INSIDE, ACROSS], size=size)
    padded = predict(network, maps, [*INSIDE, ACROSS], size=padded_size)
    torch.testing.assert_close(padded[0, :4], alone[0, :4], rtol=0, atol=tolerance)
    assert (padded[0, 4] - alone[0, 4]).abs().max() > 1e-3
    assert (padded[1:] - alone[1:]).abs().amax(2).min() > 1e-6


@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_group_norm_sees_all_padding(num_levels):
    """As in the reference: its statistics are those of the padded map. So models of short schedules, and multi-scale
    ones, depend on it."""
    network, maps = transformer(num_levels=num_levels, norm=True), pyramid(20, 24, num_levels)
    alone = predict(network, maps, INSIDE, size=(20, 24))
    padded = predict(network, maps, INSIDE, size=(32, 32))
    assert (padded - alone).abs().max() > 1e-2


@every_scale
def test_padding_of_images_matters_little(scales):
    """The whole network: beyond an unpadded image its convolutions see zeros in every layer, beyond a padded one what
    the layers before made of zeros. So padding matters (the tolerance is measured), as it does in every DETR, but once
    it is wider than the convolutions see, more of it changes nothing. (Sizes here are multiples of the stride. For
    others the number of valid cells depends on the padded size as well; the reference's rule.)"""
    detector, _ = build(f"{scales} --input_proj_norm none")
    detector.double().eval()
    image = torch.randn(3, 96, 128, dtype=torch.float64)

    def predict_padded(height: int, width: int) -> list[dict[str, Tensor]]:
        images, padding = image.new_zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
        images[..., :96, :128], padding[..., :96, :128] = image, False
        return layers_of(detector(PaddedImages(images, padding)))

    alone, padded, padded_more = predict_padded(96, 128), predict_padded(192, 224), predict_padded(288, 352)
    for a, b, c in zip(alone, padded, padded_more):
        assert (a["pred_logits"].sigmoid() - b["pred_logits"].sigmoid()).abs().max() < 0.02
        assert (a["pred_boxes"] - b["pred_boxes"]).abs().max() < 0.05
        torch.testing.assert_close(b["pred_logits"], c["pred_logits"], rtol=0, atol=1e-4)  # five layers: 5e-5
        torch.testing.assert_close(b["pred_boxes"], c["pred_boxes"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("aligner", [True, False])
def test_no_gradient_through_the_sine_encoding_of_boxes(aligner):
    """Content and boxes of the layer alone: in a whole network self-attention hides it, for the first queries are 0 and
    later boxes detached."""
    torch.manual_seed(0)
    made = SemanticsAligner(hidden_dim=16, num_heads=2, resample="average") if aligner else None
    sizes = LayerSizes(hidden_dim=16, num_heads=2, feedforward_dim=8, dropout=0.0)
    layer = SAMDecoderLayer(sizes, aligner=made).double()
    boxes = torch.rand(1, 3, 4).double().requires_grad_()
    features, position = torch.randn(2, 1, 16, 5, 6).double()
    level, queries = FeatureLevel(features, torch.zeros(1, 5, 6).bool(), position), torch.randn(1, 3, 16).double()
    output = layer(queries, boxes, level)
    moved = layer(queries, boxes + 0.1, level)
    assert (output - moved).abs().max() > 1e-3  # it has an effect
    (gradient,) = torch.autograd.grad(output.square().sum(), boxes, allow_unused=True)
    assert gradient is None or (gradient == 0).all()


def test_boxes_are_refined_from_layer_to_layer():
    """As in the reference: a prediction adds its offset to the logit of the reference box, held within log(1e-5); the
    next reference is the raw logit plus the offset, cut from the graph. Box heads that always say -4 show it."""
    *_, decoder = transformer()
    raw = torch.tensor([14.0, 9.0, 2.0, -20.0], dtype=torch.float64)
    with torch.no_grad():
        decoder.reference_boxes.copy_(raw.expand(5, 4))
        for head in decoder.box_heads:
            head.layers[-1].bias.fill_(-4)
    level = InputProjection(in_channels=[8], hidden_dim=32, norm=False).double()(
        [torch.randn(1, 8, 5, 6, dtype=torch.float64)], torch.zeros(1, 5, 6, dtype=torch.bool)
    )
    first, second = (layer["pred_boxes"][0] for layer in decoder(level))
    limit = -math.log(1e-5)
    wanted = torch.tensor([[limit, 9, 2, -limit], [10, 5, -2, -limit]], dtype=torch.float64) - 4
    torch.testing.assert_close(first, wanted[0].sigmoid().expand(5, 4), rtol=0, atol=1e-9)
    torch.testing.assert_close(second, wanted[1].sigmoid().expand(5, 4), rtol=0, atol=1e-9)

    bias = decoder.box_heads[0].layers[-1].bias
    assert torch.autograd.grad(second.sum(), bias, retain_graph=True, allow_unused=True) == (None,)
    gradient = torch.autograd.grad(first.sum(), decoder.reference_boxes)[0]
    inside = (wanted[0].sigmoid() * (1 - wanted[0].sigmoid()))[1:3]  # the sigmoid's slope, where nothing is clamped
    torch.testing.assert_close(gradient[:, 1:3], inside.expand(5, 2))


# ---- Training


@every_scale
@pytest.mark.parametrize(
    "labels", [((3, 5), ()), ((), ()), ((1,), (0, 90))], ids=["one empty", "all empty", "none empty"]
)
def test_images_without_objects_train(labels, scales):
    """A finite loss, and a finite gradient for every parameter: DistributedDataParallel waits for each of them."""
    detector, criterion = build(scales)
    detector.train()
    targets = [objects(*image) for image in labels]
    terms = criterion(detector(pad_images([torch.randn(3, 64, 64), torch.randn(3, 48, 80)])), targets)
    sum(criterion.weighted(terms).values()).backward()
    for name, term in terms.items():
        assert torch.isfinite(term), name
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert terms["loss_ce"] > 0
    found = sum(map(len, labels))
    for layer in ("", "_0", "_1"):
        assert (terms[f"loss_bbox{layer}"] > 0) == (terms[f"loss_giou{layer}"] > 0) == (found > 0)
    if not found:
        assert terms["class_error"] == 100


def test_a_tiny_network_learns_its_batch():
    detector, criterion = build("--backbone_norm learned --dropout 0 --dec_layers 2 --set_cost_class 1")
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    batch, targets = pad_images([torch.randn(3, 64, 64), torch.randn(3, 64, 80)]), [objects(3, 5), objects(90)]
    detector.train()
    losses = []
    for _ in range(25):
        loss = sum(criterion.weighted(criterion(detector(batch), targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]  # 0.4 to 0.5, whatever the seed


# In an image of 64 x 128 pixels: 4 x 8 cells, or 8 x 16, 4 x 8 and 2 x 4, of which two decoder layers each attend the
# coarser two, and one the finest.
@pytest.mark.parametrize(
    ("scales", "encoder", "attended"),
    [
        (SCALES["one scale"], {(32, 32, 0.3): 2, ((1, 32, 32), 0.3): 2 * 2, ((1, 32, 48), 0.3): 2}, [32, 32, 32]),
        (SCALES["three scales"], {((1, 168, 32), 0.3): 2 * 2, ((1, 168, 24), 0.3): 2}, [8, 8, 32, 32, 128]),
    ],
    ids=SCALES,
)
def test_dropout_is_where_the_reference_has_it(scales, encoder, attended, monkeypatch):
    """On attention weights (not on those of deformable attention), inside the feed-forward branch (half as wide in a
    deformable encoder), and on every branch before it joins the residual stream."""
    calls = Counter()
    dropout, fused = F.dropout, F.scaled_dot_product_attention

    def spy(x, p=0.5, training=True, inplace=False):
        calls[tuple(x.shape), p if training else 0.0] += 1
        return dropout(x, p, training, inplace)

    def fused_spy(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        calls[query.shape[2], key.shape[2], dropout_p] += 1
        return fused(query, key, value, attn_mask, dropout_p, *args, **kwargs)

    # Where PyTorch's own are called.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(F, "dropout", spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_spy)
    detector, _ = build(f"{scales} --dropout 0.3")
    batch, layers = pad_images([torch.randn(3, 64, 128)]), len(attended)  # 6 queries, 4 heads
    decoder = {(6, 6, 0.3): layers, ((1, 6, 32), 0.3): 3 * layers, ((1, 6, 48), 0.3): layers}
    decoder |= {(6, cells, 0.3): number for cells, number in Counter(attended).items()}
    with plain_path():
        detector.train()(batch)
        assert calls == encoder | decoder
        calls.clear()
        detector.eval()(batch)
    assert all(probability == 0 for *_, probability in calls)


# ---- Initialisation


@pytest.mark.parametrize("variant", extract.INITIALISED)
def test_initialisation_is_the_official_one(variant):
    """Constants exactly, random values by their mean, deviation and range; the official figures are one draw too."""
    flags = extract.read_compact(variant)[0]["args"]
    detector, _, _ = from_flags([*flags, "--num_queries", "300"])
    ours = {name: value for name, value in detector.named_parameters() if not name.startswith("backbone.")}
    figures = {from_official(name): figure for name, figure in extract.read_initialisation(variant).items()}
    assert figures.keys() == ours.keys()
    rounding = 1e-5  # the figures have five decimals
    for name, figure in figures.items():
        value, deviation = ours[name].detach().double(), figure["std"]
        assert list(value.shape) == figure["shape"], name
        if deviation == 0:
            assert (value - figure["mean"]).abs().max() < rounding, name
            continue
        n = value.numel()
        error = 6 * deviation * math.sqrt(2 / n)  # six standard errors of the difference of two means
        assert abs(value.mean() - figure["mean"]) < error + rounding, name
        assert abs(value.std() - deviation) < error + rounding, name  # a deviation varies less than a mean
        # The largest of n uniform numbers falls short of the bound by 1/n of it, on average. Reference boxes and level
        # embeddings are normal, whose largest varies more.
        slack = 0.5 if name in ("decoder.reference_boxes", "projection.level_embedding") else 15 / n
        assert abs(value.abs().max() - figure["max_abs"]) < slack * figure["max_abs"] + rounding, name


def test_initial_values_by_hand():
    """What the figures cannot say: which distribution, and that layers start as copies of weights drawn one by one."""
    detector, _, _ = from_flags(f"{NETWORK} --num_queries 2000".split())
    decoder = detector.decoder
    for head in decoder.class_heads:
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((91,), 0.01))
    first, second = (layer.aligner.point_head.layers[-1].weight for layer in decoder.layers[:2])
    bound = math.sqrt(6 / sum(first.shape))
    assert 0.9 * bound < first.abs().max() <= bound
    assert not torch.equal(first, second)
    # N(0, 1): of 8,000 values 68.27 % lie within 1 and 95.45 % within 2, give or take 0.5 and 0.23 %.
    embedding = InputProjection(in_channels=[1] * 4, hidden_dim=2000, norm=False).level_embedding
    for normal in (decoder.reference_boxes, embedding):
        assert normal.numel() == 8000
        assert ((normal.abs() < 1).float().mean() - 0.6827).abs() < 0.025
        assert ((normal.abs() < 2).float().mean() - 0.9545).abs() < 0.012
    # Box heads start as zeros: the first predictions are the reference boxes.
    outputs = detector(pad_images([torch.randn(3, 64, 64)]))
    for layer in layers_of(outputs):
        torch.testing.assert_close(layer["pred_boxes"][0], decoder.reference_boxes.sigmoid())


# ---- Backbone


@pytest.mark.parametrize("name", RESNETS)
def test_strides_and_channels(name):
    with torch.device("meta"):  # shapes without work
        backbone = Backbone(name=name, levels=(3, 4, 5))
        maps = backbone(torch.empty(2, 3, 128, 192))
    width = 1 if name in ("resnet18", "resnet34") else 4
    assert backbone.num_channels == [128 * width, 256 * width, 512 * width]
    assert backbone.strides == [8, 16, 32]
    assert [m.shape for m in maps] == [
        (2, channels, 128 // stride, 192 // stride) for channels, stride in zip(backbone.num_channels, backbone.strides)
    ]


def test_dilation_keeps_c5_at_stride_16():
    with torch.device("meta"):
        backbone = Backbone(name="resnet50", dilation=True)
        (features,) = backbone(torch.empty(1, 3, 128, 192))
    assert backbone.strides == [16]
    assert features.shape == (1, 2048, 8, 12)
    dilations = [block.conv2.dilation[0] for block in backbone.body["layer4"]]
    assert dilations == [1, 2, 2]  # the first block took over the stride's place
    with pytest.raises(ValueError, match=r"`dilation`.*resnet18"):
        Backbone(name="resnet18", dilation=True)


def test_stages_that_are_not_used_are_not_built():
    stages = {name.split(".")[0] for name, _ in Backbone(name="resnet18", levels=(3,)).body.named_children()}
    assert stages == {"conv1", "bn1", "relu", "maxpool", "layer1", "layer2"}


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, {"conv1", "layer1"}),  # frozen norms have no parameters
        ({"norm": "learned"}, {"conv1", "bn1", "layer1"}),
        ({"norm": "learned", "freeze_stem": False}, set()),
    ],
)
def test_what_the_backbone_freezes(options, frozen):
    backbone = Backbone(name="resnet18", levels=(4,), **options)
    stages = {True: set(), False: set()}
    for name, parameter in backbone.body.named_parameters():
        stages[parameter.requires_grad].add(name.split(".")[0])
    assert stages[False] == frozen
    assert not stages[True] & frozen
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)  # or a subclass
    norms = {kind for m in backbone.modules() for kind in kinds if isinstance(m, kind)}
    learned = options.get("norm") == "learned"
    assert norms == {nn.BatchNorm2d if learned else FrozenBatchNorm2d}
    # Frozen statistics stay as they are in training, learned ones move.
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    moved = any(not torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert moved == learned


@pytest.mark.parametrize(
    ("flags", "trainable"),
    [
        ("", {"layer2", "layer3"}),
        ("--lr_backbone 0", set()),
        ("--backbone_norm learned", {"conv1", "bn1", "layer1", "layer2", "layer3"}),
    ],
)
def test_flags_that_freeze(flags, trainable):
    detector, _ = build(flags)
    names = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in names if name.startswith("backbone.")} == trainable
    assert all(p.requires_grad for name, p in detector.named_parameters() if not name.startswith("backbone."))


@pytest.mark.parametrize("norm", ["frozen", "learned"])
def test_classifier_weights_give_the_classifiers_features(norm):
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    backbone = Backbone(name="resnet18", levels=(3, 4), norm=norm).eval()
    backbone.load_classifier_weights(resnet.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image)))))
        c3 = resnet.layer2(x)
        ours = backbone(image)
    torch.testing.assert_close(ours, [c3, resnet.layer3(c3)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["missing", "of another shape"])
def test_weights_of_another_network_are_refused_as_a_whole(kind):
    backbone = Backbone(name="resnet18", levels=(4,))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    foreign = torchvision.models.resnet18().state_dict()
    name = "layer3.1.bn2.running_mean"
    foreign[name] = torch.zeros(3)
    if kind == "missing":
        del foreign[name]
    with pytest.raises(ValueError, match=rf"1 {kind} \(first: \['{name}'"):
        backbone.load_classifier_weights(foreign)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
