# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,_kg_hide-input,-all
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
# whose labels are withheld: four masks per picture, each of which may be empty.
#
# This notebook goes from `train.csv` to `submission.csv` along the paper [Classification and
# understanding of cloud structures via satellite images with
# EfficientUNet](https://arxiv.org/abs/2009.12931) (Ahmed & Sabab, 2020) and says where it departs
# from it:
#
# 1. read the labels and look at the pictures, as they are and augmented;
# 2. train EfficientNets to tell which patterns a picture holds, and see what they look at;
# 3. train EfficientUNet, a U-Net whose encoder is an EfficientNet, to tell where the patterns are;
# 4. turn its probabilities into masks, and compare four ways to do so;
# 5. predict the test pictures, and set the results beside the paper's.
#
# A prediction is scored by its mean Dice coefficient over all pairs of a picture and a class, where
# an empty mask for an absent class counts 1. The paper reports .6611 on the private leaderboard in
# its Table III and .6602 in its text; the competition was won with .67175.
#
# You need to know Python and what a convolutional network is. Sizes are always (height, width). On
# the twelve drawn pictures of the sample a run takes two to three minutes on two CPU cores; on
# Kaggle it takes a session at the most, and ends in time.

# %% [markdown]
# ## Set up
#
# Kaggle's image lacks a few small packages. They are installed without their dependencies, which
# Kaggle has already, in versions that fit each other. A TPU needs another TensorFlow, together with
# the legacy Keras that goes with it.

# %% _kg_hide-input=true jupyter={"source_hidden": true}
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time

STARTED = time.monotonic()  # the session's hours are counted from here
PACKAGES = {  # by a module that is missing without them
    "segmentation_models": "segmentation-models==1.0.1 image-classifiers==1.0.0",
    "efficientnet": "efficientnet==1.0.0 keras-applications==1.0.8",
    "keras_radam": "keras-rectified-adam==0.20.0",
    "skimage": "scikit-image==0.25.2 lazy-loader==0.4",
}


def list_pip_calls(environment=os.environ, find_module=importlib.util.find_spec):
    """The arguments of the calls of pip that bring what is missing, in their order."""
    missing = " ".join(pins for module, pins in PACKAGES.items() if not find_module(module))
    calls = [f"install --no-deps {missing}"] if missing else []
    on_tpu = environment.get("ISTPUVM") == "1"
    if on_tpu and not any(importlib.metadata.distributions(name="tensorflow-tpu")):
        calls.append("uninstall --yes tensorflow tensorflow-cpu")
        calls.append("install tensorflow-tpu==2.19.1 libtpu==0.0.10")  # 2.20 found no TPU
        calls.append("install --no-deps tf_keras==2.19.0")
    return calls


# %%
for call in list_pip_calls():
    if subprocess.run([sys.executable, "-m", "pip", "--quiet", *call.split()]).returncode:
        raise RuntimeError(f"'pip {call}' failed. On Kaggle, switch the internet access on.")

# %% [markdown]
# segmentation-models was written for the Keras of TensorFlow 2, which lives on as *legacy Keras*.
# It is chosen by environment variables, which must be set before TensorFlow is imported.

# %% tags=["nbval-ignore-output"]
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["SM_FRAMEWORK"] = "tf.keras"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # no notes of TensorFlow's libraries between the results
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no look on the internet for a newer version

import ast
import contextlib
import csv
import functools
import inspect
import itertools
import json
import math
import random
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import albumentations
import cv2
import efficientnet.model
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pydantic
import segmentation_models
import tensorflow as tf
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image
from scipy.special import logit
from sklearn import isotonic, linear_model, metrics

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 75})  # a notebook that browsers can show
tf.get_logger().setLevel("ERROR")  # no warning that a further network has a graph of its own
if not tf.keras.Model.__module__.startswith("tf_keras"):
    raise RuntimeError("Keras 3 is loaded already. Restart, and run all cells from the top.")

# %% [markdown]
# ### Parameters
#
# What a run shall do is set in the next cell alone. *Configure the run* explains the choices. In
# the environment, `CLOUDS_PRESET`, `CLOUDS_OVERRIDES` (JSON), `CLOUDS_INPUT`, `CLOUDS_OUTPUT` and
# `CLOUDS_EARLIER` win over it.

# %% tags=["parameters"]
preset = None  # "PAPER", "BEST" or "SAMPLE"; None is BEST on Kaggle and SAMPLE elsewhere
overrides = {}  # single fields, for example {"encoders": ["efficientnetb2"], "held_out": [1]}
input_folder = None  # None finds the competition on Kaggle, and tests/sample elsewhere
output_folder = None  # None is /kaggle/working on Kaggle and output elsewhere
earlier_folders = None  # outputs of earlier sessions; None finds those attached on Kaggle

# %% [markdown]
# ## Read the labels
#
# `train.csv` has a row for each pair of an image and a class, with a mask in *run-length encoding*:
# pixels are numbered from 1 down the first column, then down the second, and so on; each run of
# mask pixels is its first number and its length. The empty mask is the empty string. A mask has
# exactly one valid encoding: an odd count of numbers is refused, and so are runs that leave the
# image, overlap, touch or are out of order.

# %%
CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
ORIGINAL_SIZE = (1400, 2100)  # of the pictures and of the masks in train.csv
SUBMISSION_SIZE = (350, 525)  # of the masks in submission.csv


