"""Denoising queries: figures of DN-DETR's published part, who sees whom, and what a run with them keeps."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    MULTISCALE,
    TINY,
    TINY_DEFORMABLE,
    build_tiny,
    call_main,
    criterion_of,
    error_line,
    evaluate,
    read_log,
    run_main,
)
from parity.cases import FULL, needs_full_figures
from torch import Tensor

from samdetr.engine import compute_losses, predict
from samdetr.inference.predictor import load
from samdetr.models.denoising import Denoising, DenoisingQueries, Noised
from samdetr.training.finetune import class_parameters
from samdetr.training.optim import load_optimizer_state, optimizer_state, parameter_groups
from samdetr.util.padded_images import PaddedImages, pad_images

HERE = Path(__file__).parent / "parity"
EXACT = {"rtol": 0, "atol": 1e-12}
WITH = ["--denoising", "3"]
NETWORKS = {
    "one scale": TINY,
    "three scales": MULTISCALE,
    "with relations": [*TINY, "--relation"],
    "no aligner": [*TINY[:-1], "--sam_resample", "off"],
    "deformable": TINY_DEFORMABLE,
    "one level, aligned": [*TINY_DEFORMABLE, "--num_feature_levels", "1", "--sam_resample", "points"],
    "refined": [*TINY_DEFORMABLE, "--with_box_refine"],
    "two stages": [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"],
}


def made(groups: int = 3, *, box: float = 0.4, label: float = 0.2, contrastive: bool = False, classes: int = 9):
    return Denoising(groups=groups, num_classes=classes, box_noise=box, label_noise=label, contrastive=contrastive)


def objects(*counts: int, classes: int = 6, seed: int = 1) -> list[dict[str, Tensor]]:
    """Targets of images with so many objects, which touch no border."""
    random = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        numbers = torch.rand(count, 4, generator=random, dtype=torch.float64)
        boxes = torch.cat([0.3 + 0.4 * numbers[:, :2], 0.1 + 0.4 * numbers[:, 2:]], 1)
        targets.append({"labels": torch.randint(classes, (count,), generator=random), "boxes": boxes})
    return targets


# ---- The published figures


def figures() -> tuple[dict, dict[str, Tensor]]:
    with np.load(HERE / "denoising.npz") as file:
        return json.loads((HERE / "denoising.json").read_text()), {n: torch.from_numpy(file[n]) for n in file.files}


def published_targets(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"labels": given[f"labels_{i}"], "boxes": given[f"boxes_{i}"]} for i in range(3)]


@needs_full_figures
def test_the_copied_figures_are_the_given_ones():
    for name in ("denoising.npz", "denoising.json"):
        assert (HERE / name).read_bytes() == (FULL / name).read_bytes()


@pytest.mark.parametrize("noise", ["noisy", "zero"])
def test_queries_and_mask_are_the_published_ones(noise):
    _, given = figures()
    targets = published_targets(given)
    denoising = made() if noise == "noisy" else made(box=0, label=0)
    known = denoising.known([2, 0, 3], torch.device("cpu"))
    flip = given["noisy_draw_label_flip"]
    new = torch.full((15,), 8)
    new[flip < 0.2] = given["noisy_draw_new_label"]
    noised = denoising.noised(targets, known, flip, new, given["noisy_draw_box"])
    assert torch.equal(known.query, given[f"{noise}_position_in_image"])
    assert noised.labels.shape == (3, int(given[f"{noise}_pad_size"]))
    assert torch.equal(noised.hidden(4), given[f"{noise}_mask"])

    queries = DenoisingQueries(num_classes=9, hidden_dim=8).double()
    queries.labels.weight.data = given["label_embedding"][:9]
    torch.testing.assert_close(queries(noised), given[f"{noise}_query_content"][:, :9], **EXACT)
    torch.testing.assert_close(noised.logits, given[f"{noise}_query_box_logits"][:, :9], **EXACT)


def test_losses_and_gradients_are_the_published_ones():
    facts, given = figures()
    logits, boxes = (given[name].requires_grad_() for name in ("pred_logits", "pred_boxes"))
    noised = Noised(torch.zeros(3, 9), torch.zeros(3, 9, 4), torch.zeros(9))
    layers = noised.split([{"pred_logits": one, "pred_boxes": other} for one, other in zip(logits, boxes)])
    criterion = criterion_of([*TINY, "--denoising", "3"])
    targets = published_targets(given)
    for order in (layers, layers[::-1]):  # the class error is that of the last layer alone
        terms = criterion({**order[-1], "aux_outputs": order[:-1]}, targets)
        found = {name.replace("_dn", ""): term for name, term in terms.items() if "_dn" in name}
        if order is layers:
            names = {f"tgt_{name}" for name in found}
            assert names == facts["losses"].keys() - {"tgt_class_error_0"}
            for name, term in found.items():
                assert term.item() == pytest.approx(facts["losses"][f"tgt_{name}"], rel=1e-12), name
            sum(term for name, term in found.items() if name.startswith("loss")).backward()
        else:
            assert found["class_error"] == facts["losses"]["tgt_class_error_0"]
    torch.testing.assert_close(logits.grad, given["grad_logits"], **EXACT)
    torch.testing.assert_close(boxes.grad, given["grad_boxes"], **EXACT)
    weighted = criterion.weighted(terms)
    assert weighted["loss_bbox_dn_0"] == 5 * terms["loss_bbox_dn_0"]
    assert "class_error_dn" not in weighted
    # A part of a larger batch of 7 objects, of 5 here and 2 elsewhere: all divide by 7 x 3 groups.
    part = criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets, torch.tensor(7.0, dtype=torch.float64))
    assert part["loss_giou_dn"].item() == pytest.approx(facts["losses"]["tgt_loss_giou"] * 15 / 21, rel=1e-12)


# ---- Copies


def test_who_sees_whom_where_numbers_are_uneven():
    """By hand: two groups of two places and a matching query at last; images of two and of one object."""
    noised = made(2)(objects(2, 1))
    sees = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert torch.equal(~noised.hidden(1), torch.tensor(sees).bool())
    assert (noised.labels[1] == -1).tolist() == [False, True, False, True]
    assert (noised.boxes[1, 1::2] == 0.5).all()
    # Of a positive and a negative copy, in this order: one group of four places.
    noised = made(1, contrastive=True)(objects(2, 1))
    assert (~noised.hidden(1)).tolist() == [[True] * 5] * 4 + [[False] * 4 + [True]]
    assert (noised.labels[1] == -1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(("largest", "groups"), [(0, 5), (1, 5), (20, 5), (21, 4), (50, 2), (51, 1), (300, 1)])
def test_groups_are_as_many_as_the_largest_image_allows(largest, groups):
    """100 copies of the image with the most objects, at least one group; with contrast, as many pairs."""
    for contrastive in (False, True):
        known = made(5, contrastive=contrastive).known([largest, 0, largest // 2], torch.device("cpu"))
        assert known.groups == groups
        assert len(known.positive) == groups * (largest + largest // 2)
        assert len(known.query) == len(known.positive) * (1 + contrastive)


def test_without_noise_copies_are_the_objects():
    targets = objects(2, 0, 3)
    for contrastive in (False, True):
        denoising = made(2, box=0, label=0, contrastive=contrastive)
        noised, known = denoising(targets), denoising.known([2, 0, 3], torch.device("cpu"))
        labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        torch.testing.assert_close(noised.logits.sigmoid()[known.image, known.query], boxes[known.target], **EXACT)
        assert torch.equal(noised.labels[known.image, known.query], labels[known.target])
        assert (noised.labels >= 0).sum() == len(known.query) == 5 * 2 * (1 + contrastive)


def test_noise_stays_within_its_limits():
    """Of 4000 copies: the centre moves by up to 0.4 of half the size, sizes change by up to 0.4 of themselves; two in
    ten labels are drawn anew, among six of which one is the old."""
    targets = objects(*[10] * 40)
    denoising = made(10, classes=6)
    noised, known = denoising(targets), denoising.known([10] * 40, torch.device("cpu"))
    labels, boxes = (torch.cat([t[name] for t in targets])[known.target] for name in ("labels", "boxes"))
    found = noised.boxes[known.image, known.query]
    inside = ((found > 0) & (found < 1)).all(1)
    moved = (found - boxes) / boxes[:, 2:].repeat(1, 2) * torch.tensor([2, 2, 1, 1])
    assert 0.39 < moved[inside].abs().max() <= 0.4 + 1e-9
    assert moved[inside].mean().abs() < 0.02
    changed = (noised.labels[known.image, known.query] != labels).double().mean()
    assert changed == pytest.approx(0.2 * 5 / 6, abs=0.03)


def test_contrast_moves_corners_inside_and_outside_of_a_margin():
    """Against DINO's rule, written for one number at a time; zero at a border, where corners are cut."""
    targets = objects(3, 1)
    denoising = made(2, label=0, contrastive=True)
    known = denoising.known([3, 1], torch.device("cpu"))
    move = torch.rand(16, 4, dtype=torch.float64)
    noised = denoising.noised(targets, known, torch.ones(16), torch.zeros(16, dtype=torch.int64), move)
    boxes = torch.cat([target["boxes"] for target in targets])
    row = 0
    for group in range(2):
        for further in (0, 1):
            for target, (image, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)]):
                cx, cy, w, h = boxes[target].tolist()
                corners = []
                for corner, side, u in zip((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), (w, h) * 2, move[row]):
                    share = abs(2 * u.item() - 1) + further
                    sign = 1 if u >= 0.5 else -1
                    corners.append(min(max(corner + sign * share * 0.4 * side / 2, 0), 1))
                x0, y0, x1, y1 = corners
                wanted = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dtype=torch.float64)
                query = group * 6 + further * 3 + place
                torch.testing.assert_close(noised.boxes[image, query], wanted, **EXACT)
                assert known.query[row] == query
                assert (row in known.positive.tolist()) == (not further)
                row += 1


