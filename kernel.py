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
# 3. train EfficientUNet, a U-Net whose encoder is an EfficientNet, with rectified Adam;
# 4. choose, per class, the threshold and the smallest mask worth predicting;
# 5. predict the test pictures at a quarter of their size, and check the file before it is handed
#    in.
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
# Kaggle has those already, in versions that fit each other.

# %%
import importlib.util
import subprocess
import sys

MISSING_ON_KAGGLE = {
    "classification_models": "image-classifiers==1.0.0",
    "efficientnet": "efficientnet==1.0.0",
    "keras_applications": "keras-applications==1.0.8",
    "keras_radam": "keras-rectified-adam==0.20.0",
    "segmentation_models": "segmentation-models==1.0.1",
}


def install_missing(packages):
    """Install what cannot be imported of `packages`, a mapping of modules to pinned requirements.

    Returns the requirements that were installed. Raises CalledProcessError where pip fails, on
    Kaggle most often because the notebook's internet access is switched off.
    """
    missing = [pin for module, pin in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *missing], check=True)
        importlib.invalidate_caches()
    return missing


# %%
print("Installed:", ", ".join(install_missing(MISSING_ON_KAGGLE)) or "nothing, all is there")

# %% [markdown]
# segmentation-models was written for the Keras of TensorFlow 2, which lives on as *legacy Keras*.
# It is chosen by environment variables, which must be set before TensorFlow is imported.

# %%
import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["SM_FRAMEWORK"] = "tf.keras"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # no notes of TensorFlow's libraries between the results
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no look on the internet for a newer version

import dataclasses
import itertools
import json
import math
import platform
import random
import re
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import albumentations
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import segmentation_models
import tensorflow as tf
from matplotlib.patches import Patch

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
COLORS = ("tab:cyan", "tab:orange", "tab:red", "tab:olive")
ORIGINAL_SIZE = (1400, 2100)  # of the pictures and of the masks in train.csv
SUBMISSION_SIZE = (350, 525)  # of the masks in submission.csv

plt.rcParams["savefig.bbox"] = "tight"  # saved figures look as they do here

# %% tags=["nbval-ignore-output"]
packages = ["tensorflow", "tf_keras", "segmentation-models", "keras-rectified-adam"]
packages += ["albumentations", "opencv-python", "numpy", "pandas"]
versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
print(", ".join(f"{name} {number}" for name, number in versions.items()))
print("Devices:", ", ".join(device.device_type for device in tf.config.list_physical_devices()))

# %% [markdown]
# ## Configure the run
#
# Everything that can be chosen stands in one `Config`. There are three of them: `PAPER` follows the
# paper, `BEST` departs from it where there is a reason to, and `SAMPLE` is `BEST` cut down until
# two CPU cores run the whole notebook in minutes. Batch size, epochs, learning rate and the
# probability of each augmentation are ours in all three.


# %%
@dataclass(frozen=True)
class Config:
    """All choices of a run."""

    encoder: str  # the U-Net's encoder, "efficientnetb0" to "efficientnetb7"
    encoder_weights: str | None  # "imagenet", the path of an HDF5 file, or None for random weights
    image_size: tuple[int, int]  # of the network's input, multiples of 32
    activation: str  # "softmax" over background and classes, or "sigmoid" for each class
    precision: str  # Keras's policy for the network's layers, "float32" or "mixed_float16"
    batch_norm_momentum: float  # of the moving averages in batch normalisation
    augmentation_probability: float  # of each transform in an augmented copy
    rotation_limit: float  # largest rotation of an augmented copy, in degrees
    folds: int  # parts that the training images are split into
    fold: int  # the part held out for validation; the others are trained on
    batch_size: int  # images per training step
    epochs: int  # passes over the training images, each as it is and once augmented
    learning_rate: float  # of rectified Adam, at the end of the warm-up
    warmup_proportion: float  # share of the training steps in which the learning rate rises
    cross_entropy_weight: float  # share of cross-entropy in the loss, the rest is Dice loss
    dice_smoothing: float  # pixels added to both sides of the Dice loss's fraction
    threads: int  # that decode and augment images
    seed: int  # of the folds, the augmentation, the initial weights and dropout


# %%
PAPER = Config(
    encoder="efficientnetb0",  # the smallest of the paper's B0 to B5
    encoder_weights="imagenet",
    image_size=(1312, 2080),
    activation="softmax",
    precision="float32",
    batch_norm_momentum=0.99,
    augmentation_probability=0.5,
    rotation_limit=20,
    folds=5,
    fold=0,
    batch_size=1,
    epochs=10,
    learning_rate=1e-3,
    warmup_proportion=0.1,
    cross_entropy_weight=0.7,
    dice_smoothing=1.0,
    threads=4,
    seed=2019,
)
BEST = replace(
    PAPER,
    activation="sigmoid",  # 60 % of the images have pixels of several classes, softmax allows one
    precision="mixed_float16",  # halves the memory of a step, 12 GB in float32
)
SAMPLE = replace(
    BEST,
    encoder_weights=None,  # nothing to download
    image_size=(128, 192),
    precision="float32",  # float16 is slow on CPUs
    batch_norm_momentum=0.8,  # so that the averages keep up with few steps
    batch_size=4,
    epochs=25,
    learning_rate=3e-3,  # few steps, so larger ones
    threads=2,
)
PRESETS = {"PAPER": PAPER, "BEST": BEST, "SAMPLE": SAMPLE}

