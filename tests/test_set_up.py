"""Set up installs what an image of Kaggle lacks, in fixed versions, and refuses a wrong Keras."""

import ast
import os
import subprocess
import sys
import time
import types

import pytest
from conftest import CELLS, ROOT

NETWORKS = "segmentation-models==1.0.1 image-classifiers==1.0.0"
ENCODERS = "efficientnet==1.0.0 keras-applications==1.0.8"
TPU = [
    "uninstall --yes tensorflow tensorflow-cpu",
    "install tensorflow-tpu==2.19.1 libtpu==0.0.10",
    "install --no-deps tf_keras==2.19.0",
]
SKIMAGE = "scikit-image==0.25.2 lazy-loader==0.4"


@pytest.mark.parametrize(
    ("environment", "modules", "calls"),
    [
        ({}, {"skimage"}, [f"install --no-deps {NETWORKS} {ENCODERS}"]),
        ({}, {"skimage", "segmentation_models"}, [f"install --no-deps {ENCODERS}"]),
        ({}, set(), [f"install --no-deps {NETWORKS} {ENCODERS} {SKIMAGE}"]),
        ({"ISTPUVM": "1"}, set(), [f"install --no-deps {NETWORKS} {ENCODERS} {SKIMAGE}", *TPU]),
    ],
    ids=["GPU", "half", "bare", "TPU"],
)
def test_each_image_of_kaggle_gets_what_it_lacks(kernel, environment, modules, calls):
    assert kernel.list_pip_calls(environment, modules.__contains__) == calls


def test_where_all_is_there_nothing_is_installed(kernel):
    assert kernel.list_pip_calls({}) == []


def test_requirements_and_first_cell_name_the_same_versions(kernel):
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {line.split("  #")[0] for line in requirements}
    (call,) = kernel.list_pip_calls({}, find_module=lambda module: None)
    assert set(call.split()[2:]) <= requirements


def test_keras_3_loaded_before_the_notebook_is_refused_at_the_imports():
    code = "import tensorflow as tf; tf.keras.Model; exec(open('kernel.py').read())"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "RuntimeError: Keras 3 is loaded already. Restart" in done.stderr


def run_statement(beginning, **variables):
    """Run the one statement of the notebook that begins so; returns the variables."""
    (node,) = (n for n in ast.parse(CELLS).body if ast.unparse(n).startswith(beginning))
    exec(ast.unparse(node), variables)
    return variables


def test_the_first_cell_run_again_leaves_the_session_s_beginning_where_it_was():
    assert run_statement("started", time=time, started=5.0)["started"] == 5.0
    assert run_statement("started", time=time)["started"] == pytest.approx(time.monotonic(), abs=9)


def test_ipython_is_not_needed(monkeypatch):
    """As in `python kernel.py`."""
    monkeypatch.setitem(sys.modules, "matplotlib_inline.backend_inline", None)  # imports fail
    beginning = "if util.find_spec('IPython')"
    run_statement(beginning, util=types.SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(ImportError):
        run_statement(beginning, util=types.SimpleNamespace(find_spec=lambda name: name))


def test_files_are_written_where_a_file_system_refuses_locks(kernel, tmp_path):
    """HDF5 asks for none; here a process of its own holds one."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
    code += "print(flush=True); sys.stdin.read()"
    path, pipe = tmp_path / "weights.h5", subprocess.PIPE
    model = kernel.tf.keras.Sequential([kernel.tf.keras.layers.Dense(1, input_shape=(1,))])
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        model.save_weights(path)
        model.load_weights(path)
        process.stdin.close()
