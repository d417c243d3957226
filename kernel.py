# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Understanding clouds with EfficientUNet
#
# Shallow clouds over the oceans arrange themselves in patterns that matter to the Earth's climate.
# Climate scientists named four of them, *Fish*, *Flower*, *Gravel* and *Sugar*, and labellers drew
# boxes around them in satellite pictures. The competition [Understanding Clouds from Satellite
# Images](https://www.kaggle.com/c/understanding_cloud_organization) asks for the same in pictures
# whose labels it keeps: four masks per picture, each of which may be empty.
#
# This notebook goes from `train.csv` to `submission.csv` along the paper [Classification and
# understanding of cloud structures via satellite images with
# EfficientUNet](https://arxiv.org/abs/2009.12931) (Ahmed & Sabab, 2020) and says where it departs
# from it:
#
# 1. read and check the labels, and split the images 80:20;
# 2. read each picture twice per epoch, as it is and augmented;
# 3. train EfficientNets, with rectified Adam, to tell which patterns a picture holds, and see what
#    they look at;
# 4. train EfficientUNet, a U-Net whose encoder is an EfficientNet, to tell where the patterns are;
# 5. compare six ways to turn their probabilities into masks, from a threshold of one half to the
#    mask of the highest expected score;
# 6. predict the test pictures at a quarter of their size, and check the file before it is handed
#    in;
# 7. set the results beside the paper's, in the paper's three tables.
#
# A prediction is scored by its mean Dice coefficient over all pairs of a picture and a class, where
# an empty mask for an absent class counts 1. The paper reports .6611 on the private leaderboard
# (its abstract quotes .6602); the competition was won with .67175.
#
# You need to know Python and what a convolutional network is. Sizes are always (height, width).

# %% [markdown]
# ## Set up
#
# Kaggle's image lacks five small packages. They are installed without their dependencies, because
# Kaggle has those already, in versions that fit each other. On a TPU, whose image has a TensorFlow
# that cannot use it, TensorFlow is replaced too, together with the matching legacy Keras.

# %%
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time

STARTED = time.monotonic()  # the session's hours are counted from here
ON_KAGGLE = {  # by the module that a package brings
    "albumentations": "albumentations==2.0.8 opencv-python-headless==4.13.0.92",
    "cv2": "opencv-python==4.13.0.92",
    "matplotlib": "matplotlib==3.10.0",
    "numpy": "numpy==2.0.2",
    "pandas": "pandas==2.2.2",
    "sklearn": "scikit-learn==1.6.1",
    "tensorflow": "tensorflow==2.20.0",
    "tf_keras": "tf_keras==2.20.1",
}
MISSING_ON_KAGGLE = {
    "classification_models": "image-classifiers==1.0.0",
    "efficientnet": "efficientnet==1.0.0",
    "keras_applications": "keras-applications==1.0.8",
    "keras_radam": "keras-rectified-adam==0.20.0",
    "segmentation_models": "segmentation-models==1.0.1",
}
FOR_TPU = ("tensorflow-tpu==2.19.1", "libtpu==0.0.10")  # 2.20.0 found no TPU on Kaggle
KERAS_FOR_TPU = "tf_keras==2.19.0"  # asks for the package tensorflow, which replaces the TPU's


# %%
def on_tpu(environment=os.environ):
    """Whether the machine is one of Kaggle's with a TPU."""
    return environment.get("ISTPUVM") == "1"


def has_module(name):
    """Whether a module can be imported."""
    return importlib.util.find_spec(name) is not None


def has_package(name):
    """Whether pip has installed a package."""
    return any(importlib.metadata.distributions(name=name))


def plan_installation(environment=os.environ, has_module=has_module, has_package=has_package):
    """The arguments of the calls of pip that bring what cannot be imported, in their order."""
    ordinary, alone = (
        [pin for module in packages if not has_module(module) for pin in packages[module].split()]
        for packages in (ON_KAGGLE, MISSING_ON_KAGGLE)
    )
    calls = []
    if on_tpu(environment):
        ordinary = [pin for pin in ordinary if not pin.startswith(("tensorflow", "tf_keras"))]
        if not has_package("tensorflow-tpu"):
            calls.append(["uninstall", "--quiet", "--yes", "tensorflow", "tensorflow-cpu"])
            calls.append(["install", "--quiet", *FOR_TPU])
            alone.append(KERAS_FOR_TPU)
    if ordinary:
        calls.append(["install", "--quiet", *ordinary])
    if alone:
        calls.append(["install", "--quiet", "--no-deps", *alone])
    return calls


# %%
def install(calls):
    """Call pip with each list of arguments. Raises RuntimeError where it fails."""
    for arguments in calls:
        if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode:
            raise RuntimeError(
                f"'pip {' '.join(arguments)}' failed. On Kaggle, switch the session's internet "
                "access on, in the panel at the right, and run the notebook again."
            )
    importlib.invalidate_caches()


# %%
pip_calls = plan_installation()
install(pip_calls)
print("\n".join(" ".join(call) for call in pip_calls) or "Nothing to install, all is there")

# %% [markdown]
# segmentation-models was written for the Keras of TensorFlow 2, which lives on as *legacy Keras*.
# It is chosen by environment variables, which must be set before TensorFlow is imported.

# %%
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["SM_FRAMEWORK"] = "tf.keras"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # no notes of TensorFlow's libraries between the results
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no look on the internet for a newer version

# %%
import contextlib
import csv
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import platform
import random
import re
import shutil
import signal
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import albumentations
import cv2
import efficientnet.model
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import segmentation_models
import tensorflow as tf
from matplotlib.patches import Patch
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# %%
CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
COLORS = ("tab:cyan", "tab:orange", "tab:red", "tab:olive")
ORIGINAL_SIZE = (1400, 2100)  # of the pictures and of the masks in train.csv
SUBMISSION_SIZE = (350, 525)  # of the masks in submission.csv

plt.rcParams["savefig.bbox"] = "tight"  # saved figures look as they do here
tf.get_logger().setLevel("ERROR")  # no warning that a further network has a graph of its own

# %% tags=["nbval-ignore-output"]
packages = ["tensorflow", "tf_keras", "segmentation-models", "keras-rectified-adam"]
packages += ["albumentations", "opencv-python", "numpy", "pandas", "scikit-learn"]
versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
print(", ".join(f"{name} {number}" for name, number in versions.items()))
print("Devices:", ", ".join(device.device_type for device in tf.config.list_physical_devices()))

# %% [markdown]
# ## Configure the run
#
# Everything that can be chosen stands in one `Config`. There are three of them: `PAPER` follows the
# paper, `BEST` departs from it where there is a reason to, and `SAMPLE` is `BEST` cut down until
# two CPU cores run the whole notebook in minutes. Batch size, epochs and learning rate of the U-Net
# and the probability of each augmentation are ours in all three; those of the classifier, and
# `gate_recall`, are the authors', from the
# [notebooks](https://github.com/TashinAhmed/CloudsClassification) that they published beside the
# paper.


# %%
DECISIONS = (  # how probabilities are turned into masks
    *("best", "threshold 0.5", "threshold and area", "threshold and area, gated"),
    *("two thresholds, area and gate", "expected Dice", "expected Dice, with shapes"),
)


@dataclass(frozen=True)
class Config:
    """All choices of a run."""

    encoder: str | tuple[float, float]  # "efficientnetb0" to "efficientnetb7", or (width, depth)
    encoders: tuple  # encoders that are trained one after the other; if empty, `encoder` is
    encoder_weights: str | None  # "imagenet", the path of an HDF5 file, or None for random weights
    image_size: tuple[int, int]  # of the U-Net's input, multiples of 32
    classifier_size: tuple[int, int] | None  # of the classifier's; None is the encoder's own
    activation: str  # "softmax", one choice for all classes, or "sigmoid", one for each class
    precision: str | None  # Keras's policy for the layers; None is what suits the accelerator
    batch_norm_momentum: float  # of the moving averages in batch normalisation
    augmentation_probability: float  # of each transform in an augmented copy
    rotation_limit: float  # largest rotation of an augmented copy, in degrees
    folds: int  # parts that the training images are split into
    fold: int  # the part held out for validation; the others are trained on
    folds_to_run: tuple  # parts that are held out one after the other; if empty, `fold` is
    batch_size: int  # images per training step on all devices, fewer if they do not fit
    classifier_batch_size: int  # the same for the classifier
    epochs: int  # passes over the training images, each as it is and once augmented
    classifier_epochs: tuple[int, int]  # the same with a frozen encoder, then with a trained one
    learning_rate: float  # of rectified Adam after the warm-up, for 32 images per training step
    warmup_proportion: float  # share of the training steps in which the learning rate rises
    cross_entropy_weight: float  # share of cross-entropy in the loss, the rest is Dice loss
    dice_smoothing: float  # pixels added to both sides of the Dice loss's fraction
    gate_recall: float  # share of a class's images in which the classifier has to find it
    flips: bool  # predict each image as it is, mirrored, upside down and both, and take the mean
    decision: str  # one of DECISIONS; "best" is expected Dice unless another is surely better
    broken_share: float  # of the training images that may be left out as they cannot be decoded
    train: bool  # False predicts with the weights of an earlier run
    hours: float | None  # for the whole notebook; None is what Kaggle grants
    threads: int | None  # that decode and augment images; None is one for each processor
    seed: int  # of the folds, the augmentation, the initial weights and dropout


# %% [markdown]
# A configuration is checked before anything is read. A rule is a test of a value, with the words
# for what the value has to be.


# %%
def number(low, high, kinds=(int, float)):
    """The rule of a number from `low` to `high` of one of these types."""
    expected = f"a {'' if float in kinds else 'whole '}number from {low} to {high}"
    return lambda value: type(value) in kinds and low <= value <= high, expected


def one_of(*allowed):
    """The rule of one of some values."""
    typed = [(type(value), value) for value in allowed]
    return lambda value: (type(value), value) in typed, " or ".join(map(repr, allowed))


def list_of(rule, count=None):
    """The rule of a tuple of values by a rule: so many of them, or any number of different ones."""
    allowed, expected = rule

    def check(values):
        right = type(values) is tuple and all(map(allowed, values))
        return right and len(values) == (len(set(values)) if count is None else count)

    return check, f"a list of {'different ones' if count is None else count}, each {expected}"


def either(*rules):
    """The rule of a value that one of some rules allows."""
    checks, texts = zip(*rules)
    return lambda value: any(check(value) for check in checks), "; or ".join(texts)


# %%
ENCODERS = {  # depth coefficient and size of the images on ImageNet
    "efficientnetb0": (1.0, 224),
    "efficientnetb1": (1.1, 240),
    "efficientnetb2": (1.2, 260),
    "efficientnetb3": (1.4, 300),
    "efficientnetb4": (1.8, 380),
    "efficientnetb5": (2.2, 456),
    "efficientnetb6": (2.6, 528),
    "efficientnetb7": (3.1, 600),
}


def size_in(step):
    """The rule of a size up to ORIGINAL_SIZE in multiples of `step`, no higher than wide."""
    most = tuple(length // step * step for length in ORIGINAL_SIZE)
    allowed, _ = list_of(number(32, max(most), (int,)), 2)

    def check(size):
        fits = allowed(size) and all(a % step == 0 and a <= b for a, b in zip(size, most))
        return fits and size[0] <= size[1]

    steps = f" in multiples of {step}" if step > 1 else ""
    return check, f"(height, width) from (32, 32) to {most}{steps}, no higher than wide"


# %%
ENCODER = either(one_of(*ENCODERS), list_of(number(0.1, 10), 2))
SHARE = number(0, 1)
MANY = number(1, 10**6, (int,))
NOTHING = one_of(None)
RULES = {
    "encoder": ENCODER,
    "encoders": list_of(ENCODER),
    "encoder_weights": (
        lambda value: value is None or isinstance(value, str),
        "'imagenet', the path of an HDF5 file or None",
    ),
    "image_size": size_in(32),
    "classifier_size": either(size_in(1), NOTHING),
    "activation": one_of("softmax", "sigmoid"),
    "precision": one_of("float32", "mixed_float16", "mixed_bfloat16", None),
    "batch_norm_momentum": SHARE,
    "augmentation_probability": SHARE,
    "rotation_limit": number(0, 180),
    "folds": number(2, 1000, (int,)),
    "fold": number(0, 999, (int,)),
    "folds_to_run": list_of(number(0, 999, (int,))),
    "batch_size": MANY,
    "classifier_batch_size": MANY,
    "epochs": MANY,
    "classifier_epochs": list_of(MANY, 2),
    "learning_rate": number(1e-9, 1000),
    "warmup_proportion": SHARE,
    "cross_entropy_weight": SHARE,
    "dice_smoothing": number(1e-6, 10**6),
    "gate_recall": SHARE,
    "flips": one_of(True, False),
    "decision": one_of(*DECISIONS),
    "broken_share": SHARE,
    "train": one_of(True, False),
    "hours": either(number(1e-3, 1000), NOTHING),
    "threads": either(number(1, 1000, (int,)), NOTHING),
    "seed": number(0, 2**32 - 1, (int,)),
}


# %%
def check_config(config):
    """Return a Config. Raises ValueError for a field that is not what its rule asks for."""
    for field, (allowed, expected) in RULES.items():
        if not allowed(value := getattr(config, field)):
            raise ValueError(f"Config: {field} is {value!r}, it has to be {expected}.")
    for field, held_out in ("fold", (config.fold,)), ("folds_to_run", config.folds_to_run):
        if max(held_out, default=0) >= config.folds:
            value, last = getattr(config, field), config.folds - 1
            raise ValueError(f"Config: {field} is {value!r}, the folds are 0 to {last}.")
    return config


# %%
PAPER = Config(
    encoder="efficientnetb0",  # the smallest of the paper's B0 to B5
    encoders=(),
    encoder_weights="imagenet",
    image_size=(1312, 2080),
    classifier_size=None,
    activation="softmax",
    precision=None,
    batch_norm_momentum=0.99,
    augmentation_probability=0.5,
    rotation_limit=20,
    folds=5,
    fold=0,
    folds_to_run=(),
    batch_size=32,
    classifier_batch_size=32,
    epochs=10,
    classifier_epochs=(20, 20),
    learning_rate=1e-3,
    warmup_proportion=0.1,
    cross_entropy_weight=0.7,
    dice_smoothing=1.0,
    gate_recall=0.94,
    flips=False,
    decision="threshold and area",
    broken_share=0.01,
    train=True,
    hours=None,
    threads=None,
    seed=2019,
)

# %%
BEST = replace(
    PAPER,
    activation="sigmoid",  # 60 % of the images have pixels of several classes, softmax allows one
    flips=True,  # a cloud pattern has no handedness; four times the time of a prediction
    decision="best",  # the paper's way is one of six that are compared
)
SAMPLE = replace(
    BEST,
    encoder=(0.5, 0.3),  # half of B0's width and a third of its depth
    encoder_weights=None,  # nothing to download
    image_size=(128, 192),
    classifier_size=(128, 192),
    batch_norm_momentum=0.8,  # so that the averages keep up with few steps
    folds_to_run=(0, 1),  # so that two networks predict together
    batch_size=4,
    classifier_batch_size=4,
    epochs=25,
    classifier_epochs=(5, 10),
    learning_rate=8.5e-3,  # few steps, so larger ones
)
PRESETS = {"PAPER": PAPER, "BEST": BEST, "SAMPLE": SAMPLE}

# %% [markdown]
# To choose differently, edit the next cell, or set `CLOUDS_PRESET`, `CLOUDS_OVERRIDES` (JSON),
# `CLOUDS_INPUT`, `CLOUDS_OUTPUT` and `CLOUDS_EARLIER` in the environment, which wins over the cell.

# %% tags=["parameters"]
preset = None  # "PAPER", "BEST" or "SAMPLE"; None is BEST on Kaggle and SAMPLE elsewhere
overrides = {}  # single fields, for example {"encoder": "efficientnetb2", "fold": 1}
input_folder = None  # None finds the competition on Kaggle, and tests/sample elsewhere
output_folder = None  # None is /kaggle/working on Kaggle and output elsewhere
earlier_folders = None  # outputs of earlier runs; None finds those attached on Kaggle


# %%
def on_kaggle(environment=os.environ):
    """Whether the notebook runs on Kaggle."""
    return "KAGGLE_KERNEL_RUN_TYPE" in environment


def to_tuples(value):
    """A value from JSON with tuples for lists, also within lists and dictionaries."""
    if isinstance(value, dict):
        return {key: to_tuples(part) for key, part in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list | tuple) else value


def choose_config(preset=None, overrides=None, environment=os.environ):
    """The name of a preset, and its Config with single fields overridden.

    Raises ValueError for an unknown preset or field, and for a value that is not allowed.
    """
    default = "BEST" if on_kaggle(environment) else "SAMPLE"
    name = environment.get("CLOUDS_PRESET") or preset or default
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}, only {', '.join(PRESETS)}.")
    if not isinstance(overrides, dict | None):
        raise ValueError(f"overrides is {overrides!r}, it has to be like {{'fold': 1}}.")
    text, fields = environment.get("CLOUDS_OVERRIDES") or "{}", dict(overrides or {})
    try:
        fields |= json.loads(text)
    except (TypeError, ValueError) as error:
        expected = 'JSON like {"fold": 1}'
        raise ValueError(
            f"CLOUDS_OVERRIDES is {text}, it has to be {expected} ({error})."
        ) from None
    allowed = [field.name for field in dataclasses.fields(Config)]
    if unknown := sorted(fields.keys() - set(allowed)):
        raise ValueError(f"Config has no field {', '.join(unknown)}, only {', '.join(allowed)}.")
    for one, several in (("encoder", "encoders"), ("fold", "folds_to_run")):
        if one in fields:
            fields.setdefault(several, ())  # or else the preset's list would win
    return name, check_config(replace(PRESETS[name], **to_tuples(fields)))


