"""Equal numbers to the official implementation: its weights in, its figures out.

The figures were computed with the official code in float64 (no dropout) for seven models, two images and eight objects;
the weights are those of reference_fill.py. Multi-scale models run through both the plain and the compiled deformable
attention. Where the folder of the full figures is at hand they are used, else the part of them in tests/parity (every
seventh query's logits; all else is complete).
"""

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference_fill
import torch
from helpers import from_flags
from official import sam_detr as to_official
from parity import cases, extract
from parity.cases import FULL, USUAL_SINE, needs_full_figures, weight

from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.sam_detr.official_weights import convert_official, from_official, is_official

ms_deform_attn = importlib.import_module("samdetr.models.ops.ms_deform_attn")
OUTPUTS = {"rtol": 0, "atol": 1e-9 if USUAL_SINE else 1e-5}
LOSSES = {"rtol": 1e-9 if USUAL_SINE else 1e-5, "atol": 1e-9}
# Absolute too, because the true gradient of a key's bias is zero.
GRADIENTS = {"rtol": 1e-9 if USUAL_SINE else 1e-5, "atol": 1e-9 if USUAL_SINE else 1e-7}
PREDICTED = ("pred_logits", "pred_boxes")

# Of the published models at 300 queries, by variant.
TRAINABLE_PARAMETERS = {
    "r50_e12": 58_074_058,
    "r50_e50": 58_073_546,
    "r50_smca_e12": 58_123_306,
    "r50_smca_e50": 58_122_794,
    "r50_dc5_smca_e50": 58_122_794,
    "r50_ms_e50": 54_972_298,
    "r50_ms_smca_e50": 55_021_546,
}


# Which deformable attention runs, where there is one.
PATHS = {v: ("plain", "compiled") if "_ms_" in v else ("dense",) for v in extract.VARIANTS}
PATHS_TAKEN = [(variant, path) for variant, paths in PATHS.items() for path in paths]


@contextmanager
def take(path: str) -> Iterator[Counter]:
    """Run deformable attention through one path, and count what is called; skips where there is no compiled kernel."""
    if path == "compiled" and kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {kernels.why_not('cpu')}")
    for dtype in (torch.float32, torch.float64):
        kernels.correct(ms_deform_attn.KERNELS.name, "cpu", None, dtype)  # the first check calls them, too
    calls = Counter()
    names = {"ms_deform_attn_forward": "compiled forward", "ms_deform_attn_backward": "compiled backward"}
    call_kernel, plain_kernel = kernels.call, ms_deform_attn.KERNELS.plain

    def call(name: str, *rest):
        calls.update([names[name]] if name in names else [])
        return call_kernel(name, *rest)

    def plain(*arguments):
        calls["plain forward"] += 1
        return plain_kernel(*arguments)

    with pytest.MonkeyPatch.context() as patch, plain_path() if path == "plain" else nullcontext():
        patch.setattr(kernels, "call", call)
        patch.setattr(ms_deform_attn, "KERNELS", replace(ms_deform_attn.KERNELS, plain=plain))
        yield calls


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # two that share a processor with other programs take five times as long as one
    yield
    weight.cache_clear()


@pytest.fixture(scope="module", params=PATHS_TAKEN, ids="-".join)
def case(request) -> SimpleNamespace:
    variant, path = request.param
    case = cases.run("sam_detr", variant, convert_official=convert_official, paths=2 * (lambda: take(path),))
    case.path = path
    return case


def test_the_path_is_the_one_taken(case):
    """Once for each of six encoder layers."""
    calls, calls_in_float32 = case.calls
    with_backward = {"plain forward": 12}  # in backward once more
    if case.path == "compiled":
        with_backward = {"compiled forward": 6, "compiled backward": 6}
    assert calls == ({} if case.path == "dense" else with_backward)
    assert calls_in_float32 == ({} if case.path == "dense" else {f"{case.path} forward": 6})