def test_negatives_shall_find_nothing():
    """The focal loss of all known queries, classes of negatives all 0; boxes of positives alone; by a plain formula."""
    targets = objects(1, 2, classes=3)
    criterion = criterion_of([*TINY, "--denoising", "2", "--contrastive"])
    logits, boxes = torch.randn(2, 8, 3, dtype=torch.float64), torch.rand(2, 8, 4, dtype=torch.float64)
    matching = {"pred_logits": logits[:, :4], "pred_boxes": boxes[:, :4], "aux_outputs": []}
    terms = criterion({**matching, "denoising": {"pred_logits": logits, "pred_boxes": boxes}}, targets)
    focal = distance = 0.0
    for image, count in ((0, 1), (1, 2)):
        for group in range(2):
            for kind in range(2):
                for place in range(count):
                    query = group * 4 + kind * 2 + place
                    wanted = targets[image]["labels"][place].item() if kind == 0 else None
                    for label, logit in enumerate(logits[image, query].tolist()):
                        p = 1 / (1 + math.exp(-logit))
                        if label == wanted:
                            focal -= 0.25 * (1 - p) ** 2 * math.log(p)
                        else:
                            focal -= 0.75 * p**2 * math.log(1 - p)
                    if kind == 0:
                        distance += (boxes[image, query] - targets[image]["boxes"][place]).abs().sum().item()
    assert terms["loss_ce_dn"].item() == pytest.approx(focal / 6, rel=1e-12)
    assert terms["loss_bbox_dn"].item() == pytest.approx(distance / 6, rel=1e-12)


