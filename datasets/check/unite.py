"""The categories of the validation split, made those of the training split. Nothing is removed."""

from __future__ import annotations

from collections import Counter
from typing import Any


def unite_categories(train: dict, val: dict) -> tuple[dict, dict, int]:
    """Contents of valid annotation files in which train defines every category that has objects in val.

    A category of val that train defines under another id gets this id, if their names are equal but for case and
    spaces. A category whose name train does not know is added to train. Categories of val without objects stay as they
    are, or go if their id is needed. Returns both contents, and the number of categories of val that changed.
    """
    known = {entry["id"]: entry["name"] for entry in train["categories"]}
    names = {entry["id"]: entry for entry in val["categories"]}
    used = Counter(entry["category_id"] for entry in val["annotations"])
    unlike = [identity for identity in used if known.get(identity) != names[identity]["name"]]
    if not unlike:
        return train, val, 0
    by_name: dict[str, list[dict]] = {}
    for entry in train["categories"]:
        by_name.setdefault(_plain(entry["name"]), []).append(entry)
    added: list[dict] = []
    new = {identity: names[identity] for identity in used if identity not in unlike}  # by id in val
    for identity in unlike:
        same = [e for e in by_name.get(_plain(names[identity]["name"]), []) if e["name"] == names[identity]["name"]]
        same = same or by_name.get(_plain(names[identity]["name"]), [])
        if len(same) == 1:
            new[identity] = same[0]
        else:
            taken = {*known, *(entry["id"] for entry in added)}
            free = identity if identity not in taken else max({*taken, *names}) + 1
            added.append({**names[identity], "id": free})
            new[identity] = added[-1]
    categories: dict[int, Any] = {entry["id"]: entry for entry in new.values()}
    for identity, entry in names.items():
        if identity not in used:
            categories.setdefault(identity, entry)
    annotations = [{**entry, "category_id": new[entry["category_id"]]["id"]} for entry in val["annotations"]]
    return (
        {**train, "categories": [*train["categories"], *added]},
        {**val, "categories": list(categories.values()), "annotations": annotations},
        len(unlike),
    )


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
