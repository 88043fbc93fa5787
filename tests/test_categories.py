import json
from pathlib import Path

import pytest
import torch

from samdetr.datasets.categories import COCO, Categories

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def categories(*ids):
    return Categories.from_annotations([{"id": i, "name": f"n{i}"} for i in ids])


@pytest.mark.parametrize(
    ("ids", "labels", "num_classes"),
    [
        ((3, 1, 7), {1: 1, 3: 3, 7: 7}, 8),  # ids themselves, gaps and all
        ((0, 2), {0: 0, 2: 2}, 3),
        ((5, 999), {5: 5, 999: 999}, 1000),
        ((5, 1000), {0: 5, 1: 1000}, 2),  # 1000 is not below max(1000, 2 * 2)
        ((-1, 4, 2), {0: -1, 1: 2, 2: 4}, 3),
        (range(1, 602), {i: i for i in range(1, 602)}, 602),
        (range(1000, 1600), {i: 1000 + i for i in range(600)}, 600),  # 1599 is not below 2 * 600
        (range(500, 1200), {i: i for i in range(500, 1200)}, 1200),  # 1199 is below 2 * 700
    ],
)
def test_labels_are_ids_unless_ids_cannot_index_a_class_head(ids, labels, num_classes):
    found = categories(*ids)
    assert found.category_ids == labels
    assert found.num_classes == num_classes
    assert found.names == {label: f"n{i}" for label, i in labels.items()}
    assert found.label_of == {i: label for label, i in labels.items()}


def test_round_trip_through_a_weights_only_checkpoint(tmp_path):
    for before in (categories(2, 9), categories(-3, 70000), COCO):
        torch.save({"categories": before.to_list()}, tmp_path / "c.pth")
        rows = torch.load(tmp_path / "c.pth", weights_only=True)["categories"]
        assert Categories.from_list(rows) == before
    assert Categories.from_list(before.to_list(), num_classes=250).num_classes == 250


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "v.json.*empty"),
        ([{"name": "cat"}], "v.json.*integer 'id'"),
        ([{"id": "1", "name": "cat"}], "v.json.*integer 'id'"),
        ([{"id": 4}], "v.json.*'name'"),
        ([{"id": 4, "name": "cat"}, {"id": 4, "name": "dog"}], "v.json.*id 4 is both 'cat' and 'dog'"),
    ],
)
def test_faulty_categories_are_named(entries, message):
    with pytest.raises(ValueError, match=message):
        Categories.from_annotations(entries, file="v.json")


def test_a_subset_is_covered_and_other_names_or_ids_are_not():
    ours = categories(1, 2, 5)
    ours.check_covers(categories(5, 1), file="v.json")
    renamed = Categories.from_annotations([{"id": 1, "name": "n1"}, {"id": 2, "name": "dog"}])
    with pytest.raises(
        ValueError, match=r"v\.json.*id 2 is 'dog' in the file and 'n2' in the model;.*use an annotation"
    ):
        ours.check_covers(renamed, file="v.json")
    with pytest.raises(ValueError, match=r"id 7 is 'n7' in the file and 'absent' in the model"):
        ours.check_covers(categories(1, 7), file="v.json")


def test_the_coco_table():
    assert (COCO.num_classes, len(COCO.names)) == (91, 80)
    assert COCO.names[1] == "person"
    assert COCO.names[44] == "bottle"
    assert COCO.names[90] == "toothbrush"
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(COCO.names)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data with real COCO annotations is not here")
def test_the_coco_table_is_that_of_the_real_files():
    file = SHARED_DATA / "coco_tiny" / "annotations" / "instances_val2017.json"
    assert Categories.from_annotations(json.loads(file.read_text())["categories"]) == COCO