# %%
def find_input(chosen=None, environment=os.environ, mount=Path("/kaggle/input")):
    """The folder that holds the competition's data.

    Looks at CLOUDS_INPUT or `chosen` alone if there is one. Else at Kaggle's present and former
    mount points, then for any `train.csv` below `mount`, and off Kaggle at tests/sample. Raises
    FileNotFoundError, which says where it looked, what lacks there and how to get the data.
    """
    competition = "understanding_cloud_organization"
    if chosen := environment.get("CLOUDS_INPUT") or chosen:
        places = [Path(chosen).expanduser()]
    else:
        places = [mount / "competitions" / competition, mount / competition]
        places += sorted(path.parent for path in mount.rglob("train.csv"))
        places += [] if on_kaggle(environment) else [Path("tests/sample")]
    parts = {"train.csv": Path.is_file, "train_images": Path.is_dir}
    parts |= {"sample_submission.csv": Path.is_file, "test_images": Path.is_dir}
    found = []
    for folder in places:
        lacking = [part for part, is_there in parts.items() if not is_there(folder / part)]
        if not lacking:
            return folder
        found.append(f"{folder} has no {', '.join(lacking)}")
    raise FileNotFoundError(
        f"The competition's data was not found: {'; '.join(found)}. On Kaggle, choose 'Add Input', "
        "search for the competition 'Understanding Clouds from Satellite Images', accept its rules "
        "and add it. Elsewhere, set CLOUDS_INPUT to the folder of the downloaded data."
    )


# %%
def make_output(chosen=None, environment=os.environ):
    """The folder for everything that the run writes, made if need be and locked.

    Raises OSError if it cannot be written, or if another run writes to it.
    """
    default = "/kaggle/working" if on_kaggle(environment) else "output"
    folder = Path(environment.get("CLOUDS_OUTPUT") or chosen or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder.resolve())
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        raise OSError(
            f"The output folder {folder} cannot be used: "
            f"{'another run, which has not ended, writes to it' if busy else error}. "
            "Set CLOUDS_OUTPUT, or output_folder in the cell of parameters, to another one."
        ) from None
    return folder


@functools.lru_cache  # it keeps the file open, and with it the lock, until the process ends
def lock_folder(folder):
    """Let no other process lock a folder. Raises BlockingIOError if one has locked it already."""
    file = (folder / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# %% [markdown]
# Files are written under another name and then renamed. Whenever the notebook is stopped, there is
# the old file or the new one, never half of one.


# %%
@contextlib.contextmanager
def replacing(path):
    """A path to write to. What is written there takes the place of `path` in the end."""
    temporary = path.with_name("part." + path.name)
    yield temporary
    os.replace(temporary, path)


def write_whole(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def save_figure(figure, path):
    """Write a figure, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary)


# %% tags=["nbval-ignore-output"]
preset, config = choose_config(preset, overrides)
source = find_input(input_folder)
output = make_output(output_folder)
print(f"{preset}: reads {source}, writes to {output}")

# %% [markdown]
# ## Choose the accelerator
#
# A TPU is taken if there is one, else all GPUs, else the CPU. With several devices each gets an
# equal part of every batch, and the gradients are added up. Layers compute in float16 on GPUs with
# tensor cores, with the loss scaled up so that small gradients are not lost, and in bfloat16 on
# TPUs, which halves the memory of a training step; weights, batch statistics, probabilities and
# losses stay in float32.


# %%
@dataclass(frozen=True)
class Accelerator:
    """What the networks are computed on."""

    strategy: tf.distribute.Strategy  # that gives each replica of a network its part of a batch
    name: str
    precision: str  # Keras's policy that suits it
    memory: int  # bytes for each replica
    hours: float  # that Kaggle grants a session with it, less a quarter to start and to end

    @property
    def replicas(self):
        """The number of devices that a batch is divided among."""
        return self.strategy.num_replicas_in_sync


GIBIBYTE = 2**30
TPU_MEMORY = 16 * GIBIBYTE  # of each of the eight cores of a v5e-8


# %%
def free_memory():
    """The bytes of the machine's memory that are free to use."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])


def start_tpu():
    """The strategy for the TPU of Kaggle's machine.

    Raises RuntimeError if there is none, which would cost nine hours of quota on a CPU.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise RuntimeError(
            "This is a TPU machine, but TensorFlow finds no TPU. Restart the session with its "
            "internet access switched on, so that the first cell can install "
            f"{', '.join(FOR_TPU)}, or choose the accelerator GPU T4 x2. ({error})"
        ) from None


# %%
def measure_gpus(gpus):
    """The names of GPUs, the least of their compute capabilities and the bytes of the smallest."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    names = ", ".join(detail["device_name"] for detail in details)
    capability = min(detail["compute_capability"] for detail in details)
    return names, capability, min(map(int, answer.split())) * 2**20


def make_strategy(environment=os.environ):
    """The best Accelerator there is: a TPU, several GPUs, one GPU, the CPU."""
    gpus = tf.config.list_physical_devices("GPU")
    if on_tpu(environment):
        strategy = start_tpu()
        name = f"TPU, {strategy.num_replicas_in_sync} cores"
        return Accelerator(strategy, name, "mixed_bfloat16", TPU_MEMORY, 8.75)
    if gpus:
        name, capability, memory = measure_gpus(gpus)
        tensor_cores = capability >= (7, 0)
        several = len(gpus) > 1
        strategy = tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
        precision = "mixed_float16" if tensor_cores else "float32"
        return Accelerator(strategy, name, precision, memory, 11.75)
    return Accelerator(tf.distribute.get_strategy(), "CPU", "float32", free_memory(), 11.75)


# %%
def suit(config, accelerator, environment=os.environ):
    """The configuration with what it leaves to the accelerator filled in.

    Raises ValueError if it wants more hours than Kaggle grants.
    """
    if on_kaggle(environment) and (config.hours or 0) > accelerator.hours:
        granted = f"with this accelerator Kaggle grants {accelerator.hours}"
        raise ValueError(f"Config: hours is {config.hours}, {granted}, start and end aside.")
    return replace(
        config,
        precision=config.precision or accelerator.precision,
        hours=config.hours or accelerator.hours,
        threads=config.threads or os.cpu_count(),
    )


# %% [markdown]
# A session has `Config.hours`, counted from the first cell, or else what Kaggle grants. How long a
# step and a prediction take is measured when training begins, and as many epochs are planned as
# leave time for all predictions. Ctrl-C, or the stop button of an interactive session, ends all
# training of a cell after the present step: the best weights so far are used, and runs that were
# not begun are left out. What a run had to do without is said where it happens, and again in the
# report.


# %%
class Clock:
    """The time that is left of a session of some hours."""

    def __init__(self, hours, start=STARTED, now=time.monotonic):
        self.end, self.now = start + 3600 * hours, now

    def left(self):
        """Seconds to the end."""
        return self.end - self.now()


class Interrupt:
    """A context in which the first Ctrl-C is only a wish, `asked`, that training ends."""

    asked = False

    def __enter__(self):
        self.asked, self.usual = False, signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        """Note the wish. The next Ctrl-C acts as usual."""
        self.asked = True
        signal.signal(signal.SIGINT, self.usual)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.usual)


# %%
@dataclass(frozen=True)
class Session:
    """What all parts of a session share."""

    accelerator: Accelerator
    clock: Clock
    earlier: tuple = ()  # folders of earlier sessions, whose trainings may be gone on with
    interrupt: Interrupt = dataclasses.field(default_factory=Interrupt)
    warnings: dict = dataclasses.field(default_factory=dict)  # by what they are about

    def warn(self, about, text):
        """Say something that the report will say again, or with None take it back."""
        self.warnings.pop(about, None)
        if text is not None:
            print("Warning:", text)
            self.warnings[about] = text

    def allow(self, share, reserve, predictions, seconds):
        """The seconds that a training may take: a share of what is left of the session.

        Kept back are `reserve` seconds and those of a number of predictions of an image, `seconds`
        each and a quarter more.
        """
        return share * (self.clock.left() - reserve - 1.25 * predictions * seconds)


# %% tags=["nbval-ignore-output"]
accelerator = make_strategy()
config = suit(config, accelerator)
clock = Clock(config.hours)
session = Session(accelerator, clock)
print(
    f"{accelerator.name}: {accelerator.replicas} x {accelerator.memory / GIBIBYTE:.1f} GiB, "
    f"{config.precision}, {clock.left() / 3600:.2f} hours left"
)

# %% [markdown]
# What this session does:

# %% tags=["nbval-ignore-output"]
for field, value in dataclasses.asdict(config).items():
    print(f"{field:25} {value}")

# %% [markdown]
# ## Encode and decode masks
#
# A mask is written as *run-length encoding*: pixels are numbered from 1 down the first column, then
# down the second, and so on; each run of mask pixels is its first number and its length. The empty
# mask is the empty string. Each mask has one encoding, and every other string is refused at the
# start of the run rather than scored wrongly at its end: an odd count, a run that leaves the image,
# runs that overlap, touch or are out of order.


# %%
WHOLE = "(?:0|[1-9][0-9]{0,17})"  # a number of up to 18 digits, without leading zeros


def parse_rle(rle, size):
    """The first pixels of an encoding's runs and those behind their last pixels.

    Returns int64 (runs, 2), counted from 0. Raises ValueError, quoting the run, unless all are
    whole numbers with single spaces between them, and the runs have pixels, ascend, neither overlap
    nor touch and lie within `size`.
    """
    if not re.fullmatch(f"({WHOLE}( {WHOLE})*)?", rle):
        word = next((word for word in rle.split(" ") if not re.fullmatch(WHOLE, word)), "")
        raise ValueError(f"{word[:40]!r} is not a whole number")
    numbers = np.fromstring(rle, np.int64, sep=" ")
    if len(numbers) % 2:
        raise ValueError(f"the run '{numbers[-1]}' has no length")
    pixels, runs = math.prod(size), numbers.reshape(-1, 2)
    starts, ends = runs[:, 0] - 1, runs.sum(axis=1) - 1
    ends_before = np.append(-1, ends)[:-1]
    if (wrong := (starts <= ends_before) | (ends <= starts) | (ends > pixels)).any():
        start, length = runs[wrong.argmax()]
        expected = (
            f"in the pixels 1 to {pixels}, of one pixel or more, with a gap to the one before"
        )
        raise ValueError(f"the run '{start} {length}' is not {expected}")
    return np.stack([starts, ends], axis=1)


# %%
def decode_rle(rle, size):
    """The mask of a run-length encoding, uint8 (height, width); see parse_rle for errors."""
    borders = np.concatenate([[0], parse_rle(rle, size).ravel(), [math.prod(size)]])
    values = np.arange(len(borders) - 1, dtype=np.uint8) % 2  # outside, inside, outside, ...
    return np.repeat(values, np.diff(borders)).reshape(size[::-1]).T


def encode_rle(mask):
    """The run-length encoding of a mask (height, width); the empty mask's is the empty string."""
    pixels = np.pad(np.asarray(mask, bool).T.ravel(), 1)
    borders = np.flatnonzero(pixels[1:] != pixels[:-1])
    starts, ends = borders[::2], borders[1::2]
    return " ".join(map(str, np.stack([starts + 1, ends - starts], axis=1).ravel().tolist()))


# %% [markdown]
# Worked by hand: in this mask of 3 x 4 pixels the second column holds pixels 4 to 6, of which the
# last two are set, and the third column holds 7 to 9, of which the first two are set. The four
# numbers 5 to 8 follow one another, so that they are one run; the fourth column's last pixel, 12,
# is another.

# %%
example = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], np.uint8)
print(example)
print("encoded:", encode_rle(example))
print("decoded again to the same mask:", np.array_equal(decode_rle("5 4 12 1", (3, 4)), example))

# %% [markdown]
# ## Read the labels
#
# `train.csv` has a row for each pair of an image and a class. We want a row for each image and a
# column for each class. Every row is checked before anything is computed, and an error names the
# file, the line and what was expected.


# %%
COLUMNS = ["Image_Label", "EncodedPixels"]


