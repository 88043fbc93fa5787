"""Which part may know which: imports flow one way, settings stop at the builders, no file is read as code."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("models", "datasets", "util")
PROGRAMS = ("main", "demo", "hubconf")

SOURCE = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in (*PACKAGES, "scripts", "benchmarks")))
    for path in REPOSITORY.glob(pattern)
)
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in SOURCE}
FAMILIES = sorted(
    path.name for path in (REPOSITORY / "models").iterdir() if (path / "__init__.py").exists() and path.name != "ops"
)


def parse(file: str) -> ast.Module:
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from models import build` names a module, `from models.build import build_model` does not.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES) or {node.module}
    return {name for name in found if name.split(".")[0] in {module.split(".")[0] for module in MODULES}}


def may_import(file: str, module: str) -> bool:
    """The rules. "Shared" are the files of models/ that are neither a family nor the builder."""
    package, *rest = module.split(".")
    family = rest[0] if package == "models" and rest and rest[0] in FAMILIES else None
    shared = package == "models" and bool(rest) and family is None and rest[0] not in ("build", "ops")
    operator = package == "models" and rest[:1] == ["ops"]
    if file.startswith("util/"):
        return package == "util"
    if file.startswith("datasets/"):
        return package in ("datasets", "util")
    if file.startswith("models/ops/"):
        return operator
    if file == "models/__init__.py":
        return module == "models.build"
    if file == "models/build.py":
        return package == "util" or shared or family is not None
    if file.startswith("models/"):
        own = file.split("/")[1]
        return package == "util" or shared or operator or (family is not None and family == own)
    if file == "engine.py":
        return package in ("util", "datasets")
    if file in ("training.py", "replay.py"):
        return package in ("engine", "util")
    if file == "main.py":
        return package not in PROGRAMS
    return True  # demo.py, hubconf.py, and programs that measure


def test_the_rules_see_the_files():
    """The tables above are made by looking; an empty one would let everything pass."""
    assert {"main.py", "training.py", "models/build.py", "models/sam_detr/decoder.py", "util/box_ops.py"} <= set(SOURCE)
    assert "sam_detr" in FAMILIES
    assert imports(parse("models/sam_detr/decoder.py")) > {"models.attention", "models.sam_detr.semantics_aligner"}
    tree = ast.parse("def f():\n    from models import matcher, build_model\n    import util.box_ops as b, os")
    assert imports(tree) == {"models.matcher", "util.box_ops"}
    assert not may_import("models/detector.py", "models.sam_detr.decoder")
    assert not may_import("models/detector.py", "models.build")
    assert not may_import("models/ops/x.py", "util.box_ops")


def test_imports_flow_one_way():
    wrong = {file: {module for module in imports(parse(file)) if not may_import(file, module)} for file in SOURCE}
    assert not {file: modules for file, modules in wrong.items() if modules}


# Who may turn command-line settings into arguments. The last two are programs with settings of their own.
READ_SETTINGS = {"main.py", "demo.py", "hubconf.py", "models/build.py", "datasets/__init__.py"}
READ_SETTINGS |= {"datasets/shapes.py", "datasets/check.py"}
NAME_THE_TYPE = {"util/checkpoint.py"}  # the reference's checkpoints hold a Namespace


def mentions_of_settings(tree: ast.Module, *, may_name_the_type: bool):
    """Lines that take or read `args` (`*args` is another thing), or import argparse."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            found = "args" in {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.Attribute):
            found = isinstance(node.value, ast.Name) and node.value.id == "args"
        elif isinstance(node, ast.ImportFrom):
            found = node.module == "argparse"
        else:
            named = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            found = "argparse" in named and not may_name_the_type
        if found:
            yield node.lineno


def test_settings_stop_at_the_builders():
    text = "def f(args): ...\ndef g(*args): h(*args)\nargs.lr\nfrom argparse import Namespace\nimport argparse"
    assert sorted(mentions_of_settings(ast.parse(text), may_name_the_type=False)) == [1, 3, 4, 5]
    files = [file for file in SOURCE if file not in READ_SETTINGS and not file.startswith("benchmarks/")]
    found = {f: list(mentions_of_settings(parse(f), may_name_the_type=f in NAME_THE_TYPE)) for f in files}
    assert not {file: lines for file, lines in found.items() if lines}


def test_weights_are_read_in_one_place_and_never_as_code():
    readers = []
    for file in SOURCE:
        tree = parse(file)
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if name == "torch.load" or name.endswith("load_state_dict_from_url"):
                    readers.append(file)
                    assert keywords.get("weights_only") == "True", where
                assert name not in ("pickle.load", "pickle.loads", "eval", "exec"), where
                assert "allow_pickle" not in keywords, where
            elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
                assert not {"load", "loads"} & {alias.name for alias in node.names}, where
    assert readers == ["util/checkpoint.py"]
