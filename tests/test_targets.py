"""Targets survive being packed, images without objects included."""

import torch

from samdetr.util.targets import TargetBatch


def target(image_id: int, objects: int) -> dict[str, torch.Tensor]:
    return {
        "labels": torch.arange(objects) + 10 * image_id,
        "boxes": torch.arange(4.0 * objects).view(-1, 4) + image_id,
        "image_id": torch.tensor(image_id),
        "orig_size": torch.tensor([480, 640 + image_id]),
    }


def test_round_trip():
    targets = [target(1, 2), target(2, 0), target(3, 5), target(4, 0)]
    packed = TargetBatch.pack(targets)
    assert packed.counts == [2, 0, 5, 0]
    assert packed.fields["labels"].tolist() == [10, 11, 30, 31, 32, 33, 34]  # by hand
    assert packed.fields["orig_size"].shape == (4, 2)
    torch.testing.assert_close(packed.to("cpu").unpack(), targets, rtol=0, atol=0)


def test_batch_without_any_object():
    (only,) = TargetBatch.pack([target(7, 0)]).unpack()
    assert only["boxes"].shape == (0, 4)
    assert only["labels"].dtype == torch.int64
    assert only["image_id"].item() == 7