# ---- In the network


def network_with(network: list[str], *flags: str):
    flags = [*network, "--backbone_norm", "frozen", "--dropout", "0", *flags]
    criterion = criterion_of(flags).train()
    if criterion.denoising:
        criterion.denoising = Denoising(**{**vars(criterion.denoising), "num_classes": 6})
    return build_tiny(network=flags)[0].double().train(), criterion


def some_images(number: int = 3):
    random = torch.Generator().manual_seed(2)
    sizes = [(64, 96), (48, 96), (64, 80)][:number]
    return pad_images([torch.randn(3, *size, generator=random, dtype=torch.float64) for size in sizes])


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_who_notices_whom(network):
    """In training mode, too: matching queries predict as in a network without, whatever the objects; copies do not
    notice other groups, but their own label."""
    images, targets = some_images(2), objects(2, 3)
    plain, _ = network_with(network)
    detector, criterion = network_with(network, *WITH)
    unused = detector.load_state_dict(plain.state_dict(), strict=False)
    assert unused.unexpected_keys == []
    assert all(name.startswith("decoder.denoising.") for name in unused.missing_keys)
    noised = criterion.noised(targets)
    first = Noised(noised.labels[:, :3], noised.boxes[:, :3], noised.group[:3])
    moved = Noised(noised.labels, torch.rand_like(noised.boxes), noised.group)
    moved.boxes[:, :3] = noised.boxes[:, :3]
    relabelled = Noised((noised.labels + 1) % 6, noised.boxes, noised.group)
    with torch.no_grad():
        wanted = plain(images)
        found = [detector(images, each) for each in (noised, first, moved, relabelled, criterion.noised(objects(0, 0)))]
    for other in found:
        assert ("enc_outputs" in other) == ("enc_outputs" in wanted)
        for layer, same in zip([*wanted["aux_outputs"], wanted], [*other["aux_outputs"], other]):
            for name in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(same[name], layer[name], **EXACT)
    boxes = [each["denoising"]["pred_boxes"] for each in found]
    assert [one.shape[1] for one in boxes] == [9, 3, 9, 9, 0]
    torch.testing.assert_close(boxes[0][:, :3], boxes[1], **EXACT)
    torch.testing.assert_close(boxes[0][:, :3], boxes[2][:, :3], **EXACT)
    assert (boxes[0][:, 3:] - boxes[2][:, 3:]).abs().max() > 1e-3
    logits = [each["denoising"]["pred_logits"] for each in found]
    assert (logits[0][0] - logits[3][0]).abs().max() > 1e-4  # the label reaches the classes


