"""The shape of the repository: who may import whom, what the wheel holds, what an import costs, the name `kernels`."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import kernels_stub
import llama_step
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folders and the packages that setup.py makes of them.
PACKAGES = {"lora_fast": "lora_fast", "kernels": "lora_fast.kernels", "profiler": "lora_fast.profiler"}
TOP_LEVEL = {
    *("kernels", "lora_fast", "profiler", "tests", "benchmarks", "setup.py", "README.md"),
    *("pyproject.toml", "Makefile", "constraints.txt", "CONTRIBUTING.md", "LICENSE", ".ci", ".gitignore"),
}

# From the bottom up, one floor a line: a module may import from its own floor and from those below. kernels and
# profiler stand for all their modules, __init__ for lora_fast/__init__.py, which offers the public names of the floors
# below it; they therefore never import from it.
FLOORS = """
kernels
config backend tuning fusion
distributed
fused
dispatch
ops dora
mlp grouped experts shared_input quantized
linear conv1d embedding subclass parameter peft_layers swiglu_mlp svd spectrum rank_evidence
checkpoint_files checkpoint_pair delta
targets injection merging
peft_bridge checkpoint rank_rules training_curve
adapter_updates
base_weights
update_spectra
resize extract
rank_search decision decision_answer decision_evidence decision_inputs decision_next
__init__
profiler
cli_output
cli_decide cli_profile cli_rank cli_report cli_search cli_spectra
cli
"""


def floor(module: str) -> int:
    """A module's floor, counted from the bottom."""
    name = module.removeprefix("lora_fast").lstrip(".").partition(".")[0] or "__init__"
    for height, members in enumerate(FLOORS.strip().splitlines()):
        if name in members.split():
            return height
    raise AssertionError(f"{module} stands on no floor: put it on one in FLOORS, in tests/test_layout.py")


def modules() -> dict[str, Path]:
    """Every module of the installed package and its file in the repository."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported_names(source: str) -> list[str]:
    """Dotted names of all imports, at any depth of the code: `from a import b` gives "a.b"."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" if base.strip(".") else base + alias.name for alias in node.names]
    return names


def imported_modules(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that a source imports; a name that is no module counts for the module that holds it."""
    found = set()
    for name in imported_names(source):
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        found |= {name} & known
    return found


def layout_errors(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of a package, given as module name → source."""
    errors, graph = [], {}
    for module, source in sources.items():
        height = floor(module)
        graph[module] = imported_modules(source, set(sources)) - {module}
        for other in sorted(graph[module]):
            if floor(other) > height:
                errors.append(f"{module} imports {other}, which stands on a higher floor")
        for name in imported_names(source):
            if name.startswith("."):
                errors.append(f"{module} has a relative import ({name}); write it as lora_fast.…")
            top = name.partition(".")[0]
            if module.startswith("lora_fast.kernels") and not (
                top in {"torch", "triton"} | set(sys.stdlib_module_names) or name.startswith("lora_fast.kernels.")
            ):
                errors.append(f"{module} imports {name}; kernels import only torch, triton and each other")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        errors.append("imports go in a circle: " + " → ".join(reversed(error.args[1])))
    return errors


def test_imports_point_down_and_never_in_a_circle():
    assert not layout_errors({module: path.read_text(encoding="utf-8") for module, path in modules().items()})


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"lora_fast.ops": "def f():\n    from lora_fast.linear import X", "lora_fast.linear": ""}, "higher floor"),
        ({"lora_fast.linear": "import lora_fast", "lora_fast": ""}, "higher floor"),
        ({"lora_fast.linear": "from lora_fast import VERSION", "lora_fast": ""}, "higher floor"),
        ({"lora_fast.linear": "from lora_fast import mlp", "lora_fast.mlp": "import lora_fast.linear"}, "circle"),
        ({"lora_fast.ops": "from .config import Z"}, "relative"),
        ({"lora_fast.kernels.gram": "import numpy"}, "kernels import only"),
        ({"lora_fast.kernels.gram": "from lora_fast.config import Z", "lora_fast.config": ""}, "kernels import only"),
    ],
)
def test_the_import_rules_find_what_they_forbid(sources, complaint):
    assert any(complaint in error for error in layout_errors(sources))


def test_the_import_rules_allow_what_they_should():
    sources = {
        "lora_fast.kernels.gram": "import math\nimport torch\nfrom lora_fast.kernels import reference",
        "lora_fast.kernels.reference": "from __future__ import annotations\nimport torch",
        "lora_fast.linear": "from lora_fast.mlp import X\nfrom lora_fast.kernels.reference import Y",
        "lora_fast.mlp": "",
        "lora_fast": "from lora_fast.linear import LoraLinear",
        "lora_fast.profiler.sweep": "from lora_fast import apply_lora",
    }
    assert layout_errors(sources) == []