def read_lines(path):
    """Yield the number and the cells of each line of a CSV file that is not blank.

    Windows line ends and a byte-order mark do not matter. Raises ValueError, which names the file,
    if it is not CSV in UTF-8, or if no line break follows its last line.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 1))
        last = file.read()
    if last not in (b"", b"\n", b"\r"):
        raise ValueError(f"{path} is cut off: no line break follows its last line.")
    csv.field_size_limit(10**8)  # characters of an encoding
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        try:
            yield from ((lines.line_num, cells) for cells in lines if cells)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}, below line {lines.line_num}: {error}.") from None


def split_label(label):
    """The image and the class of a label. Raises ValueError unless both are possible."""
    image, _, name = label.rpartition("_")
    if name not in CLASSES:
        raise ValueError(f"the class is {name!r}, not one of {', '.join(CLASSES)}")
    if image in ("", ".", "..") or re.search(r"[/\\\0]", image):
        raise ValueError(f"the image is {image!r}, not the name of a file in the images' folder")
    return image, name


# %%
def read_rows(path, size):
    """A CSV file of Image_Label and EncodedPixels, with the columns image and class added.

    Raises ValueError, which names the file and the line, for what read_lines refuses, for other
    columns, impossible labels, one that is there twice, and encodings that are invalid at `size`.
    """
    lines, rows = read_lines(path), {}
    _, columns = next(lines, (1, []))
    if columns != COLUMNS:
        found = ", ".join(columns) or "missing, as the file is empty"
        raise ValueError(f"{path}: the columns are {found}; expected: {', '.join(COLUMNS)}.")
    for line, cells in lines:
        try:
            if len(cells) != len(COLUMNS):
                raise ValueError(f"there are {len(cells)} cells, not {len(COLUMNS)}")
            label, rle = cells
            if label in rows:
                raise ValueError("the label is there twice")
            parse_rle(rle, size)
            rows[label] = label, rle, *split_label(label)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, {cells[0][:60]}: {error}.") from None
    if not rows:
        raise ValueError(f"{path} has no rows below its columns.")
    return pd.DataFrame(rows.values(), columns=[*COLUMNS, "image", "class"])


def read_labels(path, size=ORIGINAL_SIZE):
    """The run-length encodings of a CSV file, a row for each image and a column for each class.

    An absent class is the empty string. Raises ValueError for what read_rows refuses, and for an
    image that lacks a class.
    """
    table = read_rows(path, size)
    labels = table.pivot(index="image", columns="class", values="EncodedPixels")
    labels = labels.reindex(columns=CLASSES).rename_axis(columns=None)
    if (lacking := labels.isna()).to_numpy().any():
        image, name = lacking.stack().idxmax()
        raise ValueError(f"{path}: there is no row {image}_{name}.")
    return labels


# %%
def check_images(folder, names):
    """The number of other files in a folder of images.

    Raises FileNotFoundError if an image of `names` is not there, or is empty.
    """
    files = [file for file in os.scandir(folder) if file.is_file()]
    there = {file.name for file in files if file.stat().st_size > 0}
    if lacking := sorted(set(names) - there):
        some = ", ".join(lacking[:5]) + ", ..." * (len(lacking) > 5)
        number = f"{len(lacking)} of {len(names)} images"
        raise FileNotFoundError(f"{folder}: {number} are missing or empty: {some}")
    return len(files) - len(set(names))


# %%
train_path, sample_path = source / "train.csv", source / "sample_submission.csv"
train_folder, test_folder = source / "train_images", source / "test_images"
labels = read_labels(train_path)
test_names = read_labels(sample_path, SUBMISSION_SIZE).index
print(f"{labels.size:,} rows, {len(labels):,} images, {len(test_names):,} test images")
for folder, names in (train_folder, labels.index), (test_folder, test_names):
    others = check_images(folder, names)
    text = f"{folder} has {others} more files, which no row names; they are not used."
    session.warn(f"files in {folder}", text if others else None)


# %%
def write_submission(rles, sample_path, path):
    """Write the encodings `rles`, a dictionary, as the rows of sample_submission.csv in its order.

    A row without an encoding gets the empty mask.
    """
    table = read_rows(sample_path, SUBMISSION_SIZE)[COLUMNS]
    table["EncodedPixels"] = [rles.get(label, "") for label in table["Image_Label"]]
    write_whole(path, table.to_csv(index=False))


def look_transposed(rles, size):
    """Whether masks seem to have been written along the rows instead of down the columns.

    Then most mask pixels have a neighbour not `height` pixels further, but `width`.
    """
    masks = [decode_rle(rle, size).T.ravel() for rle in rles if rle]
    height, width = (
        sum(np.count_nonzero(pixels[step:] & pixels[:-step]) for pixels in masks) for step in size
    )
    return width > 1.1 * height


def check_submission(path, sample_path):
    """Read a submission and return it, with read_rows's columns.

    Raises ValueError, which names the file and the row, unless it has the rows of the sample in its
    order, and valid encodings at SUBMISSION_SIZE, down the columns.
    """
    table, sample = read_rows(path, SUBMISSION_SIZE), read_rows(sample_path, SUBMISSION_SIZE)
    rows = itertools.zip_longest(table["Image_Label"], sample["Image_Label"])
    for line, (label, expected) in enumerate(rows, start=2):
        if label != expected:
            raise ValueError(f"{path}, line {line}: {label}, where {sample_path} has {expected}.")
    if look_transposed(table["EncodedPixels"], SUBMISSION_SIZE):
        raise ValueError(f"{path}: the masks are written along the rows, not down the columns.")
    return table


# %% [markdown]
# Whatever happens later, there is a file to hand in from here on: empty masks, until better ones
# replace them.

# %% tags=["nbval-ignore-output"]
submission_path = output / "submission.csv"
if submission_path.exists():
    print("There is a submission already; it stays until this session has another.")
else:
    write_submission({}, sample_path, submission_path)
    print(f"{submission_path} has empty masks only.")

# %% [markdown]
# What only shows when an image is decoded does not stop the run. All are decoded once, at an eighth
# of their size: a broken training image is left out, up to a share that is configured, and a broken
# test image gets empty masks.
#
# The images are then dealt into folds by their combination of classes: sorted by it, the first
# image goes to fold 0, the second to fold 1, and so on. So each fold holds the same share of every
# combination to within one image, however rare the combination is. With five folds, fold 0 against
# the others is the paper's 80:20 split.


# %%
def decode_image(path, factor=1):
    """The image in a file as it is stored, BGR uint8, at one `factor`-th of its size: 1, 2, 4 or 8.

    Raises ValueError, which names the file, if it cannot be decoded to its end.
    """
    flag = cv2.IMREAD_COLOR if factor == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if image is None:
        raise ValueError(f"{path} is not an image, or is cut off.")
    return image


def find_fault(path):
    """What is wrong with an image, or None if it can be decoded and has ORIGINAL_SIZE."""
    try:
        size = 8 * np.array(decode_image(path, 8).shape[:2])
    except ValueError as error:
        return str(error)
    if (abs(size - ORIGINAL_SIZE) >= 8).any():  # the last eighth is rounded up or down
        return f"{path} has about {size[0]} x {size[1]} pixels, not {ORIGINAL_SIZE}."
    return None


def find_faults(folder, names, threads):
    """What is wrong with the images of a folder that are broken: a dictionary by name."""
    with ThreadPoolExecutor(threads) as pool:
        faults = pool.map(find_fault, [folder / name for name in names])
        return {name: fault for name, fault in zip(names, faults) if fault}


# %%
def describe_faults(faults, count, name):
    """What is wrong with some of `count` images, which a name tells of; None if nothing is."""
    few = list(faults.values())[:5] + ["..."] * (len(faults) > 5)
    return f"{len(faults)} of {count} {name}: {' '.join(few)}" if faults else None


def leave_out(labels, faults, share):
    """The labels without those of broken images.

    Raises ValueError if they are more than a share of all.
    """
    if len(faults) > share * len(labels):
        found = describe_faults(faults, len(labels), "training images are broken")
        raise ValueError(f"More than {share:.1%} (broken_share in Config): {found}")
    return labels.drop(index=list(faults))


def assign_folds(labels, folds, seed):
    """A fold, 0 to `folds` - 1, for each image, balanced over the combinations of classes."""
    present = (labels != "").to_numpy()
    combination = present @ (1 << np.arange(len(CLASSES)))
    tie_break = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((tie_break, combination))
    result = np.empty(len(labels), int)
    result[order] = np.arange(len(labels)) % folds
    return pd.Series(result, labels.index, name="fold")


def check_folds(folds, held_out):
    """Raise ValueError if a fold that is held out has fewer than two images to learn rules on."""
    for fold in held_out:
        if (count := (folds == fold).sum()) < 2:
            few = f"Of {len(folds)} images fold {fold} has {count}, and needs two."
            raise ValueError(f"{few} Set folds in Config to fewer.")


# %%
faults = find_faults(train_folder, labels.index, config.threads)
count, labels = len(labels), leave_out(labels, faults, config.broken_share)
text = describe_faults(faults, count, "training images are broken and left out")
session.warn("broken training images", text)
test_faults = find_faults(test_folder, test_names, config.threads)
text = describe_faults(test_faults, len(test_names), "test images are broken and get empty masks")
session.warn("broken test images", text)
test_paths = [test_folder / name for name in test_names if name not in test_faults]
if not test_paths:
    raise ValueError(f"There is nothing to predict: {text}")
folds = assign_folds(labels, config.folds, config.seed)
check_folds(folds, config.folds_to_run or (config.fold,))
present = labels != ""
masks = present.to_numpy().sum()
print(f"{len(labels):,} images with {masks:,} masks, {len(test_paths):,} images to predict")
print("Classes per image:", present.sum(axis=1).value_counts().sort_index().to_dict())

# %% [markdown]
# Below, the share of images that hold a class (the diagonal), and that hold both of two classes
# (beside it).

# %%
co_occurrence = (present.T.astype(int) @ present.astype(int)) / len(labels)
co_occurrence.round(3)

# %% [markdown]
# In the competition's 5,546 images Sugar is the most frequent class (.676) and Flower the rarest
# (.426); no image is without any class, and three of four hold several. Nearly half of all masks
# are empty: empty masks alone would score .4665 on them.
#
# Each fold should look like the whole:

# %%
balance = present.groupby(folds).mean().round(3)
balance.insert(0, "images", folds.value_counts().sort_index())
balance

# %% [markdown]
# ## List the runs
#
# From here on, a *run* is the training of one encoder's networks with one fold held out. Six
# encoders and five folds hardly fit into one session, so each session leaves its weights and
# `results.json`. Attach the outputs of earlier sessions as inputs: their runs enter the tables, and
# their networks predict together with those trained here, if they held out the same images.
#
# For ImageNet, B0 to B7 were made for squares of 224 to 600 pixels. As the size of a classifier's
# images we take that as the height, and 1.5 times as much as the width, because the pictures are
# 2 x 3; so a B0 sees them at 224 x 336. Between the eight, sizes are interpolated by depth.


# %%
MEASURES = ("images", "baseline accuracy", "accuracy", "average precision", "Dice", "gated Dice")
NETWORKS = ("classifier", "unet")  # whose weights an earlier run has to bring
TITLE = "Understanding clouds with EfficientUNet"  # by which results.json is known as ours


def configure_classifier(config):
    """The configuration with the classifier's image and batch size as the sizes."""
    depths, sizes = zip(*ENCODERS.values())
    depth = ENCODERS[config.encoder][0] if config.encoder in ENCODERS else config.encoder[1]
    height = round(np.interp(depth, depths, sizes))
    size = config.classifier_size or (height, height * ORIGINAL_SIZE[1] // ORIGINAL_SIZE[0])
    batch_size = config.classifier_batch_size
    return replace(config, image_size=size, classifier_size=size, batch_size=batch_size)


# %% [markdown]
# Beside the weights of each network stands what shaped them. Weights are taken over from an earlier
# session only if that is what its `results.json` says: two runs that used the same folder, one
# after the other, do not mix.


# %%
NOT_SHAPING = (  # fields of Config that a training does not depend on
    *("encoders", "folds_to_run", "gate_recall", "flips", "decision"),
    *("broken_share", "train", "hours", "threads"),
)


def describe_training(config, epochs):
    """What shapes a training, but for its labels, as JSON keeps it."""
    fields = {**dataclasses.asdict(config), "epochs": epochs}
    settings = {name: value for name, value in fields.items() if name not in NOT_SHAPING}
    return json.loads(json.dumps(settings))


# %%
@dataclass(frozen=True)
class Files:
    """What a training leaves in a folder, under names that begin alike."""

    folder: Path
    name: str

    @property
    def weights(self):
        """The HDF5 file of the best weights."""
        return self.folder / f"{self.name}.weights.h5"

    @property
    def history(self):
        """The CSV file of the losses."""
        return self.folder / f"{self.name}.csv"

    @property
    def state(self):
        """The folder of the state."""
        return self.folder / f"{self.name}.state"

    def read(self):
        """The training's settings, whether it is finished, and why it stopped early if it did.

        A dictionary, {} if there is no training.
        """
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = json.loads((self.state / "training.json").read_text())
            if isinstance(known, dict) and isinstance(known.get("settings"), dict):
                return {"finished": False, "stopped": None} | known
        return {}

    def write(self, settings, finished=False, stopped=None):
        """Leave what read returns."""
        known = {"settings": settings, "finished": finished, "stopped": stopped}
        write_whole(self.state / "training.json", json.dumps(known, indent=2))


# %%
@dataclass(frozen=True)
class Run:
    """The networks of one encoder and one held-out fold."""

    config: Config  # with this encoder and fold
    folder: Path  # of the weights
    results: dict  # MEASURES on its validation images, filled as they become known

    @property
    def name(self):
        """Encoder and fold, for file names, tables and figures."""
        return f"{name_encoder(self.config.encoder)}-fold{self.config.fold}"

    @property
    def split(self):
        """What decides which images each fold holds."""
        return self.config.folds, self.config.seed

    def files(self, network):
        """The Files of the "baseline", the "classifier" or the "unet"."""
        return Files(self.folder, f"{network}-{self.name}")

    def describe(self, network):
        """What shapes the training of a network, but for its labels."""
        if network == "unet":
            return describe_training(self.config, self.config.epochs)
        epochs = self.config.classifier_epochs[network == "classifier"]
        return describe_training(configure_classifier(self.config), epochs)

    def has_weights(self, networks):
        """Whether the weights of these networks are there and were trained as this run says."""
        return all(
            self.files(network).weights.is_file()
            and self.describe(network).items()
            <= self.files(network).read().get("settings", {}).items()
            for network in networks
        )


# %%
def name_encoder(encoder):
    """An encoder's name; coefficients of width and depth are turned into one."""
    return encoder if isinstance(encoder, str) else "efficientnet-{}-{}".format(*encoder)


def list_runs(config, output, earlier=()):
    """A Run for each encoder and each held-out fold that the configuration names.

    If training is switched off, these are runs of `earlier`. Raises FileNotFoundError for one whose
    weights are not there.
    """
    encoders, held_out = config.encoders or (config.encoder,), config.folds_to_run or (config.fold,)
    runs = [
        Run(replace(config, encoder=encoder, encoders=(), fold=fold, folds_to_run=()), output, {})
        for encoder, fold in itertools.product(encoders, held_out)
    ]
    if config.train:
        return runs
    trained = {
        run.name: run
        for run in earlier
        if run.has_weights(("baseline", *NETWORKS)) and run.split == runs[0].split
    }
    if lacking := [run.name for run in runs if run.name not in trained]:
        raise FileNotFoundError(
            f"Training is switched off, and there are no weights of {', '.join(lacking)} for these "
            "folds. Attach the output of the session that trained them, or set train to True."
        )
    changes = {"train": False, "encoder_weights": None}
    trained = [trained[run.name] for run in runs]
    return [replace(run, config=replace(run.config, **changes), results={}) for run in trained]


# %%
def read_measure(results, measure):
    """One of MEASURES: a number of images, or a share, nan where it is unknown.

    Raises ValueError for anything else.
    """
    value = results[measure]
    whole = type(value) is int and value > 0
    share = type(value) in (int, float) and (0 <= value <= 1 or math.isnan(value))
    if not (whole if measure == "images" else share):
        raise ValueError(f"{measure} is {value!r}")
    return value


def read_results(path):
    """The runs that a `results.json` tells of, none if the file is not this notebook's.

    Raises ValueError, which names the file, if it is, but a field is not what it has to be.
    """
    try:
        results = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return []
    if not isinstance(results, dict) or results.get("notebook") != TITLE:
        return []
    try:
        return [
            Run(
                check_config(Config(**to_tuples(run["config"]))),
                path.parent,
                {measure: read_measure(run["results"], measure) for measure in MEASURES},
            )
            for run in results["runs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not as this version of the notebook writes it ({error}). Detach it, or run "
            "the version that it is from."
        ) from None


# %%
def find_earlier(chosen=None, environment=os.environ, mount=Path("/kaggle/input")):
    """The results of earlier sessions, in the folders of CLOUDS_EARLIER, `chosen` or `mount`.

    CLOUDS_EARLIER separates folders like PATH does. Raises FileNotFoundError for a folder without
    results.json.
    """
    if listed := environment.get("CLOUDS_EARLIER"):
        chosen = listed.split(os.pathsep)
    folders = [chosen] if isinstance(chosen, str | Path) else chosen or ()
    paths = [Path(folder).expanduser() / "results.json" for folder in folders]
    if chosen is None:  # datasets and notebooks are mounted as */ or as datasets/owner/*/
        paths = sorted([*mount.glob("*/results.json"), *mount.glob("*/*/*/results.json")])
    if lacking := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"There is no {', no '.join(lacking)}.")
    return paths


# %%
def without_repeats(runs):
    """The runs without those that have the encoder, image size and fold of one before them."""
    kept = {}
    for run in runs:
        kept.setdefault((run.name, run.config.image_size), run)
    return list(kept.values())


def choose_members(runs, earlier, folds):
    """The runs whose networks predict together.

    These are all of ours, and the earlier ones that brought their weights and held out as many
    images as there are in the same fold of the same split here.
    """
    fitting = [run for run in earlier if run.split == runs[0].split]
    fitting = [run for run in fitting if run.results["images"] == (folds == run.config.fold).sum()]
    return without_repeats([*runs, *(run for run in fitting if run.has_weights(NETWORKS))])


# %% tags=["nbval-ignore-output"]
earlier_results = find_earlier(earlier_folders)
session = replace(session, earlier=tuple(path.parent for path in earlier_results))
earlier = [run for path in earlier_results for run in read_results(path)]
runs = list_runs(config, output, earlier)
members = choose_members(runs, earlier, folds)
if not (output / "results.json").exists():  # by which this session is known if it ends early
    write_whole(output / "results.json", json.dumps({"notebook": TITLE, "runs": []}))
print("Trained here:" if config.train else "Loaded:", ", ".join(run.name for run in runs))
print("Earlier runs:", ", ".join(f"{run.name} in {run.folder}" for run in earlier) or "none")
print("Predicting together:", ", ".join(run.name for run in members))

# %% [markdown]
# ImageNet's weights are a file for each encoder. It is looked for where Keras keeps its downloads,
# then among the datasets attached on Kaggle, and at last downloaded: now, so that a session that
# cannot get them ends here and not when training begins.


# %%
def find_weights(config, mount=Path("/kaggle/input"), home=None):
    """The path of the HDF5 file of the encoder's initial weights, None for random ones.

    Raises FileNotFoundError, naming the three ways to get them, if there are no ImageNet weights,
    and ValueError if there cannot be any for this encoder.
    """
    if config.encoder_weights != "imagenet":
        if config.encoder_weights and not Path(config.encoder_weights).is_file():
            raise FileNotFoundError(f"encoder_weights: there is no file {config.encoder_weights}.")
        return config.encoder_weights
    encoder, source = name_encoder(config.encoder), efficientnet.model
    model = encoder.replace("efficientnet", "efficientnet-")
    if model not in source.WEIGHTS_HASHES:
        raise ValueError(f"{encoder} has no ImageNet weights; set encoder_weights to None.")
    name = model + "_weights_tf_dim_ordering_tf_kernels_autoaugment_notop.h5"
    names, folder = (name, f"{model}_imagenet_1000_notop.h5"), (home or Path.home()) / ".keras"
    if (folder / "models" / name).is_file():
        return str(folder / "models" / name)
    if attached := sorted(path for name in names for path in mount.rglob(name)):
        return str(attached[0])
    url, checksum = source.BASE_WEIGHTS_PATH + name, source.WEIGHTS_HASHES[model][1]
    try:
        return tf.keras.utils.get_file(
            name, url, file_hash=checksum, cache_subdir="models", cache_dir=str(folder)
        )
    except Exception as error:  # Keras raises no narrower one
        raise FileNotFoundError(
            f"There are no ImageNet weights for {encoder}. Switch the session's internet access "
            f"on, so that {url} can be downloaded; or attach a dataset with {' or '.join(names)}, "
            f"such as efficientnet-keras-weights-b0b5; or put {name} into {folder / 'models'}. "
            f"({error})"
        ) from None


# %% tags=["nbval-ignore-output"]
starts = {run.name: find_weights(run.config) for run in runs if config.train}
for name, path in starts.items():
    print(f"{name} starts from {path or 'random weights'}")

# %% [markdown]
# ## Look at the images
#
# The four masks of an image travel together as one *plane*, a uint8 image whose lowest four bits
# are the four classes. So they are resized, and later rotated and distorted, once instead of four
# times; runs are brought to the network's size before they become pixels. JPEG decoders can decode
# at a half, a quarter or an eighth of the size for less than the cost of the whole, which serves
# small networks.


# %%
def read_image(path, size):
    """The image in a file of ORIGINAL_SIZE, RGB uint8 (height, width, 3), resized to `size`.

    Raises ValueError, which names the file, if it cannot be decoded.
    """
    shrink = max(1, min(ORIGINAL_SIZE[0] / size[0], ORIGINAL_SIZE[1] / size[1]))
    image = decode_image(path, max(factor for factor in (1, 2, 4, 8) if factor <= shrink))
    if image.shape[:2] != tuple(size):
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


# %%
def read_plane(rles, size):
    """The masks of one image as a plane, uint8 (height, width), whose bit c is class c.

    `rles` are the classes' run-length encodings at ORIGINAL_SIZE, which `size` must not exceed. A
    pixel of the plane takes the value at its centre.
    """
    rows, columns = (
        (2 * np.arange(short) + 1) * long // (2 * short) for long, short in zip(ORIGINAL_SIZE, size)
    )
    rows_before = np.searchsorted(rows, np.arange(ORIGINAL_SIZE[0] + 1))
    columns_before = np.searchsorted(columns, np.arange(ORIGINAL_SIZE[1] + 2))
    plane = np.zeros(math.prod(size), np.uint8)
    for bit, rle in enumerate(rles):
        if rle:  # the pixels taken are in the order of those of the image, so that runs stay runs
            column, row = np.divmod(parse_rle(rle, ORIGINAL_SIZE).ravel(), ORIGINAL_SIZE[0])
            taken = columns_before[column + 1] > columns_before[column]
            borders = columns_before[column] * size[0] + taken * rows_before[row]
            lengths = np.diff(borders, prepend=0, append=plane.size)
            plane |= np.repeat(np.arange(len(lengths), dtype=np.uint8) % 2 << bit, lengths)
    return cv2.transpose(plane.reshape(size[::-1]))


def split_plane(plane):
    """The masks of a plane, uint8 (height, width, classes) of zeros and ones."""
    return cv2.merge([(plane >> bit) & 1 for bit in range(len(CLASSES))])


# %% [markdown]
# One image of each class, dimmed outside of the mask (the paper's Fig. 1).


# %%
figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
for bit, (axes, name) in enumerate(zip(panels.flat, CLASSES)):
    chosen = present[name].idxmax()  # the first image that holds the class
    image = read_image(train_folder / chosen, SUBMISSION_SIZE)
    mask = read_plane(labels.loc[chosen], SUBMISSION_SIZE) >> bit & 1
    axes.imshow(np.where(mask[..., None], image, image // 4))
    axes.set(title=f"{name} in {chosen}", xlabel="column", ylabel="row")
save_figure(figure, output / "patterns.png")
plt.show()

# %% [markdown]
# Masks are unions of boxes, cut by the black band where the satellite did not pass. Fish are
# skeletons with clear sea around them, Flower large round decks, Gravel grains in a loose field,
# and Sugar is a dusting of the smallest clouds.

# %% [markdown]
# ## Augment and batch
#
# An epoch holds every training image twice, as it is and once augmented, in a new order and with
# new draws each time. An augmented copy is flipped horizontally, flipped vertically, rotated and
# distorted along a grid, each with a probability of its own; the image and its plane of masks go
# through the same draw. What turns in from outside of the image is black, as the band is. Epochs
# follow one another without a break, so that every training batch is full and no example is lost.
#
# A draw is a number that belongs to the example, not to the thread that happens to work on it, so
# that the same seed gives the same epochs whatever the number of threads. albumentations draws and
# flips; what it draws for the rotation and the distortion is carried out as a single warp. Planes
# are split into masks on the device. Where the decoded pictures fit into the memory, as small ones
# do, each is decoded once.


# %%
AS_IS = -1  # the draw of an example that is not augmented


def make_augmentation(config, draw):
    """albumentations' transforms for one example, to be applied one after the other."""
    chance = config.augmentation_probability
    transforms = [
        albumentations.HorizontalFlip(p=chance),
        albumentations.VerticalFlip(p=chance),
        albumentations.Rotate(limit=config.rotation_limit, p=chance),
        albumentations.GridDistortion(p=chance),
    ]
    # One stream of chance for all: with a stream each, all would start with the same number, and
    # either all of them would happen or none.
    streams = np.random.default_rng(draw), random.Random(draw)
    for transform in transforms:
        transform.set_random_state(*streams)
    return transforms


# %%
def find_sources(rotate, distort, size):
    """Where an image of `size` takes its pixels from: columns and rows, float32 (height, width).

    albumentations draws the rotation and the distortion. As its distortion moves whole columns and
    whole rows, both together are sums of a vector along x and one along y. None if neither happens.
    """
    shape, affine = {"shape": size}, np.eye(3)
    columns, rows = np.arange(size[1])[None], np.arange(size[0])[:, None]
    rotated = rotate.should_apply()
    if rotated:
        affine = np.linalg.inv(rotate.get_params_dependent_on_data(shape, {})["matrix"])
    distorted = distort.should_apply()
    if distorted:
        maps = distort.get_params_dependent_on_data(shape, {})
        columns, rows = maps["map_x"][:1], maps["map_y"][:, :1]
    if not (rotated or distorted):
        return None
    along_x, along_y, shift = affine[:2].T[..., None, None]
    return np.float32(along_x * columns) + np.float32(along_y * rows + shift)


# %%
def load_example(config, path, rles=None):
    """One image, uint8 (height, width, 3), and its plane of masks, uint8 (height, width).

    Where no `rles` are given, the image is alone in the tuple.
    """
    image = read_image(path, config.image_size)
    return (image,) if rles is None else (image, read_plane(rles, config.image_size))


def augment(config, image, plane, draw):
    """An image and its plane of masks, augmented by a draw unless that is AS_IS."""
    if draw == AS_IS:
        return image, plane
    *flips, rotate, distort = make_augmentation(config, int(draw))
    for flip in flips:
        image, plane = flip(image=image, mask=plane).values()
    sources = find_sources(rotate, distort, config.image_size)
    if sources is not None:  # one warp for both
        image = cv2.remap(image, *sources, cv2.INTER_LINEAR)
        plane = cv2.remap(plane, *sources, cv2.INTER_NEAREST)
    return image, plane


# %%
def plan_epoch(count, epoch, seed):
    """The examples of one epoch over `count` images: int64 (2 x count, 2), an image and a draw."""
    generator = np.random.default_rng((seed, epoch))
    draws = np.append(np.full(count, AS_IS), generator.integers(2**31, size=count))
    return generator.permutation(np.column_stack([np.tile(np.arange(count), 2), draws]))


CACHE_SHARE = 0.5  # of the memory that is free when a training begins


def plan_once(count, batch_size):
    """The examples of one pass in order, the last one again and again until its batch is full."""
    indices = np.minimum(np.arange(-(-count // batch_size) * batch_size), count - 1)
    return np.column_stack([indices, np.full(len(indices), AS_IS)])


# %%
def make_cache(config, count):
    """An empty dictionary for decoded images and planes, None if they would not fit in memory."""
    needed = count * math.prod(config.image_size) * 4
    return {} if needed < CACHE_SHARE * free_memory() else None


# %%
def make_dataset(config, paths, labels=None, first=None, cache=None):
    """A tf.data.Dataset of full batches, decoded in parallel threads and prefetched.

    Its elements are images, uint8 (batch, height, width, 3), and their planes of masks (batch,
    height, width); without `labels`, the table of encodings in the order of `paths`, a tuple of
    images alone. Given a number `first`, the examples are those of training from that one on, epoch
    after epoch without end. Else every image once, in order; the last one fills up its batch. What
    is decoded is kept in `cache`, if there is one.
    """
    cv2.setNumThreads(1)  # examples run in parallel, their parts need not
    shapes = [(*config.image_size, 3), config.image_size][: 1 if labels is None else 2]

    def plan():
        if first is None:
            yield from plan_once(len(paths), config.batch_size)
        else:
            current, skipped = divmod(first, 2 * len(paths))
            for epoch in itertools.count(current):
                yield from plan_epoch(len(paths), epoch, config.seed)[skipped:]
                skipped = 0

    def load(example):
        index, draw = example
        path = paths[index]
        parts = cache.get(path) if cache else None
        if parts is None:
            rles = None if labels is None else labels.iloc[index]
            parts = load_example(config, path, rles)
            if cache is not None:
                cache[path] = parts
        return parts if labels is None else augment(config, *parts, draw)

    def load_in_graph(example):
        arrays = tf.numpy_function(load, [example], [tf.uint8] * len(shapes))
        return tuple(tf.ensure_shape(array, shape) for array, shape in zip(arrays, shapes))

    examples = tf.data.Dataset.from_generator(plan, output_signature=tf.TensorSpec(2, tf.int64))
    examples = examples.map(load_in_graph, num_parallel_calls=config.threads)
    return examples.batch(config.batch_size, drop_remainder=True).prefetch(2)


# %% [markdown]
# An image of the training set as it is and in five draws, with the outlines of its masks:


# %%
def outline(axes, image, masks, title):
    """Draw an image and the outlines of its masks (height, width, classes) in their colours."""
    axes.imshow(image)
    for index, color in enumerate(COLORS):
        if masks[..., index].any():
            axes.contour(np.pad(masks[1:-1, 1:-1, index], 1), [0.5], colors=[color], linewidths=2)
    axes.set(title=title, xlabel="column", ylabel="row")


def add_legend(figure):
    """Name the classes' colours below a figure."""
    patches = [Patch(color=color, label=name) for name, color in zip(CLASSES, COLORS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(CLASSES))


# %%
small = replace(config, image_size=SUBMISSION_SIZE)
chosen = present.sum(axis=1).idxmax()  # the image with the most classes
figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
for axes, draw in zip(panels.flat, [AS_IS, 1, 3, 4, 6, 7]):
    pair = load_example(small, train_folder / chosen, labels.loc[chosen])
    image, plane = augment(small, *pair, draw)
    outline(axes, image, split_plane(plane), "as it is" if draw == AS_IS else f"draw {draw}")
add_legend(figure)
save_figure(figure, output / "augmentation.png")
plt.show()

# %% [markdown]
# The outlines follow their clouds through every transform. What the network will see:


# %%
def split_images(config, labels, folds, folder):
    """Training and validation images, each as its paths in `folder` and its rows of `labels`."""
    parts = labels[folds != config.fold], labels[folds == config.fold]
    return [([folder / name for name in rows.index], rows) for rows in parts]


def count_steps(config, count):
    """The number of training steps in an epoch over `count` images, each of them taken twice."""
    return math.ceil(2 * count / config.batch_size)


# %%
labelled = labels, folds, train_folder
training, validation = split_images(runs[0].config, *labelled)
images, planes = next(iter(make_dataset(runs[0].config, *training, first=0)))
print(f"{len(training[0])} training and {len(validation[0])} validation images")
print("images", images.shape, images.dtype.name, "planes", planes.shape, planes.dtype.name)

# %% [markdown]
# ## Build the networks
#
# Both networks are EfficientNets, of which segmentation-models brings B0 to B7. They are one
# network, B0, in eight sizes: B7 is twice as wide and 3.1 times as deep. `Config.encoder` takes
# such a pair of coefficients as well, which the paper left for later: `(1.0, 1.0)` is B0. There are
# no ImageNet weights for a pair.
#
# Images enter as bytes, and the normalisation by ImageNet's mean and deviation is part of the
# network: no copy of the notebook can forget it. Probabilities leave as float32 whatever the
# precision inside.


# %%
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of red, green and blue, 0 to 255
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)


@contextlib.contextmanager
def use_precision(policy):
    """Build Keras's layers with this policy, "float32" or "mixed_float16"."""
    outer_policy = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(outer_policy)


def make_input(size):
    """Keras's tensors of images, uint8 (batch, height, width, 3), and of these normalised."""
    images = tf.keras.layers.Input((*size, 3), dtype=tf.uint8, name="images")
    variance = np.square(IMAGENET_DEVIATION)
    normalise = tf.keras.layers.Normalization(
        mean=IMAGENET_MEAN, variance=variance, dtype="float32"
    )
    return images, normalise(images)


# %%
def set_momentum(network, config):
    """Set the momentum of all batch normalisations, which is read at each call."""
    for layer in network.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = config.batch_norm_momentum


def register_encoder(config):
    """The name of the encoder in segmentation-models, to which coefficients are made known."""
    name, known = name_encoder(config.encoder), segmentation_models.Backbones
    if name != config.encoder:
        scaled = functools.partial(efficientnet.model.EfficientNet, *config.encoder, None)
        known._models_update[name] = [scaled, efficientnet.model.preprocess_input]
        known._default_feature_layers[name] = known._default_feature_layers["efficientnetb0"]
    return name


# %%
class StochasticDepth(tf.keras.layers.Layer):
    """Leave out the layers before it for a random share `rate` of the images in training.

    As the package's own, but its chance depends on nothing but the layer's name and the number of
    the training step, so that a training that was interrupted goes on as it would have, on any
    device. `steps` is a function that returns that number.
    """

    def __init__(self, rate, noise_shape=None, name=None):
        super().__init__(name=name)
        self.rate, self.steps = rate, lambda: 0

    def call(self, inputs, training=None):
        """Inputs (batch, ...) of which a share is 0 and the others are scaled up."""
        if not training:
            return inputs
        context, shape = tf.distribute.get_replica_context(), tf.shape(inputs)
        draw = tf.cast(self.steps(), tf.int32) * context.num_replicas_in_sync
        seed = [zlib.crc32(self.name.encode()) >> 1, draw + context.replica_id_in_sync_group]
        size = tf.concat([shape[:1], tf.ones_like(shape[1:])], axis=0)
        kept = tf.random.stateless_uniform(size, seed) >= self.rate
        return inputs * tf.cast(kept, inputs.dtype) / (1 - self.rate)


# %%
def list_layers(model):
    """The layers of a network, and those of the networks in it."""
    parts = [list_layers(part) if hasattr(part, "layers") else [part] for part in model.layers]
    return list(itertools.chain(*parts))


@contextlib.contextmanager
def adapt_encoder(weights):
    """Let the encoders that are built within this context have our StochasticDepth, and a swish
    that keeps one map for its derivative; the package's own keeps two with legacy Keras.

    Raises ValueError if the file `weights`, from which they are loaded, is not of the encoder.
    """
    adapted = mock.patch.multiple(
        efficientnet.model,
        get_dropout=lambda **modules: StochasticDepth,
        get_swish=lambda **modules: tf.nn.swish,
    )
    try:
        with adapted:
            yield
    except (OSError, ValueError) as error:
        if weights is None:
            raise
        raise ValueError(f"{weights} does not hold the encoder's weights: {error}") from None


# %% [markdown]
# The **classifier** averages the encoder's last map over the image and gives each class a
# probability.


# %%
def build_classifier(config):
    """EfficientNet from images, uint8 (batch, *classifier size, 3), to probabilities.

    These are float32 (batch, classes), for "softmax" with a sum of 1.
    """
    layers, size = tf.keras.layers, configure_classifier(config).image_size
    with use_precision(config.precision):
        images, normalised = make_input(size)
        get_backbone = segmentation_models.Backbones.get_backbone
        build_encoder = segmentation_models.inject_global_submodules(get_backbone)
        weights = find_weights(config)
        settings = {"input_shape": (*size, 3), "weights": weights, "include_top": False}
        with adapt_encoder(weights):
            encoder = build_encoder(register_encoder(config), **settings)
        set_momentum(encoder, config)
        average = layers.GlobalAveragePooling2D(dtype="float32", name="average")
        logits = layers.Dense(len(CLASSES), dtype="float32", name="logits")
        output = layers.Activation(config.activation, dtype="float32", name="probabilities")
        probabilities = output(logits(average(encoder(normalised))))
        return tf.keras.Model(images, probabilities, name="classifier")


# %% [markdown]
# **EfficientUNet** adds a decoder, which doubles the size of the encoder's last map five times.
# Each time it upsamples bilinearly, concatenates the encoder's map of that size (at full size there
# is none) and convolves 3 x 3, twice, to 256, 128, 64, 32 and at last 16 channels. It is
# segmentation-models' U-Net, which upsamples by the nearest pixel; we change that one setting, and
# two parts of the encoder: the random omission of its blocks, which has to go on where it stopped
# when a training is interrupted, and its activation, which takes more memory than it needs.


# %%
def build_efficient_unet(config):
    """EfficientUNet (the paper's Fig. 5), from images to probabilities.

    Images are uint8 (batch, height, width, 3). Probabilities are float32 (batch, height, width,
    channels): for "sigmoid" those of the classes, for "softmax" those of background and classes,
    which sum to 1.
    """
    with use_precision(config.precision):
        images, normalised = make_input(config.image_size)
        weights = find_weights(config)
        with adapt_encoder(weights):
            unet = segmentation_models.Unet(
                register_encoder(config),
                input_shape=(*config.image_size, 3),
                encoder_weights=weights,
                classes=len(CLASSES) + (config.activation == "softmax"),
                activation="linear",
            )
        set_momentum(unet, config)
        for layer in unet.layers:
            if isinstance(layer, tf.keras.layers.UpSampling2D):
                layer.interpolation = "bilinear"  # read at each call
        activation = tf.keras.layers.Activation
        output = activation(config.activation, dtype="float32", name="probabilities")
        return tf.keras.Model(images, output(unet(normalised)), name="efficient_unet")


# %%
model = build_efficient_unet(runs[0].config)
unet = model.get_layer(index=2)
blocks = {f"decoder, block {i}": unet.get_layer(f"decoder_stage{i}b_relu") for i in range(5)}
blocks = {"images": model.layers[0], **blocks, "probabilities": model.layers[-1]}
shapes = {name: layer.get_output_shape_at(0)[1:] for name, layer in blocks.items()}
pd.DataFrame(shapes, ["height", "width", "channels"]).T

# %% [markdown]
# For how many images has a training step memory? What it keeps of each for the way back follows
# from the layers: the inputs of convolutions, batch normalisations and products, and what
# activations need for their derivative. To this come what is at work at the largest layer, and for
# each weight its gradient and the optimiser's two averages. The largest batch that fits is taken,
# up to the one that is configured. The learning rate follows the square root of the batch, as is
# [right](https://arxiv.org/abs/2205.10287) for optimisers like Adam.


# %%
KEEP_INPUTS = ("Conv2D", "DepthwiseConv2D", "BatchNormalization", "Multiply", "UpSampling2D")
AT_WORK = 1.3  # times the largest layer's maps in float32, in which bilinear upsampling works
FOR_WEIGHTS = 16  # bytes for a float32 weight, its gradient and rectified Adam's two averages


@dataclass(frozen=True)
class Footprint:
    """What a network costs."""

    parameters: int
    operations: int  # multiplications and additions to predict an image, in layers with weights
    memory: int  # bytes for each image of a training step, besides those for the weights
    shapes: tuple  # of all weights, sorted

    def step_memory(self, images):
        """The bytes of a training step with a number of images."""
        return FOR_WEIGHTS * self.parameters + images * self.memory


def count_bytes(tensors, dtype):
    """The bytes of Keras's tensors for one image."""
    numbers = sum(math.prod(size or 1 for size in tensor.shape[1:]) for tensor in tensors)
    return numbers * tf.as_dtype(dtype).size


# %%
def measure_network(model):
    """The Footprint of a network, counted from its layers."""
    operations, kept, largest = 0, {}, 0
    for layer in list_layers(model):
        kind, dtype = type(layer).__name__, layer.compute_dtype
        inputs, outputs = map(tf.nest.flatten, (layer.get_input_at(0), layer.get_output_at(0)))
        if weights := [weight for weight in layer.weights if "kernel" in weight.name]:
            operations += 2 * math.prod(outputs[0].shape[1:-1]) * math.prod(weights[0].shape)
        needed = inputs if kind in KEEP_INPUTS else []
        if kind == "Activation":
            needed = inputs if layer.activation is tf.nn.swish else outputs
        kept |= {id(tensor): count_bytes([tensor], dtype) for tensor in needed}
        largest = max(largest, count_bytes([*inputs, *outputs], "float32"))
    memory = sum(kept.values()) + AT_WORK * largest
    shapes = tuple(sorted(tuple(weight.shape) for weight in model.weights))
    return Footprint(model.count_params(), operations, round(memory), shapes)


def build_network(config, network):
    """The network named "unet", or for "baseline" and "classifier" the classifier."""
    return build_efficient_unet(config) if network == "unet" else build_classifier(config)


@functools.lru_cache
def measure_once(config, network):
    """The Footprint of a configuration's network, remembered."""
    return measure_network(build_network(config, network))


def find_footprint(config, network):
    """The Footprint of the "classifier" or the "unet" of a configuration."""
    other = {"fold": 0, "batch_size": 1, "classifier_batch_size": 1, "encoder_weights": None}
    return measure_once(replace(config, **other), network)  # these do not change it


# %%
MEMORY_SHARE = 0.8  # of a device; the rest is for TensorFlow and for gaps between tensors


def suggest_fitting(config, memory):
    """A sentence on the encoders and the image size with which one image would fit."""
    footprints = {name: find_footprint(replace(config, encoder=name), "unet") for name in ENCODERS}
    names = [name for name, cost in footprints.items() if cost.step_memory(1) <= memory]
    own = find_footprint(config, "unet")
    scale = math.sqrt(max(0, memory - own.step_memory(0)) / own.memory)
    size = tuple(int(length * scale) // 32 * 32 for length in config.image_size)
    return f"What would: an image size of {size}, or the encoders {', '.join(names) or 'none'}."


# %%
def fit_batch(accelerator, config, network, wanted):
    """The largest batch up to `wanted` that the accelerator holds, as many images on each replica.

    Raises MemoryError, which says what would fit, if a replica cannot hold a single one.
    """
    cost, memory = find_footprint(config, network), MEMORY_SHARE * accelerator.memory
    fitting = int((memory - cost.step_memory(0)) // cost.memory)
    if fitting < 1:
        raise MemoryError(
            f"A training step of the {network} with {name_encoder(config.encoder)} takes "
            f"{cost.step_memory(1) / GIBIBYTE:.1f} GiB for one image, and each device of "
            f"{accelerator.name} has {accelerator.memory / GIBIBYTE:.1f}, of which "
            f"{MEMORY_SHARE:.0%} are used. {suggest_fitting(config, memory)}"
        )
    return max(1, min(fitting, wanted // accelerator.replicas)) * accelerator.replicas


def fit_run(run, config, accelerator):
    """A run with its batches, precision and threads as this session's accelerator has them."""
    own = replace(run.config, precision=config.precision, threads=config.threads)
    batch_size = fit_batch(accelerator, own, "unet", own.batch_size)
    wanted = own.classifier_batch_size
    own = replace(
        own,
        batch_size=batch_size,
        classifier_batch_size=fit_batch(accelerator, own, "classifier", wanted),
    )
    return replace(run, config=own)


# %% [markdown]
# Before hours are spent on training: is the disk large enough for what it will leave, and are the
# weights that will be loaded those of these networks?


# %%
DISK_FOR_WEIGHT = 16  # bytes: its best value, and in the state its last one and two averages


def check_disk(runs, output):
    """Raise OSError if the output folder has not enough space for the weights and states of runs.

    A new state is written before the old one is deleted.
    """
    networks = itertools.product(runs, ("classifier", *NETWORKS))  # the baseline is a classifier
    weights = [find_footprint(run.config, network).parameters for run, network in networks]
    needed, free = DISK_FOR_WEIGHT * (sum(weights) + max(weights)), shutil.disk_usage(output).free
    if needed > free:
        raise OSError(
            f"Training may write {needed / GIBIBYTE:.1f} GiB to {output}, where "
            f"{free / GIBIBYTE:.1f} are free. Make room, choose another output folder, or name "
            "fewer encoders and folds."
        )


def read_shapes(path):
    """The shapes of all arrays in an HDF5 file, sorted. Raises ValueError if it is none."""
    parts = []
    try:
        with h5py.File(path) as file:
            file.visititems(lambda name, part: parts.append(getattr(part, "shape", None)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 ({error}).") from None
    return tuple(sorted(shape for shape in parts if shape is not None))  # groups have none


def check_weights(run):
    """Raise ValueError, which names the file, if a run's weights are not those of its networks."""
    for network in ("baseline", *NETWORKS):
        path = run.files(network).weights
        if path.is_file() and read_shapes(path) != find_footprint(run.config, network).shapes:
            encoder = name_encoder(run.config.encoder)
            raise ValueError(f"{path} does not hold the weights of a {network} with {encoder}.")


# %%
members = [fit_run(run, config, accelerator) for run in members]
runs = members[: len(runs)]  # ours lead the members
for run in members[len(runs) if config.train else 0 :]:
    check_weights(run)
if config.train:
    check_disk(runs, output)
    for start in {run.config.encoder: run.config for run in runs if starts[run.name]}.values():
        build_classifier(start)  # which loads the encoder's initial weights
footprints = {}
for run, network in itertools.product(runs, NETWORKS):
    cost, one = find_footprint(run.config, network), run.config
    batch_size = one.batch_size if network == "unet" else one.classifier_batch_size
    footprints[name_encoder(one.encoder), network] = {
        "parameters": f"{cost.parameters:,}",
        "billion operations for an image": round(cost.operations / 1e9, 2),
        "images in a step": batch_size,
        "GiB for a step": round(cost.step_memory(batch_size // accelerator.replicas) / GIBIBYTE, 2),
    }
pd.DataFrame(footprints).T

# %% [markdown]
# ## Measure and optimise
#
# The competition's measure is the Dice coefficient of two masks, twice the area of their overlap
# over the sum of their areas, and 1 where both are empty.


# %%
def divide_dice(overlap, total_area):
    """The Dice coefficient of two masks with this overlap and this sum of their areas."""
    return np.where(total_area == 0, 1.0, 2 * overlap / np.maximum(total_area, 1))


def dice(truth, prediction):
    """The competition's Dice coefficients of masks (..., height, width): float (...)."""
    truth, prediction = np.asarray(truth, bool), np.asarray(prediction, bool)
    overlap = np.logical_and(truth, prediction).sum(axis=(-2, -1))
    return divide_dice(overlap, truth.sum(axis=(-2, -1)) + prediction.sum(axis=(-2, -1)))


# %% [markdown]
# Four cases worked by hand: half of the mask found, 2 x 1 / (2 + 1), none of it, a false alarm, and
# rightly nothing.

# %%
left, right, empty = np.eye(3)[0:1], np.eye(3)[1:2], np.zeros((1, 3))
cases = {"half found": (left + right, left), "none found": (left, right)}
cases |= {"false alarm": (empty, left), "rightly nothing": (empty, empty)}
pd.Series({case: float(dice(*masks)) for case, masks in cases.items()}, name="dice").round(4)

# %% [markdown]
# The loss is 0.7 x cross-entropy + 0.3 x Dice loss. The Dice loss is 1 minus the Dice coefficient
# of the mask and the probabilities, for each class of each image, with a pixel added above and
# below the fraction so that it stays defined for an absent class.
#
# Softmax gives each pixel to one class or to the background. Where masks overlap, the paper's
# network has to choose; we let the class with the smaller mask win. Even a perfect network would
# then score .9636 at the most on the competition's training images. Sigmoids have no such limit.


# %%
def exclude_overlaps(masks):
    """Masks (batch, height, width, classes) to one-hot background and classes, one per pixel.

    Where masks overlap, the class with the smallest area in its image wins.
    """
    area = tf.reduce_sum(masks, axis=(1, 2), keepdims=True)
    rank = masks / (1 + area)  # higher for smaller masks, 0 outside
    background = tf.fill(tf.shape(masks[..., :1]), tf.constant(1e-12, masks.dtype))
    winner = tf.argmax(tf.concat([background, rank], axis=-1), axis=-1)
    return tf.one_hot(winner, len(CLASSES) + 1, dtype=masks.dtype)


# %%
def split_planes(planes):
    """The masks of planes (batch, height, width): uint8 (batch, height, width, classes)."""
    bits = tf.constant(np.arange(len(CLASSES)), planes.dtype)
    shifted = tf.bitwise.right_shift(planes[..., None], bits)
    return tf.bitwise.bitwise_and(shifted, tf.ones_like(shifted))


def soft_dice(truth, probabilities, smoothing):
    """Smoothed Dice coefficients (batch, classes) of maps (batch, height, width, classes)."""
    overlap = tf.reduce_sum(truth * probabilities, axis=(1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(1, 2))
    return (2 * overlap + smoothing) / (total_area + smoothing)


CROSS_ENTROPY = {
    "softmax": tf.keras.losses.categorical_crossentropy,
    "sigmoid": tf.keras.losses.binary_crossentropy,
}


def unet_loss(config, planes, probabilities):
    """The paper's loss of planes (batch, height, width) and probabilities, one value per image."""
    truth = tf.cast(split_planes(planes), probabilities.dtype)
    if config.activation == "softmax":
        truth = exclude_overlaps(truth)
    entropy = CROSS_ENTROPY[config.activation](truth, probabilities)
    truth, probabilities = truth[..., -len(CLASSES) :], probabilities[..., -len(CLASSES) :]
    overlap = tf.reduce_mean(soft_dice(truth, probabilities, config.dice_smoothing), axis=-1)
    weight = config.cross_entropy_weight
    return weight * tf.reduce_mean(entropy, axis=(1, 2)) + (1 - weight) * (1 - overlap)


# %% [markdown]
# The classifier's loss is the cross-entropy alone: of its softmax with a 1 for each class in the
# image, as the paper has it, or of each class's sigmoid. A class is in the image if its mask has a
# pixel.


# %%
def find_presence(planes):
    """Whether the masks of planes (batch, height, width) have pixels: float32 (batch, classes)."""
    return tf.cast(tf.reduce_any(split_planes(planes) > 0, axis=(1, 2)), tf.float32)


def classifier_loss(config, planes, probabilities):
    """The cross-entropy of planes (batch, height, width) and probabilities, one value per image."""
    return CROSS_ENTROPY[config.activation](find_presence(planes), probabilities)


# %% [markdown]
# [Rectified Adam](https://arxiv.org/abs/1908.03265) is keras-rectified-adam's. It warms up and
# decays only if it is told the number of steps, so `total_steps` has no default here. The package
# builds on Keras's older optimiser class, whose name a newer one bears today; while the package is
# imported, the older one is put back.


# %%
LEARNING_RATE_BATCH = 32  # images per training step that `Config.learning_rate` is meant for


def make_optimizer(config, total_steps, weights):
    """Rectified Adam for a network's weights, its rate rising and then falling to a hundredth.

    It comes in Keras's wrapper that scales the loss, by 1 unless the layers compute in float16.
    """
    older = tf.keras.optimizers.legacy.Optimizer
    with mock.patch("tensorflow.keras.optimizers.Optimizer", older):
        from keras_radam import RAdam
    rate = config.learning_rate * math.sqrt(config.batch_size / LEARNING_RATE_BATCH)
    optimizer = RAdam(
        rate,
        total_steps=total_steps,
        warmup_proportion=config.warmup_proportion,
        min_lr=rate / 100,
    )
    scale = {} if config.precision == "mixed_float16" else {"dynamic": False, "initial_scale": 1}
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(optimizer, **scale)
    optimizer._create_all_weights(weights)  # or else the first step would be traced twice
    return optimizer


# %% [markdown]
# ## Train
#
# Both networks are trained by the same function. A step gives each replica its part of the batch
# and adds up their gradients. Each training has an optimiser of its own, so that no warm-up or
# momentum leaks from one into the next. A line now and then says how far the work is and how long
# it will take. The first step takes a minute, because TensorFlow builds its graph.


# %%
def distribute(strategy, function):
    """A function of batches, computed by each replica on its part; the results are joined again."""
    compiled = tf.function(lambda *parts: strategy.run(function, parts), autograph=False)
    replicas = strategy.num_replicas_in_sync

    def compute(*batch):
        if replicas == 1:
            return compiled(*batch)
        with tf.device("CPU"):
            pieces = [tf.split(part, replicas) for part in batch]
        place = strategy.experimental_distribute_values_from_function
        parts = [
            place(lambda context, own=own: own[context.replica_id_in_sync_group]) for own in pieces
        ]
        results = strategy.experimental_local_results(compiled(*parts))
        with tf.device("CPU"):
            return tf.concat(results, axis=0)

    return compute


# %%
def make_validation(model, loss):
    """A function of images and planes that returns their losses, without training."""
    return lambda images, planes: loss(planes, model(images, training=False))


def make_step(model, loss, optimizer, replicas):
    """A training step of a replica: a function of images and planes that returns their losses.

    The gradients of all replicas are added up, so that each contributes its share of the mean.
    """
    for layer in list_layers(model):
        if isinstance(layer, StochasticDepth):
            layer.steps = lambda: optimizer.iterations

    def step(images, planes):
        with tf.GradientTape() as tape:
            losses = loss(planes, model(images, training=True))
            scaled = optimizer.get_scaled_loss(tf.reduce_mean(losses) / replicas)
        gradients = tape.gradient(scaled, model.trainable_variables)
        gradients = optimizer.get_unscaled_gradients(gradients)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return losses

    return step


# %%
class Progress:
    """Print the share of a work that is done and the time left, every `pause` seconds or later.

    The time left is taken from the second step on, as the first one builds TensorFlow's graph.
    """

    def __init__(self, title, total, done=0, pause=30.0):
        self.title, self.total, self.pause = title, total, pause
        self.done, self.first = done, done + 1

    def advance(self, note=""):
        """Count one of `total` as done."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.first:
            self.start = self.last = now
        elif now - self.last >= self.pause or self.done == self.total:
            pace = (now - self.start) / (self.done - self.first)
            left = pace * (self.total - self.done) / 60
            print(f"{self.title} {self.done} of {self.total}, {left:.1f} min left {note}".strip())
            self.last = now


# %% [markdown]
# When it begins and after every epoch, a training leaves its history, its best weights so far, and
# its state: all weights, the optimiser and the number of steps done. Started again in the same
# folder, or with that folder attached as an input, it goes on from there, with the same examples
# and the same chances as if it had not stopped. It does so only if everything that shapes it is the
# same, the configuration, the number of epochs and the labels, and if what it left can be read.


# %%
HISTORY = {"epoch": float, "step": int, "loss": float, "val_loss": float}


def read_history(path):
    """The history of a training, exactly as it was. Raises KeyError if a column lacks."""
    return pd.read_csv(path, float_precision="round_trip")[list(HISTORY)].astype(HISTORY)


def write_history(path, epochs):
    """Leave the history of a training, a list of dictionaries."""
    write_whole(path, pd.DataFrame(epochs, columns=list(HISTORY)).to_csv(index=False))


def find_damage(files, finished):
    """What cannot be read of a training that is to be gone on with, or None."""
    try:
        history = read_history(files.history)
        h5py.File(files.weights).close()
        if not finished and (latest := tf.train.latest_checkpoint(files.state)):
            state = tf.train.load_checkpoint(latest)
            values = {part: state.get_tensor(part) for part in state.get_variable_to_shape_map()}
            if values["done/.ATTRIBUTES/VARIABLE_VALUE"] not in history["step"].to_numpy():
                return "its history lacks the last step"
    except (OSError, ValueError, LookupError, RuntimeError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# %%
def find_training(files, settings, earlier):
    """The Files, here or in a folder of `earlier`, of a training of these settings, or None.

    Tells why others are passed over.
    """
    for place in (files, *(replace(files, folder=folder) for folder in earlier)):
        if known := place.read():
            others = [key for key in settings if known["settings"].get(key) != settings[key]]
            reason = f"other {', '.join(others)}" if others else None
            reason = reason or find_damage(place, known["finished"])
            if reason is None:
                return place
            print(f"{files.name} in {place.folder} is not gone on with: {reason}")
    return None


# %%
def save_weights(model, path):
    """Write a network's weights, whole or not at all."""
    with replacing(path) as temporary:
        model.save_weights(temporary)


def begin_training(files, settings, model):
    """Leave the initial weights, an empty history and the settings of a training."""
    shutil.rmtree(files.state, ignore_errors=True)  # what lay here is no training from now on
    save_weights(model, files.weights)
    write_history(files.history, [])
    files.state.mkdir()
    files.write(settings)


def copy_training(source, target):
    """Copy what a training has left to other Files, its state last and at once."""
    shutil.rmtree(target.state, ignore_errors=True)
    for name in ("weights", "history"):
        with replacing(getattr(target, name)) as temporary:
            shutil.copyfile(getattr(source, name), temporary)
    with replacing(target.state) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source.state, temporary)


def finish_training(files, settings, stopped=None):
    """Mark a training as complete. Its weights and its history are enough from now on."""
    files.write(settings, True, stopped)
    for path in files.state.iterdir():
        if path.name != "training.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # a kill may leave folders


# %%
class Record:
    """What a training leaves and goes on from: its best weights, its history, its state."""

    def __init__(self, files, settings, model, optimizer):
        self.files, self.settings, self.model, self.optimizer = files, settings, model, optimizer
        self.epochs, self.finished, self.stopped = [], False, None
        self.done = tf.Variable(0, trainable=False, dtype=tf.int64)  # steps
        self.parts = tf.train.Checkpoint(model=model, optimizer=optimizer, done=self.done)

    def resume(self, earlier):
        """Load the state from here or else from a folder of `earlier`, or begin the training."""
        place = find_training(self.files, self.settings, earlier)
        if place is None:
            begin_training(self.files, self.settings, self.model)
        elif place != self.files:
            copy_training(place, self.files)
        known = self.files.read()
        self.finished, self.stopped = known["finished"], known["stopped"]
        self.manager = tf.train.CheckpointManager(self.parts, str(self.files.state), max_to_keep=1)
        if not self.finished and self.manager.restore_or_initialize():
            history = read_history(self.files.history)
            rows = history["step"] <= int(self.done)  # a kill may have come before the state
            self.epochs = history[rows].to_dict("records")
        if place is not None:
            state = "is finished" if self.finished else f"goes on after {int(self.done)} steps"
            print(f"{self.files.name} {state}, in {place.folder}")

    def add(self, row):
        """Leave everything after an epoch, a dictionary of HISTORY."""
        if row["val_loss"] < min((epoch["val_loss"] for epoch in self.epochs), default=math.inf):
            save_weights(self.model, self.files.weights)
        self.epochs.append(row)
        write_history(self.files.history, self.epochs)
        self.done.assign(row["step"])
        self.manager.save()


# %% [markdown]
# The number of steps is planned by the clock: as many as are configured, or as many as fit into the
# time that the training may take, for which the steps done so far are timed. The learning rate
# reaches its end at the last planned step.


# %%
def time_batch(predict, batch, now):
    """The seconds that each image of a batch takes, once the function is compiled."""
    predict(*batch)
    start = now()
    predict(*batch).numpy()
    return (now() - start) / len(batch[0])


# %%
class Plan:
    """The steps of a training, `total`: those that are wanted, or fewer by the clock."""

    def __init__(self, title, epochs, steps, deadline, validation, now):
        self.title, self.epochs, self.steps, self.total = title, epochs, steps, epochs * steps
        self.deadline, self.validation, self.now = deadline, validation, now
        self.timed, self.seconds, self.last, self.told = 0, 0.0, None, None

    def count_step(self):
        """Time a step. The first one after the start or after a pause is not timed."""
        moment = self.now()
        if self.last is not None:
            self.timed, self.seconds = self.timed + 1, self.seconds + moment - self.last
        self.last = moment

    def count_validation(self, start):
        """Time a validation that began at `start`."""
        self.validation, self.last = self.now() - start, None

    def revise(self, done):
        """Plan anew after some steps, and tell if the number of epochs is another than before."""
        left = max(0.0, self.deadline - self.now())
        if self.timed:
            each = self.seconds / self.timed
            epochs, rest = divmod(left, max(self.steps * each + self.validation, 1e-9))
            more = max(0.0, rest - self.validation) / max(each, 1e-9)
            self.total = min(self.epochs * self.steps, done + int(epochs * self.steps + more))
        if self.told != (told := f"{self.total / self.steps:.3g} of {self.epochs} epochs"):
            print(f"{self.title}: {told} are planned, {left / 3600:.2f} hours are left for it")
            self.told = told


# %% [markdown]
# A loss that is no longer a number never becomes one again; only in float16, whose scaled gradients
# may be too large for a step, it can recover. So after ten such steps in a row, or after a
# validation whose loss is none, the training ends, and the notebook goes on with the best weights
# so far.


# %%
NOT_A_NUMBER = 10  # steps in a row


class Stop(Exception):
    """Ends a training before its time. `final` if it would end so each time."""

    def __init__(self, reason, final):
        super().__init__(reason)
        self.final = final


def check_losses(losses, interrupt):
    """Raise Stop if training should end after steps with these losses."""
    if interrupt.asked:
        raise Stop("it was interrupted", final=False)
    last = losses[-NOT_A_NUMBER:]
    if len(last) == NOT_A_NUMBER and not np.isfinite(last).any():
        raise Stop("its loss became nan", final=True)


# %%
def run_epochs(session, config, loss, parts, epochs, record, allow, cache):
    """Do the steps of a training that are not done yet. Leaves them in its record; raises Stop."""
    strategy, now = session.accelerator.strategy, session.clock.now
    model, optimizer, done = record.model, record.optimizer, int(record.done)
    steps, count = count_steps(config, len(parts[0][0])), len(parts[1][0])
    validate = distribute(strategy, make_validation(model, loss))
    step = distribute(strategy, make_step(model, loss, optimizer, strategy.num_replicas_in_sync))
    validation = make_dataset(config, *parts[1], cache=cache)
    batches = iter(make_dataset(config, *parts[0], done * config.batch_size, cache))
    each = time_batch(validate, next(iter(validation)), now)
    plan = Plan(record.files.name, epochs, steps, now() + allow(each), count * each, now)
    progress = Progress(f"{record.files.name}: step", plan.total, done)

    def revise():
        plan.revise(done)
        progress.total = plan.total
        optimizer.inner_optimizer.total_steps = float(plan.total)

    while done < plan.total:
        losses = []
        while done < plan.total and (not losses or done % steps):
            losses.append(step(*next(batches)).numpy().mean())
            done += 1
            plan.count_step()
            if plan.timed in (10, 100, 1000):
                revise()
            progress.advance(f"(loss {losses[-1]:.4f})")
            check_losses(losses, session.interrupt)
        start = now()
        validated = np.concatenate([validate(*batch).numpy() for batch in validation])[:count]
        plan.count_validation(start)
        if not np.isfinite(validated).all():
            raise Stop("its validation loss became nan", final=True)
        means = float(np.mean(losses)), float(validated.mean())
        record.add(dict(zip(HISTORY, (done / steps, done, *means))))
        revise()
    if done == epochs * steps:
        finish_training(record.files, record.settings)


# %%
def start_network(session, config, network):
    """A network with its initial weights. What TensorFlow kept of those before it is freed."""
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(config.seed)
    with session.accelerator.strategy.scope():
        return build_network(config, network)


# %%
def train(session, config, model, loss, parts, epochs, files, allow):
    """Train a network for a number of epochs, leave its Files and load its best weights.

    `loss` is a function of planes and probabilities; `parts` is what split_images returns; `allow`
    is a function from the seconds that an image's prediction takes to those that the training may
    take. If training is switched off, its weights and its history have to be there. Returns the
    history, a row per epoch; it has none if the training ended within the first.
    """
    steps = epochs * count_steps(config, len(parts[0][0]))
    with session.accelerator.strategy.scope():
        optimizer = make_optimizer(config, steps, model.trainable_variables)
    hashes = [int(pd.util.hash_pandas_object(rows).sum()) for _, rows in parts]
    settings = {**describe_training(config, epochs), "labels": hashes}
    record = Record(files, settings, model, optimizer)
    if config.train:
        record.resume(session.earlier)
        cache = make_cache(config, sum(len(paths) for paths, _ in parts))
        try:
            if not record.finished:
                check_losses([], session.interrupt)
                run_epochs(session, config, loss, parts, epochs, record, allow, cache)
        except Stop as stop:
            record.stopped = str(stop)
            if stop.final:
                finish_training(files, settings, str(stop))
        finally:
            (cache or {}).clear()  # TensorFlow holds on to the dataset for longer
    history = read_history(files.history).set_index("epoch")
    best = f"of epoch {history['val_loss'].idxmin():.3g}" if len(history) else "it began with"
    text = f"{files.name} ended early: {record.stopped}. Its weights are those {best}."
    session.warn(files.name, text if record.stopped else None)
    model.load_weights(files.weights)
    return history


# %%
def train_runs(session, runs, members, train_one):
    """Train runs one after the other, by `train_one`, a function of a run's number and the run.

    Returns the runs and the members that the session goes on with, and the histories by name.
    Interrupted, it does so without the runs that would come next.
    """
    histories = {}
    with session.interrupt:
        for index, run in enumerate(runs):
            if not session.interrupt.asked:
                histories[run.name] = train_one(index, run)
    for run in runs:
        text = f"Interrupted, the session goes on without {run.name}."
        session.warn(run.name, None if run.name in histories else text)
    kept = runs[: len(histories)]
    return kept, [*kept, *members[len(runs) :]], histories  # our runs lead the members


def plot_histories(axes, histories, title, ylabel):
    """Draw the losses of trainings, a dictionary from runs' names to histories."""
    for index, (name, history) in enumerate(histories.items()):
        color, best = f"C{index}", history["val_loss"].nsmallest(1)  # of no epoch there is none
        axes.plot(history["loss"], "--", color=color, label=f"{name}, training")
        axes.plot(history["val_loss"], color=color, label=f"{name}, validation")
        axes.plot(best, "o", color=color)
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)


# %% [markdown]
# ## Classify the patterns
#
# The classifier is trained twice. First the encoder stays frozen as it came from ImageNet, and only
# the four outputs are trained: the paper's *baseline*. From there everything is *fine-tuned*. The
# images, folds and augmentations are those of the segmentation. All classifiers together may take a
# quarter of what is left of the session.


# %%
CLASSIFIER_SHARE = 0.25  # of what is left of the session when their training begins


def train_classifier(session, run, labels, folds, folder, share=1.0, reserve=0.0):
    """Train a run's baseline and then its classifier, and leave their weights.

    They may take a share of what is left of the session, less `reserve` seconds. Returns their
    histories by these two names.
    """
    config, loss = configure_classifier(run.config), functools.partial(classifier_loss, run.config)
    parts, model = (
        split_images(config, labels, folds, folder),
        start_network(session, config, "classifier"),
    )
    histories, used = {}, 0.0
    for network, epochs in zip(("baseline", "classifier"), config.classifier_epochs):
        model.get_layer(index=2).trainable = network == "classifier"  # the encoder
        own = share * epochs / sum(config.classifier_epochs)
        allow = functools.partial(session.allow, own / (1 - used), reserve, 0)
        files = run.files(network)
        histories[network] = train(session, config, model, loss, parts, epochs, files, allow)
        used += own
    return histories


# %%
def load_network(run, network, strategy=None):
    """The trained "baseline", "classifier" or "unet" of a run, on the replicas of a strategy."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model = build_network(replace(run.config, encoder_weights=None), network)  # ours follow
        model.load_weights(run.files(network).weights)
    return model


def predict_presence(run, network, paths, strategy=None):
    """The probabilities of presence, float32 (images, classes), by "baseline" or "classifier"."""
    strategy, config = strategy or tf.distribute.get_strategy(), configure_classifier(run.config)
    model = load_network(run, network, strategy)
    predict = distribute(strategy, lambda images: model(images, training=False))
    found = [predict(*batch).numpy() for batch in make_dataset(config, paths)]
    return np.concatenate(found)[: len(paths)]


# %% tags=["nbval-ignore-output"]
reserve, count = (1 - CLASSIFIER_SHARE) * clock.left(), len(runs)
runs, members, classifier_histories = train_runs(
    *(session, runs, members),
    lambda index, run: train_classifier(session, run, *labelled, 1 / (count - index), reserve),
)

# %%
figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
for axes, network in zip(panels, ("baseline", "classifier")):
    histories = {name: history[network] for name, history in classifier_histories.items()}
    plot_histories(axes, histories, f"The {network}; a dot is kept", "cross-entropy")
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
save_figure(figure, output / "classifier.png")
plt.show()

# %% [markdown]
# In the sample the baseline's frozen encoder has random weights, as there are none from ImageNet,
# and nine images are too few for a classifier to learn anything that holds for others.
#
# *Accuracy* is the share of right answers to "is the class in the image?", over all validation
# images and all four classes; the mean over the folds is the paper's mean validation accuracy, as
# we read it. A class counts as found at a probability of 1/2 or more. A softmax has to divide its 1
# among all classes in the image, so there we ask for 1/4, the share of each if it knew nothing.


# %%
FOUND_AT = {"sigmoid": 1 / 2, "softmax": 1 / len(CLASSES)}


def measure_accuracy(truth, probabilities, activation):
    """The share of the images and classes whose presence (images, classes) is found as it is."""
    found = np.asarray(probabilities) >= FOUND_AT[activation]
    return float(np.mean(found == np.asarray(truth)))


def predict_held_out(runs, network, labels, folds, folder, strategy=None):
    """Probabilities of presence for each run's own validation images: a DataFrame per run."""
    tables = []
    for run in runs:
        _, (paths, rows) = split_images(run.config, labels, folds, folder)
        found = predict_presence(run, network, paths, strategy)
        tables.append(pd.DataFrame(found, rows.index, CLASSES))
    return tables


# %% tags=["nbval-ignore-output"]
strategy = accelerator.strategy
baselines = predict_held_out(runs, "baseline", *labelled, strategy)
classifiers = predict_held_out(members, "classifier", *labelled, strategy)
for run, baseline, found in zip(runs, baselines, classifiers):  # our runs lead the members
    truth = present.loc[found.index]
    run.results["images"] = len(truth)
    for measure, table in (("baseline accuracy", baseline), ("accuracy", found)):
        run.results[measure] = measure_accuracy(truth, table, config.activation)
pd.DataFrame({run.name: run.results for run in runs}).T[["baseline accuracy", "accuracy"]].round(4)

# %% [markdown]
# What follows looks at all validation images, each as the classifiers see it that were not trained
# on it; where several encoders did, their probabilities are averaged.
#
# Below are the precision-recall curves (the paper's Fig. 6). The authors' notebook marks two points
# on each: the highest threshold that finds .94 of the images with the class (`gate_recall`), which
# becomes the threshold below which a mask is dropped, and the lowest that is right in .90 of its
# finds. What the paper reads at its points was not at hand. Below the curves: do 70 % of the images
# hold a class to which the classifier gives 70 %? The Brier score, the mean squared error of the
# probabilities, is 0 at best.


# %%
QUOTED_PRECISION = 0.9  # of the second point that the authors mark


def find_points(truth, probability, recall):
    """The two points on a class's precision-recall curve.

    The threshold and the precision where the recall is at least `recall`, and the recall where the
    precision is at least QUOTED_PRECISION: nan where there is none.
    """
    precisions, recalls, thresholds = precision_recall_curve(truth, probability)
    last = np.flatnonzero(recalls[:-1] >= recall)[-1]  # the thresholds ascend
    precise = recalls[:-1][precisions[:-1] >= QUOTED_PRECISION]
    return thresholds[last], precisions[last], precise.max(initial=0) or np.nan


def describe_classifier(truth, probabilities, recall):
    """A row per class with find_points, frequency, average precision and Brier score."""
    rows = {}
    for name in CLASSES:
        known, probability = truth[name], probabilities[name]
        curve = [np.nan] * 4
        if known.any():
            curve = [average_precision_score(known, probability)]
            curve += find_points(known, probability, recall)
        rows[name] = [known.mean(), *curve, brier_score_loss(known, probability)]
    columns = ["frequency", "average precision", "threshold", f"precision at recall {recall:.2f}"]
    columns += [f"recall at precision {QUOTED_PRECISION:.2f}", "Brier score"]
    return pd.DataFrame(rows, columns).T


# %% tags=["nbval-ignore-output"]
held_out = pd.concat(classifiers).groupby(level=0).mean()
truth = present.loc[held_out.index]
description = describe_classifier(truth, held_out, config.gate_recall)
for run, found in zip(runs, classifiers):
    own = describe_classifier(present.loc[found.index], found, config.gate_recall)
    run.results["average precision"] = float(own["average precision"].mean())
description.round(3)

# %%
figure, panels = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
for name, color, curve, reliability in zip(CLASSES, COLORS, *panels):
    frequency, average, least, precision_there, recall_there, brier = description.loc[name]
    curve.axhline(frequency, linestyle=":", color="gray", label="frequency")
    reliability.plot([0, 1], [0, 1], ":", color="gray", label="calibrated")
    if frequency > 0:
        precision, recall, _ = precision_recall_curve(truth[name], held_out[name])
        curve.fill_between(recall, precision, step="pre", alpha=0.3, color=color)
        curve.step(recall, precision, where="pre", color=color)
        chosen = f"precision {precision_there:.2f} at recall {config.gate_recall:.2f}"
        chosen += f"\n(threshold {least:.2f})"
        curve.plot(config.gate_recall, precision_there, "kv", label=chosen)
        if recall_there > 0:
            precise = f"precision {QUOTED_PRECISION:.2f} at recall {recall_there:.2f}"
            curve.plot(recall_there, QUOTED_PRECISION, "k>", label=precise)
        bins = int(np.clip(len(truth) // 10, 2, 10))  # with ten images or more in each
        pair = truth[name], held_out[name]
        shares, means = calibration_curve(*pair, n_bins=bins, strategy="quantile")
        reliability.plot(means, shares, "o-", color=color, label=name)
    curve.set(title=f"{name}, average precision {average:.2f}", xlabel="recall")
    curve.set(ylabel="precision", xlim=(0, 1.03), ylim=(0, 1.05))
    reliability.set(title=f"{name}, Brier score {brier:.2f}", xlabel="probability")
    reliability.set(ylabel="share of images with the class", xlim=(0, 1), ylim=(-0.03, 1.03))
    curve.legend(loc="lower left")
    reliability.legend(loc="upper left")
save_figure(figure, output / "precision_recall.png")
plt.show()

# %% [markdown]
# The curve of a classifier that knows nothing is the dotted line at the class's frequency, which is
# also its average precision. A softmax is not calibrated for images of several classes: their
# probabilities cannot all be near 1.
#
# What does the classifier look at? Grad-CAM weights the maps of the encoder's last layer by how
# much a class's score rises with them, and adds them up. We show it for the first run and the first
# validation image of each class, with the outline of the true mask. The number beside it is the
# share of the heat that lies in the true mask, over all validation images with the class that have
# any heat. By chance it would be the mask's share of the image.


# %%
def grad_cam(classifier, images):
    """Where a classifier finds each class: float32 (batch, rows, columns, classes), of 0 and more.

    [Grad-CAM](https://arxiv.org/abs/1610.02391), equations 1 and 2, for the scores before softmax
    or sigmoid, at the size of the encoder's last maps.
    """
    average, logits = classifier.get_layer("average"), classifier.get_layer("logits")
    maps = tf.keras.Model(classifier.input, average.input)(images)
    maps = tf.cast(maps, tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(maps)
        scores = tf.unstack(logits(average(maps)), axis=-1)
    heat = []
    for score in scores:
        weights = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2), keepdims=True)
        heat.append(tf.nn.relu(tf.reduce_sum(weights * maps, axis=-1)))
    return tf.stack(heat, axis=-1)


def share_heat(heat, masks):
    """The share of the heat that lies in the mask, and the mask's share of the image.

    `heat` (batch, rows, columns, classes) is brought to the size of `masks`. Returns two float
    arrays (batch, classes), nan where there is no mask or no heat.
    """
    heat, masks = tf.image.resize(heat, masks.shape[1:3]).numpy(), np.asarray(masks)
    total, inside = heat.sum(axis=(1, 2)), (heat * masks).sum(axis=(1, 2))
    unknown = (total == 0) | ~masks.any(axis=(1, 2))
    shares = np.stack([inside / np.where(unknown, 1, total), masks.mean(axis=(1, 2))])
    return np.where(unknown, np.nan, shares)


# %% tags=["nbval-ignore-output"]
classifier, cam_config = load_network(runs[0], "classifier"), configure_classifier(runs[0].config)
_, (paths, rows) = split_images(cam_config, *labelled)
batches = make_dataset(cam_config, paths, rows)
shares = [share_heat(grad_cam(classifier, images), split_planes(p)) for images, p in batches]
shares = np.concatenate(shares, axis=1)[:, : len(paths)]
in_mask, in_image = (pd.DataFrame(part, columns=CLASSES) for part in shares)
pd.DataFrame({"heat in the mask": in_mask.mean(), "mask in the image": in_image.mean()}).round(3)

# %%
figure, panels = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
for index, (name, (above, below)) in enumerate(zip(CLASSES, panels.T)):
    image_name = rows.index[(rows[name] != "").argmax()]  # the first with the class
    rles = rows.loc[image_name]
    image, plane = load_example(cam_config, train_folder / image_name, rles)
    heat = tf.image.resize(grad_cam(classifier, image[None])[0], image.shape[:2])[..., index]
    only = split_plane(plane) * (np.arange(len(CLASSES)) == index)
    absent = "" if only.any() else ", where it is absent"  # if no image has the class
    outline(above, image, only, f"{name}: {image_name}{absent}")
    outline(below, image, only, "Grad-CAM")
    below.imshow(heat, cmap="inferno", alpha=0.6)
save_figure(figure, output / "grad_cam.png")
plt.show()

# %% [markdown]
# Heat inside of the outline means that the classifier decides by the clouds that the labellers
# meant. Heat outside means that it found them elsewhere, or goes by something else.

# %% [markdown]
# ## Segment the patterns
#
# Now EfficientUNet for the same runs. What is left of the session, less the time for all
# predictions, is divided among them by the operations that their networks take.


# %%
LAST_RESERVE = 900  # seconds to choose the rules and to write the submission


def train_unet(session, run, labels, folds, folder, share=1.0, predictions=0):
    """Train a run's EfficientUNet and leave its weights. Returns the history.

    It may take a share of what is left, less the time for a number of predictions of an image.
    """
    config, loss = run.config, functools.partial(unet_loss, run.config)
    parts, model = (
        split_images(config, labels, folds, folder),
        start_network(session, config, "unet"),
    )
    allow = functools.partial(session.allow, share, LAST_RESERVE, predictions)

    return train(session, config, model, loss, parts, config.epochs, run.files("unet"), allow)


# %% tags=["nbval-ignore-output"]
views, count = 4 if config.flips else 1, len(runs)
each = [views * (len(test_paths) + (folds == run.config.fold).sum()) for run in members]
costs = [find_footprint(run.config, "unet").operations for run in members]
runs, members, unet_histories = train_runs(
    *(session, runs, members),
    lambda index, run: train_unet(
        *(session, run, *labelled),
        share=costs[index] / sum(costs[index:count]),
        predictions=np.dot(each, costs) / costs[index],  # of images by this network
    ),
)

# %%
weight = config.cross_entropy_weight
ylabel = f"{weight:.2g} x cross-entropy + {1 - weight:.2g} x Dice loss"
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
plot_histories(axes, unet_histories, "EfficientUNet; a dot is kept", ylabel)
axes.legend()
save_figure(figure, output / "history.png")
plt.show()

# %% [markdown]
# As long as both curves fall, more epochs help. Where the validation loss turns up while the
# training loss goes on falling, the network learns the training images by heart, and the weights
# from before the turn are kept.

# %% [markdown]
# ## Turn probabilities into masks
#
# The network's maps are brought to the submission's size and to bytes, 0 to 255, as soon as they
# are computed. They are set to zero on the black band, which the masks leave out. Where several
# networks predict the same image, the mean of their maps, again in bytes, is used: on a validation
# image those that were not trained on it, on a test image all of them. If `flips` is set, each
# network's map is itself a mean, over the image and its mirror images.
#
# A mask is where the map reaches a threshold. What is left to decide is which threshold, and when
# to predict the empty mask instead: on an absent class it scores 1 and a single pixel 0.
#
# How many pixels of a map have each of the 256 values, and how many of these are true, is enough to
# know the Dice of *every* threshold: two cumulative sums give the area and the overlap of each
# thresholded mask. The same is counted inside of a few shapes, the boxes and hulls of a map's
# parts, which the last way to decide draws on. The maps themselves are then forgotten.


# %%
BAND_BRIGHTNESS = 2  # of 255: the band is black but for traces of JPEG compression


def find_band(image):
    """Where the satellite did not pass in an image (height, width, 3): bool of SUBMISSION_SIZE."""
    small = cv2.resize(image, SUBMISSION_SIZE[::-1], interpolation=cv2.INTER_AREA)
    dark = (small.max(axis=-1) <= BAND_BRIGHTNESS).astype(np.uint8)
    return cv2.morphologyEx(dark, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0  # no single pixels


@functools.lru_cache
def resizing_weights(length, target):
    """How TensorFlow's smooth resizing weighs pixels along a line: float32 (target, length).

    As a product of matrices it compiles for a TPU, which TensorFlow's own operation does not.
    """
    lines = np.eye(length, dtype=np.float32)[..., None]
    with tf.init_scope():
        return tf.image.resize(lines, (target, length), antialias=True)[..., 0].numpy()


def find_maps(unet, flips, images):
    """The maps of a batch of images: uint8 (batch, 350, 525, classes).

    With `flips`, the mean over the image, its mirror images and both, each turned back.
    """
    turns = [[], [1], [2], [1, 2]] if flips else [[]]  # axes that are reversed
    several = [tf.reverse(unet(tf.reverse(images, turn), training=False), turn) for turn in turns]
    probabilities = tf.add_n(several)[..., -len(CLASSES) :] / len(turns)
    rows, columns = map(resizing_weights, probabilities.shape[1:3], SUBMISSION_SIZE)
    resized = tf.einsum("yh,bhwc,xw->byxc", rows, probabilities, columns)
    return tf.cast(tf.round(255 * tf.clip_by_value(resized, 0, 1)), tf.uint8)


# %%
def predict_maps(config, predict, paths):
    """Yield the maps of each image, uint8 (350, 525, classes), 0 on the black band.

    `predict` is find_maps, distributed.
    """
    left = len(paths)
    for (images,) in make_dataset(config, paths):
        for image, maps in zip(images.numpy()[:left], predict(images).numpy()):
            maps[find_band(image)] = 0
            yield maps
        left -= len(images)


def average_maps(several):
    """The mean of maps of the same image, rounded to bytes."""
    return np.rint(np.mean(several, axis=0, dtype=np.float32)).astype(np.uint8)


def predict_together(predictors, paths):
    """Yield, for each image, the list of each predictor's maps.

    `predictors` are pairs of a Config and find_maps, distributed.
    """
    yield from zip(*(predict_maps(config, predict, paths) for config, predict in predictors))


# %%
CUTS = (64, 128, 192)  # values above which a map falls into parts
SHAPES = 2 * len(CUTS)  # the parts' bounding boxes and their convex hulls for each cut
LEAST_PART = 0.01  # of the image: smaller parts have no shape


def draw_shapes(values):
    """The shapes of a map as a plane, uint8 (height, width), whose bits are the shapes.

    Bits 0 and 1 are the boxes and the hulls at the first cut, and so on. Where the map is 0, as on
    the black band, there is none.
    """
    plane = np.zeros(values.shape, np.uint8)
    for number, cut in enumerate(CUTS):
        reached = (values >= cut).astype(np.uint8)
        parts, _ = cv2.findContours(reached, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        boxes, hulls = np.zeros((2, *values.shape), np.uint8)
        for part in parts:
            if cv2.contourArea(part) >= LEAST_PART * values.size:
                left, top, width, height = cv2.boundingRect(part)
                boxes[top : top + height, left : left + width] = 1
                cv2.fillConvexPoly(hulls, cv2.convexHull(part), 1)
        plane |= (boxes << 2 * number) | (hulls << 2 * number + 1)
    plane[values == 0] = 0
    return plane


# %%
def count_reaching(values, plane=None):
    """How many of some bytes are at least 0, 1, ..., 255: int (256).

    With the `plane` of their shapes, followed by as many numbers for those inside of each shape.
    """
    if plane is None:
        counts = np.bincount(values, minlength=256)[None]
    else:  # one pass for all shapes: by value and by the combination of shapes
        combinations = np.arange(1 << SHAPES)
        joint = np.bincount(plane * np.intp(256) + values, minlength=256 << SHAPES)
        inside = combinations >> np.arange(SHAPES)[:, None] & 1
        inside = np.concatenate([np.ones_like(inside[:1]), inside])
        counts = inside @ joint.reshape(-1, 256)
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1].ravel()


def split_classes(images):
    """Images (height, width, classes) as (classes, height, width), each class in one piece."""
    return np.ascontiguousarray(np.moveaxis(images, -1, 0))


def count_pixels(maps, masks, shapes=False):
    """Areas and overlaps of every thresholded mask: int32 (2, classes, 256).

    `maps` (height, width, classes) are uint8, `masks` of the same shape zeros and ones. Entry
    [c, t] counts the pixels of class c with a value of at least t; the overlaps count the true
    ones among them, so that overlaps[c, 0] is the area of the true mask. With `shapes`, 256
    entries more for each of them count the pixels inside of it.
    """
    counts = []
    for values, mask in zip(split_classes(maps), split_classes(masks)):
        pixels = [values] + ([draw_shapes(values)] if shapes else [])
        true = mask.ravel() > 0
        flat = [part.ravel() for part in pixels]
        counts.append([count_reaching(*flat), count_reaching(*(part[true] for part in flat))])
    return np.array(counts, np.int32).swapaxes(0, 1)


# %%
def count_validation(predictors, paths, labels):
    """count_pixels of each predictor's maps, and with shapes of their mean.

    Returns int32 (predictors, 2, images, classes, 256) and (2, images, classes, entries).
    """
    progress = Progress("Validation image", len(paths))
    counts, mean_counts = [], []
    for several, rles in zip(predict_together(predictors, paths), labels.to_numpy()):
        masks = split_plane(read_plane(rles, SUBMISSION_SIZE))
        counts.append([count_pixels(maps, masks) for maps in several])
        mean_counts.append(count_pixels(average_maps(several), masks, shapes=True))
        progress.advance()
    return np.moveaxis(np.stack(counts), 0, 2), np.stack(mean_counts, axis=1)


# %% tags=["nbval-ignore-output"]
predictors = []
for run in members:
    predict = functools.partial(find_maps, load_network(run, "unet", strategy), config.flips)
    predictors.append((run.config, distribute(strategy, predict)))
counts, mean_counts, held_out_names = {}, [], []
for fold in sorted({run.config.fold for run in members}):
    chosen = [index for index, run in enumerate(members) if run.config.fold == fold]
    _, (paths, rows) = split_images(replace(config, fold=fold), *labelled)
    own, mean = count_validation([predictors[index] for index in chosen], paths, rows)
    counts |= dict(zip(chosen, own))
    mean_counts.append(mean)
    held_out_names += list(rows.index)
areas, overlaps = np.concatenate(mean_counts, axis=1)
presence = held_out.loc[held_out_names].to_numpy()  # its rows in the order of the counts

# %% [markdown]
# A *decision* is a number for each image and class: up to 255 a threshold, beyond it a threshold
# within one of the shapes below, and at last the empty mask. A *way to decide* learns from
# validation images, and returns a rule that takes the areas of an image's masks and the
# classifier's probabilities to decisions. We compare six.
#
# The first takes one half as the threshold. The second is the usual one: per class, the threshold
# and the smallest area to predict that score best, of 255 times 60, all compared at once. Of pairs
# that score the same we take the one nearest to one half. The third adds the paper's *gate*: no
# mask where the classifier's probability is below the threshold at which it finds `gate_recall` of
# the images with the class.


# %%
EMPTY = 256 * (1 + SHAPES)  # the decision for the empty mask; 0 is that for the whole image
MINIMUM_AREAS = np.round(np.arange(0, 0.3, 0.005) * math.prod(SUBMISSION_SIZE)).astype(int)


def score_decisions(areas, overlaps, decisions):
    """The Dice of each image and class: float (images, classes).

    `areas` and `overlaps` are counts (images, classes, entries), `decisions` int (images, classes).
    """
    predicted = decisions < EMPTY
    entries = np.where(predicted, decisions, 0)[..., None]
    area, overlap = (
        np.take_along_axis(counts, entries, axis=-1)[..., 0] * predicted
        for counts in (areas, overlaps)
    )
    return divide_dice(overlap, area + overlaps[..., 0])


def score_rules(areas, overlaps):
    """The mean Dice of all thresholds and areas for one class: float (minimum areas, 256).

    `areas` and `overlaps` (images, 256) are the class's counts.
    """
    empty = overlaps[:, :1] == 0
    scores = divide_dice(overlaps, areas + overlaps[:, :1])
    rules = (np.where(areas >= least, scores, empty) for least in MINIMUM_AREAS)
    return np.stack([rule.mean(axis=0) for rule in rules])


def tune_rules(areas, overlaps):
    """Each class's best threshold, 1 to 255, and minimum area in pixels: int (classes, 2)."""
    rules = []
    for index in range(areas.shape[1]):
        scores = score_rules(areas[:, index, :256], overlaps[:, index, :256])[:, 1:]
        best = np.argwhere(np.isclose(scores, scores.max(), rtol=0, atol=1e-12)) + (0, 1)
        least, threshold = min(best, key=lambda rule: (abs(rule[1] - 128), rule[0]))
        rules.append((threshold, MINIMUM_AREAS[least]))
    return np.array(rules)


# %%
def use_half(config, areas, overlaps, presence):
    """A way to decide: a threshold of one half, whatever the area."""
    return lambda areas, presence: np.full(presence.shape, 128)


def use_area(config, areas, overlaps, presence):
    """A way to decide: the best threshold and minimum area of each class."""
    thresholds, least = tune_rules(areas, overlaps).T

    def decide(areas, presence):
        area = areas[:, np.arange(len(thresholds)), thresholds]
        return np.where(area >= least, thresholds, EMPTY)

    return decide


def choose_gates(truth, probabilities, recall):
    """The least probability, for each class, at which a mask is let through: float (classes).

    `truth` and `probabilities` of presence are (images, classes). 0 for a class that is absent.
    """
    pairs = zip(truth.T, probabilities.T)
    return np.array([find_points(*pair, recall)[0] if pair[0].any() else 0.0 for pair in pairs])


def use_gate(config, areas, overlaps, presence):
    """A way to decide: use_area, and no mask where the classifier finds the class absent."""
    decide = use_area(config, areas, overlaps, presence)
    gates = choose_gates(overlaps[..., 0] > 0, presence, config.gate_recall)
    return lambda areas, presence: np.where(presence >= gates, decide(areas, presence), EMPTY)


# %% [markdown]
# The fourth way asks a high threshold whether to predict and a low one what: the mask of the low
# threshold is predicted where that of the high one reaches an area and the classifier a
# probability. All combinations of 31 high and 255 low thresholds, 20 areas and 20 probabilities are
# compared. Whether an image passes is a row of zeros and ones for each combination, so that one
# product with the table of scores sums them all.


# %%
HIGH_THRESHOLDS = np.arange(8, 256, 8)


def tune_quadruple(areas, overlaps, presence):
    """One class's high threshold, minimum area, low threshold and probability that score best.

    `areas` and `overlaps` are (images, 256), `presence` is (images). Returns these four and their
    mean Dice.
    """
    empty = (overlaps[:, 0] == 0).astype(float)
    gains = divide_dice(overlaps, areas + overlaps[:, :1])[:, 1:] - empty[:, None]
    gates = np.append(0, np.quantile(presence, np.arange(1, 20) / 20))
    open_gates = presence >= gates[:, None]
    least = MINIMUM_AREAS[::3]
    best = (-np.inf,)
    for high in HIGH_THRESHOLDS:
        large = areas[:, high] >= least[:, None]
        passes = (large[:, None] & open_gates).reshape(-1, len(areas))
        scores = passes.astype(float) @ gains
        row, low = np.unravel_index(scores.argmax(), scores.shape)
        if scores[row, low] > best[0] + 1e-9:
            area, gate = divmod(row, len(gates))
            best = scores[row, low], high, least[area], low + 1, gates[gate]
    return *best[1:], empty.mean() + best[0] / len(areas)


def use_quadruple(config, areas, overlaps, presence):
    """A way to decide: the high and low threshold, area and probability of tune_quadruple."""
    tuned = [
        tune_quadruple(areas[:, index, :256], overlaps[:, index, :256], presence[:, index])
        for index in range(presence.shape[1])
    ]
    high, least, low = np.array([row[:3] for row in tuned]).T
    gates = np.array([row[3] for row in tuned])

    def decide(areas, presence):
        large = areas[:, np.arange(len(high)), high] >= least
        return np.where(large & (presence >= gates), low, EMPTY)

    return decide


# %% [markdown]
# The fifth way maximises the *expected* Dice coefficient of each mask. Let $P$ be the probability
# that the image holds the class, and $q(v)$ that a pixel of the value $v$ is true if it does. If
# $n(v)$ pixels have the value $v$, the mask from the threshold $t$ on has, given presence, about
# the expected Dice
#
# $$D(t) = \frac{2 \sum_{v \geq t} n(v)\,q(v)}{\sum_{v \geq t} n(v) + \sum_v n(v)\,q(v)}.$$
#
# Predicting it scores $P \max_t D(t)$ on average, the empty mask $1 - P$; we take the larger. In
# all 5,546 labelled images there is at least one class, so where all four masks would be empty, the
# one that loses least is predicted.
#
# $q$ is fitted by isotonic regression, since a higher value should not mean a lower probability,
# and $P$ by logistic regression on the classifier's probability and on how high and how far the map
# rises.
#
# The sixth way has more masks to choose from. Labellers drew boxes, so the parts of a map above
# .25, .5 and .75 are also taken as their bounding boxes and convex hulls. Inside of each shape $q$
# is fitted anew: a dark pixel amid a box is more likely true than one outside. A shape is not
# preferred for its own sake, but where its expected Dice is the highest.


# %%
def to_logits(probabilities):
    """The logarithms of the odds, of probabilities kept off 0 and 1 by a thousandth."""
    clipped = np.clip(probabilities, 1e-3, 1 - 1e-3)
    return np.log(clipped / (1 - clipped))


def describe_maps(areas, presence):
    """What a class's presence is judged by: float (images, 5), all as logits.

    The classifier's probability, the values that 2, 10 and 30 % of the map reach, and its mean.
    """
    areas, pixels = areas[:, :256], areas[:, :1]
    reached = [(areas >= share * pixels).sum(axis=1) - 1 for share in (0.02, 0.1, 0.3)]
    mean = areas[:, 1:].sum(axis=1) / pixels[:, 0]
    return to_logits(np.column_stack([presence, np.column_stack([*reached, mean]) / 255]))


# %%
def split_counts(counts):
    """Cumulative counts (..., entries) as pixels of each value: (..., 1 + shapes, 256)."""
    blocks = counts.reshape(*counts.shape[:-1], counts.shape[-1] // 256, 256)
    return -np.diff(blocks, axis=-1, append=0)


def calibrate(areas, overlaps, presence):
    """Fit one class's judge of presence and the probability of each value's pixels.

    `areas` and `overlaps` are (images, entries), `presence` is (images). The judge is a classifier
    of scikit-learn for describe_maps, the probabilities are float (1 + shapes, 256). One image with
    the class and one without, both average, and one pixel of each value keep them defined on few
    images.
    """
    features, truth = describe_maps(areas, presence), overlaps[:, 0] > 0
    features = np.concatenate([features, [features.mean(axis=0)] * 2])
    judge = make_pipeline(StandardScaler(), LogisticRegression())
    judge.fit(features, [*truth, False, True])
    values, probabilities = np.arange(256), []
    pixels = (split_counts(counts[truth]).sum(axis=0) for counts in (areas, overlaps))
    for all_pixels, true_pixels in zip(*pixels):
        shares = (true_pixels + values / 255) / (all_pixels + 1)
        fitted = IsotonicRegression().fit(values, shares, all_pixels + 1)
        probabilities.append(fitted.predict(values))
    return judge, np.array(probabilities)


def expect_dice(areas, pixel_probabilities):
    """The expected Dice, given presence, of every mask: float (images, entries)."""
    expected = split_counts(areas) * pixel_probabilities
    overlaps = expected[..., ::-1].cumsum(axis=-1)[..., ::-1].reshape(areas.shape)
    return 2 * overlaps / np.maximum(areas + overlaps[:, :1], 1e-9)


# %%
def use_shapes(config, areas, overlaps, presence):
    """A way to decide: of all masks, those in shapes too, that of the highest expected Dice."""
    classes, entries = range(presence.shape[1]), areas.shape[-1]
    fitted = [calibrate(areas[:, c], overlaps[:, c], presence[:, c]) for c in classes]

    def decide(areas, presence):
        decisions, gains = np.empty(presence.shape, int), np.empty(presence.shape)
        for index, (judge, pixel_probabilities) in enumerate(fitted):
            dice = expect_dice(areas[:, index, :entries], pixel_probabilities)[:, 1:]
            features = describe_maps(areas[:, index], presence[:, index])
            there = judge.predict_proba(features)[:, 1]
            decisions[:, index] = dice.argmax(axis=1) + 1  # without the whole image
            gains[:, index] = there * dice.max(axis=1) - (1 - there)
        predicted = gains > 0
        predicted[np.arange(len(gains)), gains.argmax(axis=1)] = True  # at least one
        return np.where(predicted, decisions, EMPTY)

    return decide


def use_expectation(config, areas, overlaps, presence):
    """A way to decide: use_shapes without shapes, by thresholds alone."""
    return use_shapes(config, areas[..., :256], overlaps[..., :256], presence)


WAYS = {  # by the names in DECISIONS
    "threshold 0.5": use_half,
    "threshold and area": use_area,
    "threshold and area, gated": use_gate,
    "two thresholds, area and gate": use_quadruple,
    "expected Dice": use_expectation,
    "expected Dice, with shapes": use_shapes,
}

# %% [markdown]
# A rule that is scored on the images it was tuned on looks better than it is. So the validation
# images are dealt into five parts, and the decisions for each part come from rules that learned on
# the other four. Those for the test images learn on all. Where networks of several folds predict a
# test image together, their mean is smoother than the maps that the rules learned on; this we do
# not correct.


# %%
def cross_validate(config, ways, areas, overlaps, presence):
    """Decisions for each image and class by rules that learned on other images.

    `ways` are names in WAYS, `areas` and `overlaps` counts (images, classes, entries), `presence`
    the classifier's probabilities (images, classes). Returns int (images, classes) by way. Raises
    ValueError for a single image.
    """
    if len(areas) < 2:
        raise ValueError("There is a single validation image: nothing to learn from beside it.")
    order = np.random.default_rng(config.seed).permutation(len(areas))
    decisions = {way: np.empty(presence.shape, int) for way in ways}
    for part in np.array_split(order, min(5, len(order))):
        others = np.setdiff1d(order, part)
        for way in ways:
            decide = WAYS[way](config, areas[others], overlaps[others], presence[others])
            decisions[way][part] = decide(areas[part], presence[part])
    return decisions


# %%
def bound_difference(differences, generator, samples=2000):
    """The mean of differences (images), and its 95 % interval by the bootstrap."""
    sizes = (samples, len(differences))
    means = differences[generator.integers(len(differences), size=sizes)].mean(axis=1)
    return differences.mean(), *np.percentile(means, [2.5, 97.5])


def compare_ways(scores, seed):
    """Each way's Dice per class and mean, and its difference to the way before it.

    `scores` are float (images, classes) by way. The difference comes with the 2.5th and the 97.5th
    percentile of 2,000 samples of the images, drawn with replacement.
    """
    rows, before = {}, None
    draws = np.random.default_rng(seed)
    for way, score in scores.items():
        image_means = score.mean(axis=1)
        rows[way] = [*score.mean(axis=0), score.mean()]
        if before is not None:
            rows[way] += [*bound_difference(image_means - before, draws)]
        before = image_means
    return pd.DataFrame.from_dict(rows, "index", columns=[*CLASSES, "mean", "gain", "from", "to"])


def choose_way(config, scores):
    """`config.decision`, or for "best" the expected Dice unless another way surely scores higher.

    Sure is a 95 % interval of the difference above 0, on twenty images or more.
    """
    if config.decision != "best":
        return config.decision
    default, generator = "expected Dice", np.random.default_rng(config.seed)
    best = max(WAYS, key=lambda way: scores[way].mean())
    differences = (scores[best] - scores[default]).mean(axis=1)
    sure = len(differences) >= 20 and bound_difference(differences, generator)[1] > 0
    return best if sure else default


# %% tags=["nbval-ignore-output"]
tables_ways = "threshold and area", "threshold and area, gated"  # of the paper's tables
for index, (run, found) in enumerate(zip(runs, classifiers)):  # our runs lead the members
    decisions = cross_validate(config, tables_ways, *counts[index], found.to_numpy())
    for measure, decided in zip(("Dice", "gated Dice"), decisions.values()):
        run.results[measure] = float(score_decisions(*counts[index], decided).mean())
there = overlaps[..., 0] > 0
decisions = {
    "all masks empty": np.full(there.shape, EMPTY),
    "whole image where the class is present": np.where(there, 0, EMPTY),
    **cross_validate(config, WAYS, areas, overlaps, presence),
}
scores = {way: score_decisions(areas, overlaps, decided) for way, decided in decisions.items()}
comparison = compare_ways(scores, config.seed)
way = choose_way(config, scores)
print(f"Dice of {len(areas)} validation images; the test images are decided by: {way}")
comparison.round(4)

# %% [markdown]
# The second row knows the truth about presence, which no submission does; it says what a perfect
# classifier without any segmentation would score. A gain, to the row above, means something where
# its 95 % interval, `from` and `to`, is on one side of 0. The handful of images of the sample
# cannot tell the six ways apart; then the expected Dice decides.
#
# Where do the gains come from? From absent classes that are left empty, from present ones that are
# found, and from masks that overlap better:

# %%
figure, panels = plt.subplots(1, 3, figsize=(14, 3.5), sharey=True, layout="constrained")
shown = {name: (decisions[name] < EMPTY, scores[name]) for name in WAYS}
bars = {
    "absent and left empty": {name: 1 - kept[~there].mean() for name, (kept, _) in shown.items()},
    "present and found": {name: kept[there].mean() for name, (kept, _) in shown.items()},
    "Dice where present and found": {
        name: score[there & kept].mean() for name, (kept, score) in shown.items()
    },
}
for axes, (title, values) in zip(panels, bars.items()):
    axes.bar_label(axes.barh(list(values), list(values.values())), fmt="%.2f", padding=3)
    axes.set(title=title, xlabel="share" if "Dice" not in title else "mean", xlim=(0, 1.15))
panels[0].invert_yaxis()
save_figure(figure, output / "gains.png")
plt.show()

# %% [markdown]
# The Dice of all thresholds and areas on the validation images, with the best one starred:

# %%
rules = tune_rules(areas, overlaps)
figure, panels = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
area_range = 100 * MINIMUM_AREAS[[0, -1]] / math.prod(SUBMISSION_SIZE)
for index, (axes, name) in enumerate(zip(panels.flat, CLASSES)):
    grid = score_rules(areas[:, index, :256], overlaps[:, index, :256])[:, 1:]
    image = axes.imshow(grid, origin="lower", aspect="auto", extent=(1 / 255, 1, *area_range))
    threshold, least = rules[index] / (255, math.prod(SUBMISSION_SIZE) / 100)
    axes.plot(threshold, least, "r*", markersize=14, clip_on=False)
    axes.set(title=f"{name}, its rule starred", xlabel="threshold", ylabel="minimum area, %")
    figure.colorbar(image, ax=axes, label="mean Dice")
save_figure(figure, output / "rules.png")
plt.show()

# %% [markdown]
# A rule on a broad bright plateau is one to trust; a thin bright ridge is chance. Some validation
# images with their true masks and with the predicted ones:


# %%
def make_masks(maps, presence, decide):
    """The masks of one image by a rule: bool (height, width, classes).

    `maps` have the same shape, `presence` are the probabilities of the classes.
    """
    several = split_classes(maps)
    planes = [draw_shapes(values) for values in several]
    areas = np.array([count_reaching(v.ravel(), p.ravel()) for v, p in zip(several, planes)])
    masks = np.zeros(maps.shape, bool)
    for index, decision in enumerate(decide(areas[None], presence[None])[0]):
        if decision < EMPTY:
            shape, threshold = divmod(decision, 256)
            masks[..., index] = several[index] >= threshold
            if shape:
                masks[..., index] &= planes[index] >> (shape - 1) & 1 > 0
    return masks


# %%
decide = WAYS[way](config, areas, overlaps, presence)
names = held_out_names[:3]
fitting = [predictor for predictor in predictors if predictor[0].fold == folds[names[0]]]
shown = [train_folder / name for name in names if folds[name] == folds[names[0]]]
figure, panels = plt.subplots(
    len(shown), 2, figsize=(12, 4 * len(shown)), layout="constrained", squeeze=False
)
for row, path, several in zip(panels, shown, predict_together(fitting, shown)):
    image = read_image(path, SUBMISSION_SIZE)
    truth = split_plane(read_plane(labels.loc[path.name], SUBMISSION_SIZE))
    masks = make_masks(average_maps(several), held_out.loc[path.name].to_numpy(), decide)
    outline(row[0], image, truth, f"{path.name}: truth")
    outline(row[1], image, masks, f"{path.name}: predicted")
add_legend(figure)
save_figure(figure, output / "validation.png")
plt.show()

# %% [markdown]
# ## Predict and write the submission
#
# Test images are read, predicted by all networks and encoded batch by batch, so that memory does
# not grow with their number; should the time run out, the rest of them get empty masks. The
# submission has the rows of `sample_submission.csv` in its order, is written whole, and is read
# back and checked.


# %%
LEAST_TIME = 120  # seconds to write the submission and the report


def predict_rles(predictors, paths, presence, decide, session):
    """The encoded masks of each image, a dictionary from label rows to run-length encodings.

    It ends LEAST_TIME before the session does, and tells how many images it has left out.
    """
    progress = Progress("Test image", len(paths))
    rles = {}
    for path, several, found in zip(paths, predict_together(predictors, paths), presence):
        masks = make_masks(average_maps(several), found, decide)
        for index, name in enumerate(CLASSES):
            rles[f"{path.name}_{name}"] = encode_rle(masks[..., index])
        progress.advance()
        if session.clock.left() < LEAST_TIME and progress.done < len(paths):
            left = len(paths) - progress.done
            text = f"The time is over: {left} test images are predicted to be empty."
            session.warn("test images", text)
            break
    return rles


# %% tags=["nbval-ignore-output"]
several = [predict_presence(run, "classifier", test_paths, strategy) for run in members]
found = np.mean(several, axis=0)
rles = predict_rles(predictors, test_paths, found, decide, session)
write_submission(rles, sample_path, submission_path)

# %%
submission = check_submission(submission_path, sample_path)
print(f"submission.csv passes: {len(submission):,} rows for {len(test_paths):,} images")

# %% tags=["nbval-ignore-output"]
empty = (submission["EncodedPixels"] == "").groupby(submission["class"]).mean().round(3)
print("Share of empty masks:", empty.to_dict())
submission.set_index("Image_Label")["EncodedPixels"].str.slice(0, 60).head(8)

# %% [markdown]
# The first test images with their predictions, decoded from the file that will be handed in:

# %%
figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
predicted = read_labels(submission_path, SUBMISSION_SIZE)
for axes, path in zip(panels, test_paths):
    encoded = predicted.loc[path.name]
    masks = np.stack([decode_rle(rle, SUBMISSION_SIZE) for rle in encoded], axis=-1)
    outline(axes, read_image(path, SUBMISSION_SIZE), masks, f"{path.name}: predicted")
add_legend(figure)
save_figure(figure, output / "test.png")
plt.show()

# %% [markdown]
# ## Report
#
# The paper's three tables, with the runs of this session and of earlier ones whose `results.json`
# is attached: a row for each encoder and image size, with the mean over its folds. All scores of
# ours are on validation images, by a threshold and a minimum area that were chosen on others.
#
# The paper's numbers are those of the table that its authors published [beside their
# notebooks](https://github.com/TashinAhmed/CloudsClassification), of EfficientUNet. Its Tables I
# and II were not at hand, so their columns are missing here. Scores on the leaderboard are only
# known to Kaggle: once you have submitted, type them in, and they will stand beside the paper's.


# %%
PAPER_DICE = pd.DataFrame(
    {
        "efficientnetb0": (0.6654, 0.6602, 0.6626),
        "efficientnetb1": (0.6601, 0.6553, 0.6598),
        "efficientnetb2": (0.6589, 0.6570, 0.6578),
        "efficientnetb3": (0.6588, 0.6500, 0.6582),
        "efficientnetb4": (0.6425, 0.6417, 0.6421),
        "efficientnetb5": (0.6322, 0.6319, 0.6333),
    },
    ["paper, validation", "paper, private", "paper, public"],
).T


# %%
def summarise_runs(runs):
    """The mean MEASURES of each encoder and image size, and what they were validated on."""
    rows = [
        {
            "encoder": name_encoder(run.config.encoder),
            "image size": "{} x {}".format(*run.config.image_size),
            "fold": run.config.fold,
        }
        | run.results
        for run in runs
    ]
    groups = pd.DataFrame(rows).groupby(["encoder", "image size"])
    folds = groups["fold"].agg(lambda fold: ", ".join(map(str, sorted(fold))))
    images = groups["images"].sum().astype(int).astype(str)
    validated = ("fold " + folds + ": " + images + " images").rename("validated on")
    return pd.concat([validated, groups[list(MEASURES[1:])].mean()], axis=1)


def make_table(runs, measure, leaderboard, paper=None):
    """A measure of each encoder and image size, beside scores on the leaderboard.

    `leaderboard` has our private and public score by encoder and image size, `paper` is a DataFrame
    by encoder.
    """
    table = summarise_runs(runs)[["validated on", measure]]
    ours = [leaderboard.get(key, (np.nan, np.nan)) for key in table.index]
    table[["ours, private", "ours, public"]] = ours
    table = table.reset_index("image size")
    if paper is not None:
        table = table.join(paper, how="outer")
    return table.round(4).astype(object).where(table.notna(), "")


# %% [markdown]
# Table I, the mean validation accuracy of the classifiers:

# %% tags=["nbval-ignore-output"]
everything = without_repeats([*runs, *earlier])
classified = summarise_runs(everything).reset_index("image size", drop=True)
classified[["validated on", *MEASURES[1:4]]].round(4)

# %% [markdown]
# Table II, the Dice coefficient of EfficientUNet's masks, gated by the classifier:

# %% tags=["nbval-ignore-output"]
gated_scores = {}  # from Kaggle, like {("efficientnetb0", "1312 x 2080"): (private, public)}
make_table(everything, "gated Dice", gated_scores)

# %% [markdown]
# Table III, the Dice coefficient of EfficientUNet alone:

# %% tags=["nbval-ignore-output"]
unet_scores = {}  # from Kaggle, in the same form
make_table(everything, "Dice", unet_scores, PAPER_DICE)

# %% [markdown]
# On the paper's validation images larger encoders score lower. A difference between two rows
# means something only if they have the same folds, and more than a handful of images.
#
# `results.json` holds the configuration, what the run measured and its warnings; attach it, with
# the weights beside it, to a later session.

# %% tags=["nbval-ignore-output"]
results = {
    "notebook": TITLE,
    "preset": preset,
    "config": dataclasses.asdict(config),
    "versions": versions,
    "images": {"labelled": len(labels), "validation": len(areas), "test": len(test_paths)},
    "runs": [{"config": dataclasses.asdict(run.config), "results": run.results} for run in runs],
    "predicted by": [f"{run.name} in {run.folder}" for run in members],
    "decided by": way,
    "validation Dice": comparison[[*CLASSES, "mean"]].to_dict(orient="index"),
    "warnings": list(session.warnings.values()),
}
write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
print("The test images were predicted by", ", ".join(results["predicted by"]))
print(f"and decided by: {way}. Dice of the validation images:")
print(comparison["mean"].round(4).to_dict())
print("\n".join(["Warnings:", *results["warnings"]]) if session.warnings else "No warnings.")
print(f"In {output}:", ", ".join(sorted(path.name for path in output.iterdir())))

# %% [markdown]
# ## Conclusion
#
# The way from labels to a submission is complete: checked labels, balanced folds, examples that are
# the same for every number of threads, networks that take bytes and give probabilities, a
# classifier whose reasons can be looked at, and masks whose thresholds were scored on images they
# were not chosen on.
#
# To go further, change the cell of parameters: a larger encoder (`{"encoder": "efficientnetb2"}`),
# all folds (`{"folds_to_run": [0, 1, 2, 3, 4]}`, or one per session and their outputs attached to
# the last), or more epochs. A smaller `image_size`, such as (640, 960), trains several times
# faster. If a session ends before its training does, attach its output to the next, which goes on
# from there.
