"""The mapping between labels of the network and categories of an annotation file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from samdetr.datasets.annotations import is_category


@dataclass(frozen=True)
class Categories:
    """`category_ids` and `names` map a label to the category's id and name.

    Labels are below `num_classes`, the width of the class head. A label without an entry is a gap and never a
    detection.
    """

    num_classes: int
    category_ids: dict[int, int]
    names: dict[int, str]

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> label."""
        return {category: label for label, category in self.category_ids.items()}

    @classmethod
    def from_annotations(cls, categories: Sequence[dict], *, file: str = "the annotation file") -> Categories:
        """Labels for the `categories` entry of a COCO annotation file.

        Labels are the ids, as in the published models (91 classes for COCO, whose ids end at 90). If ids are negative
        or far too large for the outputs of a class head, labels count the ids in sorted order.

        Raises:
            ValueError: no category, one without an integer id or a name, or an id that occurs twice; names `file`.
        """
        if not categories:
            raise ValueError(f"{file}: 'categories' is empty; list the classes as {{'id': 1, 'name': 'cat'}}, ...")
        names: dict[int, str] = {}
        for entry in categories:
            if not is_category(entry):
                raise ValueError(f"{file}: category {entry!r} needs an integer 'id' of 64 bits and a text 'name'")
            identity, name = entry["id"], entry["name"]
            if identity in names:
                raise ValueError(
                    f"{file}: category id {identity} is both {names[identity]!r} and {name!r}; give each a separate id"
                )
            names[identity] = name

        ids = sorted(names)
        usable = ids[0] >= 0 and ids[-1] < max(1000, 2 * len(ids))
        labels = ids if usable else list(range(len(ids)))
        return cls(
            num_classes=labels[-1] + 1,
            category_ids=dict(zip(labels, ids)),
            names={label: names[category] for label, category in zip(labels, ids)},
        )

    def check_covers(self, other: Categories, *, file: str, used: Collection[int] | None = None) -> None:
        """Require that every category of `other`, read from `file`, is among these with the same id and name.

        If ids that are `used` by objects are given, the other categories do not matter.

        Raises:
            ValueError: names the ids that differ, both names of each, and `file`.
        """
        ours = {row["id"]: row["name"] for row in self.to_list()}
        wrong = [
            f"id {row['id']} is {row['name']!r} in the file and {ours.get(row['id'], 'absent')!r} in the model"
            for row in other.to_list()
            if (used is None or row["id"] in used) and ours.get(row["id"]) != row["name"]
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{file}: its categories differ from those of the model: {'; '.join(wrong[:3])}{more}; "
                "use an annotation file with the ids and names of the training file (python -m datasets.check FOLDER "
                "--fix OUT.json makes both agree); to train on other classes, pass `pretrained` instead of `resume`"
            )

    def to_list(self) -> list[dict]:
        """Plain values for a checkpoint: a dict {label, id, name} for each category."""
        return [{"label": k, "id": identity, "name": self.names[k]} for k, identity in self.category_ids.items()]

    @classmethod
    def from_list(cls, rows: Sequence[dict], num_classes: int | None = None) -> Categories:
        """Undo `to_list`. `num_classes` defaults to the largest label + 1, as in `from_annotations`."""
        return cls(
            num_classes=max(row["label"] for row in rows) + 1 if num_classes is None else num_classes,
            category_ids={row["label"]: row["id"] for row in rows},
            names={row["label"]: row["name"] for row in rows},
        )


# The 80 classes of COCO 2017. Official checkpoints hold no names; their labels are these ids.
COCO = Categories.from_annotations(
    [
        {"id": identity, "name": name}
        for first, names in [
            (1, "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant"),
            (13, "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe"),
            (27, "backpack, umbrella"),
            (31, "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove"),
            (41, "skateboard, surfboard, tennis racket, bottle"),
            (46, "wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot"),
            (58, "hot dog, pizza, donut, cake, chair, couch, potted plant, bed"),
            (67, "dining table"),
            (70, "toilet"),
            (72, "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator"),
            (84, "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"),
        ]
        for identity, name in enumerate(names.split(", "), first)
    ],
    file="COCO 2017",
)


def checkpoint_categories(checkpoint: Mapping[str, Any]) -> Categories | None:
    """The classes of a checkpoint from `read_checkpoint`. Official files hold none: COCO's if they have as many outputs
    as the published models, else None."""
    num_classes = checkpoint["settings"].get("num_classes")
    if "categories" in checkpoint:
        return Categories.from_list(checkpoint["categories"], num_classes=num_classes)
    return COCO if checkpoint["official"] and num_classes == COCO.num_classes else None
