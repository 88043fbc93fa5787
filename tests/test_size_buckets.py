"""`--size_buckets`: batches of like aspect ratio, in an order that is a function of seed and epoch."""

import json
from itertools import chain

import pytest
import torch
from helpers import call_main, read_json, run_main, settings

from benchmarks.padding import padded_share
from samdetr.datasets.sampler import Buckets, TrainSampler
from samdetr.training.run import build_loaders


def ratios(number: int) -> list[float]:
    return (0.5 + torch.rand(number, generator=torch.Generator().manual_seed(number))).tolist()


def batches(length: int, *, size: int, accumulate: int, processes: int, number: int, epoch: int = 0, done: int = 0):
    """By step, process and part: the images of a batch."""
    by_rank = []
    for rank in range(processes):
        sampler = TrainSampler(
            length=length, batch=size * accumulate * processes, rank=rank, world_size=processes, seed=3,
            buckets=Buckets(ratios=ratios(length), number=number, group=size) if number > 1 else None,
        )  # fmt: skip
        sampler.set_epoch(epoch, done)
        order = list(sampler)
        assert len(order) == len(sampler)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        by_rank.append([parts[start : start + accumulate] for start in range(0, len(parts), accumulate)])
    return [list(step) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize(
    ("length", "size", "accumulate", "processes", "number"),
    [(103, 2, 1, 1, 4), (103, 4, 2, 3, 5), (100, 4, 1, 4, 2), (30, 4, 1, 2, 30), (9, 4, 1, 2, 8), (7, 3, 2, 1, 50)],
)
def test_every_process_gets_as_many_batches_of_like_images(length, size, accumulate, processes, number):
    """Data sets with fewer images than buckets, or than a batch in a bucket, too."""
    case = {"size": size, "accumulate": accumulate, "processes": processes, "number": number}
    found = batches(length, **case)
    assert len(found) == length // (size * accumulate * processes)
    assert all(len(parts) == accumulate for step in found for parts in step)
    groups = [group for step in found for parts in step for group in parts]
    assert all(len(group) == size for group in groups)
    # The images that the epoch has without buckets.
    plain = batches(length, **{**case, "number": 0})
    assert sorted(chain(*groups)) == sorted(i for step in plain for parts in step for group in parts for i in group)
    # Ranks of the ratios, by hand: bucket k has those from k / number to (k + 1) / number. What is left of a bucket is
    # less than a batch, so there are fewer mixed ones than buckets.
    values = ratios(length)
    bucket = {i: sorted(values).index(values[i]) * number // length for i in range(length)}
    assert sum(len({bucket[i] for i in group}) > 1 for group in groups) <= min(number, len(groups))
    assert batches(length, **case) == found  # a function of seed and epoch
    if len(groups) > 2:
        assert batches(length, **case, epoch=1) != found
    for done in range(len(found) + 1):
        assert batches(length, **case, done=done) == found[done:]


def test_accumulated_batches_are_those_of_more_processes():
    together = [
        [{frozenset(group) for parts in step for group in parts} for step in batches(60, **case, size=2, number=3)]
        for case in (
            {"accumulate": 4, "processes": 1},
            {"accumulate": 2, "processes": 2},
            {"accumulate": 1, "processes": 4},
        )
    ]
    assert together[0] == together[1] == together[2]


def test_less_padding():
    """10 images of 100 x 200 and 10 of 200 x 100, by hand: a mixed pair is padded to 200 x 200, half of it empty."""
    sizes = [(100, 200), (200, 100)] * 10
    plain = TrainSampler(length=20, batch=2, rank=0, world_size=1, seed=0)
    order = list(plain)
    mixed = sum(a % 2 != b % 2 for a, b in zip(order[::2], order[1::2]))
    share = 1 - 40e4 / (mixed * 8e4 + (10 - mixed) * 4e4)
    assert mixed > 2
    assert padded_share(plain, sizes, batch_size=2) == pytest.approx(share)
    buckets = Buckets(ratios=[width / height for height, width in sizes], number=2, group=2)
    sampler = TrainSampler(length=20, batch=2, rank=0, world_size=1, seed=0, buckets=buckets)
    assert padded_share(sampler, sizes, batch_size=2) == 0


def test_resumed_runs_have_the_same_bits(shapes, tmp_path, capsys):
    flags = ["--epochs", "1", "--batch_size", "2", "--accumulate", "2", "--lr", "1e-3"]
    run_main(shapes, *flags, "--size_buckets", "3", "--save_every_iterations", "2", "--output_dir", str(tmp_path / "a"))
    middle = tmp_path / "a" / "checkpoint0000_000002.pth"
    run_main(shapes, *flags, "--resume", str(middle), "--output_dir", str(tmp_path / "b"))  # the file says how many
    first, second = (torch.load(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert first["sampler"] == {"seed": 42, "batch": 4, "position": 16, "buckets": 3, "group": 2}
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    assert read_json(tmp_path / "b" / "settings.json")["size_buckets"] == 3
    capsys.readouterr()
    for other, said in (
        (["--size_buckets", "0"], "--size_buckets 3, here 0"),
        (
            ["--batch_size", "4", "--accumulate", "1"],
            "batches of like images (--size_buckets) of --batch_size 2, here 4",
        ),
    ):
        assert call_main(shapes, *flags, *other, "--resume", str(middle), "--output_dir", str(tmp_path / "c")) == 2
        assert said in capsys.readouterr().err


def test_overfit_and_unknown_sizes(own_shapes, capsys):
    found = settings(["--coco_path", str(own_shapes), "--overfit", "3", "--size_buckets", "2", "--batch_size", "2"])
    images = type("Images", (), {"ratios": lambda self: [0.5, 1.0, 2.0]})()
    few = type("Few", (), {"__len__": lambda self: 3, "__getitem__": None, "images": images})()
    images.by_id = lambda: [0, 1, 2]
    sampler = build_loaders(found.replace(num_workers=0), few, few)[0].sampler
    assert len(sampler) == 200  # 100 steps of 2, and each image as often as that needs
    assert max(sampler) < 67 * 3
    file = own_shapes / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    del content["images"][4]["width"], content["images"][4]["height"]
    file.write_text(json.dumps(content))
    assert call_main(own_shapes, "--size_buckets", "2", "--epochs", "1") == 2
    text = capsys.readouterr().err
    assert f"--size_buckets 2: {file} has no width and height of 1 images, such as image id" in text