def parse_rle(rle, size):
    """The first pixel of each run of an encoding and the one behind its last, in turn.

    Returns int64 (2 x runs), counted from 0. Raises ValueError, quoting the run, unless all are
    whole numbers with single spaces between them, and the runs have pixels, ascend, neither overlap
    nor touch and lie within `size`.
    """
    whole = "(?:0|[1-9][0-9]{0,17})"  # a number of up to 18 digits, without leading zeros
    if not re.fullmatch(f"(?:{whole}(?: {whole})*)?", rle):
        word = next((word for word in rle.split(" ") if not re.fullmatch(whole, word)), "")
        raise ValueError(f"{word[:40]!r} is not a whole number")
    numbers = np.fromstring(rle, np.int64, sep=" ")
    if len(numbers) % 2:
        raise ValueError(f"the run '{numbers[-1]}' has no length")
    ends = numbers.reshape(-1, 2).cumsum(axis=1).ravel() - 1
    wrong = (np.diff(ends, prepend=-1) <= 0) | (ends > math.prod(size))
    if wrong.any():
        start, length = numbers.reshape(-1, 2)[wrong.argmax() // 2]
        raise ValueError(f"the run '{start} {length}' is not behind the last, or leaves the image")
    return ends


def fill_runs(ends, size):
    """The mask, uint8 (height, width), of the runs whose ends parse_rle returns."""
    lengths = np.diff(ends, prepend=0, append=math.prod(size))
    values = np.arange(len(lengths), dtype=np.uint8) % 2  # outside, inside, outside, ...
    return np.repeat(values, lengths).reshape(size[::-1]).T


def decode_rle(rle, size):
    """The mask of a run-length encoding, uint8 (height, width); see parse_rle for errors."""
    return fill_runs(parse_rle(rle, size), size)


# %% [markdown]
# We want a row for each image and a column for each class. Every row is checked before anything is
# computed, and an error names the file, the line and what was expected.


# %% _kg_hide-input=true jupyter={"source_hidden": true}
def read_rows(path, size):
    """A CSV file of Image_Label and EncodedPixels, with the columns image and class added.

    Its index are the lines. Raises ValueError, which names the file and the line, for what is not
    CSV in UTF-8 with a line break at its end, other columns, impossible labels, one that is there
    twice, and encodings that are invalid at `size`.
    """
    columns, content = ["Image_Label", "EncodedPixels"], path.read_bytes()
    options = {"names": [*columns, "more"], "dtype": str, "keep_default_na": False}
    csv.field_size_limit(10**8)  # characters of an encoding
    try:
        options |= {"engine": "python", "encoding": "utf-8-sig", "skip_blank_lines": False}
        table = pd.read_csv(path, header=None, **options)
    except ValueError as error:
        raise ValueError(f"{path} is not CSV in UTF-8, or is packed ({error}).") from None
    if not content.endswith((b"\n", b"\r")):
        raise ValueError(f"{path} is empty, or cut off: no line break follows its last line.")
    if (found := table.iloc[0].dropna().tolist()) != columns or len(table.dropna(how="all")) < 2:
        raise ValueError(f"{path} has the columns {found}; expected: {columns}, with rows below.")
    table = table.set_axis(table.index + 1)[1:].dropna(how="all")  # without blank lines
    table[["image", "class"]] = table["Image_Label"].fillna("").str.rpartition("_")[[0, 2]]
    faults = {
        "there are not two cells": table["EncodedPixels"].isna() | table["more"].notna(),
        f"the class is not one of {', '.join(CLASSES)}": ~table["class"].isin(CLASSES),
        "the image is not the name of a file": table["image"].str.match(r"\.{0,2}$|.*[/\\\0]"),
        "the label is there twice": table["Image_Label"].duplicated(),
    }
    for (line, label, rle), wrong in zip(table[columns].itertuples(), pd.DataFrame(faults).values):
        try:
            if wrong.any():
                raise ValueError(list(faults)[wrong.argmax()])
            parse_rle(rle, size)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, {label}: {error}.") from None
    return table.drop(columns="more")


def read_labels(path, size=ORIGINAL_SIZE):
    """The run-length encodings of a CSV file, a row for each image and a column for each class.

    An absent class is the empty string. Raises ValueError for what read_rows refuses, and for an
    image that lacks a class.
    """
    labels = read_rows(path, size).pivot(index="image", columns="class", values="EncodedPixels")
    labels = labels.reindex(columns=CLASSES).rename_axis(columns=None)
    if (lacking := labels.isna()).any(axis=None):
        raise ValueError(f"{path}: there is no row {'_'.join(lacking.stack().idxmax())}.")
    return labels


# %% _kg_hide-input=true jupyter={"source_hidden": true}
def find_input(chosen=None, environment=os.environ, mount=Path("/kaggle/input")):
    """The folder that holds the competition's data.

    CLOUDS_INPUT or `chosen` if there is one. Else Kaggle's present or former mount point, any other
    place below `mount`, or off Kaggle tests/sample. Raises FileNotFoundError, which says where it
    looked, what lacks there and how to get the data.
    """
    chosen = environment.get("CLOUDS_INPUT") or chosen
    former = mount / "understanding_cloud_organization"
    places = [mount / "competitions" / former.name, former]
    places += sorted(path.parent for path in mount.rglob("train.csv"))
    places += [] if "KAGGLE_KERNEL_RUN_TYPE" in environment else [Path("tests/sample")]
    found, parts = "", ("train.csv", "train_images", "sample_submission.csv", "test_images")
    for folder in [Path(chosen).expanduser()] if chosen else places:
        if not (lacking := [part for part in parts if not (folder / part).exists()]):
            return folder
        found += f"{folder} has no {', '.join(lacking)}; "
        found += "".join(f"unzip {path}; " for path in sorted(folder.glob("*.zip")))
    ways = f"on Kaggle, choose 'Add Input', {former.name}, accept its rules; else unzip it and set "
    raise FileNotFoundError(f"The competition's data was not found: {found}{ways}CLOUDS_INPUT.")


# %% [markdown]
# Some faults can be lived with. A training image that cannot be decoded is left out, up to a share
# that is configured, and such a test image gets empty masks. Resized copies are used as they are,
# with the masks of `train.csv`. The report repeats all warnings.

# %% _kg_hide-input=true jupyter={"source_hidden": true}
WARNINGS = {}  # by what they are about


def warn(about, text):
    """Print a warning that the report repeats; nothing instead of a text takes it back."""
    WARNINGS.pop(about, None)
    if text:
        WARNINGS[about] = text
        print("Warning:", text)


def read_size(path):
    """The (height, width) of the image in a file, by its header."""
    with Image.open(path) as header:
        return header.height, header.width


def read_image(path, size):
    """The image in a file, RGB uint8 (height, width, 3), resized to `size`.

    Raises ValueError, which names the file, if it cannot be decoded, or is not 2 x 3. JPEG decoders
    can decode at a half, a quarter or an eighth of the size for less than the cost of the whole.
    """
    try:
        stored = read_size(path)
        shrink = max(1, min(stored[0] / size[0], stored[1] / size[1]))
        factor = max(factor for factor in (1, 2, 4, 8) if factor <= shrink)
        flag = getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}", cv2.IMREAD_COLOR)
        image = cv2.imdecode(np.fromfile(path, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if image is None or not math.isclose(stored[1] / stored[0], 1.5, rel_tol=0.01):
        raise ValueError(f"{path} is cut off, or is no copy of {ORIGINAL_SIZE}: it has {stored}.")
    return cv2.cvtColor(cv2.resize(image, size[::-1]), cv2.COLOR_BGR2RGB)


def find_faults(folder, names):
    """What is wrong with the images of a folder that are broken: a dictionary by name.

    Decodes all once, small. Warns of them, of other sizes and of further files. Raises
    FileNotFoundError if an image is not there, or is empty.
    """
    there = {file.name for file in os.scandir(folder) if file.is_file() and file.stat().st_size}
    if lacking := sorted(set(names) - there):
        alike = [f" (there is {name})" for name in there if name.lower() == lacking[0].lower()]
        text = f"{len(lacking)} of {len(names)} images are missing or empty{''.join(alike)}"
        raise FileNotFoundError(f"{folder}: {text}: {', '.join(lacking[:5])}")
    more = len(there) - len(names)
    warn(f"files in {folder}", more and f"{folder} has {more} more files, which no row names.")

    def find_fault(name):
        try:
            read_image(folder / name, (175, 262))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        faults = {name: fault for name, fault in zip(names, pool.map(find_fault, names)) if fault}
    sizes = {read_size(folder / name) for name in names if name not in faults} - {ORIGINAL_SIZE}
    warn(f"sizes in {folder}", sizes and f"{folder} has images of {sorted(sizes)[:3]}, used as is.")
    text = f"{len(faults)} of {len(names)} images are left out: {' '.join([*faults.values()][:5])}"
    warn(f"images in {folder}", faults and text)
    return faults


# %%
source = find_input(input_folder)
train_folder, test_folder = source / "train_images", source / "test_images"
all_labels = read_labels(source / "train.csv")
faults = find_faults(train_folder, all_labels.index)
readable = all_labels.drop(index=list(faults))
print(f"{all_labels.size:,} rows of {len(all_labels):,} images in {source}")

# %% [markdown]
# One image of each class, dimmed outside of the mask (the paper's Fig. 1):

# %%
figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
for axes, name in zip(panels.flat, CLASSES):
    chosen = readable.index[readable[name] != ""][0]
    image = read_image(train_folder / chosen, SUBMISSION_SIZE)
    mask = decode_rle(readable.at[chosen, name], ORIGINAL_SIZE)[2::4, 2::4, None]
    axes.imshow(np.where(mask, image, image // 4))
    axes.set(title=f"{name} in {chosen}", xlabel="column", ylabel="row")
plt.show()

# %% [markdown]
# Masks are unions of boxes, cut by the black band where the satellite did not pass. Fish are
# skeletons with clear sea around them, Flower large round decks, Gravel grains in a loose field,
# and Sugar is a dusting of the smallest clouds.

# %% [markdown]
# ## Configure the run
#
# Everything that can be chosen stands in one `Config`, whose defaults are the paper's: `PAPER`.
# `BEST` departs from it where there is a reason to, with gains that small networks showed on small
# copies of real pictures. There it scored .018 more than `PAPER` after the same time, from .013 to
# .023, and .006 more than the recipe of the competition's popular notebooks, from .001 to .011 (see
# `tests/benchmarks`). `SAMPLE` is `BEST` cut down until two CPU cores run the whole notebook in
# minutes.
#
# The paper leaves open the epochs and the learning rate of the U-Net, the probability of each
# augmentation and the way from probabilities to masks: these are ours in all three. Epochs and
# learning rate of the classifier, the batch size and `gate_recall` are the authors', from the
# [notebooks](https://github.com/TashinAhmed/CloudsClassification) that they published beside it.

# %%
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Count = Annotated[int, pydantic.Field(ge=1, le=10**6)]
Scale = Annotated[float, pydantic.Field(ge=0.1, le=10)]
Encoder = Literal[tuple(f"efficientnetb{number}" for number in range(8))] | tuple[Scale, Scale]
Side = Annotated[int, pydantic.Field(ge=32, le=2100)]
Halved = Annotated[Side, pydantic.Field(multiple_of=32)]  # five times by the encoder


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True, "extra": "forbid"})
class Config:
    """All choices of a run; a value that is not allowed raises a ValueError."""

    encoders: tuple[Encoder, ...] = ("efficientnetb0",)  # or coefficients of (width, depth)
    held_out: tuple[int, ...] = (0,)  # folds that are held out, one after the other
    folds: Annotated[int, pydantic.Field(ge=2, le=1000)] = 5  # that the images are dealt into
    encoder_weights: str | None = "imagenet"  # the path of an HDF5 file, or None for random ones
    image_size: tuple[Halved, Halved] = (1312, 2080)  # of the U-Net's input, in multiples of 32
    classifier_size: tuple[Side, Side] | None = None  # None is the encoder's own
    activation: Literal["softmax", "sigmoid"] = "softmax"  # one choice, or one for each class
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] | None = None  # None suits
    batch_norm_momentum: Share = 0.99  # of the moving averages in batch normalisation
    augmentation_probability: Share = 0.5  # of each transform in an augmented copy
    rotation_limit: Annotated[float, pydantic.Field(ge=0, le=180)] = 20  # in degrees
    batch_size: Count = 32  # images in a step on all devices, fewer if they do not fit
    epochs: Count = 10  # passes over the training images, each as it is and once augmented
    classifier_epochs: tuple[Count, Count] = (20, 20)  # with a frozen encoder, then with a free one
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 1e-3  # the highest, for 32 images
    cross_entropy_weight: Share = 0.7  # in the U-Net's loss, the rest is Dice loss
    gate_recall: Share = 0.94  # share of a class's images in which the classifier has to find it
    averaging: bool = False  # of the weights over the last third of a training's steps
    flips: bool = False  # predict each image and its three mirror images, and take the mean
    decision: Literal["half", "threshold and area", "gated", "expected"] = "threshold and area"
    image_limit: Count | None = None  # of training images, and of test images, for a first try
    broken_share: Share = 0.01  # of the training images that may be left out, if undecodable
    hours: Annotated[float, pydantic.Field(ge=1e-3, le=1000)] | None = None  # None is Kaggle's
    other_code: bool = False  # take over networks that were trained by other code than this
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 2019  # of all that is drawn

    @pydantic.model_validator(mode="after")
    def check_together(self):
        """Raise ValueError for what no field can know alone."""
        if not self.encoders or not set() < set(self.held_out) <= set(range(self.folds)):
            raise ValueError(f"encoders and held_out are lists, the folds 0 to {self.folds - 1}")
        if any(size[0] > size[1] for size in (self.image_size, self.classifier_size or (0, 0))):
            raise ValueError("image_size and classifier_size are (height, width), which is more")
        return self


# %%
PAPER = Config()
BEST = replace(
    PAPER,
    activation="sigmoid",  # 60 % of the images have pixels of several classes, softmax allows one
    averaging=True,  # single steps are noisy; +.001 of Dice at 64 x 96, +.011 at 128 x 192
    flips=True,  # clouds have no handedness; +.002 of expected Dice, +.010 by threshold and area
    decision="expected",  # +.010 of Dice over threshold and area; without averaging +.001
)
SAMPLE = replace(
    BEST,
    encoders=((0.5, 0.3),),  # half of B0's width and a third of its depth
    encoder_weights=None,  # nothing to download
    held_out=(0, 1),  # so that two networks predict together
    image_size=(128, 192),
    classifier_size=(128, 192),
    batch_norm_momentum=0.8,  # so that the averages keep up with few steps
    batch_size=4,
    epochs=16,
    classifier_epochs=(4, 8),
    learning_rate=8.5e-3,  # few steps, so larger ones
)


# %%
def choose_config(preset=None, overrides=None, environment=os.environ):
    """The name of a preset, and its Config with single fields overridden.

    Raises ValueError, which names the field, its value and what is allowed.
    """
    default = "BEST" if "KAGGLE_KERNEL_RUN_TYPE" in environment else "SAMPLE"
    name = environment.get("CLOUDS_PRESET") or preset or default
    presets = {"PAPER": PAPER, "BEST": BEST, "SAMPLE": SAMPLE}
    text = environment.get("CLOUDS_OVERRIDES") or "{}"
    if name not in presets:
        raise ValueError(f"There is no preset {name!r}, only {', '.join(presets)}.")
    try:
        fields = asdict(presets[name]) | (overrides or {}) | json.loads(text)
        return name, pydantic.TypeAdapter(Config).validate_json(json.dumps(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"overrides {overrides} and CLOUDS_OVERRIDES {text}: {error}") from None


def find_earlier(chosen=None, environment=os.environ, mount=Path("/kaggle/input")):
    """The outputs of earlier sessions: folders in CLOUDS_EARLIER, `chosen` or below `mount`.

    CLOUDS_EARLIER separates folders like PATH does. Raises FileNotFoundError for a folder that has
    no members.
    """
    chosen = listed.split(os.pathsep) if (listed := environment.get("CLOUDS_EARLIER")) else chosen
    if chosen is None:
        return sorted(path.parent for path in mount.rglob("members"))
    folders = [Path(folder).expanduser() for folder in chosen]
    if lacking := [str(folder) for folder in folders if not (folder / "members").is_dir()]:
        raise FileNotFoundError(f"There are no members in {', '.join(lacking)}.")
    return folders


# %%
preset_name, wanted = choose_config(preset, overrides)
print(preset_name, *(f"{field}: {value}" for field, value in asdict(wanted).items()), sep="\n  ")

# %%
on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
output = os.environ.get("CLOUDS_OUTPUT") or output_folder
output = Path(output or ("/kaggle/working" if on_kaggle else "output")).expanduser()
(output / "members").mkdir(parents=True, exist_ok=True)
earlier = find_earlier(earlier_folders)
print(f"Writes to {output}; earlier outputs:", *(earlier or ["none"]))

# %% [markdown]
# ## Split the images
#
# The images are dealt into folds by their combination of classes: sorted by it, the first image
# goes to fold 0, the second to fold 1, and so on. So each fold holds the same share of every
# combination to within one image, however rare the combination is. With five folds, fold 0 against
# the others is the paper's 80:20 split.


# %%
def assign_folds(labels, folds, seed):
    """A fold, 0 to `folds` - 1, for each image, balanced over the combinations of classes."""
    present = (labels != "").assign(tie=np.random.default_rng(seed).random(len(labels)))
    order = present.sort_values([*CLASSES, "tie"]).index
    return pd.Series(np.arange(len(labels)) % folds, order, name="fold").reindex(labels.index)


# %%
if len(faults) > wanted.broken_share * len(all_labels):
    raise ValueError(f"More than broken_share: {WARNINGS[f'images in {train_folder}']}")
labels, limit = readable[: wanted.image_limit], wanted.image_limit
present, folds = labels != "", assign_folds(labels, wanted.folds, wanted.seed)
sample_path, submission_path = source / "sample_submission.csv", output / "submission.csv"
rows = read_rows(sample_path, SUBMISSION_SIZE)
test_faults = find_faults(test_folder, rows["image"].unique())
test_names = [name for name in rows["image"].unique() if name not in test_faults][:limit]
warn("image_limit", limit and f"Only {len(labels)} training and {len(test_names)} test images.")
if (folds.value_counts().reindex(wanted.held_out).fillna(0) < 2).any() or not test_names:
    raise ValueError(f"Too few: {len(labels)} for {wanted.folds} folds, {len(test_names)} to test.")
test_images = [test_folder / name for name in test_names], pd.DataFrame("", test_names, CLASSES)
if not submission_path.exists():  # from here on there is a file to hand in, of empty masks
    rows.assign(EncodedPixels="").to_csv(submission_path, columns=rows.columns[:2], index=False)
present.groupby(folds).mean().assign(images=folds.value_counts()).round(3)

# %% [markdown]
# Among thousands of images, each fold looks like the whole. In the competition's 5,546 Sugar is the
# most frequent class (.676) and Flower the rarest (.426); no image is without any class, and three
# of four hold several. Nearly half of all masks are empty: empty masks alone would score .4665 on
# them.

# %% [markdown]
# ## Augment and batch
#
# An epoch holds every training image twice, as it is and once augmented, in a new order and with
# new draws each time. An augmented copy is flipped horizontally, flipped vertically, rotated and
# distorted along a grid, each with a probability of its own. What turns in from outside of the
# image is black, as the band is.
#
# The four masks of an image travel together as one *plane*, a uint8 image whose lowest four bits
# are the four classes. So they are augmented once instead of four times, and split on the device.
# All that is random in a copy follows from one number, its *draw*, so that the same seed gives the
# same epochs everywhere.


# %%
AS_IS = -1  # the draw of an example that is not augmented


def make_augmentation(config, draw):
    """albumentations' transforms for one augmented copy; the draw decides all that is random."""
    chance = config.augmentation_probability
    transforms = [albumentations.HorizontalFlip(p=chance), albumentations.VerticalFlip(p=chance)]
    transforms.append(albumentations.Rotate(limit=config.rotation_limit, p=chance))
    transforms.append(albumentations.GridDistortion(p=chance))
    compose = albumentations.Compose(transforms)  # with a seed, either all would happen or none
    compose.set_random_state(np.random.default_rng(draw), random.Random(draw))
    return compose


def read_plane(rles, size):
    """The masks of one image as a plane, uint8 (height, width), whose bit c is class c.

    `rles` are the classes' run-length encodings at ORIGINAL_SIZE. A pixel of the plane takes the
    value at its centre. The ends of runs are moved to the rows and columns of the plane, which
    costs less than to fill whole masks.
    """
    plane, sizes = np.zeros(size[::-1], np.uint8), zip(ORIGINAL_SIZE, size)  # runs go down columns
    rows, columns = ((2 * np.arange(part) + 1) * whole // (2 * part) for whole, part in sizes)
    for bit, rle in enumerate(rles):
        if rle:
            column, row = np.divmod(parse_rle(rle, ORIGINAL_SIZE), ORIGINAL_SIZE[0])
            above = np.isin(column, columns) * np.searchsorted(rows, row)  # in its own column
            ends = np.searchsorted(columns, column) * size[0] + above
            plane |= fill_runs(ends, size).T << bit
    return cv2.transpose(plane)


def split_planes(planes):
    """The masks of planes (..., height, width): uint8 (..., height, width, classes) of 0 and 1."""
    shifted = tf.bitwise.right_shift(planes[..., None], np.arange(len(CLASSES), dtype=np.uint8))
    return tf.bitwise.bitwise_and(shifted, np.uint8(1))


def load_example(config, size, path, rles, draw=AS_IS):
    """One image, uint8 (height, width, 3), and its plane, uint8 (height, width)."""
    image, plane = read_image(path, size), read_plane(rles, size)
    if draw == AS_IS:
        return image, plane
    return tuple(make_augmentation(config, int(draw))(image=image, mask=plane).values())


# %% [markdown]
# An image of the training set as it is and in five draws, with the outlines of its masks:


# %%
COLORS = ("#56b4e9", "#fe6100", "#dc267f", "#ffd700")  # of the classes, for all kinds of sight
DASHES = ((6, 0), (5, 1), (3, 1, 1, 1), (1, 0.7))


def outline(axes, image, masks, title):
    """Draw an image and the outlines of its masks (height, width, classes), a line for each class.

    Below the figure stands which line is whose.
    """
    axes.imshow(image)
    for mask, color, dash in zip(np.moveaxis(np.asarray(masks), -1, 0), COLORS, DASHES):
        line = {"colors": [color], "linestyles": [(0, dash)], "linewidths": 2.5}
        if mask.any():
            axes.contour(np.pad(mask[1:-1, 1:-1], 1), [0.5], **line)
    axes.set(title=title, xlabel="column", ylabel="row")
    if not axes.figure.legends:
        lines = [plt.Line2D([], [], color=c, dashes=d, lw=2.5) for c, d in zip(COLORS, DASHES)]
        axes.figure.legend(lines, CLASSES, loc="outside lower center", ncols=4, handlelength=4)


# %%
rles = labels.loc[present.sum(axis=1).idxmax()]  # of the image with the most classes
figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
for axes, draw in zip(panels.flat, [AS_IS, 1, 3, 4, 6, 7]):
    image, plane = load_example(wanted, SUBMISSION_SIZE, train_folder / rles.name, rles, draw)
    outline(axes, image, split_planes(plane), "as it is" if draw == AS_IS else f"draw {draw}")
plt.show()

# %% [markdown]
# The outlines follow their clouds through every transform. Epochs follow one another without a
# break: every training batch is full and no example is lost.


# %%
def plan_epoch(count, epoch, seed):
    """The examples of one epoch over `count` images: int64 (2 x count, 2), an image and a draw."""
    generator = np.random.default_rng((seed, epoch))
    draws = np.append(np.full(count, AS_IS), generator.integers(2**31, size=count))
    return generator.permutation(np.column_stack([np.tile(np.arange(count), 2), draws]))


def make_dataset(config, size, batch_size, paths, labels, done=None):
    """A tf.data.Dataset of full batches, decoded in parallel and prefetched.

    Its elements are images, uint8 (batch, height, width, 3), planes, uint8 (batch, height, width),
    and weights, float (batch), of the files `paths` and the table of encodings `labels`. Every
    image once, in order; the last one fills up its batch, with a weight of 0, while those before it
    weigh so much more that Keras's mean over the batches is that over the images. Given `done`, a
    function that returns how many examples of a training are done, the examples are those that
    follow, epoch after epoch without end, and weigh 1.
    """
    cv2.setNumThreads(1)  # examples run in parallel, their parts need not
    count, full = len(paths), math.ceil(len(paths) / batch_size) * batch_size

    def plan():
        if done is None:
            yield from ((min(number, count - 1), AS_IS, number < count) for number in range(full))
        else:
            first, skipped = divmod(done(), 2 * count)
            epochs = (plan_epoch(count, epoch, config.seed) for epoch in itertools.count(first))
            examples = itertools.chain.from_iterable(epochs)
            yield from ((*example, 1) for example in itertools.islice(examples, skipped, None))

    def load(index, draw):
        return load_example(config, size, paths[index], labels.iloc[index], draw)

    def load_in_graph(example):
        image, plane = tf.numpy_function(load, tf.unstack(example[:2]), [tf.uint8] * 2)
        weight = tf.cast(example[2], tf.float32) * (full / count if done is None else 1)
        return tf.ensure_shape(image, (*size, 3)), tf.ensure_shape(plane, size), weight

    examples = tf.data.Dataset.from_generator(plan, output_signature=tf.TensorSpec(3, tf.int64))
    examples = examples.map(load_in_graph, joblib.cpu_count())  # AUTOTUNE runs ahead
    return examples.batch(batch_size, drop_remainder=True).prefetch(2)


def split_images(labels, folds, folder, fold):
    """Training and validation images, each as its paths in `folder` and its rows of `labels`."""
    parts = labels[folds != fold], labels[folds == fold]
    return [([folder / name for name in rows.index], rows) for rows in parts]


# %%
labelled = labels, folds, train_folder
training_images, validation_images = split_images(*labelled, wanted.held_out[0])
images, planes, _ = next(iter(make_dataset(wanted, (128, 192), 8, *training_images)))
print(len(training_images[0]), len(validation_images[0]), "images; a batch:", images.shape)

# %% [markdown]
# ## Build the classifier
#
# Which patterns does a picture hold? The paper asks EfficientNets. They run on a TPU if there is
# one, else on all GPUs, else on the CPU. With several devices each gets an equal part of every
# batch, and the gradients are added up. Layers compute in float16 on GPUs and in bfloat16 on TPUs,
# which halves the memory of a training step; weights, batch statistics, probabilities and losses
# stay in float32.


# %%
def choose_accelerator(environment=os.environ):
    """The distribution strategy, and Keras's policy of the precision that suits it.

    Raises RuntimeError on Kaggle if its TPU or GPU is not found: a CPU would spend hours of quota
    in vain.
    """
    change = "Restart the session with its internet access on, or choose another accelerator."
    if environment.get("ISTPUVM") == "1":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
            tf.tpu.experimental.initialize_tpu_system(resolver)
        except (ValueError, tf.errors.OpError) as error:
            raise RuntimeError(f"TensorFlow does not find the TPU. {change} ({error})") from None
        return tf.distribute.TPUStrategy(resolver), "mixed_bfloat16"
    gpus = tf.config.list_physical_devices("GPU")
    if ask_driver() and not gpus:
        if "KAGGLE_KERNEL_RUN_TYPE" in environment:
            raise RuntimeError(f"TensorFlow does not see the GPU. {change}")
        warn("GPU", "TensorFlow does not see the GPU. Install tensorflow[and-cuda].")
    strategy = tf.distribute.MirroredStrategy() if gpus[1:] else tf.distribute.get_strategy()
    return strategy, "mixed_float16" if gpus else "float32"


def ask_driver():
    """The GiB of each GPU that NVIDIA's driver knows of; 15 where it does not tell."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [int(line) / 1024 if line.isdigit() else 15 for line in filter(None, lines)]


# %% tags=["nbval-ignore-output"]
strategy, precision = choose_accelerator()
granted = 8.75 if isinstance(strategy, tf.distribute.TPUStrategy) else 11.75  # 9 and 12 by Kaggle
hours = min(wanted.hours or granted, granted if on_kaggle else math.inf)
config = replace(wanted, precision=wanted.precision or precision, hours=hours)
tf.keras.mixed_precision.set_global_policy(config.precision)
session_end = STARTED + 3600 * config.hours
print(f"{strategy.num_replicas_in_sync} replicas, {config.precision}, {config.hours} hours")

# %% [markdown]
# segmentation-models brings EfficientNet-B0 to B7. They are one network, B0, in eight sizes: B7 is
# twice as wide and 3.1 times as deep. `Config.encoders` takes such pairs of coefficients as well,
# which the paper left for later: `(1.0, 1.0)` is B0. There are no ImageNet weights for a pair, so
# that it needs `encoder_weights=None`.
#
# Images enter as bytes, and the normalisation by ImageNet's mean and deviation is part of the
# network: no copy of the notebook can forget it. Probabilities leave as float32 whatever the
# precision inside.


# %%
def name_encoder(encoder):
    """An encoder's name; coefficients of width and depth are turned into one."""
    return encoder if isinstance(encoder, str) else "efficientnet-{}-{}".format(*encoder)


def build_part(config, encoder, size, build, mount=Path("/kaggle/input")):
    """An encoder or a U-Net on images, uint8 (batch, *size, 3): Keras's tensors in and out.

    `build` is a function of the encoder's name, the input's shape and the initial weights. Of
    ImageNet's, datasets attached on Kaggle come before a download, whose checksum Keras compares.
    Raises ValueError, which names the weights, if they cannot be had or are another encoder's.
    """
    name, weights = name_encoder(encoder), config.encoder_weights
    if weights == "imagenet":
        number = name.replace("efficientnet", "efficientnet-")
        weights = next((str(path) for path in sorted(mount.rglob(f"{number}_*notop.h5"))), weights)
    if name != encoder:  # coefficients, which are made known to the package
        known = segmentation_models.Backbones
        scaled = functools.partial(efficientnet.model.EfficientNet, *encoder, None)
        known._models_update[name] = [scaled, efficientnet.model.preprocess_input]
        known._default_feature_layers[name] = known._default_feature_layers["efficientnetb0"]
    try:  # the package's own swish keeps two maps for its derivative, TensorFlow's one
        with mock.patch.object(efficientnet.model, "get_swish", lambda **modules: tf.nn.swish):
            part = build(name, (*size, 3), weights and os.path.expanduser(weights))
    except Exception as error:  # Keras raises no narrower one if a download fails
        fault = f"{name} cannot be built with encoder_weights {weights}: {error}. ImageNet's are"
        raise ValueError(f"{fault} of B0 to B7, by internet, dataset or ~/.keras/models") from error
    for layer in part.layers:  # these settings are read at each call
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = config.batch_norm_momentum
        elif isinstance(layer, tf.keras.layers.UpSampling2D):
            layer.interpolation = "bilinear"
    images = tf.keras.layers.Input((*size, 3), dtype=tf.uint8, name="images")
    mean, variance = (123.675, 116.28, 103.53), np.square((58.395, 57.12, 57.375))
    normalise = tf.keras.layers.Normalization(mean=mean, variance=variance, dtype="float32")
    return images, part(normalise(images))


# %% [markdown]
# The **classifier** averages the encoder's last map over the image and gives each class a
# probability. Its loss is the cross-entropy: of its softmax with a 1 for each class in the image,
# as the paper has it, or of each class's sigmoid.


# %%
def build_classifier(config, encoder, size):
    """EfficientNet from images, uint8 (batch, *size, 3), to probabilities of presence.

    These are float32 (batch, classes), for "softmax" with a sum of 1.
    """

    def build(name, shape, weights):
        get_backbone = segmentation_models.Backbones.get_backbone
        build_encoder = segmentation_models.inject_global_submodules(get_backbone)
        return build_encoder(name, input_shape=shape, weights=weights, include_top=False)

    layers, (images, maps) = tf.keras.layers, build_part(config, encoder, size, build)
    average = layers.GlobalAveragePooling2D(dtype="float32", name="average")(maps)
    logits = layers.Dense(len(CLASSES), dtype="float32", name="logits")(average)
    output = layers.Activation(config.activation, dtype="float32", name="probabilities")
    return tf.keras.Model(images, output(logits), name="classifier")


def cross_entropy(config, truth, probabilities):
    """The cross-entropy over the last axis (the paper's eq. 2): of one choice, or of each class."""
    if config.activation == "softmax":
        return tf.keras.losses.categorical_crossentropy(truth, probabilities)
    return tf.keras.losses.binary_crossentropy(truth, probabilities)


def classifier_loss(config, planes, probabilities):
    """The cross-entropy of each image; a class is present if its mask has a pixel."""
    presence = tf.reduce_any(split_planes(planes) > 0, axis=(1, 2))
    return cross_entropy(config, tf.cast(presence, tf.float32), probabilities)


# %% [markdown]
# [Rectified Adam](https://arxiv.org/abs/1908.03265) is keras-rectified-adam's. It warms up and
# decays only if it is told the number of steps. The package builds on Keras's older optimiser
# class, whose name a newer one bears today; while the package is imported, the older one is put
# back. The learning rate follows the square root of the batch, as is
# [right](https://arxiv.org/abs/2205.10287) for optimisers like Adam.


# %%
def make_optimizer(config, batch_size, total_steps):
    """Rectified Adam, its rate rising and then falling to a hundredth within `total_steps`.

    The package spends some sixty operations on each array of weights, which took 20 s instead of 4
    for the first two steps of a small U-Net. Here Adam's kernel does the same update in one.
    """
    with mock.patch("tensorflow.keras.optimizers.Optimizer", tf.keras.optimizers.legacy.Optimizer):
        from keras_radam import RAdam

    class FusedRAdam(RAdam):
        """The package's update."""

        _resource_apply_dense = tf.keras.optimizers.legacy.Adam._resource_apply_dense

        def _prepare_local(self, device, dtype, state):
            """What Adam's kernel needs for a step of the package's `_resource_apply_dense`."""
            names = "learning_rate beta_1 beta_2 total_steps warmup_proportion min_lr"
            rate, first, second, end, part, low = (self._get_hyper(n, dtype) for n in names.split())
            step, warm = tf.cast(self.iterations + 1, dtype), end * part
            falling = tf.minimum((step - warm) / tf.maximum(end - warm, 1), 1)
            rate = tf.minimum(rate * step / warm, rate + (low - rate) * falling)
            power, longest = second**step, 2 / (1 - second) - 1
            length, root = longest - 2 * step * power / (1 - power), tf.sqrt(1 - power)
            ratio = (length - 4) * (length - 2) / length / (longest - 4) / (longest - 2) * longest
            scale, least = tf.unstack(tf.where(length < 5, 1e12, (ratio**0.5, self.epsilon)))
            names = "beta_1_t beta_1_power beta_2_t beta_2_power lr_t epsilon"
            values = first, first**step, second, power, rate * scale, root * least
            state[device, dtype] = dict(zip(names.split(), values))

    rate = config.learning_rate * math.sqrt(batch_size / 32)
    return FusedRAdam(rate, total_steps=total_steps, warmup_proportion=0.1, min_lr=rate / 100)


# %% [markdown]
# Before hours are spent: can a classifier learn a batch by heart?

# %%
tf.keras.utils.set_random_seed(config.seed)
classifier = build_classifier(config, config.encoders[0], (128, 192))
optimizer = make_optimizer(replace(config, learning_rate=0.01), batch_size=8, total_steps=20)
classifier.compile(optimizer, functools.partial(classifier_loss, config))
losses = classifier.fit(images, planes, epochs=20, verbose=0).history["loss"]
print("It can, to less than half of the first loss:", losses[-1] < losses[0] / 2)

# %% [markdown]
# ## Build EfficientUNet
#
# Where are the patterns? The classifier's encoder has lost that: its last map is 32 times smaller
# than the image. **EfficientUNet** adds a decoder, which doubles that map's size five times. Each
# time it upsamples bilinearly, concatenates the encoder's map of that size (at full size there is
# none) and convolves 3 x 3, twice, to 256, 128, 64, 32 and at last 16 channels. It is
# segmentation-models' U-Net, which upsamples by the nearest pixel unless that setting is changed.


# %%
def build_efficient_unet(config, encoder, size):
    """EfficientUNet (the paper's Fig. 5), from images to probabilities.

    Images are uint8 (batch, *size, 3). Probabilities are float32 (batch, *size, channels): for
    "sigmoid" those of the classes, for "softmax" those of background and classes, which sum to 1.
    """

    def build(name, shape, weights):
        channels = len(CLASSES) + (config.activation == "softmax")
        options = {"encoder_weights": weights, "classes": channels, "activation": "linear"}
        return segmentation_models.Unet(name, input_shape=shape, **options)

    images, logits = build_part(config, encoder, size, build)
    output = tf.keras.layers.Activation(config.activation, dtype="float32", name="probabilities")
    return tf.keras.Model(images, output(logits), name="efficient_unet")


# %%
for encoder in config.encoders:  # so that encoder_weights that do not fit are found now
    unet = build_efficient_unet(config, encoder, config.image_size)
    print(f"EfficientUNet with {name_encoder(encoder)} has {unet.count_params():,} parameters")

# %% [markdown]
# The competition's measure is the Dice coefficient of two masks (the paper's eq. 1), twice the area
# of their overlap over the sum of their areas, and 1 where both are empty.


# %%
def dice(overlap, total_area):
    """The Dice coefficients of masks with this overlap and this sum of their areas, in pixels."""
    return np.where(total_area == 0, 1.0, 2 * overlap / np.maximum(total_area, 1))


# %% [markdown]
# Worked by hand for masks of two pixels and of one: half of the first mask found, nothing of it, a
# false alarm, and rightly nothing.

# %%
cases = ["half found", "none found", "false alarm", "rightly nothing"]
pd.Series(dice(np.array([1, 0, 0, 0]), np.array([2 + 1, 2 + 1, 0 + 1, 0 + 0])), cases).round(4)

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
    rank = masks / (1 + tf.reduce_sum(masks, axis=(1, 2), keepdims=True))  # of smaller ones higher
    background = tf.fill(tf.shape(masks[..., :1]), tf.constant(1e-12, masks.dtype))
    winner = tf.argmax(tf.concat([background, rank], axis=-1), axis=-1)
    return tf.one_hot(winner, len(CLASSES) + 1, dtype=masks.dtype)


def unet_loss(config, planes, probabilities):
    """The paper's loss of planes (batch, height, width) and probabilities, one value per image."""
    truth = tf.cast(split_planes(planes), probabilities.dtype)
    if config.activation == "softmax":
        truth = exclude_overlaps(truth)
    entropy = tf.reduce_mean(cross_entropy(config, truth, probabilities), axis=(1, 2))
    truth, probabilities = truth[..., -len(CLASSES) :], probabilities[..., -len(CLASSES) :]
    overlap = tf.reduce_sum(truth * probabilities, axis=(1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(1, 2))
    soft_dice = tf.reduce_mean((2 * overlap + 1) / (total_area + 1), axis=-1)
    weight = config.cross_entropy_weight
    return weight * entropy + (1 - weight) * (1 - soft_dice)


# %% [markdown]
# ## Train
#
# A *member* is an encoder trained on all folds but one: three networks, each with a folder of its
# own below `members`. The *baseline* is the classifier with the encoder frozen as it came from
# ImageNet; the *classifier* goes on from there with all of its weights; the *unet* is
# EfficientUNet.
#
# Beside a network's weights stands all that shaped it: the configuration, the labels and the code,
# from the augmentation to the optimiser. If this session, or an attached output of an earlier one,
# has a network that would be trained in the same way, it is loaded, or its training goes on after
# its last epoch. Others are passed over, and what differs is said. If only the code differs, by an
# edit that does not matter, `other_code` takes them all the same.


# %%
def hash_code(*functions):
    """A number for each of some functions, and for all of ours and our constants that they use.

    By name. Comments and docstrings do not count.
    """
    hashes, waiting = {}, list(functions)
    while waiting:
        function = waiting.pop()
        tree = ast.parse(inspect.getsource(function))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            node.body = node.body[ast.get_docstring(node) is not None :]
        hashes[function.__name__] = zlib.crc32(ast.unparse(tree).encode())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in names & function.__globals__.keys() - hashes.keys():
            value = function.__globals__[name]
            if inspect.isfunction(value) and value.__module__ == function.__module__:
                waiting.append(value)
            elif name.isupper():
                hashes[name] = zlib.crc32(repr(value).encode())
    return hashes


def prepare_folder(settings, output, earlier=(), other_code=False):
    """The folder in `output` of a training that is shaped by `settings`, a dictionary.

    One that is there, a copy of the one with the most epochs in the outputs `earlier`, or a new
    one. Says of others what differs; one that differs in its code only is taken if `other_code`.
    """
    name, found = settings["training"], []
    for path in [path for place in (output, *earlier) for path in sorted(place.glob("members/*"))]:
        with contextlib.suppress(OSError, ValueError, TypeError):  # no settings, or not whole
            known = json.loads((path / "settings.json").read_text())
            other = [key for key in known | settings if known.get(key) != settings.get(key)]
            if not other or other_code and all(key.startswith("code of ") for key in other):
                done = sum(file.stat().st_size for file in path.glob("history.csv"))
                found.append((len(other), -done, path, other))
            elif known.get("training") == name:
                print(f"{path} is not used: other {', '.join(other)}")
    new = output / "members" / f"{name}-{zlib.crc32(json.dumps(settings).encode()):08x}", []
    *_, place, other = min(found, key=lambda one: one[:2], default=new)  # of equals the first
    warn(f"code of {name}", other and f"{place} is taken over, with other {', '.join(other)}.")
    folder, part = output / "members" / place.name, output / "part"
    if not folder.exists():  # the whole folder or none, whenever a session is killed
        shutil.rmtree(part, ignore_errors=True)
        if found:
            shutil.copytree(place, part, copy_function=shutil.copyfile)
        else:
            part.mkdir()
            (part / "settings.json").write_text(json.dumps(settings, indent=2))
        part.rename(folder)
    return folder


# %% [markdown]
# For ImageNet the eight encoders were made for squares of 224 to 600 pixels. As the size of a
# classifier's images we take that as the height, and 1.5 times as much as the width, because the
# pictures are 2 x 3. The largest batch that fits into the memory of a device is taken, up to the
# one that is configured, by what was measured on a CPU.

# %%
NETWORKS = {  # how each is built, and its loss
    "baseline": (build_classifier, classifier_loss),
    "classifier": (build_classifier, classifier_loss),
    "unet": (build_efficient_unet, unet_loss),
}
SCALES = {  # of B0 to B7; memory is GiB of a U-Net's training step for each million pixels
    "scale": (1.0, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6, 3.1),  # the depth; the width is less
    "height": (224, 240, 260, 300, 380, 456, 528, 600),
    "memory in 32 bits": (2.84, 3.51, 3.74, 4.73, 5.66, 7.00, 8.23, 11.70),
    "memory in 16 bits": (1.66, 1.94, 1.94, 2.50, 3.06, 3.83, 4.55, 5.98),
}


@dataclass(frozen=True)
class Training:
    """The training of one network."""

    member: str  # the encoder and the fold, for tables and figures
    network: str  # one of NETWORKS
    encoder: str | tuple[float, float]
    fold: int  # that is held out
    size: tuple[int, int]  # of the images
    batch_size: int  # images in a step, on all replicas
    epochs: int
    folder: Path  # of its settings, history, weights, results and state


# %%
def plan_training(config, network, encoder, fold, labels, replicas, memory, output, earlier=()):
    """The Training of a network on a number of replicas, each with `memory` GiB."""
    scale = max(encoder) if isinstance(encoder, tuple) else SCALES["scale"][int(encoder[-1])]
    height = round(np.interp(scale, SCALES["scale"], SCALES["height"]))
    size, batch_size, epochs = config.image_size, config.batch_size, (config.epochs,)
    later = "image_ classifier_ encoders held_out precision hours other_code gate_recall flips"
    later = *later.split(), "decision", "broken_share", "epochs"
    if network != "unet":
        size = config.classifier_size or (height, height * 3 // 2)
        later = *later, "cross_entropy_weight"
        epochs = config.classifier_epochs[: 1 + (network == "classifier")]
    member = f"{name_encoder(encoder)}-fold{fold}"
    settings = {"training": f"{member}-{network}", "size": size, "epochs": epochs}
    settings |= {key: value for key, value in asdict(config).items() if not key.startswith(later)}
    settings |= {"labels": int(pd.util.hash_pandas_object(labels).sum())}
    code = hash_code(*NETWORKS[network], make_dataset, make_optimizer)
    settings |= {f"code of {function}": number for function, number in code.items()}
    settings = json.loads(json.dumps(settings, sort_keys=True))  # as the file will have them
    folder = prepare_folder(settings, output, earlier, config.other_code)
    memories = SCALES[f"memory in {32 if config.precision == 'float32' else 16} bits"]
    each = np.interp(scale, SCALES["scale"], memories) * math.prod(size) / 1e6
    batch_size = max(1, min(int(0.8 * memory / each), batch_size // replicas)) * replicas
    return Training(member, network, encoder, fold, size, batch_size, epochs[-1], folder)


# %% tags=["nbval-ignore-output"]
shared = labels, strategy.num_replicas_in_sync, min(ask_driver() or [15]), output, earlier
members = [
    {network: plan_training(config, network, *member, *shared) for network in NETWORKS}
    for member in itertools.product(config.encoders, config.held_out)
]

# %% [markdown]
# All networks are trained by the same function, with Keras's `fit`. As many steps are done as are
# configured, or as fit into the time: a callback measures their pace, and the learning rate reaches
# its end at the last one. After every epoch the history, the best weights so far and the state of
# the training are kept. With `averaging`, the last third of a training is validated with the means
# of its weights so far. Ctrl-C, or the stop button of an interactive session, ends the training of
# a cell: the best weights so far are used, and members that were not begun are left out. Run again,
# the cell goes on where it stood.


# %%
class TimeBudget(tf.keras.callbacks.Callback):
    """End a training, and with it the learning rate's decay, with the last step that has time.

    With `averaging`, what is validated and kept in the last third are the weights' means over every
    tenth step of it. If a session ends there, the next one begins them anew.
    """

    def __init__(self, name, deadline, reserve, averaging):
        super().__init__()
        self.name, self.deadline, self.reserve, self.averaging = name, deadline, reserve, averaging
        self.start, self.pace, self.count, self.means = None, math.nan, 0, None

    def on_epoch_begin(self, epoch, logs=None):
        """Count from the steps that are done: an earlier session's batch may have been another."""
        left = (self.params["epochs"] - epoch) * self.params["steps"]
        self.wanted = self.planned = int(self.model.optimizer.iterations.numpy()) + left

    def on_train_batch_end(self, batch, logs=None):
        """Plan the last step by the pace so far, but for the first step, which builds the graph."""
        self.done, now = int(self.model.optimizer.iterations.numpy()), time.monotonic()
        self.start = self.start or (now, self.done)
        if self.done > self.start[1]:
            self.pace = (now - self.start[0]) / (self.done - self.start[1])
            fitting = self.done + (self.deadline - now) / self.pace - self.reserve
            self.planned = max(self.done, min(self.wanted, int(fitting)))
            self.model.stop_training |= self.planned == self.done
        self.model.optimizer.total_steps = float(self.planned)
        if self.averaging and self.done > 2 / 3 * self.planned and self.done % 10 == 0:
            new, self.count = self.model.get_weights(), self.count + 1
            self.means = [m + (w - m) / self.count for m, w in zip(self.means or new, new)]

    def on_test_begin(self, logs=None):
        """Validate what is saved: the means, or what is the mean over replicas anyway."""
        self.weights = self.model.get_weights()
        self.model.set_weights(self.means or self.weights)

    def on_epoch_end(self, epoch, logs=None):
        """Go on with the weights that were there before the validation, and print a line."""
        self.model.set_weights(self.weights)
        left = self.pace * (self.planned - self.done) / 60
        losses = f"loss {logs['loss']:.4f}, validation {logs['val_loss']:.4f}"
        print(f"{self.name}: epoch {epoch + 1}, {losses}, {left:.1f} min left", flush=True)


# %%
def read_history(training):
    """The losses by epoch; one that was written before a kill and again after it counts once."""
    with contextlib.suppress(FileNotFoundError, pd.errors.EmptyDataError):
        history = pd.read_csv(training.folder / "history.csv")
        return history.drop_duplicates("epoch", keep="last").set_index("epoch")
    return pd.DataFrame({"loss": [], "val_loss": []})


def load_network(config, training):
    """The network of a training with its best weights.

    Raises ValueError, which names the file, if they are not the network's.
    """
    build, _ = NETWORKS[training.network]
    model = build(replace(config, encoder_weights=None), training.encoder, training.size)
    model.get_layer(index=2).trainable = training.network != "baseline"  # the encoder
    try:
        model.load_weights(training.folder / "weights.h5")
    except (OSError, ValueError) as error:
        raise ValueError(f"The weights in {training.folder} do not fit: {error}") from None
    return model


# %%
def train(strategy, config, training, parts, deadline, predictions=0, baseline=None):
    """Train a network until `deadline`, on time.monotonic's clock, and leave it in its folder.

    `parts` is what split_images returns. Time is left for a last validation and for a number of
    `predictions` of an image. `baseline` is a Training that this one starts from. Raises
    MemoryError if a step does not fit into memory; on one device, only if none does.
    """
    history, name, batch_size = read_history(training), training.folder.name, training.batch_size
    print(f"{name}: {len(history)} of {training.epochs} epochs are done.", flush=True)
    nan = f"The loss of {name} became nan. Its best weights before that are used."
    if len(history) >= training.epochs or history.isna().any(axis=None):
        return warn(name, nan if history.isna().any(axis=None) else None)
    steps, (build, loss) = math.ceil(2 * len(parts[0][0]) / batch_size), NETWORKS[training.network]
    reserve = (len(parts[1][0]) + predictions) / batch_size / 2  # two take the time of a step
    budget = TimeBudget(name, deadline, reserve, config.averaging)
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        begun = load_network(config, baseline) if baseline else None
        model = begun or build(config, training.encoder, training.size)
        model.get_layer(index=2).trainable = training.network != "baseline"  # the encoder
        optimizer = make_optimizer(config, batch_size, steps * training.epochs)
        model.compile(optimizer, functools.partial(loss, config), weighted_metrics=[])
    if not (weights := training.folder / "weights.h5").exists():
        model.save_weights(weights)
    best = {"initial_value_threshold": min([math.inf, *history["val_loss"]])}
    best |= {"save_best_only": True, "save_weights_only": True}
    callbacks = [
        tf.keras.callbacks.TerminateOnNaN(),
        *(tf.keras.callbacks.ModelCheckpoint(weights, **best), budget),
        tf.keras.callbacks.CSVLogger(training.folder / "history.csv", append=True),
        tf.keras.callbacks.BackupAndRestore(training.folder / "state", delete_checkpoint=False),
    ]  # the last one seals an epoch
    batches = functools.partial(make_dataset, config, training.size, batch_size)
    examples = batches(*parts[0], lambda: int(optimizer.iterations.numpy()) * batch_size)
    options = {"steps_per_epoch": steps, "epochs": training.epochs, "verbose": 0}
    try:
        model.fit(examples, validation_data=batches(*parts[1]), callbacks=callbacks, **options)
    except tf.errors.ResourceExhaustedError:
        print(f"{name}: a step of {batch_size} images does not fit into memory.")
        if strategy.num_replicas_in_sync > 1 or batch_size == 1:
            raise MemoryError(f"Set batch_size to less than {batch_size}, or image_size.") from None
        smaller = replace(training, batch_size=batch_size // 2)
        return train(strategy, config, smaller, parts, deadline, predictions, baseline)
    text = nan if read_history(training).isna().any(axis=None) else None
    if budget.done == budget.planned < budget.wanted:
        epochs = 3600 * config.hours / budget.pace / steps
        text = f"The time for {name} was over after {budget.done} of {budget.wanted} steps of "
        text += f"{budget.pace:.2g} s. A whole session has time for {epochs:.1f} epochs of it."
    else:
        shutil.rmtree(training.folder / "state", ignore_errors=True)
    warn(name, text)


# %%
def train_members(strategy, config, members, network, labelled, end, predictions=0):
    """Train one network of each member, one after the other, in equal shares of the time to `end`.

    `labelled` are the labels, folds and folder for split_images. Returns the members that have the
    network: if interrupted, those that were begun. Raises RuntimeError if there is none.
    """
    start, text = time.monotonic(), ""
    try:
        for number, member in enumerate(members, start=1):
            parts = split_images(*labelled, member[network].fold)
            # time is left for the predictions by the members before, too
            shared = parts, start + (end - start) * number / len(members), number * predictions
            baseline = member["baseline"] if network == "classifier" else None
            train(strategy, config, member[network], *shared, baseline)
    except KeyboardInterrupt:
        text = f"Interrupted in {member[network].folder.name}; members not begun are left out."
    warn(network, text)
    if kept := [member for member in members if (member[network].folder / "weights.h5").exists()]:
        return kept
    raise RuntimeError(f"No {network} was trained, so there is nothing to predict with.")


def plot_histories(members, *networks):
    """Draw the losses of some networks of members, with a dot for the weights that are kept."""
    figure, panels = plt.subplots(1, len(networks), figsize=(12, 4), layout="constrained")
    for axes, network in zip(np.atleast_1d(panels), networks):
        for index, training in enumerate(member[network] for member in members):
            history, color = read_history(training).rename(lambda epoch: epoch + 1), f"C{index}"
            axes.plot(history["loss"], "--", color=color, label=f"{training.member}, training")
            axes.plot(history["val_loss"], color=color, label=f"{training.member}, validation")
            axes.plot(history["val_loss"].nsmallest(1), "o", color=color)
        axes.set(title=f"Loss of {network}, kept at the dot", xlabel="epoch", xticks=history.index)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plt.show()


# %% [markdown]
# ## Classify the patterns
#
# The classifiers may take a quarter of what is left of the session: first the paper's *baseline*,
# of which only the four outputs are trained, then all of it is *fine-tuned*.

# %% tags=["nbval-ignore-output"]
quarter, now = (session_end - time.monotonic()) / 4, time.monotonic()
begun = train_members(strategy, config, members, "baseline", labelled, now + quarter / 2)

# %% tags=["nbval-ignore-output"]
classified = train_members(strategy, config, begun, "classifier", labelled, now + quarter)

# %%
print(len(classified), "of", len(members), "members have a classifier")
plot_histories(classified, "baseline", "classifier")

# %% [markdown]
# In the sample the baseline's frozen encoder has random weights, as there are none from ImageNet,
# and nine images are too few for a classifier to learn anything that holds for others.
#
# *Accuracy* is the share of right answers to "is the class in the image?", over all validation
# images and all four classes; its mean over the folds is the paper's mean validation accuracy, as
# we read it. A class counts as found at a probability of 1/2 or more. A softmax has to divide its 1
# among all classes in the image, so there we ask for 1/4, the share of each if it knew nothing.


# %%
def predict_presence(strategy, config, training, paths, labels):
    """The probabilities of presence by a baseline or classifier, a row for each image."""
    with strategy.scope():
        model = load_network(config, training)
    batches = make_dataset(config, training.size, training.batch_size, paths, labels)
    return pd.DataFrame(model.predict(batches, verbose=0)[: len(paths)], labels.index, CLASSES)


# %% tags=["nbval-ignore-output"]
accuracies, classifiers = {}, {}
least = 1 / len(CLASSES) if config.activation == "softmax" else 1 / 2
for training in (member[network] for member in classified for network in member):
    if training.network != "unet":
        images = split_images(*labelled, training.fold)[1]
        found = classifiers[training.member] = predict_presence(strategy, config, training, *images)
        right = (found >= least) == present.loc[found.index]
        accuracies[training.member, training.network] = float(right.to_numpy().mean())
pd.Series(accuracies).unstack().round(4)

# %% [markdown]
# From here on all validation images are looked at together. Each is judged by the classifiers that
# were not trained on it; of several encoders the mean counts.
#
# Below are the precision-recall curves (the paper's Fig. 6). The authors' notebook marks two points
# on each: the highest threshold that finds .94 of the images with the class (`gate_recall`), below
# which a mask is dropped later, and the lowest threshold at which .90 of the finds are right. At
# them, the paper has the highest precision for Sugar, .74, and the lowest for Fish, .55; the
# highest recall for Flower, .49, and the lowest for Fish, .22. The Brier score, the mean squared
# error of the probabilities, is 0 at best.


# %%
def find_points(truth, probability, recall):
    """The two points on a class's precision-recall curve.

    The threshold and the precision where the recall is at least `recall`, and the recall where the
    precision is at least .90: nan where there is none.
    """
    precisions, recalls, thresholds = metrics.precision_recall_curve(truth, probability)
    last = np.flatnonzero(recalls[:-1] >= recall)[-1]  # the thresholds ascend
    precise = recalls[:-1][precisions[:-1] >= 0.9]
    return thresholds[last], precisions[last], precise.max(initial=0) or np.nan


def describe_classifier(truth, probabilities, recall):
    """A row per class with find_points, frequency, average precision and Brier score."""
    rows = {}
    for name in CLASSES:
        pair, known = (truth[name], probabilities[name]), truth[name].any()
        average = metrics.average_precision_score(*pair) if known else np.nan
        points = find_points(*pair, recall) if known else [np.nan] * 3
        rows[name] = [truth[name].mean(), average, *points, metrics.brier_score_loss(*pair)]
    columns = ["frequency", "average precision", "threshold", f"precision at recall {recall:.2f}"]
    return pd.DataFrame(rows, [*columns, "recall at precision 0.90", "Brier score"]).T


# %% tags=["nbval-ignore-output"]
held_out = pd.concat(classifiers.values()).groupby(level=0).mean()
truth = present.loc[held_out.index]
description = describe_classifier(truth, held_out, config.gate_recall)
description.round(3)

# %%
print(len(held_out), "validation images, each judged by what has not seen it")
figure, panels = plt.subplots(1, 4, figsize=(13, 4), sharey=True, layout="constrained")
for name, color, axes in zip(CLASSES, COLORS, panels):
    frequency, average, _, precision, recall, _ = description.loc[name]
    axes.axhline(frequency, linestyle=":", color="gray", label="the class's frequency")
    precisions, recalls, _ = metrics.precision_recall_curve(truth[name], held_out[name])
    axes.step(recalls, precisions, where="pre", color=color)
    axes.plot(config.gate_recall, precision, "kv", label=f"recall {config.gate_recall:.2f}")
    axes.plot(recall, 0.9, "k>", label="precision 0.90")
    axes.set(title=f"{name}, average precision {average:.2f}", xlabel="recall", ylabel="precision")
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The curve of a classifier that knows nothing is the dotted line at the class's frequency, which is
# also its average precision.
#
# What does the classifier look at? Grad-CAM weights the maps of the encoder's last layer by how
# much a class's score rises with them, and adds them up. We show it for the first member and the
# first validation image of each class, with the outline of the true mask.


# %%
def grad_cam(classifier, images):
    """Where a classifier finds each class: float32 (batch, rows, columns, classes), of 0 and more.

    [Grad-CAM](https://arxiv.org/abs/1610.02391), equations 1 and 2, for the scores before softmax
    or sigmoid, at the size of the encoder's last maps. As only an average and one layer lie behind
    these, their gradients are that layer's weights, divided by the number of pixels.
    """
    average, logits = classifier.get_layer("average"), classifier.get_layer("logits")
    maps = tf.cast(tf.keras.Model(classifier.input, average.input)(images), tf.float32)
    return tf.nn.relu(maps @ logits.kernel / math.prod(maps.shape[1:3]))


# %%
training = classified[0]["classifier"]
classifier, rows = load_network(config, training), labels[folds == training.fold]
figure, panels = plt.subplots(2, 4, figsize=(13, 5.5), layout="constrained")
for index, (name, (above, below)) in enumerate(zip(CLASSES, panels.T)):
    chosen = rows.index[(rows[name] != "").argmax()]  # the first with the class
    image, plane = load_example(config, training.size, train_folder / chosen, rows.loc[chosen])
    heat = tf.image.resize(grad_cam(classifier, image[None])[0], image.shape[:2])[..., index]
    only = split_planes(plane).numpy() * (np.arange(len(CLASSES)) == index)
    outline(above, image, only, f"{name} in {chosen}")
    outline(below, image, only, f"Where {name} is seen")
    below.imshow(heat, cmap="inferno", alpha=0.6)
plt.show()

# %% [markdown]
# Heat inside of the outline means that the classifier decides by the clouds that the labellers
# meant. Heat outside means that it found them elsewhere, or goes by something else.

# %% [markdown]
# ## Segment the patterns
#
# Now EfficientUNet of the same members. The networks share what is left of the session, less the
# time for all predictions and a tenth of the whole to decide and to write, fifteen minutes at most.

# %% tags=["nbval-ignore-output"]
predictions = (4 if config.flips else 1) * (len(test_names) + len(labels) // config.folds)
end = max(session_end - min(900, 360 * config.hours), time.monotonic())
segmented = train_members(strategy, config, classified, "unet", labelled, end, predictions)

# %%
trainings = [member["unet"] for member in segmented]
plot_histories(segmented, "unet")

# %% [markdown]
# As long as both curves fall, more epochs help. Where the validation loss turns up while the
# training loss goes on falling, the network learns the training images by heart, and the weights
# from before the turn are kept. With `averaging`, the last third of the validation losses are those
# of the weights' means.

# %% [markdown]
# ## Turn probabilities into masks
#
# The network's maps are brought to the submission's size and to bytes, 0 to 255, on the device. If
# `flips` is set, a map is the mean over the image and its mirror images. Where several networks
# predict the same image, the mean of their maps, again in bytes, is used: on a validation image
# those that were not trained on it, on a test image all of them.


# %%
def build_predictor(unet, flips):
    """A network from images, uint8 (batch, height, width, 3), to a U-Net's maps of the classes.

    These are its probabilities x 255 at the submission's size, uint8 (batch, 350, 525, classes).
    """
    images, turns = unet.input, [[], [1], [2], [1, 2]] if flips else [[]]  # axes that are reversed
    several = [tf.reverse(unet(tf.reverse(images, turn)), turn) for turn in turns]
    probabilities = tf.add_n(several)[..., -len(CLASSES) :] / len(turns)
    if images.shape[1] >= 2 * SUBMISSION_SIZE[0]:  # or else pixels would be left out
        probabilities = tf.nn.avg_pool2d(probabilities, 2, 2, "VALID")
    maps = 255 * tf.image.resize(probabilities, SUBMISSION_SIZE)
    return tf.keras.Model(images, tf.cast(tf.round(maps), tf.uint8), name="predictor")


def predict_maps(config, predictors, paths, labels, chunk=128):
    """Yield, for each image, the maps of each predictor and last their mean, rounded to bytes.

    uint8 (predictors + 1, 350, 525, classes). `predictors` are pairs of a Training and
    build_predictor's network.
    """
    start = time.monotonic()
    for first in range(0, len(paths), chunk):
        part = paths[first : first + chunk], labels[first : first + chunk]
        batches = [make_dataset(config, own.size, own.batch_size, *part) for own, _ in predictors]
        several = [network.predict(x, verbose=0) for x, (_, network) in zip(batches, predictors)]
        for _, *maps in zip(part[0], *several):
            mean = np.rint(np.mean(maps, axis=0, dtype=np.float32)).astype(np.uint8)
            yield np.stack([*maps, mean])
        done = first + len(part[0])
        left = (time.monotonic() - start) / done * (len(paths) - done) / 60
        print(f"{done} of {len(paths)} images are predicted, {left:.1f} min left", flush=True)


# %% [markdown]
# A mask is where the map reaches a threshold. What is left to decide is which threshold, and when
# to predict the empty mask instead: on an absent class it scores 1 and a single pixel 0.
#
# How many pixels of a map have each of the 256 values, and how many of these are true, is enough to
# know the Dice of *every* threshold: two cumulative sums give the area and the overlap of each
# thresholded mask. The maps themselves are then forgotten.


# %%
def count_pixels(maps, masks=None):
    """How many pixels of each class have values of at least 0, 1, ..., 255: int (classes, 256).

    `maps` (height, width, classes) are uint8. Given `masks` of the same shape, zeros and ones, only
    the true pixels are counted, so that the first number is the area of the true mask.
    """
    weights = np.ones_like(maps) if masks is None else masks
    pairs = zip(*(part.reshape(-1, len(CLASSES)).T for part in (maps, weights)))
    counts = [np.bincount(values, weight, 256) for values, weight in pairs]
    return np.array(counts, int)[:, ::-1].cumsum(axis=1)[:, ::-1]


def count_validation(config, predictors, paths, labels):
    """count_pixels of what predict_maps yields, all and the true ones.

    Returns the areas and overlaps of every mask, int (predictors + 1, 2, images, classes, 256).
    """
    counts = []
    for several, rles in zip(predict_maps(config, predictors, paths, labels), labels.to_numpy()):
        masks = split_planes(read_plane(rles, SUBMISSION_SIZE)).numpy()
        counts.append([(count_pixels(maps), count_pixels(maps, masks)) for maps in several])
    return np.moveaxis(np.array(counts), 0, 2)


# %% tags=["nbval-ignore-output"]
counts, pairs = {}, []
with strategy.scope():
    predictors = [(t, build_predictor(load_network(config, t), config.flips)) for t in trainings]
for fold in sorted({training.fold for training in trainings}):
    chosen, images = [p for p in predictors if p[0].fold == fold], split_images(*labelled, fold)[1]
    *own, mean = count_validation(config, chosen, *images)
    counts |= {training.member: part for (training, _), part in zip(chosen, own)}
    pairs.append((mean, held_out.loc[images[1].index]))
means, tables = zip(*pairs)
(areas, overlaps), presence = np.concatenate(means, axis=1), pd.concat(tables)

# %% [markdown]
# A *decision* is a number for each image and class: a threshold up to 255, or 256 for the empty
# mask. A *way to decide* learns from validation images, and returns a rule that takes the areas of
# an image's masks and the classifier's probabilities to decisions. We compare four.
#
# The first takes one half as the threshold. The second is the usual one: per class, the threshold
# and the smallest area to predict that score best, of 255 times 60, all compared at once. Of pairs
# that score the same we take the one nearest to one half. The third adds the *gate* of the authors'
# notebooks: no mask where the classifier's probability is below the threshold at which it finds
# `gate_recall` of the images with the class.


# %%
EMPTY = 256  # the decision for the empty mask
MINIMUM_AREAS = np.round(np.arange(0, 0.3, 0.005) * math.prod(SUBMISSION_SIZE)).astype(int)


def score_decisions(areas, overlaps, decisions):
    """The Dice of each image and class: float (images, classes).

    `areas` and `overlaps` are counts (images, classes, 256), `decisions` int (images, classes).
    """
    padded = np.pad([areas, overlaps], [(0, 0), (0, 0), (0, 0), (0, 1)])  # 0 for EMPTY
    area, overlap = np.take_along_axis(padded, decisions[None, ..., None], axis=-1)[..., 0]
    return dice(overlap, area + overlaps[..., 0])


def tune_rules(areas, overlaps):
    """Each class's best threshold, 1 to 255, and minimum area in pixels: int (classes, 2).

    All are scored, 255 thresholds times 60 areas. Of the best, the one nearest to one half.
    """
    empty, rules = overlaps[..., :1] == 0, []
    scores = dice(overlaps, areas + overlaps[..., :1])
    for area, score, absent in zip(*(np.moveaxis(part, 1, 0) for part in (areas, scores, empty))):
        grid = [np.where(area >= least, score, absent).mean(axis=0)[1:] for least in MINIMUM_AREAS]
        best = np.argwhere(np.isclose(grid, np.max(grid), rtol=0, atol=1e-12)) + (0, 1)
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
    chosen = np.arange(len(thresholds)), thresholds
    return lambda areas, presence: np.where(areas[:, *chosen] >= least, thresholds, EMPTY)


def use_gate(config, areas, overlaps, presence):
    """A way to decide: use_area, and no mask where the classifier finds the class absent."""
    decide, pairs = use_area(config, areas, overlaps, presence), zip(overlaps[..., 0].T, presence.T)
    gates = [find_points(t > 0, p, config.gate_recall)[0] if t.any() else 0 for t, p in pairs]
    return lambda areas, presence: np.where(presence >= gates, decide(areas, presence), EMPTY)


# %% [markdown]
# The fourth way maximises the *expected* Dice coefficient of each mask. Let $P$ be the probability
# that the image holds the class, and $q(v)$ that a pixel of the value $v$ is true if it does. If
# $n(v)$ pixels have the value $v$, the mask from the threshold $t$ on has, given presence, about
# the expected Dice
#
# $$D(t) = \frac{2 \sum_{v \geq t} n(v)\,q(v)}{\sum_{v \geq t} n(v) + \sum_v n(v)\,q(v)}.$$
#
# Predicting that mask scores $P \max_t D(t)$ on average, predicting the empty one $1 - P$; we take
# what scores more. In all 5,546 labelled images there is at least one class, so where all four
# masks would be empty, the one that loses least is predicted. $q$ is fitted by isotonic regression,
# since a higher value should not mean a lower probability, and $P$ by logistic regression on the
# classifier's probability and on how high and how far the map rises.


# %%
def describe_maps(areas, presence):
    """What a class's presence is judged by: float (images, 5), all as logits.

    The classifier's probability, the values that 2, 10 and 30 % of the map reach, and its mean.
    """
    pixels = areas[:, :1]
    reached = [(areas >= share * pixels).sum(axis=1) - 1 for share in (0.02, 0.1, 0.3)]
    mean = areas[:, 1:].sum(axis=1) / pixels[:, 0]
    shares = np.column_stack([presence, np.column_stack([*reached, mean]) / 255])
    return logit(np.clip(shares, 1e-3, 1 - 1e-3))


def calibrate(areas, overlaps, presence):
    """Fit one class's judge of presence and the probability of each value's pixels.

    `areas` and `overlaps` are (images, 256), `presence` is (images). The judge is a classifier of
    scikit-learn for describe_maps, the probabilities are float (256). One image with the class and
    one without, both average, and one pixel of each value keep them defined on few images.
    """
    features, truth = describe_maps(areas, presence), overlaps[:, 0] > 0
    features = np.concatenate([features, [features.mean(axis=0)] * 2])
    judge = linear_model.LogisticRegression().fit(features, [*truth, False, True])
    pixels, true = (-np.diff(part[truth].sum(axis=0), append=0) for part in (areas, overlaps))
    values = np.arange(256)
    shares = (true + values / 255) / (pixels + 1)
    return judge, isotonic.IsotonicRegression().fit(values, shares, pixels + 1).predict(values)


def use_expectation(config, areas, overlaps, presence):
    """A way to decide: the mask of the highest expected Dice."""
    columns = (np.moveaxis(part, 1, 0) for part in (areas, overlaps, presence))
    fitted = [calibrate(*column) for column in zip(*columns)]

    def decide(areas, presence):
        decisions, gains = np.empty(presence.shape, int), np.empty(presence.shape)
        for index, (judge, probabilities) in enumerate(fitted):
            area = areas[:, index]
            true = -np.diff(area, append=0) * probabilities
            overlap = true[:, ::-1].cumsum(axis=1)[:, ::-1]
            expected = (2 * overlap / np.maximum(area + overlap[:, :1], 1e-9))[:, 1:]
            there = judge.predict_proba(describe_maps(area, presence[:, index]))[:, 1]
            decisions[:, index] = expected.argmax(axis=1) + 1  # without the whole image
            gains[:, index] = there * expected.max(axis=1) - (1 - there)
        predicted = gains > 0
        predicted[np.arange(len(gains)), gains.argmax(axis=1)] = True  # at least one
        return np.where(predicted, decisions, EMPTY)

    return decide


WAYS = {  # by the names in Config.decision
    "half": use_half,
    "threshold and area": use_area,
    "gated": use_gate,
    "expected": use_expectation,
}

# %% [markdown]
# On the maps of a public U-Net for 4,016 of the competition's training images, which were probably
# among those that it was trained on, threshold and area scored .652 and the expected Dice .657; the
# 95 % interval of the gain is .002 to .007. The truth about presence would have added .14. So what
# is left to gain is to know which classes are there.
#
# Small networks that were trained from nothing on small copies of the pictures (see
# `tests/benchmarks`) say the same: with `averaging`, the expected Dice gained .010 there, from .005
# to .015. With the truth about presence and no segmentation, each present class predicted as the
# whole image, the Dice would be .06 higher than theirs. Their maps know presence better than their
# classifiers do: without the classifier's probability the Dice is the same to within .003. The
# classifier is needed for the gate.
#
# A rule that is scored on the images it was tuned on looks better than it is: by .004 on the public
# U-Net's 4,016 images, by .013 on its maps of only 766. So the validation images are dealt into
# five parts, and the decisions for each part come from rules that learned on the other four. Those
# for the test images learn on all. Where networks of several folds predict a test image together,
# their mean is smoother than the maps that the rules learned on; this we do not correct.


# %%
def cross_validate(config, areas, overlaps, presence):
    """Decisions for each image and class by rules that learned on other images.

    `areas` and `overlaps` are counts (images, classes, 256), `presence` the classifier's
    probabilities (images, classes). Returns int (images, classes) by the names of WAYS.
    """
    order = np.random.default_rng(config.seed).permutation(len(areas))
    decisions = {way: np.empty(presence.shape, int) for way in WAYS}
    for part, way in itertools.product(np.array_split(order, min(5, len(order))), WAYS):
        others = np.setdiff1d(order, part)
        decide = WAYS[way](config, areas[others], overlaps[others], presence[others])
        decisions[way][part] = decide(areas[part], presence[part])
    return decisions


def bound_difference(scores, others, seed):
    """The mean difference of scores (images, classes), and its 95 % interval by the bootstrap."""
    differences = (scores - others).mean(axis=1)
    means = np.random.default_rng(seed).choice(differences, (2000, len(differences))).mean(axis=1)
    return differences.mean(), *np.percentile(means, [2.5, 97.5])


# %% tags=["nbval-ignore-output"]
there, probabilities = overlaps[..., 0] > 0, presence.to_numpy()
decisions = {"all masks empty": np.full(there.shape, EMPTY)}
decisions["whole image where the class is present"] = np.where(there, 0, EMPTY)
decisions |= cross_validate(config, areas, overlaps, probabilities)
scores = {way: score_decisions(areas, overlaps, decided) for way, decided in decisions.items()}
comparison = pd.DataFrame({way: score.mean(axis=0) for way, score in scores.items()}, CLASSES).T
comparison.insert(0, "Dice", comparison.mean(axis=1))
bounds = [bound_difference(scores[way], scores["threshold and area"], config.seed) for way in WAYS]
comparison.loc[list(WAYS), ["gain", "from", "to"]] = bounds
comparison.round(4).astype(object).where(comparison.notna(), "")

# %% [markdown]
# The second row knows the truth about presence, which no submission does; it says what a perfect
# classifier without any segmentation would score. A gain, over threshold and area, means something
# where its 95 % interval, `from` and `to`, is on one side of 0. The handful of images of the sample
# cannot tell the ways apart.
#
# Some validation images with their true masks and with the predicted ones:


# %%
def make_masks(maps, presence, decide):
    """The masks of one image by a rule: bool (height, width, classes).

    `maps` have the same shape, `presence` are the probabilities of the classes.
    """
    (decided,) = decide(count_pixels(maps)[None], np.asarray(presence)[None])
    return maps >= decided  # EMPTY is more than any byte


# %%
print("Each decision is a threshold or empty:", all(decisions[way].min() > 0 for way in WAYS))
decide = WAYS[config.decision](config, areas, overlaps, probabilities)
chosen = [predictor for predictor in predictors if predictor[0].fold == trainings[0].fold]
paths, rows = (part[:3] for part in split_images(*labelled, trainings[0].fold)[1])
figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
for axes, path, several in zip(panels.T, paths, predict_maps(config, chosen, paths, rows)):
    image, plane = load_example(config, SUBMISSION_SIZE, path, rows.loc[path.name])
    masks = make_masks(several[-1], presence.loc[path.name], decide)
    outline(axes[0], image, split_planes(plane), f"{path.name}, true masks")
    outline(axes[1], image, masks, f"{path.name}, predicted masks")
plt.show()

# %% [markdown]
# ## Predict and write the submission
#
# Test images are read, predicted by all networks and encoded part by part, so that memory does not
# grow with their number; should the time run out, the rest of them get empty masks. The submission
# has the rows of `sample_submission.csv` in its order, is written whole, and is read back and
# checked.


# %%
def encode_rle(mask):
    """The run-length encoding of a mask (height, width); the empty mask's is the empty string."""
    pixels = np.pad(np.asarray(mask, bool).T.ravel(), 1)
    starts, ends = np.flatnonzero(pixels[1:] != pixels[:-1]).reshape(-1, 2).T
    return " ".join(map(str, np.column_stack([starts + 1, ends - starts]).ravel().tolist()))


# %% [markdown]
# Worked by hand: in this mask of 3 x 4 pixels the second column holds pixels 4 to 6, of which the
# last two are set, and the third column holds 7 to 9, of which the first two are set. The four
# numbers 5 to 8 follow one another, so that they are one run; the fourth column's last pixel, 12,
# is another.

# %%
example = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], np.uint8)
print(example, encode_rle(example), np.array_equal(decode_rle("5 4 12 1", (3, 4)), example))


# %%
def predict_rles(config, predictors, images, presence, decide, end):
    """The encoded masks of each image, a dictionary from label rows to run-length encodings.

    `images` are paths and labels, `presence` (images, classes) the classifier's probabilities. Ends
    at `end`, on time.monotonic's clock, and tells how many images it has left out.
    """
    rles = {}
    for path, found, several in zip(images[0], presence, predict_maps(config, predictors, *images)):
        masks = make_masks(several[-1], found, decide)
        rles |= {f"{path.name}_{name}": encode_rle(masks[..., c]) for c, name in enumerate(CLASSES)}
        if time.monotonic() > end:
            break
    left = len(images[0]) - len(rles) // len(CLASSES)
    warn("time", left and f"The time is over: {left} test images are predicted to be empty.")
    return rles


def write_whole(path, text):
    """Write a text file, whole or not at all: whenever a run is killed, the old or the new."""
    temporary = path.with_name("part." + path.name)
    temporary.write_text(text)
    os.replace(temporary, path)


def write_submission(rles, sample_path, path):
    """Write the encodings `rles`, a dictionary, as the rows of sample_submission.csv in its order.

    A row without an encoding gets the empty mask.
    """
    labels = read_rows(sample_path, SUBMISSION_SIZE)["Image_Label"]
    table = pd.DataFrame({"Image_Label": labels, "EncodedPixels": labels.map(rles).fillna("")})
    write_whole(path, table.to_csv(index=False))


def check_submission(path, sample_path):
    """Read a submission and return it, with read_rows's columns.

    Raises ValueError, which names the file and the row, unless it has the rows of the sample in its
    order, and valid encodings at SUBMISSION_SIZE.
    """
    table, sample = read_rows(path, SUBMISSION_SIZE), read_rows(sample_path, SUBMISSION_SIZE)
    pairs = itertools.zip_longest(table["Image_Label"], sample["Image_Label"])
    for line, (found, expected) in enumerate(pairs, start=2):
        if found != expected:
            raise ValueError(f"{path}, line {line}: {found}, where {sample_path} has {expected}.")
    return table


# %% tags=["nbval-ignore-output"]
several = [predict_presence(strategy, config, m["classifier"], *test_images) for m in segmented]
end = session_end - 120  # seconds to write
rles = predict_rles(config, predictors, test_images, np.mean(several, axis=0), decide, end)
write_submission(rles, sample_path, submission_path)

# %%
submission = check_submission(submission_path, sample_path)
print(f"submission.csv passes: {len(submission):,} rows for {len(test_names):,} images")
written = submission.set_index("Image_Label")["EncodedPixels"]
print("Its masks are those of the maps:", all(written[label] == rle for label, rle in rles.items()))

# %% tags=["nbval-ignore-output"]
written.str.slice(0, 60).head(8)

# %% [markdown]
# ## Report
#
# Each member gets its results, beside its U-Net. The tables have those of this session and of
# earlier ones whose outputs are attached: a row for each encoder and size, with the mean over its
# folds. All scores of ours are on validation images, by rules that learned on others. Scores on the
# leaderboard are only known to Kaggle.


# %%
PAPER_TABLES = {  # Tables I to III, of B0 to B5
    ("I", "baseline"): (0.670, 0.656, 0.657, 0.659, 0.640, 0.601),
    ("I", "fine-tuned"): (0.836, 0.829, 0.827, 0.825, 0.798, 0.732),
    ("II", "cross-validation"): (0.6389, 0.6423, 0.6351, 0.6311, 0.6294, 0.6255),
    ("II", "private"): (0.64595, 0.64640, 0.64551, 0.64585, 0.63911, 0.64059),
    ("III", "cross-validation"): (0.6689, 0.6601, 0.6589, 0.6588, 0.6425, 0.6322),
    ("III", "private"): (0.6611, 0.6553, 0.6570, 0.6500, 0.6417, 0.6319),
}


def read_results(trainings, places):
    """The results of members, a row each: of trainings, then of what else is in some outputs.

    Of the same encoder, size and fold only the first.
    """
    paths = [training.folder / "results.json" for training in trainings]
    paths += [path for place in places for path in sorted(place.glob("members/*/results.json"))]
    results = pd.DataFrame([json.loads(path.read_text()) for path in paths])
    return results.drop_duplicates(["encoder", "image size", "fold"])


def make_table(results, measures, number):
    """The means of some measures over the folds, beside a table of the paper."""
    groups = results.groupby(["encoder", "image size"])
    table = groups[measures].mean().round(4).assign(images=groups["images"].sum().astype(object))
    table["folds"] = groups["fold"].agg(lambda fold: ", ".join(map(str, sorted(fold))))
    paper = pd.DataFrame(PAPER_TABLES, [f"efficientnetb{size}" for size in range(6)])[number]
    table = table.reset_index("image size").join(paper.add_prefix("paper, "), how="outer")
    return table.astype(object).where(table.notna(), "")


# %% tags=["nbval-ignore-output"]
for training in trainings:
    found, size = classifiers[training.member], "{} x {}".format(*training.size)
    results = {"encoder": name_encoder(training.encoder), "image size": size, "fold": training.fold}
    results |= {"images": len(found), "baseline accuracy": accuracies[training.member, "baseline"]}
    results["accuracy"] = accuracies[training.member, "classifier"]
    results["average precision"] = metrics.average_precision_score(present.loc[found.index], found)
    decided = cross_validate(config, *counts[training.member], found.to_numpy())
    for way, decision in decided.items():
        results[way] = float(score_decisions(*counts[training.member], decision).mean())
    write_whole(training.folder / "results.json", json.dumps(results, indent=2))
results = read_results(trainings, [output, *earlier])

# %% [markdown]
# Table I, the mean validation accuracy of the classifiers:

# %% tags=["nbval-ignore-output"]
make_table(results, ["baseline accuracy", "accuracy", "average precision"], "I")

# %% [markdown]
# Table II. The paper's is of EfficientNet without EfficientUNet, and does not say where its masks
# came from. Ours are EfficientUNet's, gated by the classifier:

# %% tags=["nbval-ignore-output"]
make_table(results, ["gated"], "II")

# %% [markdown]
# Table III, the Dice coefficient of EfficientUNet alone. For B0 the paper's text has .6654 in
# cross-validation, and .6602 on the private leaderboard:

# %% tags=["nbval-ignore-output"]
make_table(results, ["threshold and area", "expected"], "III")

# %% [markdown]
# In the paper's Table III larger encoders score lower. A difference between two rows means
# something only if they have the same folds, and more than a handful of images. Here each fold's
# rules learned within that fold, on two images in the sample: look at the ways' comparison above
# instead, which has all images, and at the pictures.
#
# `results.json` holds the configuration, what the run measured and its warnings.

# %% tags=["nbval-ignore-output"]
report = {"preset": preset_name, "config": asdict(config), "warnings": [*WARNINGS.values()]}
report["versions"] = {m.__name__: m.__version__ for m in (tf, albumentations, cv2, np, pd)}
report["validation Dice"] = comparison["Dice"].round(4).to_dict()
write_whole(output / "results.json", json.dumps(report, indent=2) + "\n")
print(*(f"{title}: {report[title] or 'none'}" for title in list(report)[2:]), sep="\n")

# %% [markdown]
# ## Conclusion
#
# The way from labels to a submission is complete: checked labels, balanced folds, examples that are
# the same in every run, networks that take bytes and give probabilities, a classifier whose reasons
# can be looked at, and masks whose thresholds were scored on images they were not chosen on.
#
# To go further, change the cell of parameters: a larger encoder (`{"encoders":
# ["efficientnetb2"]}`), all folds (`{"held_out": [0, 1, 2, 3, 4]}`, or one per session and their
# outputs attached to the last), or more epochs. A smaller `image_size`, such as `[640, 960]`,
# trains several times faster. If a session ends before its training does, attach its output to the
# next, which goes on from there.
