"""Names of weights under another naming, by a table."""

from __future__ import annotations

import re
from collections.abc import Sequence


def translate(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    """The name with its beginning replaced by the first rule (from, to) whose `from` it starts with, {i} standing for a
    number in both. None where no rule matches."""
    for source, target in rules:
        match = re.match(re.escape(source).replace(r"\{i\}", r"(\d+)"), name)
        if match:
            return target.replace("{i}", match.group(1) if match.groups() else "") + name[match.end() :]
    return None
