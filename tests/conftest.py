"""The definitions of the notebook as a module, without a run of it, and what tests share."""

import ast
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from make_sample import draw_sample

ROOT = Path(__file__).parents[1]
CELLS = (ROOT / "kernel.py").read_text()  # of the notebook, as a script
SETTINGS = ("os.environ", "efficientnet.model.")  # what definitions need to be set


def is_definition(node):
    """Whether a top-level statement of kernel.py defines something and runs nothing.

    Definitions are imports, functions, classes, types and constants, whose names begin with a
    capital, and settings of the environment and of packages.
    """
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = getattr(node, "targets", None) or [node.target]
        return all(
            ast.unparse(t)[0].isupper() or ast.unparse(t).startswith(SETTINGS) for t in targets
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
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background else
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
def sample(tmp_path_factory):
    """A folder with 12 training and 4 test pictures of the original size, drawn like the sample."""
    folder = tmp_path_factory.mktemp("drawn") / "clouds"
    draw_sample(folder, train=12, test=4, seed=0, size=(1400, 2100))
    return folder


@pytest.fixture(scope="session")
def pictures(kernel, sample):
    """The table of its training pictures, of which the last four are fold 1 of 2."""
    return read_pictures(kernel, sample)


def read_pictures(kernel, folder):
    """The table of the training pictures in a folder, of which the last four are fold 1 of 2."""
    labels = kernel.read_labels(folder / "train.csv")
    paths = [folder / "train_images" / name for name in labels.index]
    return labels.assign(path=paths, fold=(np.arange(len(labels)) >= 8).astype(int))


@pytest.fixture(scope="session")
def labels(kernel, pictures):
    """The encodings of their masks."""
    return pictures[kernel.CLASSES]


@pytest.fixture(scope="session")
def paths(pictures):
    """Their files."""
    return list(pictures["path"])


@pytest.fixture(scope="session")
def tiny(kernel):
    """A configuration small enough for a test of the network."""
    sizes = {"image_size": (64, 96), "classifier_size": (64, 96), "batch_size": 2}
    own = {"folds": 2, "held_out": (1,), "precision": "float32", "hours": 1000.0, "epochs": 1}
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

IMAGE = f"{np.random.default_rng((0, False, 0)).integers(16**7):07x}.jpg"
FIRST = f"{IMAGE}_Fish"


def run_cells(kernel, until, **parameters):
    """Run the notebook's cells before a heading, without definitions and figures; its variables.

    `parameters` are those of the cell of parameters.
    """
    variables = dict(vars(kernel))
    for cell in CELLS[: CELLS.index(f"# ## {until}\n")].split("\n# %%")[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" not in head and "show(" not in body:
            nodes = [node for node in ast.parse(body).body if not is_definition(node)]
            exec(compile(ast.Module(nodes, []), "kernel.py", "exec"), variables)
        if "parameters" in head:
            variables |= parameters
    return variables


@pytest.fixture
def source(sample, tmp_path):
    """A copy of the drawn pictures and labels, to be damaged."""
    return Path(shutil.copytree(sample, tmp_path / "input"))


@pytest.fixture
def begin(kernel, source, tmp_path):
    """A function that runs the notebook's first cells, with an output folder of earlier files."""
    output = tmp_path / "output"
    output.mkdir()
    earlier = [output / name for name in ("submission.csv", "results.json", "weights.h5")]
    for path in earlier:
        path.write_text("earlier")

    def run(until="Which patterns?", output_folder=output, **overrides):
        times = [path.stat().st_mtime_ns for path in earlier]
        folders = {"input_folder": source, "output_folder": output_folder}
        try:
            return run_cells(kernel, until, overrides=overrides, **folders)
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
