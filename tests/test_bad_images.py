"""Unreadable training images: others take their place, the same ones whoever loads them; they are counted, listed."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import (
    call_main,
    command,
    damage,
    data_set,
    error_line,
    in_processes,
    read_log,
    run_main,
    settings,
)

from samdetr.datasets import bad_images
from samdetr.datasets.bad_images import BadImages
from samdetr.training.run import build_loaders
from samdetr.util import distributed

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
MANY = ["--max_bad_images", "0.2"]  # of 16 images: three


def cut(image: Path) -> Path:
    """Seen at the start of a run."""
    image.write_bytes(image.read_bytes()[:-100])
    return image


def image(data: Path, number: int) -> Path:
    return data / "train2017" / f"{number:012d}.jpg"


def epoch(data: Path, workers: int, number: int, *flags: str):
    """Batches of an epoch as (images, image ids), and what was unreadable."""
    words = ["--coco_path", str(data), "--train_sizes", "48", "64", "--batch_size", "4", *flags]
    found = settings([*words, "--num_workers", str(workers)])
    train_set = data_set("train", found)
    loader, _ = build_loaders(found, train_set, data_set("val", found))
    loader.sampler.set_epoch(number)
    train_set.set_epoch(number)
    batches, unreadable = [], {}
    for images, targets in loader:
        batches.append([images.images, targets.fields["image_id"], targets.fields["boxes"]])
        unreadable |= targets.unreadable
    return batches, unreadable, list(loader.sampler)


def test_replacements_are_a_function_of_seed_epoch_and_index(own_shapes):
    cut(image(own_shapes, 3))
    damage(image(own_shapes, 8))
    image(own_shapes, 11).unlink()
    batches, unreadable, order = epoch(own_shapes, 0, 0)
    for workers in (1, 2):
        torch.testing.assert_close(epoch(own_shapes, workers, 0)[0], batches, rtol=0, atol=0)
        assert epoch(own_shapes, workers, 0)[1] == unreadable
    assert unreadable[2].startswith("image file is truncated")
    assert unreadable[10] == "there is no such file"
    assert sorted(unreadable) == [2, 7, 10]

    seen = [int(number) for batch in batches for number in batch[1]]
    for number, index in zip(seen, order, strict=True):
        assert (number == index + 1) == (index not in unreadable)  # the others are where they were
    assert not {3, 8, 11} & set(seen)
    places = [order.index(index) for index in (2, 7, 10)]
    drawn = {tuple(seen[place] for place in places)}
    for batches, _, order in (epoch(own_shapes, 0, 1), epoch(own_shapes, 0, 0, "--seed", "3")):
        seen = [int(number) for batch in batches for number in batch[1]]
        drawn.add(tuple(seen[order.index(index)] for index in (2, 7, 10)))
    assert len(drawn) == 3


def test_held_in_memory_too(own_shapes):
    cut(image(own_shapes, 3))
    image(own_shapes, 11).unlink()
    plain, held = epoch(own_shapes, 0, 0), epoch(own_shapes, 0, 0, "--cache_mode")
    torch.testing.assert_close(held[0], plain[0], rtol=0, atol=0)
    assert held[1] == plain[1]


def test_training_goes_on_and_keeps_a_list(own_shapes, forks, tmp_path):
    """Two bad images, one seen at once and one where it is decoded; the same run with workers and after a resume."""
    cut(image(own_shapes, 3))
    damage(image(own_shapes, 8))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--epochs", "2", "--lr_drop", "1", *MANY, "--output_dir"]
    _, *words = command(own_shapes, *flags, str(whole), "--num_workers", "2")
    assert forks.main(words, tmp_path / "printed") == [0], forks.err()
    printed = forks.out()
    lines = (whole / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["000000000003.jpg", "000000000008.jpg"]
    assert all(len(line.split("\t")[1]) > 10 for line in lines)
    assert "data, train: error: image files that are cut: 1, such as '000000000003.jpg' (image id 3): " in printed
    assert printed.count("1 of 16 training images (6.25%) cannot be used and are replaced by others") == 1
    assert printed.count("2 of 16 training images (12.50%) cannot be used") == 1
    assert f"{whole}/bad_images.txt lists them; {image(own_shapes, 8)} (image id 8) cannot be used: " in printed

    # The same run in two parts and without workers.
    run_main(own_shapes, "--epochs", "1", "--lr_drop", "1", *MANY, "--output_dir", str(parts))
    run_main(own_shapes, *flags, str(parts), "--resume", str(parts / "checkpoint.pth"))
    assert read_log(parts) == read_log(whole)
    assert (parts / "bad_images.txt").read_text() == (whole / "bad_images.txt").read_text()


def test_too_many(own_shapes, tmp_path, capsys):
    """One is known at the start; the second shows when it is decoded; a list that is there is read again."""
    cut(image(own_shapes, 3))
    damaged = damage(image(own_shapes, 8))
    output = tmp_path / "output"
    flags = ["--epochs", "1", "--output_dir", str(output), "--max_bad_images"]

    def refused(share: str) -> str:
        assert call_main(own_shapes, *flags, share) == 2
        captured = capsys.readouterr()
        assert os.listdir(output) == ["bad_images.txt"]
        line = error_line(captured.err)
        assert f"more than --max_bad_images {share} allows; {output}/bad_images.txt lists them; " in line
        return line

    assert "1 of 16 training images (6.25%)" in refused("0.06")
    line = refused("0.0625")
    assert "2 of 16 training images (12.50%)" in line
    assert f"{damaged} (image id 8) cannot be used: " in line
    assert "2 of 16 training images (12.50%)" in refused("0.1")  # at the start, from the list
    for source in (3, 8):
        shutil.copy(image(own_shapes, 1), image(own_shapes, source))
    assert call_main(own_shapes, *flags, "0") == 0
    assert not (output / "bad_images.txt").exists()
    for share in ("-0.1", "1.1", "nan"):
        assert call_main(own_shapes, *flags, share) == 2
        assert f"--max_bad_images {share}" in capsys.readouterr().err


def test_all_unreadable(own_shapes, capsys):
    for number in range(1, 17):
        damage(image(own_shapes, number))
    assert call_main(own_shapes, "--max_bad_images", "1") == 2
    assert "nor can the 15 images tried after it" in error_line(capsys.readouterr().err)


def test_evaluation_cannot_replace(own_shapes, trained, capsys):
    bad = damage(own_shapes / "val2017" / "000000000019.jpg")
    flags = ["--eval", "--resume", str(trained / "checkpoint.pth")]
    assert call_main(own_shapes, *flags, network=[]) == 2
    assert f"{bad} (image id 19) cannot be used: " in error_line(capsys.readouterr().err)


def in_rank(rank: int, port: int, data: str, output: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    distributed.init_distributed(device="cpu")
    found = settings(["--coco_path", data, "--train_sizes", "64", "--num_workers", "0"])
    train_set = data_set("train", found)
    loader, _ = build_loaders(found, train_set, data_set("val", found))
    watched = BadImages(train_set, largest_share=3 / 16, folder=Path(output), every=3)
    said = [dict(watched.reasons)]
    for number in range(2):
        loader.sampler.set_epoch(number)
        try:
            for batches, (_, targets) in enumerate(loader, start=1):
                watched.note(targets.unreadable, last=batches == len(loader))
            said.append((batches, dict(watched.reasons), (Path(output) / bad_images.LIST).read_text()))
        except ValueError as error:
            said.append(str(error))
        distributed.barrier()
        if rank == 0:
            damage(image(Path(data), 5))
        distributed.barrier()
    Path(output, f"{rank}.json").write_text(json.dumps(said))
    distributed.shutdown()


def test_two_processes_know_the_same_and_stop_together(own_shapes, tmp_path):
    """One is found at the start, by the main process alone; two where they are decoded; a fourth is one too many."""
    cut(image(own_shapes, 3))
    for number in (8, 12):
        damage(image(own_shapes, number))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_processes(in_rank, (port, str(own_shapes), str(tmp_path)), 2)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    start, (batches, reasons, listed), stopped = said[0]
    assert list(start) == ["2"]
    assert batches == 4
    assert sorted(reasons, key=int) == ["2", "7", "11"]
    assert re.findall(r"^0*(\d+)\.jpg\t.", listed, re.MULTILINE) == ["3", "8", "12"]
    assert "4 of 16 training images (25.00%)" in stopped
    assert "000000000005.jpg" in (tmp_path / "bad_images.txt").read_text()
