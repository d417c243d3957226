"""Carry kernel.py into kernel.ipynb, execute that on the sample and store its outputs.

python tests/refresh.py

The picture at the top of the notebook and of the README is the run's own: its best, its median and
its worst held-out picture.
"""

import base64
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "tests" / "prediction.jpg"


def find_picture(notebook):
    """The figure of the best, the median and the worst picture, JPEG in base 64."""
    (cell,) = (c for c in notebook.cells if "true masks" in c.source and c.cell_type == "code")
    return cell.outputs[0].data["image/jpeg"].replace("\n", "")


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
    picture = find_picture(notebook)
    notebook.cells[0].attachments = {"prediction.jpg": {"image/jpeg": picture}}
    PICTURE.write_bytes(base64.b64decode(picture))
    nbformat.write(notebook, ROOT / "kernel.ipynb")


if __name__ == "__main__":
    main()