# %% [markdown]
# To choose differently, edit the next cell, or set `CLOUDS_PRESET`, `CLOUDS_OVERRIDES` (JSON),
# `CLOUDS_INPUT` and `CLOUDS_OUTPUT` in the environment, which wins over the cell.

# %% tags=["parameters"]
preset = None  # "PAPER", "BEST" or "SAMPLE"; None is BEST on Kaggle and SAMPLE elsewhere
overrides = {}  # single fields, for example {"encoder": "efficientnetb2", "fold": 1}
input_folder = None  # None finds the competition on Kaggle, and tests/sample elsewhere
output_folder = None  # None is /kaggle/working on Kaggle and output elsewhere


# %%
def on_kaggle(environment=os.environ):
    """Whether the notebook runs on Kaggle."""
    return "KAGGLE_KERNEL_RUN_TYPE" in environment


def choose_config(preset=None, overrides=None, environment=os.environ):
    """The name of a preset, and its Config with single fields overridden.

    Raises ValueError for an unknown preset or field.
    """
    default = "BEST" if on_kaggle(environment) else "SAMPLE"
    name = environment.get("CLOUDS_PRESET") or preset or default
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}, only {', '.join(PRESETS)}.")
    fields = {**(overrides or {}), **json.loads(environment.get("CLOUDS_OVERRIDES") or "{}")}
    allowed = [field.name for field in dataclasses.fields(Config)]
    if unknown := sorted(fields.keys() - set(allowed)):
        raise ValueError(f"Config has no field {', '.join(unknown)}, only {', '.join(allowed)}.")
    if "image_size" in fields:
        fields["image_size"] = tuple(fields["image_size"])  # JSON has lists only
    return name, replace(PRESETS[name], **fields)


# %%
def find_input(chosen=None, environment=os.environ, mount=Path("/kaggle/input")):
    """The folder that holds the competition's data.

    Looks at CLOUDS_INPUT or `chosen` alone if there is one. Else at Kaggle's present and former
    mount points, then for any `train.csv` below `mount`, and off Kaggle at tests/sample. Raises
    FileNotFoundError, which says where it looked and how to attach the competition.
    """
    competition = "understanding_cloud_organization"
    if chosen := environment.get("CLOUDS_INPUT") or chosen:
        places = [Path(chosen)]
    else:
        places = [mount / "competitions" / competition, mount / competition]
        places += sorted(path.parent for path in mount.rglob("train.csv"))
        places += [] if on_kaggle(environment) else [Path("tests/sample")]
    parts = ("train.csv", "train_images", "sample_submission.csv", "test_images")
    for folder in places:
        if all((folder / part).exists() for part in parts):
            return folder
    raise FileNotFoundError(
        f"None of {', '.join(map(str, places))} is a folder with {', '.join(parts)}. On Kaggle, "
        "choose 'Add Input', search for the competition 'Understanding Clouds from Satellite "
        "Images', accept its rules and add it. Elsewhere, set CLOUDS_INPUT to the folder of the "
        "downloaded data."
    )


# %%
def make_output(chosen=None, environment=os.environ):
    """The folder for everything that the run writes, made if need be."""
    default = "/kaggle/working" if on_kaggle(environment) else "output"
    folder = Path(environment.get("CLOUDS_OUTPUT") or chosen or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path, text):
    """Write a text file under another name, then rename it: it is never there by half."""
    temporary = path.with_name("part." + path.name)
    temporary.write_text(text)
    os.replace(temporary, path)


# %% tags=["nbval-ignore-output"]
preset, config = choose_config(preset, overrides)
source = find_input(input_folder)
output = make_output(output_folder)
print(f"{preset}: reads {source}, writes to {output}")

# %% [markdown]
# What this run does:

# %%
for field, value in dataclasses.asdict(config).items():
    print(f"{field:25} {value}")

# %% [markdown]
# ## Encode and decode masks
#
# A mask is written as *run-length encoding*: pixels are numbered from 1 down the first column, then
# down the second, and so on; each run of mask pixels is its first number and its length. The empty
# mask is the empty string. A faulty encoding (an odd count, a run that leaves the image, runs that
# overlap or are out of order) is refused at the start of the run rather than scored wrongly at its
# end.


# %%
def parse_rle(rle, size):
    """The first pixels of an encoding's runs and those behind their last pixels.

    Returns int64 (runs, 2), counted from 0. Raises ValueError, quoting the run, unless all are
    whole numbers and the runs have pixels, ascend, do not overlap and lie within `size`.
    """
    if not re.fullmatch(r"([0-9]{1,18}( [0-9]{1,18})*)?", rle):
        word = next((word for word in rle.split(" ") if not re.fullmatch("[0-9]{1,18}", word)), "")
        raise ValueError(f"{word[:40]!r} is not a whole number")
    numbers = np.fromstring(rle, np.int64, sep=" ")
    if len(numbers) % 2:
        raise ValueError(f"the run '{numbers[-1]}' has no length")
    pixels, runs = math.prod(size), numbers.reshape(-1, 2)
    starts, ends = runs[:, 0] - 1, runs.sum(axis=1) - 1
    ends_before = np.append(0, ends)[:-1]
    if (wrong := (starts < ends_before) | (ends <= starts) | (ends > pixels)).any():
        start, length = runs[wrong.argmax()]
        expected = f"in the pixels 1 to {pixels}, of one pixel or more and behind the run before it"
        raise ValueError(f"the run '{start} {length}' is not {expected}")
    return np.stack([starts, ends], axis=1)


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
# file, the row and what was expected.
#
# The images are dealt into folds by their combination of classes: sorted by it, the first image
# goes to fold 0, the second to fold 1, and so on. So each fold holds the same share of every
# combination to within one image, however rare the combination is. With five folds, fold 0 against
# the others is the paper's 80:20 split.


