"""What is installed, and what importing it touches."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

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


def test_ref_knows_nothing_of_ext():
    assert loaded("lace_loss.ref", ("lace_loss.ext", "lace_loss.train")) == "[]"


def test_no_module_is_loaded_twice_under_its_folder_name():
    modules = "lace_loss.ref, lace_loss.ext.torch, lace_loss.train"
    assert run(f"import sys, {modules}; print({{'ref', 'ext', 'train'}} & set(sys.modules))").strip() == "set()"


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
