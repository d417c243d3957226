"""Carry kernel.py into kernel.ipynb, execute that on the sample and store its outputs.

python tests/refresh.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def main():
    """Leave kernel.ipynb as one run from top to bottom, without the times of execution."""
    jupytext = [sys.executable, "-m", "jupytext", "--update", "--to", "ipynb", "kernel.py"]
    subprocess.run(jupytext, cwd=ROOT, check=True)
    os.environ["PYTEST_CURRENT_TEST"] = "reference"  # as under nbval, TensorFlow logs less then
    notebook = nbformat.read(ROOT / "kernel.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # no networks of earlier runs
        (Path(folder) / "tests").symlink_to(ROOT / "tests")
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, ROOT / "kernel.ipynb")


if __name__ == "__main__":
    main()