# %%
def read_rows(path, size):
    """A CSV file of Image_Label and EncodedPixels, with the columns image and class added.

    Raises ValueError, which names the file and the row, for other columns, unknown classes, a label
    that is there twice, and encodings that are invalid at `size`.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(table.columns) != ["Image_Label", "EncodedPixels"]:
        found = ", ".join(table.columns)
        raise ValueError(f"{path}: the columns are {found}, not Image_Label, EncodedPixels.")
    table[["image", "class"]] = table["Image_Label"].str.rpartition("_")[[0, 2]]
    seen_before = table["Image_Label"].duplicated()
    rows = zip(table["Image_Label"], table["EncodedPixels"], table["class"], seen_before)
    for line, (label, rle, name, repeated) in enumerate(rows, start=2):
        try:
            parse_rle(rle, size)
            if name not in CLASSES:
                raise ValueError(f"the class is {name!r}, not one of {', '.join(CLASSES)}")
            if repeated:
                raise ValueError("the label is there twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, {label}: {error}.") from None
    return table


def read_labels(path):
    """The run-length encodings of `train.csv`, one row per image and one column per class.

    An absent class is the empty string. Raises ValueError for the faults that read_rows refuses and
    for an image that lacks a class.
    """
    table = read_rows(path, ORIGINAL_SIZE)
    labels = table.pivot(index="image", columns="class", values="EncodedPixels")
    labels = labels.reindex(columns=CLASSES).rename_axis(columns=None)
    if (lacking := labels.isna()).to_numpy().any():
        image, name = lacking.stack().idxmax()
        raise ValueError(f"{path}: there is no row {image}_{name}.")
    return labels


# %%
def check_images(folder, names):
    """Raise FileNotFoundError if an image of `names` is not in `folder`, or is empty."""
    there = {file.name for file in os.scandir(folder) if file.stat().st_size > 0}
    if lacking := sorted(set(names) - there):
        number = f"{len(lacking)} of {len(names)} images"
        raise FileNotFoundError(f"{folder}: {number} are missing or empty: {lacking[0]}, ...")


def assign_folds(labels, folds, seed):
    """A fold, 0 to `folds` - 1, for each image, balanced over the combinations of classes."""
    present = (labels != "").to_numpy()
    combination = present @ (1 << np.arange(len(CLASSES)))
    tie_break = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((tie_break, combination))
    result = np.empty(len(labels), int)
    result[order] = np.arange(len(labels)) % folds
    return pd.Series(result, labels.index, name="fold")


# %%
labels = read_labels(source / "train.csv")
check_images(source / "train_images", labels.index)
folds = assign_folds(labels, config.folds, config.seed)
present = labels != ""
print(f"{labels.size:,} rows, {len(labels):,} images, {present.to_numpy().sum():,} masks")
print("Classes per image:", present.sum(axis=1).value_counts().sort_index().to_dict())

# %%
sample_path = source / "sample_submission.csv"
test_names = read_rows(sample_path, SUBMISSION_SIZE)["image"].unique()
check_images(source / "test_images", test_names)
test_paths = [source / "test_images" / name for name in test_names]
print(f"{len(test_names):,} test images")

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
# ## Look at the images
#
# The four masks of an image travel together as one *plane*, a uint8 image whose lowest four bits
# are the four classes. So they are resized, and later rotated and distorted, once instead of four
# times. JPEG decoders can decode at a half, a quarter or an eighth of the size for less than the
# cost of the whole, which serves small networks.


# %%
def read_image(path, size):
    """The image in a JPEG file of ORIGINAL_SIZE, RGB uint8 (height, width, 3), resized to `size`.

    Raises ValueError, which names the file, if it cannot be decoded.
    """
    shrink = max(1, min(ORIGINAL_SIZE[0] / size[0], ORIGINAL_SIZE[1] / size[1]))
    factor = max(factor for factor in (1, 2, 4, 8) if factor <= shrink)
    flag = cv2.IMREAD_COLOR if factor == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")
    image = cv2.imread(str(path), flag)
    if image is None:
        raise ValueError(f"{path} is not an image that can be decoded.")
    if image.shape[:2] != tuple(size):
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_plane(rles, size):
    """The masks of one image as a plane, uint8 (height, width), whose bit c is class c.

    `rles` are the classes' run-length encodings at ORIGINAL_SIZE. A pixel of the plane takes the
    value at its centre.
    """
    plane = np.zeros(ORIGINAL_SIZE, np.uint8, order="F")
    for bit, rle in enumerate(rles):
        if rle:
            plane |= decode_rle(rle, ORIGINAL_SIZE) << bit
    # Transposed, the column-major plane is an image in OpenCV's row-major order.
    return cv2.transpose(cv2.resize(plane.T, size, interpolation=cv2.INTER_NEAREST_EXACT))


def split_plane(plane):
    """The masks of a plane, uint8 (height, width, classes) of zeros and ones."""
    return cv2.merge([(plane >> bit) & 1 for bit in range(len(CLASSES))])


# %% [markdown]
# One image of each class, dimmed outside of the mask (the paper's Fig. 1).


# %%
figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
for bit, (axes, name) in enumerate(zip(panels.flat, CLASSES)):
    chosen = present[name].idxmax()  # the first image that holds the class
    image = read_image(source / "train_images" / chosen, SUBMISSION_SIZE)
    mask = read_plane(labels.loc[chosen], SUBMISSION_SIZE) >> bit & 1
    axes.imshow(np.where(mask[..., None], image, image // 4))
    axes.set(title=f"{name} in {chosen}", xlabel="column", ylabel="row")
figure.savefig(output / "patterns.png")
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
# that the same seed gives the same epochs whatever the number of threads.


# %%
AS_IS = -1  # the draw of an example that is not augmented


def make_augmentation(config, draw):
    """albumentations' transform for one example: called with image and mask, it returns both."""
    chance = config.augmentation_probability
    transforms = [
        albumentations.HorizontalFlip(p=chance),
        albumentations.VerticalFlip(p=chance),
        albumentations.Rotate(limit=config.rotation_limit, p=chance),
        albumentations.GridDistortion(p=chance),
    ]
    augmentation = albumentations.Compose(transforms)
    # One stream of chance for all: given a seed, Compose would start the same stream anew for each
    # transform, and either all of them would happen or none.
    augmentation.set_random_state(np.random.default_rng(draw), random.Random(draw))
    return augmentation


