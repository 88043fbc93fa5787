"""What the parity tests of all families share: figures in, a network with the official weights, its figures out."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference_fill
import torch
from helpers import from_flags
from parity import extract
from torch import Tensor

from samdetr.models.ops.kernels import plain_path
from samdetr.util.padded_images import pad_images

FULL = Path(__file__).parents[2].parent / "shared" / "parity"
needs_full_figures = pytest.mark.skipif(not FULL.is_dir(), reason="the folder of the full figures is not here")

# All is float64 but the position encoding of the map, which is float32 as in the reference. Where this processor rounds
# the sine as the one did that made the figures (x86 with AVX2 or AVX-512), we see 1e-13. Where the last place of some
# sines is another, logits move by up to 1e-7 and gradients by 4e-6; then those that come with the figures hold.
_angles = torch.arange(100_000) / 2**14
USUAL_SINE = zlib.crc32(torch.cat([_angles.sin(), _angles.cos()]).numpy().tobytes()) == 0x692622D
FLOAT32 = {"rtol": 1e-3, "atol": 1e-3}


def read_figures(variant: str, *, family: str) -> tuple[dict, dict[str, np.ndarray]]:
    if FULL.is_dir():
        return extract.read_full(FULL, variant, family=family)
    return extract.read_compact(variant, family=family)


@functools.cache
def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Most models of a family share most weights, and drawing them takes seconds."""
    return torch.from_numpy(reference_fill.weights(name, shape))


def evaluate(detector, criterion, dtype: torch.dtype) -> SimpleNamespace:
    detector.to(dtype)
    batch = pad_images([torch.from_numpy(image) for image in reference_fill.images()]).to(dtype)
    targets = [{name: torch.from_numpy(value) for name, value in t.items()} for t in reference_fill.targets()]
    targets = [t | {"boxes": t["boxes"].to(dtype)} for t in targets]
    outputs = detector(batch)
    losses = criterion(outputs, targets)
    return SimpleNamespace(
        outputs=outputs,
        matches=criterion.matcher([outputs], targets)[0],
        losses={name: loss.item() for name, loss in losses.items()},
        total=sum(criterion.weighted(losses).values()),
        sizes=torch.stack([t["orig_size"] for t in targets]),
        targets=targets,
        matcher=criterion.matcher,
    )


def stacked(outputs: dict, name: str) -> np.ndarray:
    """What all layers predict, the last one last: (layers, B, Q, ...)."""
    return np.stack([layer[name].detach().numpy() for layer in (*outputs["aux_outputs"], outputs)])


def run(
    family: str,
    variant: str,
    *,
    convert_official: Callable,
    paths: tuple[Callable[[], AbstractContextManager], Callable[[], AbstractContextManager]] = (
        nullcontext,
        plain_path,
    ),
) -> SimpleNamespace:
    """What the figures say (`facts`, `figures`) and what our network makes of the same weights, in float64 (`ours`,
    `gradients`) and in float32 (`in_float32`); not the network.

    `paths` say which deformable attention runs in the one and in the other: what can be compiled, then plain, unless
    given. What they give as contexts is `calls`, in this order.
    """
    facts, figures = read_figures(variant, family=family)
    detector, criterion, postprocess = from_flags(["--model", family, *facts["args"]])
    detector.eval()
    criterion.eval()
    filled_as = facts.get("fill_names", {})
    state = {name: weight(filled_as.get(name, name), tuple(shape)) for name, shape in facts["state_dict"].items()}
    detector.double().load_state_dict(convert_official(state), strict=True)
    with paths[0]() as calls:
        ours = evaluate(detector, criterion, torch.float64)
        ours.total.backward()
    trainable = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.norm().item() for name, p in trainable.items()}
    shapes = {name: list(value.shape) for name, value in detector.state_dict().items()}
    detections = postprocess(ours.outputs, ours.sizes)
    with torch.no_grad(), paths[1]() as calls_in_float32:
        in_float32 = evaluate(detector, criterion, torch.float32)
    return SimpleNamespace(
        facts=facts, figures=figures, shapes=shapes, ours=ours, gradients=gradients, detections=detections,
        in_float32=in_float32, calls=(calls, calls_in_float32),
    )  # fmt: skip


def assert_same_outputs(
    outputs: dict, figures: dict[str, np.ndarray], names: Sequence[str], **tolerance: float
) -> None:
    """Of all layers; of those queries alone for which there are figures."""
    for name in names:
        ours = stacked(outputs, name)
        if figures[name].shape[2] < ours.shape[2]:
            ours = ours[:, :, figures["queries"]]
        np.testing.assert_allclose(ours, figures[name], err_msg=name, **tolerance)


def assert_same_losses(case: SimpleNamespace, *, terms: int | None = None, **tolerance: float) -> None:
    """Every term, of which there must be so many, and their weighted sum."""
    assert case.ours.losses.keys() == case.facts["losses"].keys()
    assert terms is None or len(case.ours.losses) == terms
    for name, wanted in case.facts["losses"].items():
        np.testing.assert_allclose(case.ours.losses[name], wanted, err_msg=name, **tolerance)
    np.testing.assert_allclose(case.ours.total.item(), case.facts["total_loss"], **tolerance)


def assert_same_gradients(case: SimpleNamespace, our_name: Callable[[str], str], **tolerance: float) -> None:
    wanted = {our_name(name): norm for name, norm in case.facts["grad_norms"].items()}
    assert wanted.keys() == case.gradients.keys()
    for name, norm in wanted.items():
        np.testing.assert_allclose(case.gradients[name], norm, err_msg=name, **tolerance)


def assert_near_in_float32(case: SimpleNamespace, names: Sequence[str]) -> None:
    """Predictions and every loss term within 1e-3 of the float64 figures, and the same assignment."""
    assert {stacked(case.in_float32.outputs, name).dtype for name in names} == {np.dtype(np.float32)}
    assert_same_outputs(case.in_float32.outputs, case.figures, names, **FLOAT32)
    assert torch.equal(case.in_float32.matches.query, case.ours.matches.query)
    for name, wanted in case.facts["losses"].items():
        np.testing.assert_allclose(case.in_float32.losses[name], wanted, err_msg=name, **FLOAT32)


def assert_same_matches(matches, figures: dict[str, np.ndarray], *, prefix: str = "match") -> None:
    first_target = 0
    for image, number in enumerate(reference_fill.OBJECTS):
        here = matches.image == image
        np.testing.assert_array_equal(matches.query[here], figures[f"{prefix}_pred_{image}"])
        np.testing.assert_array_equal(matches.target[here] - first_target, figures[f"{prefix}_target_{image}"])
        first_target += number


def assert_same_detections(detections: list[dict[str, Tensor]], figures: dict[str, np.ndarray], atol: float) -> None:
    for image, found in enumerate(detections):
        wanted = {name: torch.from_numpy(figures[f"post_{name}_{image}"]) for name in ("scores", "labels", "boxes")}
        torch.testing.assert_close(found["scores"], wanted["scores"], rtol=0, atol=atol)
        # Nearly equal scores may swap places, so each detection has to be found somewhere in the other list.
        same = found["labels"][:, None] == wanted["labels"]
        same &= (found["scores"][:, None] - wanted["scores"]).abs() < atol
        same &= (found["boxes"][:, None] - wanted["boxes"]).abs().amax(-1) < 1000 * atol  # pixels
        assert same.any(0).all()
        assert same.any(1).all()