@pytest.mark.parametrize("network", [NETWORKS["one scale"], NETWORKS["deformable"]], ids=["sam", "deformable"])
def test_gradients_by_finite_differences(network):
    """In one layer: later ones do not see through the references that refinement detaches."""
    detector, criterion = network_with(network, *WITH, "--dec_layers", "1")
    images, targets = some_images(), objects(2, 0, 3)
    noised = criterion.noised(targets)

    def loss() -> Tensor:
        terms = criterion.weighted(criterion(detector(images, noised), targets))
        return sum(term for name, term in terms.items() if "_dn" in name)

    loss().backward()
    of_copies = dict(detector.decoder.denoising.named_parameters())
    assert of_copies
    others = {"heads": detector.decoder.class_heads[0].weight, "layer": detector.decoder.layers[-1].norm1.weight}
    for name, weight in {**of_copies, **others}.items():
        direction = torch.randn_like(weight)
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(sign * 1e-6 * direction)
                slopes.append(loss().item())
                weight.sub_(sign * 1e-6 * direction)
        slope = (slopes[0] - slopes[1]) / 2e-6
        assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=1e-5, abs=1e-7), name
        assert abs(slope) > 1e-6


def test_a_batch_without_objects_has_losses_of_zero():
    """And gives the embedding a gradient, as DistributedDataParallel wants."""
    for network in (TINY, [*TINY_DEFORMABLE, "--contrastive"]):
        detector, criterion = network_with(network, *WITH)
        targets = objects(0, 0)
        terms = criterion(detector(some_images(2), criterion.noised(targets)), targets)
        assert [terms[f"loss_{name}_dn"].item() for name in ("ce", "bbox", "giou")] == [0, 0, 0]
        assert terms["class_error_dn"] == 100
        sum(criterion.weighted(terms).values()).backward()
        assert all((p.grad == 0).all() for p in detector.decoder.denoising.parameters())


def test_evaluation_has_nothing_of_it():
    detector, criterion = network_with(TINY, *WITH)
    assert criterion.noised(objects(2)) is not None
    assert criterion.eval().noised(objects(2)) is None
    outputs = detector.eval()(some_images(1))
    assert "denoising" not in outputs
    assert not any("_dn" in name for name in criterion(outputs, objects(2)))


@pytest.mark.slow
@pytest.mark.parametrize("network", [TINY, TINY_DEFORMABLE], ids=["sam_detr", "deformable_detr"])
def test_compiles_without_a_break(network):
    """The decoder, which alone knows of it; with other numbers of objects and groups, too."""
    detector, criterion = network_with(network, *WITH, "--dec_layers", "1")
    images = some_images()
    levels = detector.encoder(detector.projection(detector.backbone(images.images), images.padding))
    compiled = torch.compile(detector.decoder, backend="eager", fullgraph=True, dynamic=True)
    for counts in ((2, 0, 3), (1, 4, 1), (40, 2, 0)):
        noised = criterion.noised(objects(*counts))
        (found,), (wanted,) = (decoder(levels, noised) for decoder in (compiled, detector.decoder))
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found["denoising"][name], wanted["denoising"][name], **EXACT)