def load_example(config, path, rles=None, draw=AS_IS):
    """One image, uint8 (height, width, 3), and its masks, uint8 (height, width, classes).

    Where no `rles` are given, the image is alone in the tuple.
    """
    image = read_image(path, config.image_size)
    if rles is None:
        return (image,)
    plane = read_plane(rles, config.image_size)
    if draw != AS_IS:
        augmented = make_augmentation(config, int(draw))(image=image, mask=plane)
        image, plane = augmented["image"], augmented["mask"]
    return image, split_plane(plane)


# %%
def plan_epoch(count, epoch, seed):
    """The examples of one epoch over `count` images: int64 (2 x count, 2), an image and a draw."""
    generator = np.random.default_rng((seed, epoch))
    draws = np.append(np.full(count, AS_IS), generator.integers(2**31, size=count))
    return generator.permutation(np.column_stack([np.tile(np.arange(count), 2), draws]))


def make_dataset(config, paths, labels=None, training=False):
    """A tf.data.Dataset of batches, decoded in parallel threads and prefetched.

    For training, images and masks without end, epoch after epoch, all batches full. Else every
    image once, in order, the last batch being smaller: images and masks, or images alone where
    `labels`, the table of encodings in the order of `paths`, is None.
    """
    cv2.setNumThreads(1)  # examples run in parallel, their parts need not
    depths = (3,) if labels is None else (3, len(CLASSES))

    def plan():
        if training:
            for epoch in itertools.count():
                yield from plan_epoch(len(paths), epoch, config.seed)
        else:
            yield from ((index, AS_IS) for index in range(len(paths)))

    def load(example):
        index, draw = example
        rles = None if labels is None else labels.iloc[index]
        return load_example(config, paths[index], rles, draw)

    def load_in_graph(example):
        arrays = tf.numpy_function(load, [example], [tf.uint8] * len(depths))
        shapes = [(*config.image_size, depth) for depth in depths]
        return tuple(tf.ensure_shape(array, shape) for array, shape in zip(arrays, shapes))

    examples = tf.data.Dataset.from_generator(plan, output_signature=tf.TensorSpec(2, tf.int64))
    examples = examples.map(load_in_graph, num_parallel_calls=config.threads)
    return examples.batch(config.batch_size).prefetch(2)


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
    image, masks = load_example(small, source / "train_images" / chosen, labels.loc[chosen], draw)
    outline(axes, image, masks, "as it is" if draw == AS_IS else f"draw {draw}")
add_legend(figure)
figure.savefig(output / "augmentation.png")
plt.show()

# %% [markdown]
# The outlines follow their clouds through every transform. What the network will see:

# %%
training_rows, validation_rows = labels[folds != config.fold], labels[folds == config.fold]
training_paths = [source / "train_images" / name for name in training_rows.index]
validation_paths = [source / "train_images" / name for name in validation_rows.index]

images, masks = next(iter(make_dataset(config, training_paths, training_rows, training=True)))
print(f"{len(training_paths)} training and {len(validation_paths)} validation images")
print("images", images.shape, images.dtype.name, "masks", masks.shape, masks.dtype.name)

# %% [markdown]
# ## Build EfficientUNet
#
# The encoder is an EfficientNet. The decoder doubles the size of its deepest map five times. Each
# time it upsamples bilinearly, concatenates the encoder's map of that size (at full size there is
# none) and convolves 3 x 3, twice, to 256, 128, 64, 32 and at last 16 channels.
#
# The U-Net is segmentation-models'. It upsamples by the nearest pixel, so we change that one
# setting. Images enter as bytes, and the normalisation by ImageNet's mean and deviation is part of
# the network: no copy of the notebook can forget it. Probabilities leave as float32 whatever the
# precision inside.


