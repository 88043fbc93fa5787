"""Which part may know which: imports flow one way, settings stop at the builders, no file is read as code."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("samdetr", "models", "datasets", "training", "inference", "util")

SOURCE = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in (*FOLDERS, "scripts", "benchmarks")))
    for path in REPOSITORY.glob(pattern)
)
PROGRAMS = {file.removesuffix(".py") for file in SOURCE if "/" not in file} - {"engine"}
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in SOURCE}
FAMILIES = sorted(
    path.name for path in (REPOSITORY / "models").iterdir() if (path / "__init__.py").exists() and path.name != "ops"
)


def parse(file: str) -> ast.Module:
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """Modules of ours that a file imports, wherever in it, without the package's name: "models.layers"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from samdetr.models import build` names a module, `from samdetr.models.build import ...` does not.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("samdetr.") in MODULES} or {node.module}
    return {name.removeprefix("samdetr.") for name in found if name.startswith("samdetr.")}


def foreign_names(tree: ast.Module) -> set[str]:
    """Imports of our folders and programs by bare names, which belong to everyone."""
    bare = {*FOLDERS, *PROGRAMS, "engine"} - {"samdetr"}
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        found |= {name for name in names if name.split(".")[0] in bare}
    return found


def builds_on(family: str) -> set[str]:
    """Families whose layers a family subclasses: `BUILDS_ON = ("sam_detr",)` in its __init__.py says so."""
    file = f"models/{family}/__init__.py"
    tree = parse(file) if (REPOSITORY / file).is_file() else ast.Module([], [])
    named = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BUILDS_ON"
    ]
    return set(ast.literal_eval(named[0])) if named else set()


def may_import(file: str, module: str) -> bool:
    """The drawing: programs -> training, inference -> engine, models, datasets -> util. "Shared" are the files of
    models/ that are neither a family nor the builder."""
    package, *rest = module.split(".")
    family = rest[0] if package == "models" and rest and rest[0] in FAMILIES else None
    shared = package == "models" and bool(rest) and family is None and rest[0] not in ("build", "ops")
    operator = package == "models" and rest[:1] == ["ops"]
    check = package == "datasets" and rest[:1] == ["check"]
    if file.startswith("util/"):
        return package == "util"
    if file.startswith("datasets/check/"):
        return package in ("datasets", "util")
    if file.startswith("datasets/"):
        return (package == "datasets" and not check) or package == "util"
    if file.startswith("models/ops/"):
        return operator
    if file == "models/build.py":
        return package == "util" or shared or family is not None
    if file in ("models/__init__.py", "models/checkpoints.py"):  # they look families up
        return package == "util" or shared or module == "models.build"
    if file.startswith("models/"):
        own = file.split("/")[1]
        return package == "util" or shared or operator or (family is not None and family in {own, *builds_on(own)})
    if file == "engine.py":
        return package in ("util", "datasets", "models")
    if file.startswith("training/"):
        return package in ("training", "engine", "models", "datasets", "util")
    if file.startswith("inference/"):
        return package in ("inference", "models", "datasets", "util")
    return package not in PROGRAMS or package == "cli"  # programs, and what measures them


def test_the_rules_see_the_files():
    """The tables above are made by looking; an empty one would let everything pass."""
    assert {"main.py", "training/loop.py", "models/build.py", "models/sam_detr/decoder.py"} <= set(SOURCE)
    assert "sam_detr" in FAMILIES
    assert imports(parse("models/sam_detr/decoder.py")) > {"models.attention", "models.semantics_aligner"}
    tree = ast.parse("def f():\n    from samdetr.models import matcher, load\n    import samdetr.util.box_ops as b, os")
    assert imports(tree) == {"models.matcher", "util.box_ops"}
    assert foreign_names(ast.parse("import datasets\nfrom models.x import y\nimport modelsx, samdetr.util")) == {
        "datasets",
        "models.x",
    }
    assert not may_import("models/detector.py", "models.sam_detr.decoder")
    assert not may_import("models/detector.py", "models.build")
    assert not may_import("models/ops/x.py", "util.box_ops")
    assert not may_import("inference/x.py", "training.loop")
    assert not may_import("training/x.py", "inference.watch")
    assert not may_import("training/x.py", "main")


def test_imports_flow_one_way():
    wrong = {file: {module for module in imports(parse(file)) if not may_import(file, module)} for file in SOURCE}
    wrong = {file: modules for file, modules in wrong.items() if modules}
    assert not wrong, (
        f"{wrong}: see may_import. Move what two rooms need below both; a family that subclasses another's layers says "
        'BUILDS_ON = ("OTHER",) in its __init__.py'
    )


def test_nothing_is_imported_by_a_bare_name():
    everything = [*SOURCE, *(f"tests/{path.name}" for path in (REPOSITORY / "tests").glob("*.py"))]
    wrong = {file: foreign_names(parse(file)) for file in everything}
    assert not {file: names for file, names in wrong.items() if names}


# Who may read a command line: main.py by cli.py, and programs with a few separate flags.
READ_SETTINGS = {"cli.py", "demo.py", "export.py", "slim.py", "compare.py", "count.py", "report.py"}
READ_SETTINGS |= {"datasets/shapes.py", "datasets/check/__main__.py", "datasets/convert.py"}
NAME_THE_TYPE = {"util/checkpoint.py", "models/checkpoints.py"}  # the reference's checkpoints hold a Namespace


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