def test_every_name_and_shape_is_accounted_for_both_ways(case):
    official = case.facts["state_dict"]
    assert is_official(official)
    assert not is_official(case.shapes)
    # The official model lists its box heads twice; under its decoder they are an alias.
    alias = {name for name in official if name.startswith("transformer.decoder.bbox_embed.")}
    assert len(alias) == 36
    assert {from_official(name): shape for name, shape in official.items()} == case.shapes
    assert {to_official(name): shape for name, shape in case.shapes.items()} == {
        name: shape for name, shape in official.items() if name not in alias
    }
    for name in official.keys() - alias:
        assert to_official(from_official(name)) == name
    for name in alias:
        assert from_official(name) == from_official(name.removeprefix("transformer.decoder."))


def test_the_same_parameters_train(case):
    wanted = [from_official(name) for name in case.facts["trainable"]]
    assert sorted(wanted) == sorted(case.gradients)


def test_outputs_of_all_layers(case):
    cases.assert_same_outputs(case.ours.outputs, case.figures, PREDICTED, **OUTPUTS)


def test_assignment(case):
    cases.assert_same_matches(case.ours.matches, case.figures)


def test_detections(case):
    assert [found["scores"].shape for found in case.detections] == 2 * [(100,)]
    cases.assert_same_detections(case.detections, case.figures, OUTPUTS["atol"])


def test_losses(case):
    """Four terms a layer, and class_error of the last one."""
    cases.assert_same_losses(case, terms=4 * 6 + 1, **LOSSES)


def test_gradient_norm_of_every_parameter(case):
    cases.assert_same_gradients(case, from_official, **GRADIENTS)


def test_float32(case):
    """We see 1e-5."""
    cases.assert_near_in_float32(case, PREDICTED)


@pytest.mark.parametrize("variant", extract.VARIANTS)
def test_number_of_trainable_parameters(variant):
    flags = re.sub(
        r"--num_queries \d+", "", " ".join(cases.read_figures(variant, family="sam_detr")[0]["args"])
    ).split()
    with torch.device("meta"):  # counts without memory
        detector, _, _ = from_flags(flags)
    count = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert count == TRAINABLE_PARAMETERS[variant]


@pytest.mark.parametrize("alias_first", [True, False])
def test_a_box_head_overwrites_its_alias(alias_first):
    """As loading the official file does: whatever their order in the file, `bbox_embed.*` has the last word."""
    name = "bbox_embed.2.layers.0.bias"
    pair = [(f"transformer.decoder.{name}", torch.zeros(3)), (name, torch.ones(3))]
    state = convert_official(dict(pair if alias_first else pair[::-1]) | {"foreign.weight": torch.zeros(1)})
    assert state.keys() == {"decoder.box_heads.2.layers.0.bias", "foreign.weight"}
    assert torch.equal(state["decoder.box_heads.2.layers.0.bias"], torch.ones(3))


@needs_full_figures
def test_weights_and_inputs_are_those_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(FULL)
    import fill

    for ours, theirs in zip(reference_fill.images(), fill.images(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(reference_fill.targets(), fill.targets(), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    names = {}
    for path in FULL.glob("*.json"):
        names |= json.loads(path.read_text()).get("state_dict", {})
    assert len(names) > 1000
    for name, shape in names.items():  # small ones of the same kind are as good
        shape = tuple(min(size, 4) for size in shape)
        np.testing.assert_array_equal(reference_fill.weights(name, shape), fill.fill(name, shape), err_msg=name)


@needs_full_figures
def test_compact_figures_are_those_of_the_full_ones():
    for variant in extract.VARIANTS:
        full, compact = extract.read_full(FULL, variant), extract.read_compact(variant)
        kept = compact[1]["queries"]
        assert len(kept) == 8
        for name in ("args", "state_dict", "losses", "total_loss", "grad_norms"):
            assert full[0][name] == compact[0][name], name
        assert set(full[0]["trainable"]) == set(compact[0]["trainable"])
        assert full[1].keys() == compact[1].keys()
        for name, values in full[1].items():
            wanted = kept if name == "queries" else values[:, :, kept] if name == "pred_logits" else values
            np.testing.assert_array_equal(compact[1][name], wanted, err_msg=name)
    initialisation = json.loads((FULL / "sam_detr_init.json").read_text())
    for variant in extract.INITIALISED:
        assert extract.read_initialisation(variant) == initialisation[variant]