@pytest.mark.parametrize("network", [TINY, TINY_DEFORMABLE], ids=["sam_detr", "deformable_detr"])
def test_parts_of_a_step_are_one_large_batch(network):
    """`--accumulate`: terms and gradients of two parts, with an image without objects, are those of both together."""
    detector, criterion = network_with(network, "--denoising", "2", "--denoising_box_noise", "0")
    criterion.denoising = Denoising(**{**vars(criterion.denoising), "label_noise": 0.0})
    images, targets = some_images(), objects(2, 2, 0)
    results = []
    for parts in ([slice(3)], [slice(1), slice(1, 3)]):
        detector.zero_grad()
        num_boxes, sums = criterion.count(targets, images.images), {}
        for part in parts:
            batch = PaddedImages(images.images[part], images.padding[part])
            outputs = predict(detector, batch, None, criterion.noised(targets[part]))
            loss, terms = compute_losses(criterion, outputs, targets[part], num_boxes=num_boxes, parts=len(parts))
            loss.backward()
            sums = {name: sums.get(name, 0) + term / len(parts) for name, term in terms.items()}
        weights = {name: weight.grad.clone() for name, weight in detector.named_parameters() if weight.grad is not None}
        results.append((weights, {name: sums[name] for name in sums if name.startswith("loss")}))
    assert "loss_giou_dn_0_unscaled" in results[0][1]
    assert results[0][0]["decoder.denoising.labels.weight"].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


# ---- In a run


def adamw_state(detector: torch.nn.Module) -> torch.optim.AdamW:
    groups = parameter_groups(
        detector, lr=1e-3, lr_backbone=1e-4, lr_linear_proj_names=("reference_points",), lr_linear_proj_mult=0.1
    )
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("network", [TINY, TINY_DEFORMABLE], ids=["sam_detr", "deformable_detr"])
def test_moments_go_to_the_same_parameters_with_and_without(network):
    plain, copies = (build_tiny(*flags, network=network)[0] for flags in ((), WITH))
    optimizers = [adamw_state(plain), adamw_state(copies)]
    for detector, optimizer in zip((plain, copies), optimizers):
        for name, parameter in detector.named_parameters():
            parameter.grad = torch.full_like(parameter, float(len(name)))
        optimizer.step()
    for source, target, detector in ((0, 1, copies), (1, 0, plain), (1, 1, copies)):
        fresh = adamw_state(detector)
        load_optimizer_state(fresh, optimizer_state(optimizers[source]), source="file")
        for name, parameter in detector.named_parameters():
            new = "denoising" in name and (source, target) == (0, 1)
            assert (parameter in fresh.state) == (parameter.requires_grad and not new), name
            if parameter in fresh.state:
                assert (fresh.state[parameter]["exp_avg"] == 0.1 * torch.tensor(float(len(name)))).all(), name
    wrong = optimizer_state(optimizers[0])
    wrong["param_groups"][0]["param_names"] = [*wrong["param_groups"][0]["param_names"][1:], "another"]
    with pytest.raises(ValueError, match=r"other groups of parameters|not in order"):
        load_optimizer_state(adamw_state(copies), wrong, source="file")


RUN = ["--lr", "1e-3", "--epochs", "2", "--ema", "0.9", "--accumulate", "2", "--batch_size", "2"]
RUN += ["--eval_every_epoch", "2"]


@pytest.fixture(scope="module")
def with_copies(shapes, tmp_path_factory) -> Path:
    """Output folder of two epochs with dropout, denoising and --accumulate, saved in the middle, too."""
    output = tmp_path_factory.mktemp("denoising") / "output"
    run_main(shapes, *RUN, *WITH, "--save_every_iterations", "3", "--keep", "-1", "--output_dir", str(output))
    return output


