"""Deformable attention: numbers by hand, all paths equal, PyTorch's rules for operators, and a build that may fail."""

import ctypes
import importlib.util
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import forget_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from samdetr.models.ops import build, doctor, kernels, nvrtc, test as checks
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.ops.ms_deform_attn import ms_deform_attn

REPOSITORY = Path(__file__).parents[1]
SHAPES = [(7, 5), (4, 3), (1, 2)]
LENGTH = 35 + 12 + 2
OPERATOR = torch.ops.sam_detr.ms_deform_attn.default


@pytest.fixture(params=["plain", "compiled"])
def path(request):
    """Runs a test through the plain path, then through the compiled one where this machine can build it."""
    if request.param == "plain":
        with plain_path():
            yield "plain"
    else:
        reason = kernels.why_not("cpu")
        if reason:
            pytest.skip(f"no compiled kernel: {reason}")
        yield "compiled"


def compiled_or_skip() -> None:
    if kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {kernels.why_not('cpu')}")


def look(value: list[list[float]], x: float, y: float) -> tuple[float, float, float, float]:
    """One head of one channel looks at one point of one map: output, gradients of x, y and of the weight."""
    map_ = torch.tensor(value, dtype=torch.float64).reshape(1, -1, 1, 1)
    location = torch.tensor([x, y], dtype=torch.float64).reshape(1, 1, 1, 1, 1, 2).requires_grad_()
    weight = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    output = ms_deform_attn(map_, [(len(value), len(value[0]))], location, weight)
    output.backward()
    return (output.item(), *location.grad.flatten().tolist(), weight.grad.item())