def test_kernels_init_holds_a_docstring_and_nothing_else():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_nobody_imports_the_folders_by_their_own_names():
    for folder in (*PACKAGES, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            tops = {name.partition(".")[0] for name in imported_names(path.read_text(encoding="utf-8"))}
            assert not tops & {"kernels", "profiler"}, f"{path.name}: import lora_fast.kernels or lora_fast.profiler"


def test_every_import_is_declared():
    """In setup.py, as a requirement or an extra. (The import names are the distributions' own.)"""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(setup) if isinstance(node, ast.Constant)]
    declared = {str(text).partition(">=")[0] for text in texts if ">=" in str(text)}
    for module, path in modules().items():
        tops = {name.partition(".")[0] for name in imported_names(path.read_text(encoding="utf-8"))}
        undeclared = tops - declared - set(sys.stdlib_module_names) - {"lora_fast"}
        assert not undeclared, f"{module} imports {undeclared}"


def tracked_files() -> list[Path]:
    """Files in git's index, as paths relative to the root; skips the test where there is no git checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_top_level_is_fixed():
    assert {path.parts[0] for path in tracked_files()} <= TOP_LEVEL
    assert not (ROOT / "conftest.py").exists(), "a conftest.py at the root puts the root, and so `kernels`, on sys.path"


def test_no_path_of_one_machine_is_in_the_repository():
    machine_path = re.compile(rb"(?<![\w.~-])/(work|root|home/\w+|Users/\w+)/")
    for path in tracked_files():
        found = machine_path.search((ROOT / path).read_bytes())
        assert not found, f"{path} names {found[0].decode()}…"


def test_wheel_holds_one_package_and_all_of_it(tmp_path):
    pytest.importorskip("setuptools", reason="builds without isolation, so setuptools has to be installed")
    source, out = tmp_path / "source", tmp_path / "wheel"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):  # a copy: builds leave folders behind
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "--wheel-dir", out, source], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "lora-fast = lora_fast.cli:main" in archive.read(entry_points).decode()
    packed = {name for name in names if ".dist-info/" not in name}
    expected = set()
    for folder, package in PACKAGES.items():
        files = [path for path in (source / folder).rglob("*") if path.is_file()]
        expected |= {f"{package.replace('.', '/')}/{path.relative_to(source / folder).as_posix()}" for path in files}
    assert packed == expected
    assert "lora_fast/py.typed" in packed
    assert any(name.endswith("/LICENSE") for name in names)


def run_python(script: Path, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run a script in a new process and return what it printed."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light(tmp_path):
    script = tmp_path / "light.py"
    script.write_text(
        "import sys\n"
        "import lora_fast\n"
        "heavy = {'transformers', 'peft', 'accelerate', 'matplotlib', 'plotly', 'rich', 'typer', 'hypothesis'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run_python(script, cwd=tmp_path)


def test_imports_without_triton(tmp_path):
    script = tmp_path / "no_triton.py"
    script.write_text(
        "import sys\n"
        "sys.modules['triton'] = None  # makes every import of it fail\n"
        "import torch\n"
        "import lora_fast\n"
        "x, weight, a, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, 4), torch.ones(5, 2)\n"
        "assert torch.equal(lora_fast.lora_linear(x, weight, a, b), torch.full((3, 5), 12.0))\n"
    )
    run_python(script, cwd=tmp_path)


def installed_kernels() -> str:
    """The version of Hugging Face's `kernels` that is installed beside us, or "none"."""
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def test_transformers_model_runs_in_this_process():
    assert llama_step.run() == installed_kernels()


@pytest.mark.parametrize("place", ["first", "last"])
def test_transformers_model_runs_from_the_root_beside_kernels(tmp_path, place):
    """A script run from the repository root, with Hugging Face's package first or last on the path."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION  # each Transformers accepts versions of its own

    if place == "last" and installed_kernels() != "none":
        pytest.skip(f"kernels {installed_kernels()} is installed and would be found first")
    kernels_stub.install(tmp_path, KERNELS_MIN_VERSION)
    script, expect = ROOT / "tests" / "llama_step.py", ["--expect", KERNELS_MIN_VERSION]
    if place == "first":
        run_python(script, *expect, cwd=ROOT, PYTHONPATH=str(tmp_path))
    else:
        run_python(script, *expect, "--site", tmp_path, cwd=ROOT)