def test_the_log_and_the_checkpoint(with_copies, shapes):
    line = read_log(with_copies)[-1]
    names = {f"train_loss_{kind}_dn{layer}" for kind in ("ce", "bbox", "giou") for layer in ("", "_0")}
    assert names <= line.keys()
    assert 0 < line["train_loss_bbox_dn"] < line["train_loss_bbox"]  # copies are near their objects
    assert line["train_loss"] == pytest.approx(
        sum(v for n, v in line.items() if n.startswith("train_loss_") and not n.endswith("unscaled")), rel=1e-5
    )
    assert not any("_dn" in name for name in line if name.startswith("test_"))
    saved = torch.load(with_copies / "checkpoint.pth", weights_only=True)
    assert saved["model"]["decoder.denoising.labels.weight"].shape == (6, 31)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(with_copies, shapes, tmp_path):
    """From the middle of the second epoch: noise, dropout and the averages go on."""
    shutil.copy(with_copies / "checkpoint0001_000003.pth", tmp_path)
    (tmp_path / "log.txt").write_text((with_copies / "log.txt").read_text().splitlines(keepends=True)[0])
    run_main(shapes, *RUN, *WITH, "--resume", "auto", "--output_dir", str(tmp_path))
    resumed, straight = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path, with_copies))
    for parts in zip(
        *((file["model"], file["ema"]["model"], file["optimizer"]["state"]) for file in (resumed, straight))
    ):
        torch.testing.assert_close(*parts, rtol=0, atol=0)
    assert read_log(tmp_path) == read_log(with_copies)


def test_a_run_goes_on_without_and_with(with_copies, trained, shapes, tmp_path, capsys):
    """And says so. The rest of network, optimiser and averages is the file's."""
    more = ["--epochs", "3", "--lr", "1e-12", "--ema", "0.9"]
    for source, flags, said in (
        (with_copies, (), "its label embedding is left out"),
        (trained, WITH, "its label embedding starts from random weights"),
    ):
        output = tmp_path / str(len(flags))
        start = source / "checkpoint.pth"
        run_main(shapes, *more, *flags, "--resume", str(start), "--output_dir", str(output))
        assert said in capsys.readouterr().out
        before, after = (torch.load(folder / "checkpoint.pth") for folder in (source, output))
        names = set(after["model"])
        assert ("decoder.denoising.labels.weight" in names) == bool(flags)
        assert before["model"].keys() ^ names == {"decoder.denoising.labels.weight"}
        for name in ("decoder.reference_boxes", "decoder.class_heads.1.weight"):
            torch.testing.assert_close(after["model"][name], before["model"][name], rtol=0, atol=1e-6)
        steps = {int(state["step"]) for state in after["optimizer"]["state"].values()}
        assert steps == ({12, 4} if flags else {12})
    figures, detections = evaluate(shapes, with_copies / "checkpoint.pth", tmp_path / "eval")
    assert "its label embedding is left out, which only training needs" in capsys.readouterr().out
    assert detections
    assert figures == read_log(with_copies)[-1]["test_ema_coco_eval_bbox"]
    predictor = load(str(with_copies / "checkpoint.pth"))
    assert predictor.model.decoder.denoising is None


@pytest.mark.parametrize("flags", [WITH, pytest.param((), marks=pytest.mark.slow)])
def test_pretrained_with_and_without(flags, with_copies, trained, shapes, tmp_path, capsys):
    source = trained if flags else with_copies
    more = ["--epochs", "1", "--lr", "1e-9", "--pretrained", str(source / "checkpoint.pth")]
    run_main(shapes, *more, *flags, "--output_dir", str(tmp_path), network=["--backbone_weights", "none"])
    assert "decoder.denoising.labels.weight" in {*class_parameters(build_tiny(*WITH)[0])}  # rows follow the classes
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decoder.denoising ")]
    assert row.split()[1:] == (["0", "186", "0"] if flags else ["0", "0", "186"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--contrastive"], "--contrastive is a kind of --denoising, which is 0: pass its number of groups"),
        (["--denoising", "-1"], "--denoising -1 must be at least 0"),
        (["--denoising", "2", "--denoising_box_noise", "1.5"], "--denoising_box_noise 1.5 must be at most 1"),
        (["--denoising", "2", "-m", "sap_detr"], "--denoising has no effect on -m sap_detr"),
    ],
)
def test_bad_flags(flags, said, shapes, capsys):
    assert call_main(shapes, *flags, network=[]) == 2
    assert said in error_line(capsys.readouterr().err)