def test_one_point_by_hand(path):
    """A map of 2 rows and 3 columns; the weight is 2. The cell in row i, column k is centred at (k + 0.5, i + 0.5)."""
    rows = [[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]
    # A quarter cell right of the centre of column 0, half way between the rows: 0.75 * 5.5 + 0.25 * 11 = 6.875. One
    # step right adds (2 - 1 + 20 - 10) / 2 = 5.5, over a width of 3; one step down 0.75 * 9 + 0.25 * 18 = 11.25, of 2.
    assert look(rows, 0.75 / 3, 1.0 / 2) == pytest.approx((13.75, 2 * 3 * 5.5, 2 * 2 * 11.25, 6.875))
    # A quarter cell left of the last column's centre plus 0.75: beyond it lie zeros, 0.25 * 4 of the upper row remain.
    out, along_x, _, weight = look(rows, 3.25 / 3, 0.5 / 2)
    assert (out, weight) == pytest.approx((2 * 1.0, 1.0))
    assert along_x == pytest.approx(2 * 3 * -4.0)
    # Above the map by a quarter of a cell: a quarter of row 0, and one step down adds all of it.
    out, _, along_y, _ = look(rows, 1.5 / 3, -0.25 / 2)
    assert (out, along_y) == pytest.approx((2 * 0.25 * 2.0, 2 * 2 * 2.0))
    assert look(rows, -0.5 / 3 - 1e-9, 0.5) == (0, 0, 0, 0)


def test_levels_heads_and_images_are_kept_apart(path):
    """Every cell holds its own number, each head looks at one cell's centre: the numbers come back in order."""
    value = torch.arange(2 * LENGTH * 2 * 3, dtype=torch.float32).reshape(2, LENGTH, 2, 3)
    centres = torch.tensor([[2.5 / 5, 6.5 / 7], [0.5 / 3, 1.5 / 4], [1.5 / 2, 0.5]])  # cells 32, 3 and 1 of the levels
    for level, cell in enumerate((32, 35 + 3, 47 + 1)):
        weights = torch.zeros(2, 1, 2, 3, 1)
        weights[:, :, :, level] = 1
        locations = centres[:, None].expand(2, 1, 2, 3, 1, 2)
        output = ms_deform_attn(value, SHAPES, locations, weights)
        assert torch.allclose(output[:, 0], value[:, cell].flatten(1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 8, 32, 71])
def test_paths_agree(dtype, channels):
    compiled_or_skip()
    inputs = checks.example(SHAPES, channels=channels, device="cpu", dtype=dtype)
    function = lambda v, *rest: ms_deform_attn(v, SHAPES, *rest)  # noqa: E731
    compiled = checks.with_gradients(function, inputs)
    with plain_path():
        plain = checks.with_gradients(function, inputs)
    for actual, expected in zip(compiled, plain):
        assert actual.dtype == expected.dtype
        assert checks.error(actual, expected) < checks.TOLERANCE[dtype]


def test_any_layout_of_the_inputs(path):
    value, locations, weights = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    expected = checks.with_gradients(lambda v, *rest: ms_deform_attn(v, SHAPES, *rest), (value, locations, weights))
    strided = (value.mT.contiguous().mT, locations.transpose(1, 2).contiguous().transpose(1, 2), weights)
    assert not strided[0].is_contiguous()
    output, *gradients = checks.with_gradients(lambda v, *rest: ms_deform_attn(v, SHAPES, *rest), strided)
    for actual, wanted in zip([output, *gradients], expected):
        torch.testing.assert_close(actual, wanted)


def test_any_number_of_threads_gives_the_same_bits():
    compiled_or_skip()
    inputs = checks.example([(9, 7), (2, 2)], channels=32, device="cpu", dtype=torch.float32, queries=200)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(checks.with_gradients(lambda v, *rest: ms_deform_attn(v, [(9, 7), (2, 2)], *rest), inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


CHECKS = dict(checks.checks("cpu"))


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_the_package(name, path):
    CHECKS[name]()


def test_a_failed_check_is_counted(monkeypatch, capsys):
    def broken():
        raise AssertionError("wrong")

    monkeypatch.setattr(checks, "checks", lambda device: [("fine", lambda: "good"), ("broken", broken)])
    monkeypatch.setattr(kernels, "why_not", lambda *device: "not now")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "cpu, compiled: not here, not now",
        "ok      cpu, plain: fine: good",
        "FAILED  cpu, plain: broken: AssertionError: wrong",
        "1 failed",
    ]


# PyTorch's rules for operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    """Schema, autograd, fake tensors, and tracing with dynamic shapes; no queries as well as some."""
    compiled_or_skip()
    for queries in (0, 5):
        value, locations, weights = checks.example(SHAPES, channels=6, device="cpu", dtype=dtype, queries=queries)
        sizes = [size for shape in SHAPES for size in shape]
        inputs = (value.requires_grad_(), sizes, locations.requires_grad_(), weights.requires_grad_())
        result = torch.library.opcheck(OPERATOR, inputs)
        assert set(result.values()) == {"SUCCESS"}, result
        detached = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in inputs]
        grad = torch.randn(2, queries, 12, dtype=dtype)
        torch.library.opcheck(torch.ops.sam_detr.ms_deform_attn_backward.default, (grad, *detached))


def test_compiles_without_a_graph_break(path):
    """Traced to the end and run through AOTAutograd; what a back end then generates is not ours to test."""
    module, inputs = example_module()
    expected = module(*inputs)
    actual = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_only_first_derivatives():
    compiled_or_skip()
    value, locations, weights = checks.example(SHAPES, channels=4, device="cpu", dtype=torch.float64)
    output = ms_deform_attn(value, SHAPES, locations.requires_grad_(), weights)
    (first,) = torch.autograd.grad(output.sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


def test_autocast_narrows_the_values_and_not_the_locations(path):
    value, locations, weights = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    expected = ms_deform_attn(value.bfloat16(), SHAPES, locations, weights)
    with torch.autocast("cpu", torch.bfloat16):
        output = ms_deform_attn(value, SHAPES, locations, weights)
        assert ms_deform_attn(value.double(), SHAPES, locations.double(), weights.double()).dtype == torch.float64
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_shapes_are_checked_without_reading_a_tensor(path):
    """On the meta device there is nothing to read: an attempt would raise."""
    inputs = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    value, locations, weights = (tensor.to("meta").requires_grad_() for tensor in inputs)
    output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output.shape == (2, 5, 16)
    output.sum().backward()
    assert value.grad.shape == value.shape
    module, arguments = example_module()
    query, reference, tokens, shapes, padding = arguments
    meta = [tensor.to("meta") for tensor in (query, reference, tokens, padding)]
    assert module.to("meta")(*meta[:3], shapes, meta[3]).shape == query.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value: expected \(B, L, heads, channels\), got \(49, 2, 8\)"),
        (lambda v, s, x, w: (v, s[:2], x, w), r"has 47 cells, value 49"),
        (lambda v, s, x, w: (v, [*s, (0, 3)], x, w), r"at least 1 each level, got .*\(0, 3\)"),
        (lambda v, s, x, w: (v, torch.tensor(s), x, w), "level_shapes: a tensor"),
        (lambda v, s, x, w: (v, [7, 5], x, w), r"one \(height, width\) .* got \[7, 5\]"),
        (lambda v, s, x, w: (v, [(7.0, 5.0), *s[1:]], x, w), r"one \(height, width\) .* got \[\(7.0"),
        (lambda v, s, x, w: (v, s, x[..., :1], w), r"expected \(2, 5, 2, 3, 3, 2\).*got \(2, 5, 2, 3, 3, 1\)"),
        (lambda v, s, x, w: (v, s, x[:, :, :, :, 0], w), r"locations: expected \(B, Q, heads, levels, points, 2\)"),
        (lambda v, s, x, w: (v, s, x[:1], w), r"locations: expected \(2, 5, .*got \(1, 5,"),
        (lambda v, s, x, w: (v, s, x, w[:, :4]), r"weights: expected \(2, 5, 2, 3, 3\).*got \(2, 4,"),
        (lambda v, s, x, w: (v.int(), s, x, w), "value: torch.int32 is none of"),
        (lambda v, s, x, w: (v, s, x.to("meta"), w), "locations is on meta, value on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    value, locations, weights = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(value, SHAPES, locations, weights))


# The module


def example_module(*, numbers: int = 2, padded: bool = True):
    """A small module with random parameters, and arguments for it."""
    torch.manual_seed(3)
    module = MSDeformAttn(hidden_dim=24, num_levels=3, num_heads=4, num_points=2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, tokens = torch.randn(2, 6, 24), torch.randn(2, LENGTH, 24)
    reference = torch.rand(2, 6, 3, numbers)
    padding = torch.rand(2, LENGTH) < 0.3
    return module, (query, reference, tokens, SHAPES, padding if padded else None)


def test_initialisation():
    """As published; the ring of eight heads written out for the first point."""
    module = MSDeformAttn(hidden_dim=256, num_levels=3, num_heads=8, num_points=4)
    bias = module.sampling_offsets.bias.detach().reshape(8, 3, 4, 2)
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(ring):
        for level in range(3):
            for point in range(4):
                expected = torch.tensor(direction) * (point + 1.0)
                torch.testing.assert_close(bias[head, level, point], expected, atol=1e-5, rtol=0)
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert not module.get_parameter(name).any(), name
    for projection in (module.value_proj, module.output_proj):
        assert not projection.bias.any()
        assert projection.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=1e-3)
    assert sum(p.numel() for p in module.parameters()) == 2 * 256 * 257 + 257 * (192 + 96)
    assert {name.rsplit(".", 1)[0] for name, _ in module.named_parameters()} == {
        "sampling_offsets", "attention_weights", "value_proj", "output_proj",
    }  # fmt: skip


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("numbers", [2, 4])
def test_module_against_the_definition(numbers, padded, path):
    """Written out with loops over images, queries, heads, levels and points."""
    module, (query, reference, tokens, shapes, padding) = example_module(numbers=numbers, padded=padded)
    module.double()
    query, reference, tokens = query.double(), reference.double(), tokens.double()
    actual = module(query, reference, tokens, shapes, padding)
    value = module.value_proj(tokens).detach().clone()
    if padded:
        value[padding] = 0
    offsets = module.sampling_offsets(query).detach().reshape(2, 6, 4, 3, 2, 2)
    weights = module.attention_weights(query).detach().reshape(2, 6, 4, 6).softmax(-1).reshape(2, 6, 4, 3, 2)
    expected = torch.zeros(2, 6, 24, dtype=torch.float64)
    for b in range(2):
        for q in range(6):
            for head in range(4):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for point in range(2):
                        x, y = offsets[b, q, head, level, point].tolist()
                        centre = reference[b, q, level].tolist()
                        if numbers == 2:
                            column, row = centre[0] * width + x - 0.5, centre[1] * height + y - 0.5
                        else:
                            column = (centre[0] + x / 2 * centre[2] / 2) * width - 0.5
                            row = (centre[1] + y / 2 * centre[3] / 2) * height - 0.5
                        for i in range(height):
                            for k in range(width):
                                share = max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - k))
                                if share:
                                    cell = value[b, start + i * width + k, head * 6 : head * 6 + 6]
                                    amount = share * weights[b, q, head, level, point]
                                    expected[b, q, head * 6 : head * 6 + 6] += amount * cell
                    start += height * width
    torch.testing.assert_close(actual, module.output_proj(expected))


def test_padded_cells_do_not_matter(path):
    module, (query, reference, tokens, shapes, padding) = example_module()
    changed = torch.where(padding[..., None], torch.randn_like(tokens), tokens).requires_grad_()
    output = module(query, reference, changed, shapes, padding)
    assert torch.equal(output, module(query, reference, tokens, shapes, padding))
    output.square().sum().backward()
    assert not changed.grad[padding].any()
    assert changed.grad[~padding].any()


def test_no_queries_and_no_images(path):
    module, (query, reference, tokens, shapes, padding) = example_module()
    output = module(query[:, :0], reference[:, :0], tokens, shapes, padding)
    assert output.shape == (2, 0, 24)
    output.sum().backward()
    assert not module.value_proj.weight.grad.any()
    assert module(query[:0], reference[:0], tokens[:0], shapes, padding[:0]).shape == (0, 6, 24)


def test_autocast_of_the_module(path):
    module, inputs = example_module()
    expected = module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(*inputs)
    assert output.dtype == torch.bfloat16
    assert checks.error(output, expected) < 2e-2
    output.float().sum().backward()
    assert module.sampling_offsets.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_dim": 30}, "hidden_dim: 30 is no multiple of num_heads, 4"),
        ({"num_points": 0}, "num_points: expected at least 1, got 0"),
    ],
)
def test_bad_sizes_of_the_module(settings, message):
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**{"hidden_dim": 24, "num_levels": 3, "num_heads": 4, "num_points": 2, **settings})


