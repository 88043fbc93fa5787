"""What scripts/gpu_check.sh found, as a page; and the table of docs/published.md of what training costs, from it:
`python benchmarks/gpu_report.py OUT/report.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import report
from samdetr.util.files import whole_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "published.md"
MARKS = ("<!-- cost: benchmarks/gpu_report.py writes this -->\n", "<!-- end of cost -->\n")
BEST = "bf16 + compile"
RECIPES = {
    "R50_SMCA": "SAM-DETR R50 + SMCA",
    "R50_DC5_SMCA": "SAM-DETR R50-DC5 + SMCA",
    "R50_MS_SMCA": "SAM-DETR R50 multi-scale + SMCA",
    "DEFORMABLE_R50": "Deformable DETR R50",
    "SAP_R50": "SAP-DETR R50",
}
UNKNOWN = "not yet measured"


def faults(result: dict) -> list[str]:
    """What is not as it should be; a row that was not measured is one, too."""
    if "error" in result:
        return [result["error"]]
    checks = [f"{name}: {check['text']}" for name, check in result.get("checks", {}).items() if not check["ok"]]
    rows = [f"{row['config']}, {row['mode']}: {row['error']}" for row in result.get("models", []) if "error" in row]
    return checks + rows


def verdict(result: dict) -> str:
    found = faults(result)
    took = f"{result.get('seconds', 0):.0f} s"
    return f"{len(found)} faults in {took}; the first: {found[0]}" if found else f"as it should be, {took}"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def markdown(whole: dict) -> str:
    about, parts = whole["environment"], whole["parts"]
    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    if about["device"] == "cpu":
        lines += ["**Small, on a CPU: shows that the check runs, and nothing about a GPU.**", ""]
    lines += [*table(["part", "result"], [[name, cell(verdict(result))] for name, result in parts.items()]), ""]
    for name, result in parts.items():
        lines += [f"## {name}", "", *(f"- {cell(fault)}" for fault in faults(result)), ""]
        found = result.get("checks", {}).items()
        checks = [[label, "ok" if one["ok"] else "FAILED", cell(one["text"])] for label, one in found]
        if checks:
            lines += [*table(["check", "", "found"], checks), ""]
        if "operators" in result:
            lines += [*operator_table(result["operators"]), "", *model_table(result["models"]), ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def operator_table(rows: list[dict]) -> Iterator[str]:
    """Milliseconds of the device, and in brackets by the clock, dispatch included."""

    def times(row: dict, kind: str) -> str:
        return f"{row[kind]['device_ms']:.3f} ({row[kind]['clock_ms']:.3f})"

    body = [[row["shape"], row["dtype"], row["path"], times(row, "forward"), times(row, "both")] for row in rows]
    yield from table(["deformable attention", "type", "path", "forward ms (clock)", "+ backward ms (clock)"], body)


def model_table(rows: list[dict]) -> Iterator[str]:
    plain = {row["config"]: row for row in rows if row["mode"] == "plain float32" and "error" not in row}
    body = []
    for row in rows:
        start = [f"{row['config']}, batch {row['batch']}", row["mode"]]
        if "error" in row:
            body.append([*start, cell(row["error"]), "", "", "", ""])
            continue
        base = plain.get(row["config"])
        cells = []
        for task in ("train", "evaluate"):
            speed = row[task]["images_s"]
            cells.append(f"{speed:.1f}" + (f" ({speed / base[task]['images_s']:.2f}x)" if base else ""))
        share = ", ".join(f"{name} {value:.0%}" for name, value in row["share"].items())
        body.append([*start, *cells, peak(row), f"{row['hours']['12']:.1f}", share])
    head = ["model", "mode", "training images/s", "evaluation images/s", "peak MiB", "hours of 12 epochs", "step"]
    yield from table(head, body)


def peak(row: dict) -> str:
    return f"{row['train']['peak_mib']:.0f}" if "peak_mib" in row["train"] else "-"


def write_all(folder: Path, whole: dict) -> None:
    report.write(folder / "report.json", whole)
    with whole_file(folder / "report.md") as temporary:
        temporary.write_text(markdown(whole))


def cost(whole: dict | None) -> str:
    """The lines of the page's table. Raises ValueError for a report of a CPU: it says nothing of costs."""
    rows: dict[str, dict] = {}
    if whole is not None:
        if whole["environment"]["device"] != "cuda":
            raise ValueError("a report without a GPU says nothing of costs; run scripts/gpu_check.sh on one")
        measured = whole["parts"].get("speed", {}).get("models", [])
        rows = {row["config"]: row for row in measured if row["mode"] == BEST and "error" not in row}
    body = []
    for config, label in RECIPES.items():
        row = rows.get(config)
        hours = [f"{row['hours'][n]:.0f}" for n in ("12", "50")] if row else [UNKNOWN, UNKNOWN]
        rest = [f"{row['train']['images_s']:.1f}", f"{peak(row)} MiB, batch {row['batch']}"] if row else [UNKNOWN] * 2
        body.append([label, *hours, *rest])
    where = f"One {whole['environment']['name']}, `--amp bf16 --compile`." if whole else "No GPU has been at hand."
    head = ["model", "GPU-hours, 12 epochs", "50 epochs", "training images/s", "peak memory"]
    return "\n".join([where, "", *table(head, body), ""])


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: {Path(__file__).name} REPORT.json", file=sys.stderr)
        return 2
    try:
        lines = cost(json.loads(Path(arguments[0]).read_text()))
    except OSError as error:
        print(f"{arguments[0]}: {error.strerror}; scripts/gpu_check.sh writes one", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if type(error) is ValueError else "no report of scripts/gpu_check.sh"
        print(f"{arguments[0]}: {reason}", file=sys.stderr)
        return 2
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with whole_file(PAGE) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}{lines}{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
