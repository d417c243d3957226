"""Which patterns? builds encoders, finds their weights and trains networks, the classifier first.

A training keeps the best weights, ends in its time, and goes on where it was interrupted or killed;
on one device, on several, and with XLA. What was trained otherwise is not taken over. Then the
classifier is judged, and shows what it looks at.
"""

import ast
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import efficientnet.tfkeras
import h5py
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import CELLS, ENCODER, KERNEL, pack, read_pictures
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score

FOREVER = 1e12  # seconds
BEGINNING = (  # of a process of its own, in which a function of this module is called
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    "import conftest, test_which_patterns as tests\n"
)

# Encoders


def count_published(width, depth):
    """The parameters of the EfficientNet that Keras itself ships, without its normalisation."""
    build = inspect.unwrap(tf.keras.applications.efficientnet.EfficientNetB0).__globals__
    model = build["EfficientNet"](width, depth, 224, weights=None, include_top=False)
    return model.count_params() - 7  # mean, variance and count of three channels


@pytest.mark.parametrize(
    ("encoder", "width", "depth"),
    [
        ("efficientnetb0", 1.0, 1.0),
        ((1.1, 1.2), 1.1, 1.2),  # B2
        ((0.5, 0.3), 0.5, 0.3),
    ],
)
def test_encoders_have_as_many_parameters_as_keras_s(kernel, tiny, encoder, width, depth):
    own = kernel.build_classifier(tiny, encoder, (64, 96)).get_layer(index=2)
    assert own.count_params() == count_published(width, depth)
    unet = kernel.build_efficient_unet(tiny, encoder, (64, 96)).get_layer(index=2)
    inside = tf.keras.Model(unet.input, unet.get_layer("top_activation").output)
    assert inside.count_params() == own.count_params()


def test_scaling_multiplies_channels_and_repeats_layers(kernel, tiny):
    """B0's widths 32 to 320 and depths 1, 2, 2, 3, 3, 4, 1, scaled and rounded by hand."""
    encoder = kernel.build_classifier(tiny, (1.5, 0.6), (64, 96)).get_layer(index=2)
    assert encoder.get_layer("stem_conv").filters == 48
    repeats = [1, 2, 2, 2, 2, 3, 1]  # 0.6 times as many, rounded up
    widths = [24, 40, 64, 120, 168, 288, 480]  # 1.5 times as many, to the nearest 8; 36 to 40
    for block, (count, width) in enumerate(zip(repeats, widths), start=1):
        names = [f"block{block}{letter}_project_conv" for letter in "abcd"]
        there = [layer for layer in encoder.layers if layer.name in names]
        assert [layer.filters for layer in there] == [width] * count
    assert encoder.get_layer("top_conv").filters == 1920


def test_normalisation_is_the_one_the_encoder_was_trained_with(unets, images):
    model = unets["sigmoid"]
    normalised = tf.keras.Model(model.input, model.get_layer(index=1).output)(images)
    expected = efficientnet.tfkeras.preprocess_input(images.astype(np.float32))
    np.testing.assert_allclose(normalised, expected, atol=1e-5)


NAME = "efficientnet-b0_weights_tf_dim_ordering_tf_kernels_autoaugment_notop.h5"


@pytest.fixture
def sources(kernel, monkeypatch):
    """The initial weights that an encoder is asked to load, which it does not."""
    asked = []
    monkeypatch.setattr(
        kernel.tf.keras.Model, "load_weights", lambda model, path: asked.append(path)
    )

    def download(name, url, cache_subdir, file_hash):
        assert url.startswith("https://github.com/") and url.endswith(f"/efficientnet/{name}")
        assert len(file_hash) == 64 and cache_subdir == "models"
        return f"downloaded {name}"

    monkeypatch.setattr(kernel.tf.keras.utils, "get_file", download)
    return asked


