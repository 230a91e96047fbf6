"""The notebooks are the source: exported code equals the package, files are clean, lessons run from top to bottom."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
ALL = LIBRARY + EXPERIMENTS
BIN = Path(sys.executable).parent


def names(paths):
    return [path.stem for path in paths]


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the checkout in which nbdev may write, exported anew and cleaned."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "rlhi"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in (folder / "rlhi").glob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=folder, check=True, capture_output=True)
    return folder


def test_exported_modules_equal_the_package(copy):
    made = {path.name: path.read_text() for path in (copy / "rlhi").glob("*.py")}
    here = {path.name: path.read_text() for path in (ROOT / "rlhi").glob("*.py")}
    assert sorted(made) == sorted(here)
    differing = [name for name in made if made[name] != here[name]]
    assert differing == [], f"run `make export`, then commit notebooks and modules together: {differing}"


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_notebook_is_clean(path, copy):
    cleaned = copy / path.relative_to(ROOT)
    assert cleaned.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), "run `make export`, which cleans notebooks"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_cleaning_keeps_the_parameters_tag(path, copy):
    cleaned = copy / path.relative_to(ROOT)
    tagged = [cell for cell in cells(cleaned) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in "".join(tagged[0]["source"]).splitlines() if line.strip()]
    assert all(" = " in line for line in lines), "Papermill wants one parameter per line"


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_notebook_is_committed_with_its_outputs(path):
    shown = [cell for cell in cells(path) if not "".join(cell["source"]).startswith("#|")]
    assert any(cell["outputs"] for cell in shown), "run it from top to bottom and commit it with its outputs"
    assert not [o for cell in shown for o in cell["outputs"] if o["output_type"] == "error"]


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_prose_is_no_commented_code(path):
    """A draft's comment marks left in would make every paragraph a heading."""
    prose = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    marked = [text for text in prose if all(line.startswith("#") for line in text.splitlines() if line.strip()) and "\n" in text.strip()]
    assert not [text for text in prose if text.startswith("# #")] and not [text for text in marked if "\n# " in text or "\n#\n" in text]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiments_hold_no_machinery(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path))
    assert "#| export" not in text and "nbdev" not in text
    assert not [line for line in text.splitlines() if line.startswith("class ")]


@pytest.mark.slow
@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_lesson_runs_from_top_to_bottom(path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