def test_bad_input_of_the_module():
    module, (query, reference, tokens, shapes, padding) = example_module()
    with pytest.raises(ValueError, match=r"reference: expected \(2, 6, 3\) with 2 or 4 .* got \(2, 6, 3, 1\)"):
        module(query, reference[..., :1], tokens, shapes, padding)
    with pytest.raises(ValueError, match=r"level_shapes: expected 3 levels, got \[\(7, 7\)\]"):
        module(query, reference, tokens, [(7, 7)], padding)
    with pytest.raises(ValueError, match=r"padding: expected \(2, 49\) of torch.bool, got \(2, 48\)"):
        module(query, reference, tokens, shapes, padding[:, 1:])
    with pytest.raises(ValueError, match=r"padding: .* got \(2, 49\) of torch.float32"):
        module(query, reference, tokens, shapes, padding.float())
    with pytest.raises(ValueError, match=r"query: expected 3 dimensions, the last of 24, got \(6, 24\)"):
        module(query[0], reference, tokens, shapes, padding)
    with pytest.raises(ValueError, match=r"value: expected 3 dimensions, the last of 24, got \(2, 49, 20\)"):
        module(query, reference, tokens[..., :20], shapes, padding)
    with pytest.raises(ValueError, match="has 49 cells, value 48"):
        module(query, reference, tokens[:, 1:], shapes, padding[:, 1:])


