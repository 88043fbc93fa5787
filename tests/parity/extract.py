"""Reduce the reference figures to what the parity tests need.

    python tests/parity/extract.py FOLDER     (the folder of the full figures; files are written beside this script)

Kept, in float64 as they are: of the class logits every seventh query, in all decoder layers and both images; all
boxes, assignments and detections; all loss terms, gradient norms, parameter names and shapes; and the statistics of
SAM-DETR's initialisation outside the backbone. Of SAP-DETR, which has more queries, every eleventh and of these all
predictions. What the models of a family have in common is written once.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np

VARIANTS = (
    "r50_e12", "r50_e50", "r50_smca_e12", "r50_smca_e50", "r50_dc5_smca_e50", "r50_ms_e50", "r50_ms_smca_e50",
)  # fmt: skip
FAMILIES = {
    "sam_detr": VARIANTS,
    "deformable_detr": (
        "single_scale", "single_scale_dc5", "multi_scale", "multi_scale_refine", "multi_scale_refine_two_stage",
    ),
    "sap_detr": ("r50", "r50_dc5", "r50_live", "r50_live_q49"),
}  # fmt: skip
INITIALISED = ("r50_smca_e12", "r50_e50", "r50_ms_smca_e50")
EVERY = 7  # of the queries' logits
# Of SAP-DETR's queries, and in all that they predict; prime to the grid's 18 columns and to 49.
SAP_EVERY, SAP_SPARSE = 11, ("pred_logits", "pred_boxes", "pred_objs", "pred_points")
HERE = Path(__file__).parent


def read_full(folder: Path, variant: str, *, family: str = "sam_detr") -> tuple[dict, dict[str, np.ndarray]]:
    """One model's facts and arrays as the folder has them, and `queries`, whose logits are there: all."""
    facts = json.loads((folder / f"{family}_{variant}.json").read_text())
    with np.load(folder / f"{family}_{variant}.npz") as file:
        arrays = dict(file)
    return facts, arrays | {"queries": np.arange(arrays["pred_logits"].shape[2])}


def read_compact(variant: str, *, family: str = "sam_detr") -> tuple[dict, dict[str, np.ndarray]]:
    """The same of the files beside this script: fewer logits."""
    tables = _tables(family)
    facts = tables["variants"][variant]
    state = {name: shape for name, shape in tables["state_dict"].items() if name not in facts["without"]}
    with np.load(HERE / f"{family}.npz") as file:
        arrays = {name.split("/")[1]: file[name] for name in file.files if name.startswith(f"{variant}/")}
    trainable = [name for name in tables["trainable"] if name not in facts["without"]]
    return facts | {"state_dict": state | facts["other_shapes"], "trainable": trainable}, arrays


def read_initialisation(variant: str) -> dict[str, dict]:
    """Shape, mean, standard deviation and largest absolute value of each parameter after the official constructor."""
    return _tables("sam_detr")["initialisation"][variant]


def _tables(family: str) -> dict:
    return json.loads(gzip.decompress((HERE / f"{family}.json.gz").read_bytes()))


# Facts of a model that are not about its state dict; not every family has all of them.
FACTS = ("args", "losses", "total_loss", "grad_norms", "aliases", "fill_names", "loss_weights")


def reduce(folder: Path, family: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Tables and arrays to write."""
    full = {variant: read_full(folder, variant, family=family) for variant in FAMILIES[family]}
    state, trainable = {}, {}
    for facts, _ in full.values():
        state = facts["state_dict"] | state
        trainable |= dict.fromkeys(facts["trainable"])

    tables: dict = {"state_dict": state, "trainable": list(trainable), "variants": {}}
    arrays = {}
    for variant, (facts, values) in full.items():
        own = facts["state_dict"]
        tables["variants"][variant] = {name: facts[name] for name in FACTS if name in facts} | {
            "without": [name for name in state if name not in own],
            "other_shapes": {name: shape for name, shape in own.items() if shape != state[name]},
        }
        if family == "sap_detr":
            values = values | {name: values[name][..., ::SAP_EVERY, :] for name in SAP_SPARSE}
            values["queries"] = values["queries"][::SAP_EVERY]
        else:
            fewer = {name: values[name][:, ::EVERY] for name in ("enc_pred_logits",) if name in values}
            fewer["pred_logits"] = values["pred_logits"][:, :, ::EVERY]
            values = values | {"queries": values["queries"][::EVERY]} | fewer
        arrays |= {f"{variant}/{name}": value for name, value in values.items()}
    if family == "sam_detr":
        initialisation = json.loads((folder / "sam_detr_init.json").read_text())
        tables["initialisation"] = {variant: initialisation[variant] for variant in INITIALISED}
    return tables, arrays


def main(folder: Path) -> None:
    for family in FAMILIES:
        tables, arrays = reduce(folder, family)
        # A fixed time stamp, so that the same figures make the same file.
        (HERE / f"{family}.json.gz").write_bytes(gzip.compress(json.dumps(tables).encode(), mtime=0))
        np.savez_compressed(HERE / f"{family}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