# %%
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of red, green and blue, 0 to 255
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)


def build_efficient_unet(config):
    """EfficientUNet (the paper's Fig. 5), from images to probabilities.

    Images are uint8 (batch, height, width, 3). Probabilities are float32 (batch, height, width,
    channels): for "sigmoid" those of the classes, for "softmax" those of background and classes,
    which sum to 1.
    """
    layers = tf.keras.layers
    outer_policy = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(config.precision)
    try:
        images = layers.Input((*config.image_size, 3), dtype=tf.uint8, name="images")
        variance = np.square(IMAGENET_DEVIATION)
        normalised = layers.Normalization(mean=IMAGENET_MEAN, variance=variance)(images)
        unet = segmentation_models.Unet(
            config.encoder,
            input_shape=(*config.image_size, 3),
            encoder_weights=config.encoder_weights,
            classes=len(CLASSES) + (config.activation == "softmax"),
            activation="linear",
        )
        for layer in unet.layers:  # both attributes are read whenever the network is called
            if isinstance(layer, layers.UpSampling2D):
                layer.interpolation = "bilinear"
            if isinstance(layer, layers.BatchNormalization):
                layer.momentum = config.batch_norm_momentum
        output = layers.Activation(config.activation, dtype="float32", name="probabilities")
        return tf.keras.Model(images, output(unet(normalised)), name="efficient_unet")
    finally:
        tf.keras.mixed_precision.set_global_policy(outer_policy)


# %%
model = build_efficient_unet(config)
unet = model.get_layer(index=2)
blocks = {f"decoder, block {i}": unet.get_layer(f"decoder_stage{i}b_relu") for i in range(5)}
blocks = {"images": model.layers[0], **blocks, "probabilities": model.layers[-1]}
shapes = {name: layer.get_output_shape_at(0)[1:] for name, layer in blocks.items()}
print(f"{model.count_params():,} parameters")
pd.DataFrame(shapes, ["height", "width", "channels"]).T

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


