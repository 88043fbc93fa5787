"""Settings from a command line. The parser is derived from the dataclasses; nothing is declared here."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from samdetr.models.build import FAMILIES
from samdetr.models.settings import AlignerConfig
from samdetr.training.settings import PARTS, RunSettings
from samdetr.util.command_line import as_flags, program_name
from samdetr.util.settings import Settings, flags, value_type

# What people need first, in this order; the rest follows by subject.
FIRST = (
    "coco_path", "output_dir", "model", "resume", "eval", "batch_size", "epochs", "lr", "device", "num_workers",
)  # fmt: skip
METAVARS = {int: "N", float: "X", str: "TEXT"}
TITLES = {"trunk": "network (with --resume, values that are not given come from the checkpoint)"}  # others: their name


@dataclass(frozen=True)
class CommandLine:
    """What the user typed."""

    settings: RunSettings  # all of them, checked one by one and together
    given: Mapping[str, Any]  # the values of the flags that were typed, by the names of the settings
    typed: Mapping[str, str]  # their spelling, e.g. {"aux_loss": "--no_aux_loss"}

    def with_flags(self, text: str) -> str:
        """A message with its arguments, `hidden_dim`, as flags, --hidden_dim: as typed, if they were."""
        return with_flags(text, self.typed)


def with_flags(text: str, typed: Mapping[str, str] | None = None) -> str:
    """A message of a part below the programs, which names arguments in backticks, with flags instead."""
    return as_flags(text, {**_spellings(), **(typed or {})})


def parse(argv: Sequence[str] | None = None) -> CommandLine:
    """Settings from the words of a command line, `sys.argv` if None.

    Ends the program with status 2 after one line about a word it does not understand, and after `--help` with 0.

    Raises:
        ValueError: values that no run can use, flags spelled as the user typed them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    import_plugins(words)
    parser = build_parser()
    found = vars(parser.parse_args(words))
    typed = {
        action.dest: word
        for word in (word.split("=")[0] for word in words)
        if (action := parser.option(word)) and action.dest in found
    }
    _choose_aligner(found, typed)
    try:
        return CommandLine(RunSettings.from_flat(found), found, typed)
    except ValueError as error:
        raise ValueError(with_flags(str(error), typed)) from None


def _choose_aligner(found: dict[str, Any], typed: dict[str, str]) -> None:
    """`--aligner` and `--no_aligner` are short for a choice of `--sam_resample`, which alone is a setting."""
    wanted = found.pop("aligner", None)
    short = typed.pop("aligner", "")
    if wanted is False or (wanted and found.get("sam_resample") in ("off", None)):
        found["sam_resample"] = "points" if wanted else "off"
        typed["sam_resample"] = short if wanted else f"{short}, short for --sam_resample"


def import_plugins(words: Sequence[str]) -> None:
    """Import the modules or files that `--plugin` names, which register families. Raises ValueError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugin", action="append", default=[])
    for name in parser.parse_known_args(words)[0].plugin:
        import_plugin(name)


def import_plugin(name: str) -> None:
    """Import a module by its dotted name, or a file by its path. Raises ValueError."""
    try:
        if name.endswith(".py"):
            path = Path(name).resolve()
            module = f"samdetr_plugin_{path.stem}"
            if module in sys.modules:
                return
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        else:
            importlib.import_module(name)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(
            f"--plugin {name} cannot be imported ({error}); pass a module or a file that ends in .py"
        ) from None


class Parser(argparse.ArgumentParser):
    """Leaves flags that were not typed out of its result."""

    def __init__(self) -> None:
        super().__init__(
            program_name("main.py"),
            usage=f"{program_name('main.py')} [FLAGS]",
            description="Train or evaluate a detector. Examples are in README.md and docs/.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def option(self, word: str) -> argparse.Action | None:
        """The flag that a word of the command line is, if any."""
        return self._option_string_actions.get(word)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            self.error(f"{unknown} is no flag" + (f"; did you mean {near[0]}?" if near else ""))
        return found

    def error(self, message: str) -> NoReturn:
        """One line; the usage of all flags would hide it."""
        end = "" if message.endswith("?") else ";"
        self.exit(2, f"{self.prog}: error: {message}{end} --help lists all flags\n")


def build_parser() -> Parser:
    """The parser of all settings, of all families that are registered."""
    parser = Parser()
    first = parser.add_argument_group("start here")
    groups = {part: parser.add_argument_group(TITLES.get(part, part)) for part in PARTS}
    declared = {name: (kind, groups[part]) for part, kind in PARTS.items() for name, _ in flags(kind)}
    aligner = parser.add_argument_group("Semantics Aligner")
    declared |= {name: (AlignerConfig, aligner) for name, _ in flags(AlignerConfig)}
    for family in FAMILIES.values():
        group = parser.add_argument_group(f"--model {family.name}")
        declared |= {name: (family.config, group) for name, _ in flags(family.config) if name not in declared}
    for name in FIRST:
        declared[name] = (declared[name][0], first)
    for name in (*FIRST, *(name for name in declared if name not in FIRST)):
        kind, group = declared[name]
        _add(group, kind, name)
    switch = aligner.add_mutually_exclusive_group()
    switch.add_argument(
        "--aligner",
        action="store_true",
        help="an aligner in every decoder layer, if the family has none or --sam_resample is off",
    )
    switch.add_argument("--no_aligner", dest="aligner", action="store_false", help="short for --sam_resample off")
    return parser


def _add(group: Any, kind: type[Settings], name: str) -> None:
    """Add the flag or the flags of a field."""
    declared = dict(flags(kind))[name]
    if declared.hidden:
        return
    default, (type_, several) = getattr(kind, name), value_type(kind, name)
    if type_ is bool:
        turns_on = () if default is True else (f"--{name}", *declared.on)
        turns_off = declared.off or ((f"--no_{name}",) if default is True else ())
        if turns_on:
            text = declared.help if default is None else f"{declared.help} (default: off)"
            group.add_argument(*dict.fromkeys(turns_on), dest=name, action="store_true", help=text)
        if turns_off:
            text = f"{declared.help} (default: off)" if default is True else "the opposite"
            group.add_argument(*turns_off, dest=name, action="store_false", help=text)
        return
    group.add_argument(
        *declared.on,
        f"--{name}",
        dest=name,
        type=type_,
        nargs="+" if several else None,
        choices=tuple(FAMILIES) if name == "model" else declared.choices,
        metavar=declared.metavar or (None if declared.choices or name == "model" else METAVARS[type_]),
        help=f"{declared.help} (default: {_defaults(name, default)})".replace("%", "%%"),
    )


def _defaults(name: str, default: Any) -> str:
    """The default, and those of families that were published with others."""
    others = [f"; {f.name}: {_shown(f.defaults[name])}" for f in FAMILIES.values() if name in f.defaults]
    return "".join([_shown(default), *others])


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "unset" if default is None else "empty" if default == "" else str(default)


def _spellings() -> dict[str, str]:
    """How the switches that are on by default are spelled if they were not typed: as what turns them off."""
    kinds = [*PARTS.values(), *(family.config for family in FAMILIES.values())]
    switches = {n: declared for kind in kinds for n, declared in flags(kind) if getattr(kind, n) is True}
    return {name: declared.off[0] if declared.off else f"--no_{name}" for name, declared in switches.items()}


def program_parser(file: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of a program that has few flags. `description`, its docstring, keeps its line breaks."""
    return argparse.ArgumentParser(
        program_name(file),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )
