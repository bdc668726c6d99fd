"""Each floor imports only what lies below it, and `import jprob` stays light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"jprob": {"jax", "jaxtyping", "numpy"}, "jprob/mle": {"jax", "jaxtyping", "numpy", "optax", "jprob"}}
ALONE = {"checkpoint.py": {"orbax", "etils"}, "terminal.py": {"rich"}}  # optional, and known to this file alone
FILES = [*ROOT.glob("jprob/*.py"), *ROOT.glob("jprob/mle/*.py"), *ROOT.glob("experiments/studies/**/*.py")]


def imports(path: Path, *, with_names: bool = False) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it. `with_names`: what is taken from them, too."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [parent, node.module]))
            found |= {base} if node.module else set()
            found |= {f"{base}.{alias.name}" for alias in node.names} if with_names or not node.module else set()
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    floor = str(path.relative_to(ROOT).parent)
    for name in imports(path):
        if floor.startswith("experiments/studies"):
            own = floor.replace("/", ".") + "."  # a study that is a package imports its own files
            assert not name.startswith("experiments.studies.") or name.startswith(own), f"a study imports {name}"
            continue
        top = name.split(".")[0]
        assert top in FLOORS[floor] | ALONE.get(path.name, set()) | {"jprob"} | set(sys.stdlib_module_names), (
            f"{path.name} imports {name}"
        )
        if floor == "jprob" and path.name != "__init__.py":  # which loads it on first use
            assert not name.startswith("jprob.mle"), f"{path.name} imports {name} from the floor above"


def test_no_two_modules_of_the_harness_import_each_other():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
               for path in ROOT.glob("experiments/**/*.py")}  # fmt: skip
    graph = {}
    for module, path in modules.items():
        names = imports(path, with_names=True)
        graph[module] = {name for name in names if name in modules and not module.startswith(f"{name}.")} - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def private_names(path: Path) -> set[str]:
    """Names with an underscore that a file takes from other modules. A private module is none: it is there to share."""
    tree, modules, found = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                modules.add(alias.asname or alias.name.split(".")[0])
                folder = ROOT / (node.module or "").replace(".", "/") if isinstance(node, ast.ImportFrom) else ROOT
                folders = folder, *path.parents[: getattr(node, "level", 0)]
                if alias.name.startswith("_") and not any((f / f"{alias.name}.py").exists() for f in folders):
                    found.add(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} if node.value.id in modules else set()
    return found


@pytest.mark.parametrize("path", [*ROOT.glob("jprob/**/*.py"), *ROOT.glob("experiments/**/*.py")], ids=str)
def test_no_module_takes_another_ones_private_name(path):
    assert private_names(path) <= {"os._exit"}


def test_importing_jprob_is_light():
    heavy = {"optax", "orbax", "scipy", "matplotlib", "chex", "sklearn", "msgspec"}
    # jax itself imports scipy.special lazily; what counts is what jprob adds to it.
    code = "import sys, jax.experimental.checkify; b = {*sys.modules}; import jprob; print({*sys.modules} - b)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    added = {name.split(".")[0] for name in ast.literal_eval(out.stdout)}
    assert "jprob" in added
    assert not added & heavy
