"""The notebook as a whole: as it is committed, in a run with many faults, and files around it."""

import ast
import base64
import builtins
import copy
import dis
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jupytext
import nbformat
import papermill
import pytest
from conftest import CELLS, IMAGE, ROOT, add_mark, turn_line_ends


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


def test_every_figure_has_an_alternative_text(code_cells):
    """As metadata of its cell, from where nbconvert takes it."""
    drawn = [c for c in code_cells if any("image/jpeg" in o.get("data", {}) for o in c.outputs)]
    texts = [cell.metadata.get("alt", "") for cell in drawn]
    assert len(texts) > 10 and all(len(text) > 50 for text in texts)
    assert len(set(texts)) == len(texts)


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
        command += ["-p", "no:cacheprovider", "-k", "ipynb"]
        results.append(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
    assert results == [0, 1]


def test_the_picture_at_the_top_is_the_run_s_own(notebook, code_cells):
    """In Jupyter, on Kaggle and in the README."""
    picture = base64.b64decode(notebook.cells[0].attachments["prediction.jpg"]["image/jpeg"])
    assert picture == (ROOT / "tests" / "prediction.jpg").read_bytes()
    shown = [
        o.data["image/jpeg"]
        for c in code_cells
        for o in c.outputs
        if "image/jpeg" in o.get("data", {})
    ]
    assert picture in [base64.b64decode(data) for data in shown]


def test_contents_link_to_the_sections(notebook):
    headings = [
        line.removeprefix("## ").replace(" ", "-")
        for cell in notebook.cells
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert re.findall(r"^\d\. \[[^]]+\]\(#([^)]+)\)", notebook.cells[0].source, re.M) == headings


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


def test_nothing_is_unpickled():
    """A pickle may run code; the notebook names no module or function that reads one."""
    tree = ast.parse(CELLS)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", "")}
    assert len(names) > 300
    readers = {"pickle", "dill", "shelve", "marshal", "read_pickle", "eval", "exec"}
    assert not names & readers
    assert not names & {"load_model", "allow_pickle", "frompickle", "Unpickler"}
    loads = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    loads = {name for name in loads if name.rpartition(".")[2] in ("load", "loads")}
    assert loads == {"json.loads"}


def is_tagged(cell, name):
    """Whether a cell has a tag, or one that ends in it."""
    return any(tag.endswith(name) for tag in cell.metadata.get("tags", []))


def shown(cell):
    """What a cell shows: its tables, and what it prints unless that depends on the machine."""
    data = [output.data for output in cell.outputs if "data" in output]
    outputs = [part["text/plain"] for part in data]
    if "nbval-ignore-output" not in cell.metadata.get("tags", []):
        outputs.append("".join(output.get("text", "") for output in cell.outputs))
        outputs += data
    return outputs


def test_a_run_with_many_faults_ends_with_a_submission_and_its_cells_run_twice(
    kernel, source, tmp_path
):
    """It tells of each fault in a line, and finds the same again in each cell.

    One class is in all pictures, and one in none.
    """
    table = source / "train.csv"
    everywhere = re.sub("_Fish,.*", "_Fish,1 200000", table.read_text())
    table.write_text(re.sub("_Flower,.*", "_Flower,", everywhere))
    turn_line_ends(source)
    add_mark(source)
    os.truncate(source / "train_images" / IMAGE, 9999)
    broken = sorted((source / "test_images").iterdir())[0]
    broken.write_text("text")
    shutil.copy(source / "train_images" / IMAGE, source / "test_images" / "other.jpg")
    sizes = {"image_size": [64, 96], "classifier_size": [64, 96], "folds": 5, "flips": False}
    epochs = {"epochs": 1, "baseline_epochs": 1, "classifier_epochs": 1}
    parameters = {"preset": "SAMPLE", "overrides": {**sizes, **epochs, "broken_share": 0.1}}
    parameters |= {"input_folder": str(source), "output_folder": str(tmp_path / "output")}
    notebook = jupytext.reads(CELLS, fmt="py:percent")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    once = [index for index, cell in enumerate(cells) if is_tagged(cell, "parameters")]
    notebook.cells = [copy.deepcopy(c) for i, c in enumerate(cells) for _ in range(2 - (i in once))]
    paths = tmp_path / "twice.ipynb", tmp_path / "executed.ipynb"
    nbformat.write(notebook, paths[0])
    papermill.execute_notebook(*paths, parameters, cwd=tmp_path, progress_bar=False)
    notebook = nbformat.read(paths[1], as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not is_tagged(cell, "parameters")]
    for first, second in zip(notebook.cells[::2], notebook.cells[1::2]):
        assert shown(first) == shown(second), first.source
    assert len([cell for cell in notebook.cells if any(shown(cell))]) > 40
    submission = tmp_path / "output" / "submission.csv"
    table = kernel.check_submission(submission, source / "sample_submission.csv")
    assert (table.loc[table["image"] == broken.name, "EncodedPixels"] == "").all()
    assert (table["EncodedPixels"] != "").any()
    warnings = json.loads((tmp_path / "output" / "results.json").read_text())["warnings"]
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.outputs)
    assert f"warnings: {warnings}\n" in printed and len(warnings) == 3
    assert not any(o.get("name") == "stderr" for cell in notebook.cells for o in cell.outputs)
    for part in (IMAGE, broken.name, "labelled with Flower"):
        (warning,) = (warning for warning in warnings if part in warning)
        assert f"Warning: {warning}\n" in printed


@pytest.mark.parametrize(
    ("row", "encoder", "value"),
    [
        ("I: baseline accuracy", "B0", 0.670),
        ("I: fine-tuned accuracy", "B5", 0.732),
        ("II: Dice, cross-validation", "B1", 0.6423),
        ("II: Dice, private leaderboard", "B3", 0.64585),
        ("III: Dice, private leaderboard", "B0", 0.6611),
        ("III: Dice, cross-validation", "B2", 0.6589),
    ],
)
def test_the_paper_s_tables_are_as_they_are_printed(row, encoder, value):
    lines = [line.strip("|").split(" | ") for line in re.findall(r"(?m)^# \| (.+) \|$", CELLS)]
    (head,) = (cells for cells in lines if cells[0] == "paper")
    (cells,) = (cells for cells in lines if cells[0] == row)
    assert len(head) == len(cells) == 7 and float(cells[head.index(encoder)]) == value


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
    assert all(isinstance(keyword, str) for keyword in metadata["keywords"])


def test_readme_s_test_command_is_the_one_that_is_run():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pytest --nbval kernel.ipynb tests" in readme
    assert "README.md" in script


def test_what_the_readme_says_to_change_can_be_changed(kernel):
    """Word for word: a preset, overrides, or the name of something that is defined."""
    table = (ROOT / "README.md").read_text().partition("| to have | change |")[2].split("\n\n")[0]
    codes = re.findall("`(.+?)`", table)
    assert len(codes) == len(set(codes)) == 9
    for code in codes:
        name, equals, value = code.partition(" = ")
        if equals:
            kernel.choose_config(**{"preset": "BEST", name: ast.literal_eval(value)})
        elif code != "overrides":
            assert functools.reduce(getattr, code.split("."), kernel)


def test_each_section_that_defines_something_has_a_test_file_of_its_name():
    """Besides those there is only this file, on the notebook as a whole."""
    expected = {"test_notebook.py"}
    for section in re.split("^# ## ", CELLS, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if re.search("^(def |class |[A-Z_]+ = )", body, re.MULTILINE):
            name = re.sub("[^a-z0-9]+", "_", heading.lower()).strip("_")
            expected.add(f"test_{name}.py")
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} == expected