@pytest.mark.parametrize("network", ["build_classifier", "build_efficient_unet"])
def test_attached_weights_win_over_the_package_s_own_which_are_checked(
    kernel, tiny, sources, tmp_path, monkeypatch, network
):
    """Also below links; Keras's get_file, given a checksum, compares a file that is there too."""
    config, mount = kernel.replace(tiny, encoder_weights="imagenet"), tmp_path / "mount"
    for folder in (mount / "datasets", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (mount / "weights").symlink_to(tmp_path / "elsewhere")
    build_part = kernel.build_part
    monkeypatch.setattr(kernel, "build_part", lambda *args: build_part(*args, mount=mount))
    build = getattr(kernel, network)
    build(config, "efficientnetb0", (64, 96))
    assert sources == [f"downloaded {NAME}"]
    other = mount / "weights" / "efficientnet-b0_imagenet_1000_notop.h5"
    for path in (other, mount / "datasets" / NAME):
        path.touch()
        build(config, "efficientnetb0", (64, 96))
        assert sources[-1] == str(path)


def test_a_damaged_download_is_not_taken_for_the_whole(kernel, tmp_path):
    """What a killed download leaves in Keras's folder has another checksum."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).write_bytes(b"half")
    with pytest.raises(Exception, match="fetch"):
        tf.keras.utils.get_file(
            NAME,
            "http://localhost:9/weights.h5",
            cache_subdir="models",
            cache_dir=str(tmp_path),
            file_hash=kernel.efficientnet.model.WEIGHTS_HASHES["efficientnet-b0"][1],
        )


def test_without_imagenet_weights_the_three_ways_are_named(kernel, tiny, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise Exception("URL fetch failure")  # as Keras does

    monkeypatch.setattr(kernel.tf.keras.utils, "get_file", fail)
    config = kernel.replace(tiny, encoder_weights="imagenet")
    message = "efficientnetb0 .*imagenet: URL fetch failure.*internet.*dataset.*~/.keras/models"
    with pytest.raises(ValueError, match=message):
        kernel.build_classifier(config, "efficientnetb0", (64, 96))


def test_the_home_folder_is_expanded_in_encoder_weights(
    kernel, tiny, sources, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.h5").touch()
    config = kernel.replace(tiny, encoder_weights="~/x.h5")
    kernel.build_classifier(config, ENCODER, (64, 96))
    assert sources == [str(tmp_path / "x.h5")]


def test_initial_weights_of_another_encoder_are_refused_before_training(kernel, tiny, tmp_path):
    path = tmp_path / "encoder.h5"
    same = kernel.build_classifier(tiny, (0.5, 0.3), (64, 96)).get_layer(index=2)
    same.save_weights(path)
    config = kernel.replace(tiny, encoder_weights=str(path))
    loaded = kernel.build_classifier(config, (0.5, 0.3), (64, 96)).get_layer(index=2)
    for first, second in zip(same.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(first, second)
    half = tmp_path / "half.h5"
    half.write_bytes(path.read_bytes()[:9999])
    cases = (path, (0.5, 0.6)), (half, (0.5, 0.3)), (tmp_path / "no.h5", (0.5, 0.3))
    for weights, encoder in (*cases, ("imagenet", (1.0, 1.2))):
        config = kernel.replace(tiny, encoder_weights=str(weights))
        for build in (kernel.build_classifier, kernel.build_efficient_unet):
            with pytest.raises(ValueError, match=f"cannot be built with encoder_weights {weights}"):
                build(config, encoder, (64, 96))


# The classifier, its loss and its optimiser


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_classifier_takes_bytes_and_gives_float32_probabilities(kernel, tiny, images, activation):
    config = kernel.replace(tiny, activation=activation)
    probabilities = kernel.build_classifier(config, ENCODER, (64, 96))(images).numpy()
    assert probabilities.shape == (2, 4) and probabilities.dtype == np.float32
    assert probabilities.min() > 0 and probabilities.max() < 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_the_classifier_s_loss_asks_for_a_pixel_of_the_mask(kernel):
    masks = np.zeros((2, 5, 6, 4), np.uint8)
    masks[0, 4, 5, 1] = masks[1, :, :, 3] = masks[1, 0, 0, 0] = 1
    probabilities = np.array([[0.1, 0.8, 0.3, 0.4], [0.6, 0.2, 0.1, 0.9]])
    found = kernel.classifier_loss(kernel.BEST, pack(masks), tf.constant(probabilities))
    right = np.array([[0.9, 0.8, 0.7, 0.6], [0.6, 0.8, 0.9, 0.9]])
    np.testing.assert_allclose(found, -np.log(right).mean(axis=1), rtol=1e-5)
    softmax = np.array([[0.1, 0.6, 0.2, 0.1], [0.3, 0.1, 0.1, 0.5]])
    found = kernel.classifier_loss(kernel.PAPER, pack(masks), tf.constant(softmax))
    expected = [-np.log(0.6), -np.log(0.3) - np.log(0.5)]  # a 1 for each class in the image
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_accuracy_is_the_share_of_classes_whose_presence_is_told(kernel):
    """A class is found at one half, or where one choice is made at a quarter."""
    masks = np.zeros((2, 5, 6, 4), np.uint8)
    masks[0, 4, 5, 1] = masks[1, :, :, 3] = masks[1, 0, 0, 0] = 1
    found = tf.constant([[0.1, 0.5, 0.3, 0.4], [0.49, 0.6, 0.7, 0.9]])
    np.testing.assert_allclose(kernel.accuracy(kernel.BEST, pack(masks), found), [1, 0.25])
    found = tf.constant([[0.2, 0.25, 0.3, 0.25], [0.24, 0.26, 0.1, 0.4]])
    np.testing.assert_allclose(kernel.accuracy(kernel.PAPER, pack(masks), found), [0.5, 0.5])


def test_rectified_adam_warms_up_and_decays(kernel):
    """Step for step equal to the algorithm of arXiv 1908.03265 with a linear rise and fall.

    But for the first steps, where the rectification is not defined: they leave the weights alone.
    """
    total, peak, first_decay, second_decay = 40, 0.01, 0.9, 0.999
    variable, optimizer = tf.Variable([1.0, -2.0]), tf.keras.optimizers.legacy.Adam()
    expected = np.array([1.0, -2.0])
    mean, square = np.zeros(2), np.zeros(2)
    longest, rectified = 2 / (1 - second_decay) - 1, 0
    for step in range(1, total + 1):
        gradient = np.array([math.sin(step), 0.5])
        optimizer.learning_rate = kernel.learning_rate(peak, step, step / total)
        optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        mean = first_decay * mean + (1 - first_decay) * gradient
        square = second_decay * square + (1 - second_decay) * gradient**2
        length = longest - 2 * step * second_decay**step / (1 - second_decay**step)
        rate = peak * step / 4 if step <= 4 else peak + (peak / 100 - peak) * (step - 4) / 36
        update = np.zeros(2)
        if length >= 5:
            update = mean / (1 - first_decay**step)
            update /= np.sqrt(square / (1 - second_decay**step)) + 1e-7
            numerator = (length - 4) * (length - 2) * longest
            update *= math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
            rectified += 1
        expected = expected - rate * update
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-4)
    assert rectified == total - 5


def test_each_update_is_that_of_the_package_keras_rectified_adam(kernel):
    """For gradients of all sizes, with a last step that is moved on the way.

    From the first step on that is rectified: before, the package follows the mean gradient. Its
    epsilon is that of the algorithm, Adam's is the "epsilon hat" of a root that is not corrected.
    """
    older = tf.keras.optimizers.legacy.Optimizer
    with mock.patch("tensorflow.keras.optimizers.Optimizer", older):
        from keras_radam import RAdam
    package = RAdam(1e-3, total_steps=60, warmup_proportion=0.1, min_lr=1e-5)
    random, last = np.random.default_rng(0), 60
    adam = tf.keras.optimizers.legacy.Adam()
    first, second = (tf.Variable(np.zeros((3, 4))) for _ in range(2))
    for step in range(1, 71):
        if step == 41:
            package.total_steps = last = 50.0
        gradient = random.normal(size=(3, 4)) * 10.0 ** random.uniform(-3, 3, (3, 4))
        adam.learning_rate = kernel.learning_rate(1e-3, step, min(1, step / last))
        package.epsilon = 1e-7 / math.sqrt(1 - 0.999**step)
        for optimizer, variable in ((adam, first), (package, second)):
            variable.assign(np.zeros((3, 4)))
            optimizer.apply_gradients([(tf.constant(gradient), variable)])
        if step > 5:
            assert np.abs(second.numpy()).max() > 1e-7
            np.testing.assert_allclose(first.numpy(), second.numpy(), rtol=1e-5)
        else:
            assert not first.numpy().any()


# The networks, their sizes and their batches

NAMES = ("members", "parts", "baselines", "changes", "classifiers", "unets")


def is_plan(node):
    """Whether a statement of the notebook plans networks and trains none."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = isinstance(node, ast.Assign | ast.AugAssign) and ast.unparse(targets[0]) in NAMES
    return names and "train(" not in ast.unparse(node)


PLAN = [
    compile(ast.Module([n], []), "kernel.py", "exec") for n in ast.parse(CELLS).body if is_plan(n)
]


def plan(kernel, config):
    """The three networks of the first member, as the notebook's cells plan them, by their kind."""
    variables = dict(vars(kernel), config=config)
    for statement in PLAN:
        exec(statement, variables)
        if "baselines" in variables:  # in a folder, as if they were trained
            placed = [replace(b, folder=Path("baseline")) for b in variables["baselines"]]
            variables["baselines"] = placed
    kinds = (variables[name][0] for name in ("baselines", "classifiers", "unets"))
    return {network.kind: replace(network, folder=None) for network in kinds}


@pytest.mark.parametrize("encoder", ["efficientnetb5", (1.0, 1.3)])
def test_a_member_is_three_networks_of_an_encoder_and_a_fold(kernel, encoder):
    config, size = kernel.replace(kernel.BEST, encoders=(encoder,)), (224, 336)
    found = plan(kernel, config)
    assert list(found) == ["baseline", "classifier", "U-Net"]
    assert [network.size for network in found.values()] == [size, size, (1312, 2080)]
    assert [network.epochs for network in found.values()] == [20, 20, 10]
    assert {(network.encoder, network.fold) for network in found.values()} == {(encoder, 0)}


@pytest.fixture
def pretend_replicas(monkeypatch):
    """A function that lets a strategy of one CPU for all networks have a number of replicas."""

    def pretend(replicas):
        monkeypatch.setattr(tf.distribute.MirroredStrategy, "num_replicas_in_sync", replicas)
        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy(["CPU:0"]))

    yield pretend
    tf.distribute.experimental_set_strategy(None)


def build_unet(kernel, config, encoder, size):
    """EfficientUNet of a configuration from random weights."""
    return kernel.build_efficient_unet(kernel.replace(config, encoder_weights=None), encoder, size)


@pytest.mark.parametrize(
    ("memory", "replicas", "precision", "size", "batch"),
    [
        (15.0, 2, "mixed_float16", (1312, 2080), 6),
        (15.0, 1, "float32", (1312, 2080), 1),
        (16.0, 8, "mixed_bfloat16", (1312, 2080), 24),
        (1.0, 2, "float32", (1312, 2080), 2),  # at least one for each; it is tried
        (15.0, 1, "mixed_float16", (320, 480), 32),
    ],
)
def test_the_largest_batch_that_fits_is_taken(
    kernel, pretend_replicas, memory, replicas, precision, size, batch
):
    config = kernel.replace(kernel.BEST, precision=precision)
    unet = build_unet(kernel, config, "efficientnetb0", size)
    pretend_replicas(replicas)
    assert kernel.choose_batch_size(config, unet, memory) == batch


