"""`python benchmarks/gflops.py` writes the counted GFLOPs into the headers of recipes, README and docs/published.md.

They are those of the network as published, for an image of 800 x 1120; inference/counting.py says what counts.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from samdetr.cli import parse
from samdetr.inference.counting import count
from samdetr.inference.plain import plain
from samdetr.training.run import build_network
from samdetr.util.files import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = (800, 1120)
TABLES = ("README.md", "docs/published.md")
HEADER = re.compile(r"^(# GFLOPs .*;) (?:measured by us: not yet|counted: .*)$", re.MULTILINE)


def counted(script: Path) -> float:
    """GFLOPs of the network that a recipe trains."""
    run = {"env": {**os.environ, "DRY_RUN": "1"}, "capture_output": True, "text": True, "check": True}
    words = shlex.split(subprocess.run(["bash", str(script)], **run).stdout)
    settings = parse(words[words.index("main.py") + 1 :]).settings.with_resolved_norm()
    return count(plain(build_network(settings)[0]), SIZE).flops / 1e9


def put(file: Path, pattern: re.Pattern, text: str) -> None:
    """Replace what a pattern finds in a file by `text`."""
    old = file.read_text(encoding="utf-8")
    with whole_file(file) as temporary:
        temporary.write_text(pattern.sub(text, old), encoding="utf-8")
        temporary.chmod(file.stat().st_mode)


def main() -> None:
    for script in sorted((REPOSITORY / "scripts").glob("*.sh")):
        if not HEADER.search(script.read_text(encoding="utf-8")):
            continue
        figure = f"{counted(script):.1f}"
        print(f"{script.stem:40} {figure}", flush=True)
        put(script, HEADER, rf"\1 counted: {figure}")
        # The cell before that of the recipe: "203" or "203 / 203.4".
        cell = re.compile(rf"\| (\d+)(?: / [\d.]+)? \|(?=[^|\n]*scripts/{script.stem}\.sh)")
        for table in TABLES:
            put(REPOSITORY / table, cell, rf"| \1 / {figure} |")


if __name__ == "__main__":
    main()
