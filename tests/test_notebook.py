"""The notebook as it is committed, and the files around it."""

import builtins
import dis
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def notebook():
    """kernel.ipynb with its outputs."""
    return jupytext.read(ROOT / "kernel.ipynb")


@pytest.fixture(scope="module")
def code_cells(notebook):
    """Its code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_and_script_are_in_step(notebook):
    assert jupytext.writes(notebook, fmt="py:percent") == (ROOT / "kernel.py").read_text()


def test_notebook_is_stored_as_one_run_from_top_to_bottom(notebook, code_cells):
    assert [cell.execution_count for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert not [cell for cell in code_cells if "execution" in cell.metadata]


def test_github_shows_the_notebook(notebook):
    """It does so reliably below 2 MB; pictures are JPEG, which are smaller than PNG."""
    assert (ROOT / "kernel.ipynb").stat().st_size < 1.5e6
    kinds = {
        kind
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        for kind in o.get("data", {})
    }
    assert "image/jpeg" in kinds and "image/png" not in kinds


def test_at_least_twenty_text_outputs_are_compared(code_cells):
    compared = [
        output
        for cell in code_cells
        for output in cell.outputs
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
        and ("text" in output or "text/plain" in output.get("data", {}))
    ]
    assert len(compared) >= 20


def test_what_a_library_says_on_stderr_decides_nothing(tmp_path):
    """nbval compares it, unless told otherwise; what a cell shows is compared."""
    results = []
    for shown in ("1", "2"):
        source = "import sys\nprint('Building the font cache', file=sys.stderr)\n1"
        output = nbformat.v4.new_output("execute_result", {"text/plain": shown}, execution_count=1)
        cell = nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1)
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=[cell], metadata=metadata), tmp_path / "x.ipynb"
        )
        command = [sys.executable, "-m", "pytest", "--nbval", str(tmp_path / "x.ipynb"), __file__]
        command += ["-p", "no:cacheprovider", "-k", "Cell or ipynb"]
        results.append(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
    assert results == [0, 1]


def test_parameters_cell_is_tagged(code_cells):
    tagged = [cell for cell in code_cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and "preset = None" in tagged[0].source


def global_names(code):
    """The names that a function's code, and the code within it, load from the globals."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(global_names, inner))


def test_definitions_lean_on_nothing_that_a_run_cell_makes(kernel):
    """Whatever a definition reads is a definition itself, or built in."""
    known = vars(kernel).keys() | vars(builtins).keys()
    own = [value for value in vars(kernel).values() if getattr(value, "__module__", "") == "kernel"]
    methods = [vars(value).values() for value in own if isinstance(value, type)]
    functions = [f for f in [*own, *itertools.chain(*methods)] if isinstance(f, types.FunctionType)]
    assert len(functions) > 50
    for function in functions:
        if function.__code__.co_filename.endswith("kernel.py"):  # not what dataclasses generate
            lacking = global_names(function.__code__) - known
            assert not lacking, f"{function.__qualname__} reads {lacking}"


def test_metadata_is_what_kaggle_reads():
    """Whoever pushes puts a name of their own and another accelerator."""
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    _, slug = metadata["id"].split("/")
    assert slug == re.sub("[^a-z0-9]+", "-", metadata["title"].lower()).strip("-")
    assert metadata["code_file"] == "kernel.ipynb"
    assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")
    assert metadata["competition_sources"] == ["understanding_cloud_organization"]
    assert metadata["machine_shape"] in ("NvidiaTeslaT4", "TpuV5E8")
    assert metadata["enable_internet"] is True


def test_requirements_and_first_cell_name_the_same_versions(kernel):
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {line.split("  #")[0] for line in requirements}
    assert set(" ".join(kernel.PACKAGES.values()).split()) <= requirements


def test_readme_s_test_command_is_the_one_that_is_run():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pytest --nbval kernel.ipynb tests" in readme
    assert "README.md" in script