@pytest.mark.parametrize(
    ("preset", "encoder", "precision", "measured"),
    [
        ("PAPER", "efficientnetb0", "float32", 2.84),
        ("PAPER", "efficientnetb0", "mixed_bfloat16", 1.66),
        ("PAPER", "efficientnetb5", "mixed_bfloat16", 3.83),
        ("BEST", "efficientnetb0", "float32", 2.39),
        ("BEST", "efficientnetb0", "mixed_bfloat16", 1.14),
    ],
)
def test_the_memory_of_a_step_is_what_was_measured_or_little_more(
    kernel, preset, encoder, precision, measured
):
    """In GiB for a million pixels, by tests/benchmarks/memory.py; four fifths of it are used."""
    config = kernel.replace(getattr(kernel, preset), precision=precision, batch_size=10**6)
    unet = build_unet(kernel, config, encoder, (320, 480))
    planned = 0.8 * 1e5 / kernel.choose_batch_size(config, unet, 1e5) / (0.320 * 0.480)
    assert measured < planned < 1.35 * measured


@pytest.mark.parametrize(
    ("gpus", "batch"),
    [([], 3), ([15], 3), ([15, 80], 3), ([80, 30], 7), ([8], 1)],
)
def test_memory_is_that_of_the_smallest_gpu(kernel, monkeypatch, gpus, batch):
    """As TensorFlow says it, in bytes; 15 GiB without one."""
    kinds = [("CPU", 2**28), *(("GPU", gpu * 2**30) for gpu in gpus)]
    devices = [types.SimpleNamespace(device_type=t, memory_limit=limit) for t, limit in kinds]
    monkeypatch.setattr(kernel.device_lib, "list_local_devices", lambda: devices)
    config = kernel.replace(kernel.BEST, precision="mixed_float16")
    unet = build_unet(kernel, config, "efficientnetb0", config.image_size)
    assert kernel.choose_batch_size(config, unet) == batch


# Trains and keeps the best weights


def build_small(config, encoder, size):
    """A network of one layer, with batch normalisation, in EfficientUNet's place."""
    layers = tf.keras.layers
    images = layers.Input((*size, 3), dtype=tf.uint8)
    maps = layers.Conv2D(4, 1)(layers.Rescaling(1 / 255)(images))
    maps = layers.BatchNormalization(momentum=0.8)(maps)
    return tf.keras.Model(images, layers.Activation("sigmoid", dtype="float32")(maps))


def plan_small(kernel, config, **changes):
    """The notebook's U-Net, but of one layer, and changed."""
    return replace(plan(kernel, config)["U-Net"], **{"build": build_small, **changes})


def train(kernel, config, pictures, output, end=FOREVER, **changes):
    """Train the small network on eight pictures; returns it and its history."""
    (output / "networks").mkdir(parents=True, exist_ok=True)
    network = plan_small(kernel, config, **changes)
    (trained,) = kernel.train(config, [network], pictures, output, end)
    return trained, kernel.read_history(trained.folder)


def measure(kernel, config, network, pictures):
    """The loss and the measure of a network's model on what was held out, picture by picture."""
    found = []
    for _, picture in pictures[pictures["fold"] == network.fold].iterrows():
        image, plane = kernel.load_example(config, picture, network.size)
        probabilities = tf.cast(network.model(image[None], training=False), tf.float32)
        pair = network.loss, network.measure
        found.append([float(f(config, tf.constant(plane[None]), probabilities)[0]) for f in pair])
    return np.mean(found, axis=0)


def assert_equal(first, second):
    """Lists of arrays are equal to the last bit."""
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def make_easy(kernel, config, pictures):
    """A configuration and pictures with which each epoch is the best so far."""
    pictures = pictures.assign(**dict.fromkeys(kernel.CLASSES, "1 2940000"))
    return kernel.replace(config, learning_rate=1.0), pictures


def watch(kernel, patch, seconds=0.0):
    """What each step of a training leaves: how many are done, the rate, a copy of the weights.

    A step takes some seconds, by a clock in the place of the notebook's if it is not 0.
    """
    steps, clock = [], itertools.accumulate(itertools.repeat(seconds))

    class Watched(kernel.Schedule):
        def on_train_batch_begin(self, batch, logs=None):
            now.append(next(clock))
            super().on_train_batch_begin(batch, logs)

        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            rate = float(self.model.optimizer.learning_rate.numpy())
            steps.append((self.done, rate, self.model.get_weights()))

    now = [0.0]
    patch.setattr(kernel, "Schedule", Watched)
    if seconds:
        patch.setattr(kernel, "time", types.SimpleNamespace(monotonic=lambda: now[-1]))
    return steps


