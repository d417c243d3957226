"""Run the notebook with what Kaggle's image has, and with nothing else.

    python3.12 tests/bare_image.py gpu|tpu FOLDER

To be run before a push: the environment of the tests has more than Kaggle's. FOLDER gets a new
virtual environment with those packages of the image that the notebook leans on and what they
bring, by Python 3.12, which runs this script. Then papermill runs the notebook there, as Kaggle
does, on the sample and with one epoch of each network; its first cell installs what lacks. The
executed notebook is left in FOLDER.

For `tpu` the first cell brings the TensorFlow for TPUs, as on Kaggle. Its devices cannot be had
elsewhere, so the rest of the notebook then takes the CPU.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]
IMAGES = {
    "gpu": "tensorflow==2.20.0 tf_keras==2.20.1 albumentations==2.0.8 matplotlib==3.10.0 "
    "numpy==2.0.2 opencv-python==4.13.0.92 pandas==2.2.2 scikit-learn==1.6.1 scipy==1.15.3 "
    "papermill ipykernel",
    # what Kaggle's published requirements of its TPU image ask for, as far as it matters here
    "tpu": "tensorflow-cpu==2.20.0 tensorflow_hub keras>3 albumentations matplotlib opencv-python "
    "opencv-python-headless pandas scikit-learn seaborn papermill notebook ipywidgets",
}
OVERRIDES = {"epochs": 1, "baseline_epochs": 1, "classifier_epochs": 1}


def main(image, folder):
    """Build the environment and run the notebook; what fails ends the script."""
    folder = Path(folder).resolve()
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *IMAGES[image].split()], check=True)
    before = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
    notebook = jupytext.read(ROOT / "kernel.ipynb")
    (imports,) = [i for i, cell in enumerate(notebook.cells) if "import tensorflow" in cell.source]
    no_device = jupytext.reads('# %%\nos.environ.pop("ISTPUVM", None)\n', fmt="py:percent").cells
    notebook.cells[imports + 1 : imports + 1] = no_device
    jupytext.write(notebook, folder / "kernel.ipynb")
    variables = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    if image == "tpu":  # without the second one the library looks for a TPU for minutes
        variables |= {"ISTPUVM": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_PROCESS_ADDRESSES": "local"}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    parameters = {"preset": "SAMPLE", "overrides": OVERRIDES}
    parameters |= {"input_folder": str(ROOT / "tests" / "sample"), "output_folder": "output"}
    command = [python, "-m", "papermill", "-k", "python3", "kernel.ipynb", "executed.ipynb"]
    command += ["-y", json.dumps(parameters)]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    after = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
    print("The notebook installed:", *sorted(set(after.split("\n")) - set(before.split("\n"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
