"""What is installed, and what importing it touches."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lace_loss import ref

ROOT = Path(__file__).parent.parent


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=True
    ).stdout


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "lace_loss": "LACELoss ext ref train __version__",
        "lace_loss.ref": "forward backward hessian_vector_product",
        "lace_loss.ext": "evaluate forward backward forward_backward",
        "lace_loss.ext.torch": "LACELoss lace_loss",
        "lace_loss.train": "",
    }.items(),
)
def test_public_names_are_where_the_readme_says(module, names):
    run(f"from {module} import {', '.join(names.split()) or '__doc__'}")


def loaded(modules, prefix):
    """Modules whose name begins with one of `prefix` after importing `modules`."""
    return run(f"import sys, {modules}; print([m for m in sys.modules if m.startswith({prefix})])").strip()


def test_importing_the_package_alone_imports_none_of_its_parts():
    assert loaded("lace_loss", ("torch", "numpy", "lace_loss.")) == "[]"


def test_the_parts_are_attributes_of_the_package():
    shown = "lace_loss.ext.forward([[0.0, 0.0]], [0]), lace_loss.LACELoss.__module__, lace_loss.__version__"
    said = run(f"import lace_loss; print({shown})").split()
    assert said == ["0.34657359027997264", "lace_loss.ext.torch", version("lace-loss")]
    with pytest.raises(subprocess.CalledProcessError) as error:
        run("import lace_loss; lace_loss.lace")
    assert "module 'lace_loss' has no attribute 'lace'" in error.value.stderr


def test_ref_and_ext_need_numpy_only():
    assert loaded("lace_loss.ref, lace_loss.ext", ("torch", "matplotlib", "scipy")) == "[]"


REF = sorted(path.stem for path in (ROOT / "ref").glob("*.py"))


def packages_imported(file):
    """Packages that a file's import statements name, at its head or in a function; a dot stands for its own folder."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level or node.module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(set(REF) - {"installed"}))
def test_a_file_of_ref_but_installed_imports_numpy_and_its_neighbours_only(module):
    assert set(packages_imported(ROOT / "ref" / f"{module}.py")) <= {".", "numpy", *sys.stdlib_module_names}


def test_the_search_for_imports_finds_those_in_functions():
    assert {"torch", "lace_loss", "numpy", "."} <= set(packages_imported(ROOT / "ref" / "installed.py"))


def test_importing_every_module_of_ref_loads_neither_ext_nor_a_framework():
    outside = ("lace_loss.ext", "lace_loss.train", "torch", "jax", "keras", "scipy", "matplotlib", "mpmath")
    assert loaded(", ".join(f"lace_loss.ref.{module}" for module in REF), outside) == "[]"


def test_no_module_is_loaded_twice_under_its_folder_name():
    modules = "lace_loss.ref, lace_loss.ext.torch, lace_loss.train"
    assert run(f"import sys, {modules}; print({{'ref', 'ext', 'train'}} & set(sys.modules))").strip() == "set()"


def test_the_package_holds_every_vector_and_every_port_that_the_repository_has(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for folder in ("ref/vectors", "ref/ports"):
        files = [path for path in (ROOT / folder).iterdir() if path.is_file()]
        assert len(files) >= 4
        for path in files:
            assert (tmp_path / "lace_loss" / folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", sorted(name for name in ref.__all__ if inspect.isfunction(getattr(ref, name))))
def test_a_public_function_of_ref_says_what_it_takes_and_has_examples_that_hold(name):
    function = getattr(ref, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(
        function, name, globs=vars(sys.modules[function.__module__]).copy()
    )
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
    for word in inspect.signature(function).parameters:
        assert re.search(rf"\b{word}\b", function.__doc__), word


def test_the_version_stands_in_one_place():
    assert f'version = "{version("lace-loss")}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version('lace-loss')}" in (ROOT / "CHANGELOG.md").read_text()


TYPED = """
from typing import assert_type

from torch import Tensor

from lace_loss.ext.torch import LACELoss, lace_loss


def step(x: Tensor, y: Tensor, wanted: bool) -> None:
    loss = LACELoss()(x, y)
    assert_type(loss, Tensor)
    assert_type(lace_loss(x, y, reduction="sum"), Tensor)
    assert_type(LACELoss()(x, y, statistics=True), tuple[Tensor, dict[str, Tensor]])
    assert_type(lace_loss(x, y, statistics=True), tuple[Tensor, dict[str, Tensor]])
    assert_type(LACELoss()(x, y, statistics=wanted), Tensor | tuple[Tensor, dict[str, Tensor]])
    loss.nonsense
"""


def test_a_type_checker_knows_what_a_loss_returns(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "step.py"
    program.write_text(TYPED)
    command = [sys.executable, "-m", "mypy", program]  # strict, by pyproject.toml
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert [line.partition("error: ")[2] for line in done.stdout.splitlines()[:-1]] == [
        '"Tensor" has no attribute "nonsense"  [attr-defined]'
    ], done.stdout + done.stderr
