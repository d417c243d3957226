"""The definitions of the notebook as a module, without a run of it, and what tests share."""

import ast
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
CELLS = (ROOT / "kernel.py").read_text()  # of the notebook, as a script


def is_definition(node):
    """Whether a top-level statement of kernel.py defines something and runs nothing.

    Definitions are imports, functions, classes, types and constants, whose names begin with a
    capital, and the settings of the environment that an import needs.
    """
    if isinstance(node, ast.Assign):
        return all(
            target.id[0].isupper()
            if isinstance(target, ast.Name)
            else ast.unparse(target).startswith("os.")
            for target in node.targets
        )
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return isinstance(node, kinds)


def load_definitions():
    """A module that holds the definitions of kernel.py."""
    path = ROOT / "kernel.py"
    tree = ast.parse(CELLS)
    tree.body = [node for node in tree.body if is_definition(node)]
    module = sys.modules["kernel"] = types.ModuleType("kernel")
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


KERNEL = load_definitions()  # before a test imports TensorFlow: it chooses the version of Keras
ENCODER = (0.5, 0.3)  # coefficients of width and depth of a small one
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=300)
settings.register_profile("deep", derandomize=True, deadline=None, max_examples=5000)
settings.load_profile("quick")  # pytest --hypothesis-profile deep takes the other


def pytest_collection_modifyitems(items):
    """Of a notebook's cell compare what it shows, not what libraries say on stderr."""
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare += ("stderr",)


@pytest.fixture(scope="session")
def kernel():
    """The definitions of kernel.py."""
    return KERNEL


@pytest.fixture(autouse=True)
def warnings():
    """What the notebook has warned of, none when a test begins."""
    KERNEL.WARNINGS.clear()
    return KERNEL.WARNINGS


@pytest.fixture(scope="session")
def sample():
    """The folder of the drawn sample."""
    return ROOT / "tests" / "sample"


@pytest.fixture(scope="session")
def labels(kernel, sample):
    """The labels of the drawn sample."""
    return kernel.read_labels(sample / "train.csv")


@pytest.fixture(scope="session")
def paths(labels, sample):
    """The training images of the drawn sample, in the order of the labels."""
    return [sample / "train_images" / name for name in labels.index]


@pytest.fixture(scope="session")
def tiny(kernel):
    """A configuration small enough for a test of the network."""
    sizes = {"image_size": (64, 96), "classifier_size": (64, 96), "batch_size": 2}
    own = {"held_out": (0,), "precision": "float32", "hours": 1000.0, "epochs": 1}
    return kernel.replace(kernel.SAMPLE, **sizes, **own)


@pytest.fixture(scope="session")
def images():
    """Two random images."""
    return np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def unets(kernel, tiny):
    """The U-Net with either activation."""
    configs = {name: kernel.replace(tiny, activation=name) for name in ("sigmoid", "softmax")}
    return {x: kernel.build_efficient_unet(c, ENCODER, (64, 96)) for x, c in configs.items()}


def pack(masks):
    """Masks (batch, height, width, classes) as planes."""
    return KERNEL.tf.constant((masks << np.arange(4)).sum(axis=-1).astype(np.uint8))


# The notebook's cells on a copy of the sample, whose first label and image are these

FIRST = (ROOT / "tests" / "sample" / "train.csv").read_text().splitlines()[1].partition(",")[0]
IMAGE = FIRST.rpartition("_")[0]


def run_cells(kernel, until):
    """Run the notebook's cells before a heading, without definitions and figures; its variables."""
    variables = dict(vars(kernel))
    for cell in CELLS[: CELLS.index(f"# ## {until}\n")].split("\n# %%")[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" not in head and "plt.show()" not in body:
            nodes = [node for node in ast.parse(body).body if not is_definition(node)]
            exec(compile(ast.Module(nodes, []), "kernel.py", "exec"), variables)
    return variables


@pytest.fixture
def source(sample, tmp_path):
    """A copy of the sample, to be damaged."""
    return Path(shutil.copytree(sample, tmp_path / "input"))


@pytest.fixture
def begin(kernel, source, tmp_path, monkeypatch):
    """A function that runs the notebook's first cells, with an output folder of earlier files."""
    output = tmp_path / "output"
    output.mkdir()
    earlier = [output / name for name in ("submission.csv", "results.json", "weights.h5")]
    for path in earlier:
        path.write_text("earlier")
    variables = {"CLOUDS_INPUT": source, "CLOUDS_OUTPUT": output}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))

    def run(until="Augment and batch", **overrides):
        monkeypatch.setenv("CLOUDS_OVERRIDES", json.dumps(overrides))
        times = [path.stat().st_mtime_ns for path in earlier]
        try:
            return run_cells(kernel, until)
        finally:
            assert [path.stat().st_mtime_ns for path in earlier] == times
            assert [path.read_text() for path in earlier] == ["earlier"] * 3

    return run


def change(path, old, new, count=1):
    """Replace bytes of a file."""
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, count))


def add_mark(source):
    """A byte-order mark, as some editors write it."""
    change(source / "train.csv", b"Image_Label", b"\xef\xbb\xbfImage_Label")


def turn_line_ends(source):
    """Windows line ends."""
    change(source / "train.csv", b"\n", b"\r\n", -1)
