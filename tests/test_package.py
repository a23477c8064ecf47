"""What holds for the package as a whole: what ships, and the limits that no linter keeps."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

# Every *.py at the root is shipped as a module of the package.
ROOT_MODULES = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
NOT_SHIPPED = {"benchmarks", "docs", "examples", "tests"}

_MADE_FOLDERS = {"__pycache__", "build", "dist", "htmlcov", "out"}
_MACHINE_PATH = re.compile(r"(?<![\w.\-])/(?:home|root|tmp|Users)/\w")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a checkout: not hidden, not made by a build, not in an artefact."""
    for path in sorted(folder.iterdir()):
        if (
            path.name in _MADE_FOLDERS
            or path.suffix == ".egg-info"
            or (path.name.startswith(".") and path.name != ".ci")
        ):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not (path / "tokexport.json").exists():
            yield from files_below(path)


def python_files() -> list[Path]:
    return [path for path in files_below(ROOT) if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def packages_on_disk() -> set[str]:
    folders = {path.parent.relative_to(ROOT) for path in python_files()}
    return {".".join(("tokexport", *folder.parts)) for folder in folders if not NOT_SHIPPED.intersection(folder.parts)}


def packages_listed() -> set[str]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(table["tool"]["setuptools"]["packages"])


def long_functions(source: str) -> list[str]:
    """Return the names of the functions of more than ``MAX_FUNCTION_LINES`` lines."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [node.name for node in functions if (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES]


def relative_imports(source: str) -> list[int]:
    """Return the lines that import relatively."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [node.lineno for node in imports if node.level > 0]


def machine_paths(text: str) -> list[str]:
    """Return the lines that name a folder of somebody's machine."""
    return [line for line in text.splitlines() if _MACHINE_PATH.search(line)]


def test_only_the_known_modules_stand_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} <= ROOT_MODULES


def test_every_package_on_disk_is_listed_in_pyproject():
    assert packages_on_disk() - packages_listed() == set()


def test_every_package_listed_in_pyproject_is_on_disk():
    assert packages_listed() - packages_on_disk() == set()


@pytest.mark.parametrize("package", sorted(packages_listed()))
def test_a_listed_package_has_an_init_file(package: str):
    assert ROOT.joinpath(*package.split(".")[1:], "__init__.py").is_file()


def test_the_tests_are_no_package():
    # With an __init__.py pytest would import them, and the whole checkout, under the name of its folder.
    assert [name_of(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_no_file_is_too_long():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    found = {name_of(path): long_functions(path.read_text(encoding="utf-8")) for path in python_files()}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_no_import_is_relative():
    found = {name_of(path): relative_imports(path.read_text(encoding="utf-8")) for path in python_files()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_file_names_a_folder_of_somebodys_machine():
    found = {
        name_of(path): machine_paths(path.read_text(encoding="utf-8", errors="ignore")) for path in files_below(ROOT)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(("num_lines", "found"), [(80, []), (81, ["long"])])
def test_a_function_is_too_long_from_81_lines_on(num_lines: int, found: list[str]):
    source = "\n".join(["class A:", "    def long(self):", *["        pass"] * (num_lines - 1)])
    assert long_functions(source) == found


@pytest.mark.parametrize(
    "source", ["from . import plan", "from ..errors import RecipeError", "def f():\n    from .plan import x"]
)
def test_a_relative_import_is_found(source: str):
    assert relative_imports(source) != []


@pytest.mark.parametrize("folder", ["home", "root", "tmp", "Users"])
def test_a_folder_of_somebodys_machine_is_found(folder: str):
    assert machine_paths(f'WEIGHTS = "/{folder}/me/model"') != []


@pytest.mark.parametrize("text", ["https://example.org/home/page", "out/tmp/x", "Path.home()", "/usr/bin/env"])
def test_other_paths_are_left_alone(text: str):
    assert machine_paths(text) == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build a wheel and return the names of its files."""
    if find_spec("setuptools") is None:
        pytest.skip("building a wheel needs setuptools; install it with: pip install setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools writes into the folder that it builds, and ships what an earlier build left there.
    for path in files_below(ROOT):
        copy = folder / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        folder / "source",
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_data_file_of_the_packages(wheel_names: set[str]):
    packages = [ROOT.joinpath(*package.split(".")[1:]) for package in packages_listed() if "." in package]
    data = {name_of(path) for package in packages for path in files_below(package) if path.suffix != ".py"}
    assert {f"tokexport/{name}" for name in data} - wheel_names == set()


@pytest.mark.parametrize("name", ["recipes/mini_adsc.toml", "recipes/models/mini/config.json", "py.typed"])
def test_the_wheel_holds_what_the_main_job_needs(wheel_names: set[str], name: str):
    assert f"tokexport/{name}" in wheel_names


def test_the_wheel_holds_every_module(wheel_names: set[str]):
    modules = {name_of(path) for path in python_files() if not NOT_SHIPPED.intersection(path.relative_to(ROOT).parts)}
    assert {f"tokexport/{name}" for name in modules} - wheel_names == set()


@pytest.mark.parametrize("folder", sorted(NOT_SHIPPED))
def test_the_wheel_leaves_out_what_is_not_the_package(wheel_names: set[str], folder: str):
    assert [name for name in wheel_names if folder in Path(name).parts] == []