# The build


def fake_compiler(folder: Path, body: str) -> str:
    """A program that appends a line to calls.txt for each compilation, then does what `body` says."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\necho x >> {folder}/calls.txt\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def copying(library: Path) -> str:
    """What a fake compiler does that knows what comes out."""
    return f'while [ "$1" != -o ]; do shift; done; cp "{library}" "$2"'


def run_once() -> Tensor:
    value, locations, weights = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    return ms_deform_attn(value, SHAPES, locations, weights)


def test_a_failed_build_is_one_warning_and_the_plain_path(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, "echo 'line 7: no such thing' >&2; exit 3"))
    with plain_path():
        expected = run_once()
    with pytest.warns(UserWarning, match="(?s)plain PyTorch on cpu.*status 3:\nline 7: no such thing") as caught:
        results = [run_once() for _ in range(3)]
    assert all(torch.equal(result, expected) for result in results)
    assert len(caught) == 1
    assert (fresh / "calls.txt").read_text() == "x\n"
    assert doctor.main() == 0
    assert "because\n" in (text := capsys.readouterr().out)
    assert "line 7: no such thing" in text


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "CXX=no-such-compiler: there is no such program"),
        ("CXX", '"c++', 'CXX="c\\+\\+: No closing quotation'),
        ("CXX", " ", "CXX= : there is no such program"),
        ("PATH", "/nowhere", "no C\\+\\+ compiler: none of .* is in PATH"),
        ("TORCH_EXTENSIONS_DIR", __file__, "cache folder .*Not a directory"),
        ("TORCH_EXTENSIONS_DIR", "", "no cache folder: who is that.* Set TORCH_EXTENSIONS_DIR"),
        ("MS_DEFORM_ATTN", "plain", "MS_DEFORM_ATTN=plain is set"),
    ],
)
def test_no_compiler_no_folder_or_not_wanted(variable, value, reason, fresh, monkeypatch):
    def nobody():
        raise RuntimeError("who is that?")

    monkeypatch.setattr(Path, "home", nobody)  # as for a user without a name, without HOME
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable == "PATH":
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", fake_compiler(fresh, "exit 1"))
    monkeypatch.setenv(variable, value)
    assert re.search(reason, kernels.why_not("cpu"))
    assert doctor.main() == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_once().shape == (2, 5, 16)
    assert len(caught) == (variable != "MS_DEFORM_ATTN")  # who asked for the plain path need not be warned


def test_other_ranks_stay_silent(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_once()


@pytest.mark.parametrize("works", [True, False])
def test_many_processes_build_once(works, fresh, monkeypatch):
    """Threads here, each with a separate file lock; all of them ask before the first has finished."""
    body = 'sleep 0.5; while [ "$1" != -o ]; do shift; done; echo library > "$2"' if works else "sleep 0.5; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(fresh, body))
    recipe, results = build.cpu_recipe(), []

    def work():
        try:
            results.append(build.build(recipe).read_text())
        except build.BuildError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (fresh / "calls.txt").read_text() == "x\n"
    assert len(results) == 8
    assert len(set(results)) == 1
    assert ("library" if works else "failed with status 1") in results[0]
    if works:
        assert build.build(recipe) == recipe.library  # found, not built
    else:
        with pytest.raises(build.BuildError):
            build.build(recipe)  # a later run tries again
    assert (fresh / "calls.txt").read_text() == "x\n" * (1 if works else 2)


def test_a_damaged_library_is_built_again(built, monkeypatch):
    """To load a file that lost its end, as by a power failure, would end the process."""
    shutil.copy(build.cpu_recipe().library, built / "whole.so")
    Path(fake_compiler(built, copying(built / "whole.so"))).rename(built / "c++")
    monkeypatch.setenv("PATH", str(built), prepend=os.pathsep)
    library, expected = build.cpu_recipe().library, run_once()
    content, checksum = library.read_bytes(), build.checksum_file(library).read_bytes()
    cut, changed = content[: len(content) // 2], content[:-1] + b"x"
    for damaged, beside in ((content, None), (cut, checksum), (changed, checksum)):
        library.unlink()  # it is loaded: its content must stay as it is
        library.write_bytes(damaged)
        build.checksum_file(library).unlink(missing_ok=True)
        if beside:
            build.checksum_file(library).write_bytes(beside)
        with monkeypatch.context() as without_compiler:
            without_compiler.setenv("PATH", "/nowhere")
            forget_kernels()
            assert "no C++ compiler" in kernels.why_not("cpu")
    forget_kernels()
    assert kernels.why_not("cpu") is None
    assert library.read_bytes() == content
    assert build.is_whole(library)
    assert torch.equal(run_once(), expected)


def test_the_cache_is_this_users_alone(fresh, monkeypatch):
    """What others could have written is not loaded; what killed builds left is removed; no wait is endless."""
    body = 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
    monkeypatch.setenv("CXX", fake_compiler(fresh, body))
    recipe = build.cpu_recipe()
    library = build.build(recipe)
    folder = library.parent
    assert [path.stat().st_mode & 0o077 for path in (folder, library, build.checksum_file(library))] == [0, 0, 0]

    library.write_text("planted")
    build.checksum_file(library).write_text(build.checksum(library))
    folder.chmod(0o777)
    (folder / f"{library.stem}.build-abc").mkdir()
    assert build.build(recipe).read_text() == "library\n"
    assert folder.stat().st_mode & 0o022 == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".sha256", ".so"]
    library.chmod(0o722)
    assert not build.is_whole(library)

    with build.locked(library.with_suffix(".lock"), timeout=1):
        start = time.monotonic()
        with pytest.raises(build.BuildError, match=r"another process has held .*\.lock"):
            build.build(recipe, timeout=0.5)
        assert time.monotonic() - start < 5
    if os.getuid() == 0:  # another user's folder
        os.chown(folder, 12345, -1)
        with pytest.raises(
            build.BuildError, match="belongs to user 12345, and this is user 0; set TORCH_EXTENSIONS_DIR"
        ):
            build.build(recipe)


def test_a_kernel_that_is_wrong_steps_aside(built, monkeypatch):
    """It is compared with the plain path once, for each device and dtype; one warning has the numbers."""
    with plain_path():
        expected = run_once()
    right = kernels.OPERATORS["ms_deform_attn"]
    monkeypatch.setitem(
        kernels.OPERATORS, "ms_deform_attn", replace(right, compiled=lambda *rest: 1.01 * right.compiled(*rest))
    )
    with pytest.warns(UserWarning, match=r"of ms_deform_attn on cpu differ .* by 1.0e-02 in torch.float32, more than"):
        results = [run_once() for _ in range(3)]
    assert all(torch.equal(result, expected) for result in results)


def test_a_kernel_that_fails_steps_aside(built, monkeypatch):

    def broken(*arguments):
        raise RuntimeError("no kernel image")

    right = kernels.OPERATORS["ms_deform_attn"]
    monkeypatch.setitem(kernels.OPERATORS, "ms_deform_attn", replace(right, compiled=broken))
    with pytest.warns(UserWarning, match="of ms_deform_attn fail on cpu.*: no kernel image") as caught:
        assert all(torch.equal(run_once(), run_once()) for _ in range(2))
    assert len(caught) == 1


@pytest.mark.parametrize("mode", ["inference", "no grad", "autocast", "fake", "compile"])
def test_the_first_call_may_be_inside_anything(mode, built, monkeypatch):
    """Where no gradients are, or no numbers at all."""
    value, locations, weights = checks.example(SHAPES, channels=8, device="cpu", dtype=torch.float32)
    contexts = {"inference": torch.inference_mode, "no grad": torch.no_grad, "fake": FakeTensorMode}
    context = contexts.get(mode, nullcontext)() if mode != "autocast" else torch.autocast("cpu", torch.bfloat16)
    function = lambda *x: ms_deform_attn(x[0], SHAPES, *x[1:])  # noqa: E731
    with warnings.catch_warnings(), context:
        warnings.simplefilter("error", UserWarning)
        if mode == "fake":
            value, locations, weights = (context.from_tensor(x) for x in (value, locations, weights))
        elif mode == "compile":
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert function(value, locations, weights).shape == (2, 5, 16)
    torch._dynamo.reset()
    assert kernels.correct.cache_info().currsize == 1


def test_from_the_official_initialisation_on_both_paths_learn_the_same():
    """Its points lie whole cells from the references, at kinks of the interpolation, where the smallest difference of
    a location shows in the gradient, and through AdamW in the weights. A third path is the published formula."""
    compiled_or_skip()
    shapes = [(13, 17), (7, 9), (4, 5)]
    length = sum(height * width for height, width in shapes)
    grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes]
    reference = torch.cat(grids).double()[None, :, None].expand(2, -1, 3, -1)
    tokens, position = torch.randn(2, 2, length, 32, generator=torch.Generator().manual_seed(0)).double()

    def train(attend) -> list[Tensor]:
        """Output and gradients of the first step, and the weights after ten."""
        torch.manual_seed(0)
        module = MSDeformAttn(hidden_dim=32, num_levels=3, num_heads=8, num_points=4).double()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        results = []
        for _ in range(10):
            leaves = [x.clone().requires_grad_() for x in (tokens + position, reference, tokens)]
            output = attend(module, *leaves)
            optimizer.zero_grad()
            output.square().mean().backward()
            results = results or [output, *(x.grad.clone() for x in (*leaves, *module.parameters()))]
            optimizer.step()
        return [*results, *module.parameters()]

    def published(module: MSDeformAttn, query: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        value = module.value_proj(tokens).unflatten(-1, (8, 4))
        sizes = torch.tensor([(width, height) for height, width in shapes])
        offsets = module.sampling_offsets(query).unflatten(-1, (8, 3, 4, 2)) / sizes[:, None]
        grids = 2 * (reference[:, :, None, :, None] + offsets) - 1
        weights = module.attention_weights(query).unflatten(-1, (8, 12)).softmax(-1).unflatten(-1, (3, 4))
        sampled = 0
        for level, (part, shape) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
            maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)  # (B * heads, C, H, W)
            places = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * heads, Q, points, 2)
            found = torch.nn.functional.grid_sample(maps, places, align_corners=False)
            sampled = sampled + (found * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return module.output_proj(sampled.unflatten(0, (2, 8)).flatten(1, 2).mT)

    compiled = train(lambda module, *x: module(*x, shapes))
    with plain_path():
        plain = train(lambda module, *x: module(*x, shapes))
    for ours, other, wanted in zip(compiled, plain, train(published), strict=True):
        scale = max(1e-3, wanted.abs().max().item())
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(other, wanted, rtol=0, atol=1e-9 * scale)


def test_a_library_that_does_not_load(fresh, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(fresh, 'while [ "$1" != -o ]; do shift; done; echo text > "$2"'))
    assert "does not load" in kernels.why_not("cpu")


def test_a_library_that_is_there_needs_no_compiler(built, monkeypatch):
    """Built where there is one, used where there is none: on a compute node, say."""
    library = build.cpu_recipe().library
    monkeypatch.setenv("PATH", "/nowhere")
    assert kernels.why_not("cpu") is None
    monkeypatch.setenv("CXX", "other")  # who names a compiler wants its library
    assert build.cpu_recipe().library != library


def test_the_name_of_a_library_tells_what_it_depends_on(fresh, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(fresh, "exit 1"))
    first = build.cpu_recipe().library.name
    assert f"torch{torch.__version__.split('+')[0]}" in first
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert build.cpu_recipe().library.name != first
    monkeypatch.setattr(torch, "__version__", "9.9.0+cu999")
    assert "torch9.9.0-" in build.cpu_recipe().library.name


def test_architectures(fresh, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "find_nvrtc", lambda: "libnvrtc.so.13")
    monkeypatch.setattr(nvrtc, "version", lambda path: "13.0")
    monkeypatch.setattr(nvrtc, "architectures", lambda path: [80, 90, 100])
    monkeypatch.setattr(sys, "executable", fake_compiler(fresh, 'while [ "$1" != -o ]; do shift; done; echo x > "$2"'))
    assert build.wanted_architectures() == ["8.0", "9.0", "10.0"]  # of the default list what NVRTC knows
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX 9.0a")
    for _ in range(2):  # the second finds everything built
        assert build.main(["cuda"]) == 0
        lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert lines == ["cuda sm_80"] * 4 + ["cuda sm_90"] * 4
    assert len((fresh / "calls.txt").read_text().splitlines()) == 8
    assert len(list(fresh.glob("cache/sam_detr_ops/ms_deform_attn_*-sm_?0-nvrtc13.0-*.cubin"))) == 8
    for wrong, line in {
        "Hopper": "TORCH_CUDA_ARCH_LIST: 'Hopper' is no compute capability such as 9.0 or 9.0+PTX",
        "9.0 90": "TORCH_CUDA_ARCH_LIST: '90' is no compute capability such as 9.0 or 9.0+PTX",
        "7.0": "TORCH_CUDA_ARCH_LIST: 7.0 is unknown to NVRTC 13.0, which has 8.0 9.0 10.0",
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        assert build.main(["cuda"]) == 2
        assert capsys.readouterr().err == line + "\n"


def test_make_without_compilers(fresh, monkeypatch, capsys):
    """Skips a device that nobody asked for; to make nothing, or not what was asked for, is a failure."""

    def absent():
        raise build.NoCompiler("no NVRTC: nowhere")

    monkeypatch.setattr(build, "find_nvrtc", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CXX", fake_compiler(fresh, 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'))
    assert build.main([]) == 0
    assert "cuda: skipped, no NVRTC: nowhere" in capsys.readouterr().out
    assert build.main(["cuda"]) == 1
    assert capsys.readouterr().out == "cuda: FAILED, no NVRTC: nowhere\n"
    monkeypatch.setenv("CXX", "/bin/false")
    assert build.main([]) == 1
    assert "failed with status 1:\n(no message)" in capsys.readouterr().out
    assert build.main(["gpu"]) == 2


@pytest.mark.parametrize("interpreter", ["no-such-python", "torchless"])
def test_make_without_pytorch(interpreter, tmp_path):
    if interpreter == "torchless":
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
        script.chmod(0o755)
        interpreter = str(script)
    command = ["bash", str(REPOSITORY / "models/ops/make.sh")]
    made = subprocess.run(command, env={**os.environ, "PYTHON": interpreter}, capture_output=True, text=True)
    assert made.returncode == 2
    assert made.stderr.splitlines() == [
        f"{interpreter} has no PyTorch: run scripts/setup.sh, or name another interpreter with PYTHON"
    ]


def test_make_as_a_program(library, tmp_path):
    """From any folder; leaves a library that loads. A relative cache folder is one of the caller's."""
    compiler = fake_compiler(tmp_path, copying(library))
    environment = {**os.environ, "PYTHON": sys.executable, "TORCH_EXTENSIONS_DIR": "a b", "CXX": compiler}
    command = ["bash", str(REPOSITORY / "models/ops/make.sh"), "cpu"]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (library,) = tmp_path.glob("a b/sam_detr_ops/*.so")
    assert library.name in made.stdout
    assert ctypes.CDLL(str(library)).ms_deform_attn_forward_float32


def test_the_benchmark(monkeypatch, capsys):
    """A row for each shape, type and path; bad arguments are refused in a line."""
    path = REPOSITORY / "benchmarks" / "ms_deform_attn.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "SHAPES", {"small": ([(5, 4), (2, 3)], None), "few": ([(5, 4)], 3)})
    monkeypatch.setattr(benchmark, "copy_speed", lambda *arguments: 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--repeats", "1", "--batch", "2"])
    benchmark.main()
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith(("small", "few"))]
    paths = [*([] if kernels.why_not("cpu") else ["compiled"]), "plain", "autograd"]
    assert rows == [[name, t, p] for name in ("small", "few") for t in ("float32", "bfloat16") for p in paths]
    for wrong in (["--repeats", "0"], ["--dtypes", "int8"], ["--device", "cuda"], ["--threads", "x"]):
        monkeypatch.setattr(sys, "argv", ["benchmark", *wrong])
        with pytest.raises(SystemExit, match="2"):
            benchmark.main()