def soft_dice(truth, probabilities, smoothing):
    """Smoothed Dice coefficients (batch, classes) of maps (batch, height, width, classes)."""
    overlap = tf.reduce_sum(truth * probabilities, axis=(1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(1, 2))
    return (2 * overlap + smoothing) / (total_area + smoothing)


def make_loss(config):
    """The paper's loss as a function of masks and probabilities, one value per image."""

    def loss(masks, probabilities):
        truth = tf.cast(masks, probabilities.dtype)
        if config.activation == "softmax":
            truth = exclude_overlaps(truth)
            entropy = tf.keras.losses.categorical_crossentropy(truth, probabilities)
            truth, probabilities = truth[..., 1:], probabilities[..., 1:]
        else:
            entropy = tf.keras.losses.binary_crossentropy(truth, probabilities)
        overlap = tf.reduce_mean(soft_dice(truth, probabilities, config.dice_smoothing), axis=-1)
        weight = config.cross_entropy_weight
        return weight * tf.reduce_mean(entropy, axis=(1, 2)) + (1 - weight) * (1 - overlap)

    return loss


# %% [markdown]
# [Rectified Adam](https://arxiv.org/abs/1908.03265) is keras-rectified-adam's. It warms up and
# decays only if it is told the number of steps, so `total_steps` has no default here. The package
# builds on Keras's older optimiser class, whose name a newer one bears today; while the package is
# imported, the older one is put back.


# %%
def make_optimizer(config, total_steps):
    """Rectified Adam, rising to `config.learning_rate` and falling to a hundredth of it."""
    older = tf.keras.optimizers.legacy.Optimizer
    with mock.patch("tensorflow.keras.optimizers.Optimizer", older):
        from keras_radam import RAdam
    return RAdam(
        config.learning_rate,
        total_steps=total_steps,
        warmup_proportion=config.warmup_proportion,
        min_lr=config.learning_rate / 100,
    )


# %% [markdown]
# ## Train
#
# After every epoch the history is written, and the weights if the validation loss is the lowest so
# far; these are loaded again at the end. A line now and then says how far the work is and how long
# it will take. The first step takes a minute, because TensorFlow builds its graph.


# %%
class Progress:
    """Print the share of a work that is done and the time left, every `pause` seconds or later.

    The time left is taken from the second step on, as the first one builds TensorFlow's graph.
    """

    def __init__(self, title, total, pause=30.0):
        self.title, self.total, self.pause, self.done = title, total, pause, 0

    def advance(self, note=""):
        """Count one of `total` as done."""
        self.done += 1
        now = time.monotonic()
        if self.done == 1:
            self.start = self.last = now
        elif now - self.last >= self.pause or self.done == self.total:
            left = (now - self.start) / (self.done - 1) * (self.total - self.done) / 60
            print(f"{self.title} {self.done} of {self.total}, {left:.1f} min left {note}".strip())
            self.last = now


# %%
class Record(tf.keras.callbacks.Callback):
    """Keep the best weights and the history of a training in the folder `output`."""

    def __init__(self, output):
        super().__init__()
        self.weights_path = output / "efficient_unet.weights.h5"
        self.history_path = output / "history.csv"

    def on_train_begin(self, logs=None):
        self.epochs, self.best = [], math.inf
        self.progress = Progress("Training step", self.params["epochs"] * self.params["steps"])

    def on_train_batch_end(self, batch, logs=None):
        self.progress.advance(f"(loss {logs['loss']:.4f})")

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append({"epoch": epoch + 1, **logs})
        write_whole(self.history_path, pd.DataFrame(self.epochs).to_csv(index=False))
        if logs["val_loss"] < self.best:
            self.best = logs["val_loss"]
            temporary = self.weights_path.with_name("part." + self.weights_path.name)
            self.model.save_weights(temporary)
            os.replace(temporary, self.weights_path)


# %%
def train(config, training, validation, steps, output):
    """Train EfficientUNet for `config.epochs` epochs of `steps` steps.

    Returns the network with the weights of the lowest validation loss, and the history, one row per
    epoch. Raises RuntimeError if the validation loss never was a finite number.
    """
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(config.seed)
    model = build_efficient_unet(config)
    model.compile(make_optimizer(config, steps * config.epochs), make_loss(config))
    record = Record(output)
    plan = {"steps_per_epoch": steps, "epochs": config.epochs, "validation_data": validation}
    model.fit(training, **plan, callbacks=[record], verbose=0)
    if record.best == math.inf:
        raise RuntimeError("The validation loss never was finite; try a lower learning rate.")
    model.load_weights(record.weights_path)
    return model, pd.DataFrame(record.epochs).set_index("epoch")


# %% tags=["nbval-ignore-output"]
training = make_dataset(config, training_paths, training_rows, training=True)
validation = make_dataset(config, validation_paths, validation_rows)
steps = math.ceil(2 * len(training_paths) / config.batch_size)
model, history = train(config, training, validation, steps, output)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
axes.plot(history["loss"], label="training, augmented")
axes.plot(history["val_loss"], label="validation")
best_epoch = history["val_loss"].idxmin()
axes.plot(best_epoch, history["val_loss"][best_epoch], "o", label="weights that are kept")
axes.set(title="Loss of each epoch", xlabel="epoch", ylabel="0.7 x cross-entropy + 0.3 x Dice loss")
axes.legend()
figure.savefig(output / "history.png")
plt.show()

# %% [markdown]
# As long as both curves fall, more epochs help. Where the validation loss turns up while the
# training loss goes on falling, the network learns the training images by heart, and the weights
# from before the turn are kept.

# %% [markdown]
# ## Turn probabilities into masks
#
# The network's maps are brought to the submission's size and to bytes, 0 to 255, as soon as they
# are computed. They are set to zero on the black band, which the masks leave out.
#
# A mask is where the map reaches a threshold. It is predicted if its area reaches a minimum, else
# the empty mask is: on an absent class the empty mask scores 1 and a single pixel 0.
#
# How many pixels of a map have each of the 256 values, and how many of these are true, is enough to
# know the Dice of *every* threshold: two cumulative sums give the area and the overlap of each
# thresholded mask. The maps themselves are then forgotten.


# %%
BAND_BRIGHTNESS = 2  # of 255: the band is black but for traces of JPEG compression


def find_band(image):
    """Where the satellite did not pass in an image (height, width, 3): bool of SUBMISSION_SIZE."""
    small = cv2.resize(image, SUBMISSION_SIZE[::-1], interpolation=cv2.INTER_AREA)
    dark = (small.max(axis=-1) <= BAND_BRIGHTNESS).astype(np.uint8)
    return cv2.morphologyEx(dark, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0  # no single pixels


def make_predictor(config, model):
    """The network and what follows it as one compiled function.

    It takes images, uint8 (batch, height, width, 3), to maps, uint8 (batch, 350, 525, classes).
    """
    signature = [tf.TensorSpec((None, *config.image_size, 3), tf.uint8)]

    @tf.function(input_signature=signature, autograph=False)
    def predict(images):
        probabilities = model(images, training=False)[..., -len(CLASSES) :]
        resized = tf.image.resize(probabilities, SUBMISSION_SIZE, antialias=True)
        return tf.cast(tf.round(255 * tf.clip_by_value(resized, 0, 1)), tf.uint8)

    return predict


def predict_maps(config, predict, paths):
    """Yield the maps of each image, uint8 (350, 525, classes), 0 on the black band.

    `predict` is what make_predictor returns.
    """
    for (images,) in make_dataset(config, paths):
        for image, maps in zip(images.numpy(), predict(images).numpy()):
            maps[find_band(image)] = 0
            yield maps


# %%
def count_pixels(maps, masks):
    """Areas and overlaps of every thresholded mask: two int arrays (classes, 256).

    `maps` (height, width, classes) are uint8, `masks` of the same shape zeros and ones. Entry
    [c, t] counts the pixels of class c with a value of at least t; the overlaps count the true
    ones among them, so that overlaps[c, 0] is the area of the true mask.
    """
    areas, overlaps = np.empty((2, maps.shape[-1], 256), int)
    for index in range(maps.shape[-1]):
        values, true_values = maps[..., index].ravel(), maps[..., index][masks[..., index] > 0]
        areas[index] = np.bincount(values, minlength=256)[::-1].cumsum()[::-1]
        overlaps[index] = np.bincount(true_values, minlength=256)[::-1].cumsum()[::-1]
    return areas, overlaps


def count_validation(config, predict, paths, labels):
    """count_pixels for each image: two int arrays (images, classes, 256)."""
    progress = Progress("Validation image", len(paths))
    counts = []
    for maps, rles in zip(predict_maps(config, predict, paths), labels.to_numpy()):
        counts.append(count_pixels(maps, split_plane(read_plane(rles, SUBMISSION_SIZE))))
        progress.advance()
    return np.stack(counts, axis=1)


# %% tags=["nbval-ignore-output"]
predict = make_predictor(config, model)
areas, overlaps = count_validation(config, predict, validation_paths, validation_rows)

# %% [markdown]
# With the counts, all 255 thresholds times 60 minimum areas are compared at once, for each class.
# Of rules that score the same we take the one nearest to a probability of one half.
#
# A rule that is scored on the images it was tuned on looks better than it is. So the validation
# images are halved, and each half is scored by the rules that were tuned on the other. The rules
# for the test images are tuned on both.


# %%
MINIMUM_AREAS = np.round(np.arange(0, 0.3, 0.005) * math.prod(SUBMISSION_SIZE)).astype(int)


def score_rules(areas, overlaps):
    """The mean Dice of all rules for one class: float (minimum areas, 256 thresholds).

    `areas` and `overlaps` (images, 256) are the class's counts.
    """
    true_areas = overlaps[:, :1]
    scores = divide_dice(overlaps, areas + true_areas)
    rules = [np.where(areas >= least, scores, true_areas == 0) for least in MINIMUM_AREAS]
    return np.stack([rule.mean(axis=0) for rule in rules])


def tune_rules(areas, overlaps):
    """Each class's best threshold, 1 to 255, and minimum area in pixels: int (classes, 2)."""
    rules = []
    for index in range(areas.shape[1]):
        scores = score_rules(areas[:, index], overlaps[:, index])[:, 1:]
        best = np.argwhere(np.isclose(scores, scores.max(), rtol=0, atol=1e-12)) + (0, 1)
        least, threshold = min(best, key=lambda rule: (abs(rule[1] - 128), rule[0]))
        rules.append((threshold, MINIMUM_AREAS[least]))
    return np.array(rules)


# %%
def apply_rules(areas, overlaps, rules):
    """The Dice of each image and class under the rules (classes, 2): float (images, classes)."""
    classes, (thresholds, least) = np.arange(len(rules)), rules.T
    area, overlap = areas[:, classes, thresholds], overlaps[:, classes, thresholds]
    true_area = overlaps[:, :, 0]
    return np.where(area >= least, divide_dice(overlap, area + true_area), true_area == 0)


def score_tuning(areas, overlaps, seed):
    """The Dice of each image and class under the rules tuned on the other half of the images.

    Raises ValueError for a single image, which has no halves.
    """
    if len(areas) < 2:
        raise ValueError("The validation fold has a single image, which cannot be halved.")
    order = np.random.default_rng(seed).permutation(len(areas))
    halves = order[::2], order[1::2]
    scores = np.empty(areas.shape[:2])
    for tuned, scored in (halves, halves[::-1]):
        rules = tune_rules(areas[tuned], overlaps[tuned])
        scores[scored] = apply_rules(areas[scored], overlaps[scored], rules)
    return scores


# %% tags=["nbval-ignore-output"]
plain_rules = np.tile([128, 0], (len(CLASSES), 1))
rules = tune_rules(areas, overlaps)
validation_scores = {
    "all masks empty": (overlaps[:, :, 0] == 0).mean(axis=0),
    "threshold 0.5": apply_rules(areas, overlaps, plain_rules).mean(axis=0),
    "tuned on the other half": score_tuning(areas, overlaps, config.seed).mean(axis=0),
}
validation_scores = pd.DataFrame(validation_scores, CLASSES).T
validation_scores["mean"] = validation_scores.mean(axis=1)
print(f"Dice of {len(areas)} validation images")
validation_scores.round(4)

# %% [markdown]
# With a thousand validation images the last row is the one to trust, and the reason to tune. With a
# handful, as in the sample, rules tuned on one or two images are noise, and the plain threshold may
# well score higher. The rules that the test images get, and the Dice of all rules on the validation
# images:

# %% tags=["nbval-ignore-output"]
rule_table = pd.DataFrame(rules / (255, math.prod(SUBMISSION_SIZE)), CLASSES)
rule_table.set_axis(["threshold", "minimum area, share of the image"], axis=1).round(3)

# %%
figure, panels = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
area_range = 100 * MINIMUM_AREAS[[0, -1]] / math.prod(SUBMISSION_SIZE)
for index, (axes, name) in enumerate(zip(panels.flat, CLASSES)):
    scores = score_rules(areas[:, index], overlaps[:, index])[:, 1:]
    image = axes.imshow(scores, origin="lower", aspect="auto", extent=(1 / 255, 1, *area_range))
    threshold, least = rules[index] / (255, math.prod(SUBMISSION_SIZE) / 100)
    axes.plot(threshold, least, "r*", markersize=14, clip_on=False)
    axes.set(title=f"{name}, its rule starred", xlabel="threshold", ylabel="minimum area, %")
    figure.colorbar(image, ax=axes, label="mean Dice")
figure.savefig(output / "rules.png")
plt.show()

# %% [markdown]
# A rule on a broad bright plateau is one to trust; a thin bright ridge is chance. Some validation
# images with their true masks and with the predicted ones:


# %%
def make_masks(maps, rules):
    """The masks of probability maps under the rules: bool, both (height, width, classes)."""
    masks = maps >= rules[:, 0]
    return masks & (masks.sum(axis=(0, 1)) >= rules[:, 1])


# %%
shown = validation_paths[:3]
figure, panels = plt.subplots(
    len(shown), 2, figsize=(12, 4 * len(shown)), layout="constrained", squeeze=False
)
for row, path, maps in zip(panels, shown, predict_maps(config, predict, shown)):
    image = read_image(path, SUBMISSION_SIZE)
    truth = split_plane(read_plane(labels.loc[path.name], SUBMISSION_SIZE))
    outline(row[0], image, truth, f"{path.name}: truth")
    outline(row[1], image, make_masks(maps, rules), f"{path.name}: predicted")
add_legend(figure)
figure.savefig(output / "validation.png")
plt.show()

# %% [markdown]
# ## Predict and write the submission
#
# Test images are read, predicted and encoded batch by batch, so that memory does not grow with
# their number. The submission has the rows of `sample_submission.csv` in its order, is written
# whole, and is read back and checked.


# %%
def predict_rles(config, predict, paths, rules):
    """The encoded masks of each image, a dictionary from label rows to run-length encodings."""
    progress = Progress("Test image", len(paths))
    rles = {}
    for path, maps in zip(paths, predict_maps(config, predict, paths)):
        masks = make_masks(maps, rules)
        for index, name in enumerate(CLASSES):
            rles[f"{path.name}_{name}"] = encode_rle(masks[..., index])
        progress.advance()
    return rles


# %%
def write_submission(rles, sample_path, path):
    """Write the encodings `rles`, a dictionary, as the rows of sample_submission.csv in its order.

    Raises ValueError where a row of the sample has no encoding.
    """
    table = read_rows(sample_path, SUBMISSION_SIZE)[["Image_Label", "EncodedPixels"]]
    if lacking := [label for label in table["Image_Label"] if label not in rles]:
        raise ValueError(f"{len(lacking)} rows of {sample_path} lack a mask: {lacking[0]}, ...")
    table["EncodedPixels"] = table["Image_Label"].map(rles)
    write_whole(path, table.to_csv(index=False))


def check_submission(path, sample_path):
    """Read a submission and return it, with read_rows's columns.

    Raises ValueError, which names the file and the row, unless it has the rows of the sample in its
    order, and valid encodings at SUBMISSION_SIZE.
    """
    table, sample = read_rows(path, SUBMISSION_SIZE), read_rows(sample_path, SUBMISSION_SIZE)
    rows = itertools.zip_longest(table["Image_Label"], sample["Image_Label"])
    for line, (label, expected) in enumerate(rows, start=2):
        if label != expected:
            raise ValueError(f"{path}, line {line}: {label}, where {sample_path} has {expected}.")
    return table


# %% tags=["nbval-ignore-output"]
rles = predict_rles(config, predict, test_paths, rules)
write_submission(rles, sample_path, output / "submission.csv")

# %%
submission = check_submission(output / "submission.csv", sample_path)
print(f"submission.csv passes: {len(submission):,} rows for {len(test_paths):,} images")

# %% tags=["nbval-ignore-output"]
empty = (submission["EncodedPixels"] == "").groupby(submission["class"]).mean().round(3)
print("Share of empty masks:", empty.to_dict())
submission.set_index("Image_Label")["EncodedPixels"].str.slice(0, 60).head(8)

# %% [markdown]
# The first test images with their predictions, decoded from the file that will be handed in:

# %%
figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
predicted = submission.pivot(index="image", columns="class", values="EncodedPixels")
for axes, path in zip(panels, test_paths):
    encoded = predicted.loc[path.name, list(CLASSES)]
    masks = np.stack([decode_rle(rle, SUBMISSION_SIZE) for rle in encoded], axis=-1)
    outline(axes, read_image(path, SUBMISSION_SIZE), masks, f"{path.name}: predicted")
add_legend(figure)
figure.savefig(output / "test.png")
plt.show()

# %% [markdown]
# ## Report
#
# `results.json` holds the configuration and what the run measured.

# %% tags=["nbval-ignore-output"]
results = {
    "preset": preset,
    "config": dataclasses.asdict(config),
    "versions": versions,
    "images": {"training": len(training_paths), "validation": len(validation_paths)},
    "best_epoch": int(best_epoch),
    "validation_loss": float(history["val_loss"][best_epoch]),
    "validation_dice": validation_scores.to_dict(orient="index"),
    "rules": dict(zip(CLASSES, rules.tolist())),
}
results["images"]["test"] = len(test_paths)
write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
print(f"Best epoch {best_epoch} of {config.epochs}, loss {results['validation_loss']:.4f}")
print(validation_scores["mean"].round(4).to_dict())
print(f"In {output}:", ", ".join(sorted(path.name for path in output.iterdir())))

# %% [markdown]
# ## Conclusion
#
# The way from labels to a submission is complete: checked labels, balanced folds, examples that are
# the same for every number of threads, a network that takes bytes and gives probabilities, and
# masks whose thresholds were scored on images they were not chosen on.
#
# To go further, change the cell of parameters: a larger encoder (`{"encoder": "efficientnetb2"}`),
# another fold, or more epochs. A smaller `image_size`, such as (640, 960), trains several times
# faster.