def test_best_weights_are_kept(kernel, tiny, pictures, tmp_path, capsys):
    """Also where the validation pictures contradict the others, so that the last ones are worst."""
    pictures = pictures.copy()
    held_out = pictures["fold"] == 1
    pictures.loc[held_out, kernel.CLASSES] = pictures.loc[held_out, kernel.CLASSES].replace(
        "^.*$", "1 2940000", regex=True
    )
    config = kernel.replace(tiny, epochs=6)
    network, history = train(kernel, config, pictures, tmp_path)
    losses = history["val_loss"]
    assert list(losses.index) == [0, 1, 2, 3, 4, 5] and losses.idxmin() < losses.idxmax()
    kept = history.loc[losses.idxmin(), ["val_loss", "val_dice_at_half"]]
    assert measure(kernel, config, network, pictures) == pytest.approx(kept, rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{network}: 0 of 6 epochs are done." and len(lines) == 7
    parts = "loss ., dice at half ., val loss ., val dice at half ., . min left".replace(
        ".", "[0-9.]+"
    )
    for number, line in enumerate(lines[1:], start=1):
        assert re.fullmatch(f"{network}: epoch {number}, {parts}", line)
    assert not (network.folder / "state").exists() and not kernel.WARNINGS


def test_validation_weighs_the_pictures_of_an_uneven_batch_alike(kernel, tiny, pictures, tmp_path):
    config = kernel.replace(tiny, batch_size=3)  # four pictures in two batches
    network, history = train(kernel, config, pictures, tmp_path)
    kept = history.loc[0, ["val_loss", "val_dice_at_half"]]
    assert measure(kernel, config, network, pictures) == pytest.approx(kept, rel=1e-5)


def test_training_twice_gives_the_same_weights(kernel, tiny, pictures, tmp_path):
    found = [train(kernel, tiny, pictures, tmp_path / name)[0] for name in ("a", "b")]
    assert_equal(*(network.model.get_weights() for network in found))


def test_a_finished_training_is_not_repeated(kernel, tiny, pictures, tmp_path, monkeypatch):
    network, history = train(kernel, tiny, pictures, tmp_path)
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    again, same = train(kernel, tiny, pictures, tmp_path)
    assert replace(again, model=None) == replace(network, model=None)
    assert_equal(network.model.get_weights(), again.model.get_weights())
    pd.testing.assert_frame_equal(history, same)


def test_the_rate_of_each_step_is_that_of_its_progress(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    """Two pictures in a step: the square root of a sixteenth of the rate for 32."""
    steps = watch(kernel, monkeypatch)
    train(kernel, kernel.replace(tiny, epochs=2), pictures, tmp_path)
    highest = tiny.learning_rate / 4
    expected = [kernel.learning_rate(highest, step, step / 16) for step in range(1, 17)]
    assert [done for done, _, _ in steps] == list(range(1, 17)) and not any(expected[:5])
    np.testing.assert_allclose([rate for _, rate, _ in steps], expected, rtol=1e-6)
    kernels = [weights[0] for _, _, weights in steps]
    moved = [not np.array_equal(*pair) for pair in itertools.pairwise(kernels)]
    assert moved == [False] * 4 + [True] * 11


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_saving_that_is_interrupted_half_way_leaves_the_best_weights_whole(
    kernel, tiny, pictures, tmp_path, monkeypatch, error
):
    """The weights of the first two epochs, and half of those of the third."""
    config, pictures = make_easy(kernel, kernel.replace(tiny, epochs=3), pictures)
    saved, usual = [], tf.keras.Model.save_weights
    whole, history = train(kernel, config, pictures, tmp_path / "whole")
    assert history["val_loss"].is_monotonic_decreasing and len(history) == 3

    def fail(model, path, **options):
        if len(saved) == 2:
            Path(path).write_bytes(saved[-1][: len(saved[-1]) // 2])
            raise error("No space left")
        usual(model, path, **options)
        saved.append(Path(path).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(tf.keras.Model, "save_weights", fail)
        if error is OSError:
            with pytest.raises(OSError, match="No space left"):
                train(kernel, config, pictures, tmp_path)
        else:
            network, history = train(kernel, config, pictures, tmp_path)
            measured = measure(kernel, config, network, pictures)[0]
            assert measured == pytest.approx(history["val_loss"].iloc[-1], rel=1e-5)
            assert len(history) == 2
    (folder,) = (tmp_path / "networks").iterdir()
    assert (folder / "weights.h5").read_bytes() == saved[1] != saved[0]
    network, _ = train(kernel, config, pictures, tmp_path)
    assert_equal(network.model.get_weights(), whole.model.get_weights())


def test_means_of_the_last_third_s_weights_are_validated_and_kept(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    """They are taken ten times an epoch, and the training goes on as if there were none.

    Of 20 steps an epoch every second one counts, of 120 those after the eightieth.
    """
    pictures = pictures.assign(fold=(np.arange(12) >= 10).astype(int))
    runs = {}
    for averaging in (False, True):
        own = {"batch_size": 1, "epochs": 6, "learning_rate": 1.0, "averaging": averaging}
        config = kernel.replace(tiny, **own)
        with monkeypatch.context() as patch:
            steps = watch(kernel, patch)
            network, history = train(kernel, config, pictures, tmp_path / str(averaging))
        runs[averaging] = {done: weights for done, _, weights in steps}
    assert_equal(runs[False][120], runs[True][120])
    kept = network.model.get_weights()
    for epoch, last in ((3, 80), (4, 100), (5, 120)):
        counted = range(82, last + 1, 2) or [80]
        means = [np.mean(part, axis=0) for part in zip(*(runs[True][step] for step in counted))]
        network.model.set_weights(means)
        measured = measure(kernel, config, network, pictures)[0]
        assert history["val_loss"][epoch] == pytest.approx(measured, rel=1e-5)
        if history["val_loss"].idxmin() == epoch:
            np.testing.assert_allclose(kept[-1], means[-1], rtol=1e-5)
    assert history["val_loss"].idxmin() >= 4


def test_what_the_clock_ends_just_after_an_epoch_is_validated_with_new_means(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    """Of 20 steps an epoch every second one counts, of 41 those after the 27th, and the last."""
    pictures = pictures.assign(fold=(np.arange(12) >= 10).astype(int))
    config = kernel.replace(tiny, batch_size=1, epochs=6, learning_rate=1.0, averaging=True)
    steps = watch(kernel, monkeypatch, seconds=1.0)
    network, history = train(kernel, config, pictures, tmp_path, end=42)
    assert len(steps) == 41 and len(history) == 3
    counted = [*range(28, 41, 2), 41]
    means = [np.mean(part, axis=0) for part in zip(*(steps[step - 1][2] for step in counted))]
    network.model.set_weights(means)
    measured = measure(kernel, config, network, pictures)[0]
    assert history["val_loss"].iloc[2] == pytest.approx(measured, rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved(
    kernel, tiny, pictures, tmp_path, monkeypatch, pretend_replicas, warnings, capsys
):
    """Until each device has one picture, but not because the disk is full."""
    config, fit, sizes, fitting = kernel.replace(tiny, batch_size=8), tf.keras.Model.fit, [], 2

    def fail(model, batches, **options):
        sizes.append(batches.element_spec[0].shape[0])
        if sizes[-1] > fitting:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")
        return fit(model, batches, **options)

    monkeypatch.setattr(tf.keras.Model, "fit", fail)
    network, history = train(kernel, config, pictures, tmp_path)
    assert sizes == [8, 4, 2] and network.batch_size == 2 and len(history) == 1
    assert "a step of 8 images does not fit into memory" in capsys.readouterr().out
    sizes.clear()
    fitting = 0
    with pytest.raises(RuntimeError, match="No U-Net was trained"):
        train(kernel, config, pictures, tmp_path / "none")
    assert sizes == [8, 4, 2, 1]
    assert warnings == {str(network): f"{network} is left out: choose smaller images or encoders."}
    pretend_replicas(2)
    with pytest.raises(RuntimeError, match="No U-Net was trained"):
        train(kernel, kernel.replace(config, batch_size=6), pictures, tmp_path / "several")
    assert sizes[4:] == [6, 2]  # three pictures on each device, then one


def test_a_network_that_does_not_fit_loses_no_other(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings
):
    """The second of two; cuDNN's own error tells of memory too, any other ends the run."""
    message = "No algorithm worked! Profiling failure on CUDNN engine 1: RESOURCE_EXHAUSTED: 2 GiB"
    networks = [plan_small(kernel, tiny, fold=fold) for fold in (1, 0)]
    (tmp_path / "networks").mkdir()
    fit = kernel.fit

    def fail(config, network, *others):
        if network.fold == 0:
            raise tf.errors.NotFoundError(None, None, message)
        fit(config, network, *others)

    monkeypatch.setattr(kernel, "fit", fail)
    trained = kernel.train(tiny, networks, pictures, tmp_path, FOREVER)
    assert [network.fold for network in trained] == [1] and [*warnings] == [str(networks[1])]
    message = "No such file"
    with pytest.raises(tf.errors.NotFoundError, match="No such file"):
        kernel.train(tiny, networks, pictures, tmp_path, FOREVER)


def exhausting_loss(config, planes, probabilities):
    """The loss, but for more than two pictures on a device with an array that no memory holds."""
    count = tf.where(tf.shape(planes)[0] > 2, 10**13, 1)
    nothing = 0 * tf.reduce_sum(tf.random.uniform([count]))
    return KERNEL.unet_loss(config, planes, probabilities) + nothing


def exhaust_two(sample, output):
    """Train on two devices, on which a batch of four fits but none of eight."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    tf.distribute.experimental_set_strategy(strategy)
    pictures, own = read_pictures(KERNEL, Path(sample)), {"image_size": (64, 96), "batch_size": 16}
    own |= {"precision": "float32", "hours": 1000.0, "folds": 2, "held_out": (1,), "epochs": 2}
    config = KERNEL.replace(KERNEL.SAMPLE, **own)
    network, history = train(KERNEL, config, pictures, Path(output), loss=exhausting_loss)
    assert network.batch_size == 4 and len(history) == 2 and history.notna().all(axis=None)


def test_a_batch_that_does_not_fit_is_halved_on_two_devices_too(sample, tmp_path):
    done = call_apart(exhaust_two, sample, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for images in (16, 8):
        assert f"a step of {images} images does not fit into memory" in done.stdout


def test_a_disk_that_is_too_small_is_named_before_and_after(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    """TensorFlow tells of a full disk as it does of memory; the batch stays as it is."""
    free, sizes = 10**9, []
    usage = types.SimpleNamespace

    def fail(model, batches, **options):
        nonlocal free
        sizes.append(batches.element_spec[0].shape[0])
        free = 100
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(kernel.shutil, "disk_usage", lambda path: usage(free=free))
    monkeypatch.setattr(tf.keras.Model, "fit", fail)
    for _ in range(2):
        with pytest.raises(OSError, match=r"networks/.*U-Net-\w+ has 0 MB free; .* needs 0\.$"):
            train(kernel, tiny, pictures, tmp_path)
    assert sizes == [2]


# Ends before its time


def fail_after(kernel, first):
    """The U-Net's loss, which becomes nan after some of its calls."""
    calls = tf.Variable(0, trainable=False)

    def loss(config, planes, probabilities):
        factor = tf.where(calls.assign_add(1) > first, math.nan, 1.0)
        return kernel.unet_loss(config, planes, probabilities) * factor

    return loss


def test_a_loss_that_becomes_nan_ends_the_training_with_its_best_weights(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings
):
    """An epoch has eight steps, and two batches of validation."""
    loss, config = fail_after(kernel, 8 + 2 + 8 + 2 + 3), kernel.replace(tiny, epochs=9)
    network, history = train(kernel, config, pictures, tmp_path, loss=loss)
    assert len(history) == 3
    assert history.iloc[-1][["loss", "val_loss"]].isna().all()
    weights = network.model.get_weights()
    assert all(np.isfinite(array).all() for array in weights)
    plain = replace(network, loss=kernel.unet_loss)
    measured = measure(kernel, config, plain, pictures)[0]
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    name = str(network)
    text = f"The loss of {name} became nan; what was best before is used."
    assert warnings == {name: text}
    # Begun again, it would end so again; so it does not begin, and warns again.
    warnings.clear()
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    train(kernel, config, pictures, tmp_path, loss=loss)
    assert warnings == {name: text}


def test_a_loss_that_is_nan_in_the_first_epoch_leaves_nothing_to_predict_with(
    kernel, tiny, pictures, tmp_path, warnings
):
    with pytest.raises(RuntimeError, match="No U-Net was trained"):
        train(kernel, tiny, pictures, tmp_path, loss=fail_after(kernel, 0))
    assert "became nan" in "".join(warnings.values())


def interrupt(kernel, patch, step):
    """Press Ctrl-C in a training step, counted from now."""
    steps, usual = [], kernel.Schedule.on_train_batch_end

    def count(schedule, batch, logs=None):
        usual(schedule, batch, logs)
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(kernel.Schedule, "on_train_batch_end", count)
    return steps


def test_ctrl_c_ends_all_trainings_of_the_cell_and_they_go_on_when_begun_again(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings
):
    """Of two networks the first is interrupted in its third epoch."""
    config, pictures = make_easy(kernel, kernel.replace(tiny, epochs=4), pictures)
    found = {}
    networks = [plan_small(kernel, config, fold=fold) for fold in (1, 0)]
    for name in ("whole", "interrupted", "interrupted"):
        output = tmp_path / name
        (output / "networks").mkdir(parents=True, exist_ok=True)
        if name == "interrupted" and name not in found:
            with monkeypatch.context() as patch:
                steps = interrupt(kernel, patch, 8 + 8 + 3)
                found[name] = kernel.train(config, networks, pictures, output, FOREVER)
            assert len(steps) == 19 and [network.fold for network in found[name]] == [1]
            assert len(kernel.read_history(found[name][0].folder)) == 2
            assert warnings[str(networks[0])].startswith(f"Interrupted in {networks[0]}")
        else:
            found[name] = kernel.train(config, networks, pictures, output, FOREVER)
            assert not warnings  # taken back
    for first, second in zip(found["interrupted"], found["whole"], strict=True):
        assert_equal(first.model.get_weights(), second.model.get_weights())
        histories = [kernel.read_history(network.folder) for network in (first, second)]
        assert histories[0]["val_loss"].is_monotonic_decreasing
        pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_what_was_interrupted_in_its_first_epoch_is_left_out_until_it_has_one(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    """It would predict with the weights that it began with. The second of two."""
    networks = [plan_small(kernel, tiny, fold=fold) for fold in (1, 0)]
    (tmp_path / "networks").mkdir()
    with monkeypatch.context() as patch:
        interrupt(kernel, patch, 8 + 3)
        trained = kernel.train(tiny, networks, pictures, tmp_path, FOREVER)
    assert [network.fold for network in trained] == [1]
    trained = kernel.train(tiny, networks, pictures, tmp_path, FOREVER)
    assert [network.fold for network in trained] == [1, 0]


def test_if_nothing_was_trained_the_run_ends_with_a_sentence(
    kernel, tiny, pictures, tmp_path, monkeypatch
):
    def press(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tf.keras.Model, "fit", press)
    with pytest.raises(RuntimeError, match="No U-Net was trained"):
        train(kernel, tiny, pictures, tmp_path)


@pytest.mark.parametrize(
    ("cause", "error"), [(KeyboardInterrupt(), RuntimeError), (None, SystemError)]
)
def test_ctrl_c_within_c_code_is_one_too_but_no_other_fault_is(
    kernel, tiny, pictures, tmp_path, monkeypatch, cause, error
):
    """Python then raises a SystemError from the KeyboardInterrupt."""

    def fail(*arguments, **options):
        raise SystemError("returned a result with an exception set") from cause

    monkeypatch.setattr(tf.keras.Model, "fit", fail)
    with pytest.raises(error):
        train(kernel, tiny, pictures, tmp_path)


def test_training_ends_when_its_time_is_over_says_so_and_goes_on_later(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings
):
    """A step takes a second, and one second is for the validation."""
    config = kernel.replace(tiny, epochs=6)
    with monkeypatch.context() as patch:
        steps = watch(kernel, patch, seconds=1.0)
        network, history = train(kernel, config, pictures, tmp_path, end=23)
    assert len(steps) == 22 and len(history) == 3
    planned = [48] * 2 + [22] * 20  # the pace is known from the second step on
    rate = tiny.learning_rate / 4
    rates = [kernel.learning_rate(rate, n, n / p) for n, p in enumerate(planned, start=1)]
    np.testing.assert_allclose([rate for _, rate, _ in steps], rates, rtol=1e-6)
    measured = measure(kernel, config, network, pictures)[0]
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    text = "was over after 22 of 48 steps of 1 s. A whole session has time for 450000.0 epochs"
    assert text in warnings[str(network)]
    steps = watch(kernel, monkeypatch)
    _, history = train(kernel, config, pictures, tmp_path)
    assert len(history) == 6 and not warnings and not (network.folder / "state").exists()
    assert [done for done, _, _ in steps] == list(range(23, 47))
    rates = [kernel.learning_rate(rate, n, n / 46) for n in range(23, 47)]
    np.testing.assert_allclose([rate for _, rate, _ in steps], rates, rtol=1e-6)


def test_networks_share_the_time_less_that_of_their_predictions(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings
):
    """Of 40 s each has half. Four images take as long as a step of two.

    The first keeps 1 s for its validation and 2 s for eight predictions; the second 2 s for its
    validation and 4 s for the predictions of both, and has what the first one left.
    """
    config = kernel.replace(tiny, epochs=6)
    networks = [plan_small(kernel, config, fold=fold) for fold in (1, 0)]
    (tmp_path / "networks").mkdir()
    steps = watch(kernel, monkeypatch, seconds=1.0)
    kernel.train(config, networks, pictures, tmp_path, 40, predictions=8)
    assert [done for done, _, _ in steps] == [*range(1, 18), *range(1, 18)]
    assert list(warnings) == [str(network) for network in networks]


@pytest.mark.parametrize(
    ("time", "steps"), [(1e6, 800), (2454, 800), (2453, 799), (100, 15), (1, 2)]
)
def test_steps_are_planned_into_the_time(kernel, tiny, monkeypatch, time, steps):
    """Steps of 3 s, and 20 steps' time that is kept back."""
    clock = iter([100, 100, 103])
    monkeypatch.setattr(kernel, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    network = plan_small(kernel, tiny, batch_size=8)
    schedule = kernel.Schedule(tiny, network, 103 + time, 20 * 2 * 8)
    optimizer = types.SimpleNamespace(iterations=tf.constant(0))
    schedule.params = {"epochs": 8, "steps": 100}
    schedule.model = types.SimpleNamespace(optimizer=optimizer, stop_training=False)
    schedule.on_epoch_begin(0)
    for done in (1, 2):
        optimizer.iterations = tf.constant(done)
        schedule.on_train_batch_end(0)
    assert schedule.planned == steps and schedule.model.stop_training == (steps == 2)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(5.0, ["1", "2"]), (25.0, ["0.375", "0.75", "1", "1.38", "1.75", "2"])],
)
def test_a_line_is_printed_for_each_epoch_and_at_least_each_minute(
    kernel, tiny, pictures, tmp_path, monkeypatch, capsys, seconds, told
):
    """Of eight steps an epoch; a line that is due comes at the end of a step."""
    watch(kernel, monkeypatch, seconds)
    network, _ = train(kernel, kernel.replace(tiny, epochs=2), pictures, tmp_path)
    _, *lines = capsys.readouterr().out.splitlines()
    assert re.findall("epoch ([^,]+), loss [0-9.]+, dice at half ", "\n".join(lines)) == told
    left = [f"{seconds * (16 - 8 * float(epoch)) / 60:.1f}" for epoch in told]
    assert [re.search(" ([0-9.]+) min left$", line)[1] for line in lines][:3] == left[:3]
    assert all(line.startswith(f"{network}: epoch ") for line in lines)


# Several replicas, and XLA


def call_apart(function, *arguments):
    """Call a function of this module with texts, in a process of its own."""
    code = BEGINNING + f"tests.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def build_plain(config, encoder, size):
    """A small EfficientUNet without what each replica does by its own part of a batch."""
    model = KERNEL.build_efficient_unet(config, (0.2, 0.1), size)
    for layer in model.get_layer(index=2).layers:
        if hasattr(layer, "rate"):
            layer.rate = 0.0
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.call = lambda inputs, training=None, call=layer.call: call(inputs, training=False)
    return model


def train_on_one_and_two(sample, output, precision, build):
    """Train, validate and predict with one replica and with two, and compare."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.keras.mixed_precision.set_global_policy(precision)
    kernel, small, found = KERNEL, build == "build_small", []
    pictures = read_pictures(kernel, Path(sample))
    pictures["fold"] = (np.arange(12) >= 7).astype(int)  # five, which batches of four do not hold
    own = {"image_size": (64, 96), "batch_size": 4, "precision": precision, "hours": 1000.0}
    own |= {"folds": 2, "held_out": (1,), "learning_rate": 0.1}
    config = kernel.replace(kernel.SAMPLE, **own, epochs=3)
    for strategy in (None, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        tf.distribute.experimental_set_strategy(strategy)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        assert replicas == len(found) + 1
        with pytest.MonkeyPatch.context() as patch:
            steps = watch(kernel, patch)
            place = Path(output) / str(replicas)
            network, history = train(kernel, config, pictures, place, build=globals()[build])
        assert [done for done, _, _ in steps] == list(range(1, 13)) and network.batch_size == 4
        rates = [
            kernel.learning_rate(config.learning_rate / 8**0.5, n, n / 12) for n in range(1, 13)
        ]
        np.testing.assert_allclose([rate for _, rate, _ in steps], rates, rtol=1e-6)
        predictor = replace(network, model=kernel.build_predictor(network.model, small))
        maps = list(kernel.predict_maps([predictor], pictures[pictures["fold"] == 1]))
        weights = network.model.get_weights()
        found.append((history["val_loss"].iloc[-1], weights, np.array(maps)))
        measured = measure(kernel, config, network, pictures)[0]
        np.testing.assert_allclose(history["val_loss"].min(), measured, rtol=2e-4)
        first = steps[0][2]
    (loss, weights, maps), (other_loss, other_weights, other_maps) = found
    moved = max(np.abs(a - b).max() for a, b in zip(weights, first))
    difference = max(np.abs(a - b).max() for a, b in zip(weights, other_weights))
    print("loss", loss, other_loss, "weights", difference, "moved by", moved)
    assert maps.shape == other_maps.shape == (5, 2, 350, 525, 4)
    if not small:
        assert abs(loss - other_loss) < 1e-5 and difference < 1e-3 * moved
        assert np.abs(maps.astype(int) - other_maps).max() <= 1


@pytest.mark.parametrize(
    ("precision", "build"),
    [("float32", build_small), ("mixed_float16", build_small), ("float32", build_plain)],
)
def test_two_replicas_train_validate_and_predict_as_one(sample, tmp_path, precision, build):
    done = call_apart(train_on_one_and_two, sample, tmp_path, precision, build.__name__)
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_training_step_and_a_prediction_compile_with_xla(kernel, tiny):
    """As a TPU needs it: nothing in them has a shape that depends on values."""
    tf.keras.utils.set_random_seed(1)
    network = replace(plan(kernel, tiny)["U-Net"], encoder=(0.3, 0.1), batch_size=2)
    model = kernel.build_network(tiny, network).model
    loss, dice = (functools.partial(f, tiny) for f in (network.loss, network.measure))
    dice = tf.keras.metrics.MeanMetricWrapper(dice, "dice")
    optimizer = tf.keras.optimizers.legacy.Adam()
    model.compile(optimizer, loss, jit_compile=True, weighted_metrics=[dice])
    random = np.random.default_rng(0)
    images = random.integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    planes = random.integers(16, size=(2, 64, 96), dtype=np.uint8)
    options = {"batch_size": 2, "verbose": 0}
    options["callbacks"] = [kernel.Schedule(tiny, network, FOREVER)]
    history = model.fit(images, planes, epochs=8, **options).history
    assert np.isfinite(history["loss"]).all() and history["loss"][-1] < history["loss"][0]
    predictor = kernel.build_predictor(model, True)
    compiled = tf.function(lambda images: predictor(images, training=False), jit_compile=True)
    difference = compiled(images).numpy().astype(int) - predictor(images).numpy()
    assert np.abs(difference).max() <= 1
    large = tf.keras.layers.Input((704, 1056, 3), dtype=tf.uint8)
    channels = tf.cast(tf.concat([large, large[..., :1]], axis=-1), tf.float32) / 255
    predictor = kernel.build_predictor(tf.keras.Model(large, channels), False)
    compiled = tf.function(lambda images: predictor(images), jit_compile=True)
    assert compiled(np.zeros((1, 704, 1056, 3), np.uint8)).shape == (1, 350, 525, 4)


# Going on


def train_until(sample, output, when, *earlier):
    """Train the small network for three epochs; the process kills itself at a time."""
    kernel, output, calls = KERNEL, Path(output), {}
    own = {"image_size": (64, 96), "batch_size": 2, "precision": "float32", "hours": 1000.0}
    config = kernel.replace(kernel.SAMPLE, **own, folds=2, held_out=(1,), epochs=3)

    def die(place, name, number, half=lambda *arguments: None):
        whole = getattr(place, name)

        def count(*arguments, **options):
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == number:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **options)

        setattr(place, name, count)

    def write_half(model, path):
        Path(path).write_bytes(b"HDF")

    if when == "in the second epoch":
        die(kernel.Schedule, "on_train_batch_end", 11)
    elif when == "in the best weights":
        die(tf.keras.Model, "save_weights", 2, write_half)
    elif when == "before the state":
        die(tf.keras.callbacks.BackupAndRestore, "on_epoch_end", 2)
    elif when == "while copying":
        die(shutil, "copyfile", 3)
    (output / "networks").mkdir(parents=True, exist_ok=True)
    kernel.copy_networks(output, [Path(place) for place in earlier])
    config, pictures = make_easy(kernel, config, read_pictures(kernel, Path(sample)))
    train(kernel, config, pictures, output)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sample):
    """The output of a training that was never killed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    done = call_apart(train_until, sample, output, "never")
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def read_arrays(path):
    """All arrays of an HDF5 file, in the order of their names."""
    arrays = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, part: arrays.append(part[()]) if hasattr(part, "shape") else None
        )
    return arrays


@pytest.mark.parametrize(
    ("when", "elsewhere"),
    [
        ("in the second epoch", True),
        ("in the best weights", False),
        ("before the state", True),
        ("while copying", True),
    ],
)
def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(
    kernel, sample, tmp_path, uninterrupted, when, elsewhere
):
    """Begun again in its place, or in another with the killed one's output attached, read-only."""
    killed, folder = tmp_path / "killed", tmp_path / ("other" if elsewhere else "killed")
    first = "in the second epoch" if when == "while copying" else when
    done = call_apart(train_until, sample, killed, first)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    if when == "while copying":
        done = call_apart(train_until, sample, folder, when, killed)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not list((folder / "networks").iterdir())
    for path in killed.rglob("*") if elsewhere else []:
        path.chmod(0o555)
    done = call_apart(train_until, sample, folder, "never", *([killed] if elsewhere else []))
    assert done.returncode == 0, done.stderr[-2000:]
    for path in killed.rglob("*"):
        path.chmod(0o755)
    known = 2 if when == "before the state" else 1  # what was written
    assert f"{known} of 3 epochs are done" in done.stdout
    (first,), (second,) = (list(place.glob("networks/*")) for place in (uninterrupted, folder))
    assert first.name == second.name
    weights = [read_arrays(path / "weights.h5") for path in (first, second)]
    assert len(weights[0]) == 6
    assert_equal(*weights)
    histories = [kernel.read_history(path) for path in (first, second)]
    assert histories[0]["val_loss"].is_monotonic_decreasing and len(histories[0]) == 3
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    files = {"settings.json", "history.csv", "weights.h5"}
    assert {path.name for path in second.iterdir()} == files


@pytest.mark.parametrize("factor", [4, 0.5])
def test_a_training_goes_on_with_another_batch_for_all_its_epochs(
    kernel, tiny, pictures, tmp_path, monkeypatch, warnings, capsys, factor
):
    """As on another accelerator, whose memory holds more or less; lines name the epoch rightly."""
    config = kernel.replace(tiny, epochs=6)
    with monkeypatch.context() as patch:
        watch(kernel, patch, seconds=1.0)
        first, history = train(kernel, config, pictures, tmp_path, end=23)
    assert len(history) == 3
    wanted = int(first.batch_size * factor)
    monkeypatch.setattr(kernel, "choose_batch_size", lambda config, model: wanted)
    steps = watch(kernel, monkeypatch, seconds=61)  # a line is due after each step
    capsys.readouterr()
    second, history = train(kernel, config, pictures, tmp_path)
    assert second.folder == first.folder and second.batch_size == wanted
    assert len(history) == 6 and not warnings
    assert [done for done, _, _ in steps] == list(range(23, 23 + 3 * 16 // wanted))
    told = [float(epoch) for epoch in re.findall("epoch ([^,]+),", capsys.readouterr().out)]
    assert told == sorted(told) and told[0] == round(3 + wanted / 16, 2) and told[-1] == 6


# Taken over or not


def choose(kernel, config, pictures, output, kind="U-Net", **changes):
    """The folder of a network, as the notebook plans it, but changed."""
    (output / "networks").mkdir(parents=True, exist_ok=True)
    network = replace(plan(kernel, config)[kind], **changes)
    if kind == "classifier":  # it begins with the baseline of the same configuration
        baseline = choose(kernel, config, pictures, output, "baseline")
        network = replace(network, start=baseline / "weights.h5")
    return kernel.choose_folder(config, network, pictures, output)


@pytest.mark.parametrize(
    ("kind", "shape", "own"),
    [
        ("baseline", "NetworkConfig", ["build_classifier", "classifier_loss"]),
        ("classifier", "NetworkConfig", ["build_classifier", "classifier_loss"]),
        ("U-Net", "UNetConfig", ["build_efficient_unet", "unet_loss"]),
    ],
)
def test_settings_are_what_shapes_a_network(kernel, tiny, pictures, tmp_path, kind, shape, own):
    """Its fields of the configuration, its own values and the source text of five functions."""
    folder = choose(kernel, tiny, pictures, tmp_path, kind)
    assert re.fullmatch(f"efficientnet-0.5-0.3-fold1-{kind}-[0-9a-f]{{8}}", folder.name)
    settings = json.loads((folder / "settings.json").read_text())
    for name in [*own, "build_part", "make_augmentation", "learning_rate"]:
        assert settings.pop(f"code of {name}") == inspect.getsource(getattr(kernel, name))
    assert settings.pop("size") == [64, 96] and isinstance(settings.pop("pictures"), int)
    assert settings.pop("epochs") == plan(kernel, tiny)[kind].epochs
    start = choose(kernel, tiny, pictures, tmp_path, "baseline").name
    assert settings.pop("start") == (start if kind == "classifier" else None)
    names = [field.name for field in fields(getattr(kernel, shape))]
    expected = {name: getattr(tiny, name) for name in names}
    assert settings == json.loads(json.dumps(expected))


def unet_loss(config, planes, probabilities):
    """The notebook's loss, after an edit."""
    return 2 * KERNEL.unet_loss(config, planes, probabilities)


def test_a_network_of_other_code_is_not_taken_over(kernel, tiny, pictures, tmp_path, capsys):
    """The loss is edited while the notebook runs."""
    network, _ = train(kernel, tiny, pictures, tmp_path)
    capsys.readouterr()
    other, history = train(kernel, tiny, pictures, tmp_path, loss=unet_loss)
    out = capsys.readouterr().out
    assert f"{network.folder} is not used: other code of unet_loss\n" in out
    assert other.folder != network.folder and "0 of 1 epochs are done" in out
    measured = measure(kernel, tiny, other, pictures)[0]
    assert history["val_loss"].item() == pytest.approx(measured, rel=1e-5)
    same = replace(other, loss=kernel.unet_loss)
    assert measure(kernel, tiny, same, pictures)[0] == pytest.approx(measured / 2, rel=1e-5)


def edit(function):
    """A function of the same name, whose text differs."""
    return functools.update_wrapper(lambda *a, **k: function(*a, **k), function, updated=())


@pytest.mark.parametrize(
    "name",
    ["build_part", "make_augmentation", "learning_rate", "build_efficient_unet", "unet_loss"],
)
def test_an_edit_of_a_function_that_is_watched_asks_for_another_training(
    kernel, tiny, pictures, tmp_path, monkeypatch, capsys, name
):
    first = choose(kernel, tiny, pictures, tmp_path)
    edited = edit(getattr(kernel, name))
    del edited.__wrapped__
    monkeypatch.setattr(kernel, name, edited)  # the notebook's cells take it from there
    assert choose(kernel, tiny, pictures, tmp_path) != first
    assert f"{first} is not used: other code of {name}\n" in capsys.readouterr().out


def test_no_other_edit_asks_for_another_training(kernel, tiny, pictures, tmp_path, monkeypatch):
    first = choose(kernel, tiny, pictures, tmp_path)
    for name in ("dice_at_half", "split_planes", "load_example", "fit", "name_encoder"):
        edited = edit(getattr(kernel, name))
        del edited.__wrapped__
        monkeypatch.setattr(kernel, name, edited)
    assert choose(kernel, tiny, pictures, tmp_path) == first


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 2}, "epochs"),
        ({"seed": 1, "rotation_limit": 5.0}, "rotation_limit, seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"image_size": (32, 64)}, "size"),
        ({"cross_entropy_weight": 0.5}, "cross_entropy_weight"),
    ],
)
def test_another_training_begins_anew_and_says_why(
    kernel, tiny, pictures, tmp_path, capsys, change, named
):
    network, _ = train(kernel, tiny, pictures, tmp_path)
    other = choose(kernel, kernel.replace(tiny, **change), pictures, tmp_path, build=build_small)
    assert other != network.folder and not (other / "weights.h5").exists()
    found = capsys.readouterr().out.rpartition(f"{network.folder} is not used: other ")[2].strip()
    assert ", ".join(sorted(found.split(", "))) == named


@pytest.mark.parametrize("column", ["Fish", "fold"])
def test_other_labels_and_other_folds_are_another_training(
    kernel, tiny, pictures, tmp_path, capsys, column
):
    first, changed = choose(kernel, tiny, pictures, tmp_path), pictures.copy()
    changed.loc[changed.index[0], column] = {"Fish": "1 1", "fold": 1}[column]
    assert choose(kernel, tiny, changed, tmp_path) != first
    assert f"{first} is not used: other pictures\n" in capsys.readouterr().out


def test_what_does_not_shape_a_network_may_change(kernel, tiny, pictures, tmp_path):
    moved = pictures.assign(path=Path("elsewhere"))
    own = {"hours": 3.0, "decision": "half", "flips": False, "gate_recall": 0.5}
    own |= {"held_out": (1, 0), "precision": "mixed_float16", "broken_share": 0.5}
    kinds = ["baseline", "classifier", "U-Net"]
    changes = {  # and of whom they are another training
        (): [],
        tuple(own.items()): [],
        (("classifier_epochs", 3),): ["classifier"],
        (("baseline_epochs", 3),): ["baseline", "classifier"],
        (("classifier_size", (32, 64)),): ["baseline", "classifier"],
        (("epochs", 7),): ["U-Net"],
        (("image_size", (32, 64)), ("cross_entropy_weight", 0.1)): ["U-Net"],
        (("activation", "softmax"),): kinds,
    }
    first = {kind: choose(kernel, tiny, pictures, tmp_path, kind) for kind in kinds}
    for change, others in changes.items():
        config = kernel.replace(tiny, **dict(change))
        found = {kind: choose(kernel, config, moved, tmp_path, kind) for kind in kinds}
        assert [kind for kind in kinds if found[kind] != first[kind]] == others


def test_folders_without_whole_settings_are_passed_over(kernel, tiny, pictures, tmp_path):
    first = choose(kernel, tiny, pictures, tmp_path / "a")
    bad = [None, b"{", b"", b"[]", b"null", b"\xff\xfe"]
    for number, content in enumerate(bad):
        folder = tmp_path / "b" / "networks" / f"{first.name[:-8]}{number:08x}"
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "settings.json").write_bytes(content)
    second = choose(kernel, tiny, pictures, tmp_path / "b")
    assert second.name == first.name
    shutil.rmtree(second)
    second.mkdir()  # as a kill may leave it
    assert choose(kernel, tiny, pictures, tmp_path / "b") == second
    texts = [(folder / "settings.json").read_text() for folder in (first, second)]
    assert texts[0] == texts[1] and json.loads(texts[0])["seed"] == tiny.seed


def build_deeper(config, encoder, size):
    """The small network and a layer more."""
    model = build_small(config, encoder, size)
    return tf.keras.Model(model.input, tf.keras.layers.Dense(4)(model.output))


def test_weights_that_do_not_fit_are_named(kernel, tiny, pictures, tmp_path):
    network, _ = train(kernel, tiny, pictures, tmp_path)
    path = network.folder / "weights.h5"
    with pytest.raises(ValueError, match=f"The weights {path} do not fit: "):
        kernel.build_network(tiny, replace(network, build=build_deeper), path)
    os.truncate(path, 999)
    with pytest.raises(ValueError, match=f"The weights {path} do not fit: "):
        train(kernel, tiny, pictures, tmp_path)


# The classifier, from the baseline to its judgement


def test_baseline_trains_the_head_and_fine_tuning_all(kernel, tiny, pictures, tmp_path):
    """A classifier whose rate is next to nothing stays where it begins, at the baseline."""
    own = {"baseline_epochs": 1, "classifier_epochs": 1, "activation": "softmax"}
    config, found = kernel.replace(tiny, **own), []
    slow = kernel.replace(config, learning_rate=1e-30)
    (tmp_path / "networks").mkdir()
    for kind, used in (("baseline", config), ("classifier", slow), ("classifier", config)):
        network = plan(kernel, used)[kind]
        if found:
            network = replace(network, start=found[0].folder / "weights.h5")
        found += kernel.train(used, [network], pictures, tmp_path, FOREVER)
    tf.keras.utils.set_random_seed(config.seed)
    fresh = kernel.build_classifier(config, (0.5, 0.3), (64, 96))
    first, second, slow, third = (
        model.get_weights() for model in [fresh, *(network.model for network in found)]
    )
    changed = [not np.array_equal(*pair) for pair in zip(first, second)]
    assert changed == [False] * (len(first) - 2) + [True] * 2  # the last layer's two
    baseline, beginning = found[0].model, found[1].model
    for one, other in zip(baseline.variables, beginning.variables, strict=True):
        if "moving" not in one.name:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-20)
    assert len(found[2].model.trainable_weights) > 20
    assert np.mean([not np.array_equal(*pair) for pair in zip(second, third)]) > 0.8
    asked = pictures[:3]
    answers = kernel.predict_presence(found[2], asked)
    assert list(answers.index) == list(asked.index) and list(answers) == kernel.CLASSES
    for path, row in zip(asked["path"], answers.to_numpy()):
        expected = found[2].model(kernel.read_image(path, (64, 96))[None])
        np.testing.assert_allclose(row, expected[0], rtol=1e-4)


@given(
    answers=st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=1, max_size=30),
    recall=st.floats(0.01, 1),
)
def test_points_of_the_curve_are_those_of_brute_force(kernel, answers, recall):
    truth, probability = np.array([(True, 3), *answers]).T
    probability = probability / 10
    gate, precise = (list(point) for point in kernel.find_points(truth, probability, recall))
    reached = {
        level: [precision_score(truth, found), recall_score(truth, found)]
        for level in probability
        for found in [probability >= level]
    }
    assert gate[0] == max(level for level, point in reached.items() if point[1] >= recall)
    assert gate[1:] == pytest.approx(reached[gate[0]])
    enough = min((level for level, point in reached.items() if point[0] >= 0.9), default=np.nan)
    expected = [enough, *reached.get(enough, [np.nan] * 2)]
    assert precise == pytest.approx(expected, nan_ok=True)


def build_color_classifier():
    """A classifier whose maps are the red and the green channel, each the evidence of a class.

    Class 0 is red, class 1 is green and not red, class 2 is never there.
    """
    images = tf.keras.layers.Input((6, 8, 3), dtype=tf.uint8)
    maps = tf.keras.layers.Rescaling(1 / 255)(images)[..., :2]
    average = tf.keras.layers.GlobalAveragePooling2D(name="average")(maps)
    logits = tf.keras.layers.Dense(3, name="logits", use_bias=False)
    model = tf.keras.Model(images, tf.keras.layers.Activation("sigmoid")(logits(average)))
    logits.set_weights([np.array([[2.0, -1.0, -1.0], [0.0, 3.0, -1.0]])])
    return model


def test_grad_cam_finds_the_evidence(kernel):
    """With one average and one layer behind the maps, it is their sum weighted by that layer."""
    image = np.zeros((1, 6, 8, 3), np.uint8)
    image[0, 1:3, 2:5, 0] = 255
    image[0, 2:5, 4:7, 1] = 255
    red, green = image[0, ..., 0] / 255, image[0, ..., 1] / 255
    heat = kernel.grad_cam(build_color_classifier(), np.concatenate([image, 0 * image])).numpy()
    assert heat.shape == (2, 6, 8, 3) and not heat[1].any()
    for index, evidence in enumerate((2 * red, np.maximum(3 * green - red, 0), 0 * red)):
        np.testing.assert_allclose(heat[0, ..., index], evidence / 48, atol=1e-7)


def test_grad_cam_of_a_real_classifier_is_what_its_gradients_say(kernel, tiny):
    """Equations 1 and 2 of arXiv 1610.02391 with TensorFlow's own gradients."""
    images = np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    classifier = kernel.build_classifier(tiny, (0.5, 0.3), (64, 96))
    heat = kernel.grad_cam(classifier, images).numpy()
    assert heat.shape == (2, 2, 3, 4) and heat.dtype == np.float32 and heat.max() > 0
    average, logits = classifier.get_layer("average"), classifier.get_layer("logits")
    maps = tf.keras.Model(classifier.input, average.input)(images)
    for index in range(4):
        with tf.GradientTape() as tape:
            tape.watch(maps)
            score = logits(average(maps))[:, index]
        weights = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2), keepdims=True)
        expected = tf.nn.relu(tf.reduce_sum(weights * maps, axis=-1))
        np.testing.assert_allclose(heat[..., index], expected, rtol=1e-4, atol=1e-8)
