"""The definitions of the notebook as a module, without a run of it."""

import ast
import sys
import types
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]


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
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if is_definition(node)]
    module = sys.modules["kernel"] = types.ModuleType("kernel")
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


KERNEL = load_definitions()  # before a test imports TensorFlow: it chooses the version of Keras
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
