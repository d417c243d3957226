"""Train keeps the best weights, ends in its time, and goes on where it was interrupted or killed.

It does so on one device, on several, and with XLA.
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

TESTS = Path(__file__).parent
FOREVER = 1e12  # seconds


def run_python(code, *arguments):
    """Run code that has the notebook's definitions as `kernel`, in a process of its own."""
    start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_train as tests\n"
    start += "from conftest import KERNEL as kernel\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def build_small(config, encoder, size):
    """A network of one layer, with batch normalisation, in EfficientUNet's place."""
    layers = tf.keras.layers
    images = layers.Input((*size, 3), dtype=tf.uint8)
    maps = layers.Conv2D(4, 1)(layers.Rescaling(1 / 255)(images))
    maps = layers.BatchNormalization(momentum=0.8)(maps)
    return tf.keras.Model(images, layers.Activation("sigmoid", dtype="float32")(maps))


@pytest.fixture
def small(kernel, monkeypatch):
    """The small network as the notebook's U-Net."""
    monkeypatch.setitem(kernel.NETWORKS, "unet", (build_small, kernel.unet_loss))


def plan(kernel, config, labels, output, network="unet", earlier=(), memory=1000.0, replicas=1):
    """A Training in an output folder."""
    (output / "members").mkdir(parents=True, exist_ok=True)
    member = config.encoders[0], config.held_out[0]
    return kernel.plan_training(config, network, *member, labels, replicas, memory, output, earlier)


def split(paths, labels):
    """The first eight images of the sample for training, the others for validation."""
    return [(paths[:8], labels[:8]), (paths[8:], labels[8:])]


def train(kernel, config, labels, paths, output, deadline=FOREVER, **options):
    """Train the small network on eight images; returns its Training and its history."""
    training = plan(kernel, config, labels, output, **options)
    parts = split(paths, labels)
    kernel.train(tf.distribute.get_strategy(), config, training, parts, deadline)
    return training, kernel.read_history(training)


def measure_loss(kernel, config, training, paths, labels):
    """The loss of the kept weights on the validation images, image by image."""
    model, losses = kernel.load_network(config, training), []
    for path, rles in zip(paths[8:], labels[8:].to_numpy()):
        image, plane = kernel.load_example(config, training.size, path, rles)
        probabilities = model.predict(image[None], verbose=0)
        losses.append(kernel.unet_loss(config, tf.constant(plane[None]), probabilities))
    return float(np.mean(losses))


def read_weights(kernel, config, training):
    """The kept weights of a training."""
    return kernel.load_network(config, training).get_weights()


def assert_equal(first, second):
    """Lists of arrays are equal to the last bit."""
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("small")
def test_best_weights_are_kept(kernel, tiny, labels, paths, tmp_path, capsys):
    """Also where the validation images contradict the others, so that the last ones are worst."""
    labels = pd.concat([labels[:8], labels[8:].replace("^.*$", "1 2940000", regex=True)])
    config = kernel.replace(tiny, epochs=6)
    training, history = train(kernel, config, labels, paths, tmp_path)
    losses = history["val_loss"]
    assert list(losses.index) == [0, 1, 2, 3, 4, 5] and losses.idxmin() < losses.idxmax()
    measured = measure_loss(kernel, config, training, paths, labels)
    assert measured == pytest.approx(losses.min(), rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 0 of 6 epochs are done.") and len(lines) == 7
    assert all("validation" in line and "min left" in line for line in lines[1:])
    assert not (training.folder / "state").exists() and not kernel.WARNINGS


@pytest.mark.usefixtures("small")
def test_validation_weighs_the_images_of_an_uneven_batch_alike(
    kernel, tiny, labels, paths, tmp_path
):
    config = kernel.replace(tiny, batch_size=3)  # four images in two batches
    training, history = train(kernel, config, labels, paths, tmp_path)
    measured = measure_loss(kernel, config, training, paths, labels)
    assert history["val_loss"].item() == pytest.approx(measured, rel=1e-5)


@pytest.mark.usefixtures("small")
def test_training_twice_gives_the_same_weights(kernel, tiny, labels, paths, tmp_path):
    found = [train(kernel, tiny, labels, paths, tmp_path / name)[0] for name in ("a", "b")]
    assert_equal(*(read_weights(kernel, tiny, training) for training in found))


@pytest.mark.usefixtures("small")
def test_a_finished_training_is_not_repeated(kernel, tiny, labels, paths, tmp_path, monkeypatch):
    training, history = train(kernel, tiny, labels, paths, tmp_path)
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    again, same = train(kernel, tiny, labels, paths, tmp_path)
    assert again == training
    pd.testing.assert_frame_equal(history, same)


# Ends before its time


@pytest.mark.parametrize("first", [0, 8 + 2 + 8 + 2 + 3])
def test_a_loss_that_becomes_nan_ends_the_training_with_its_best_weights(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, warnings, first
):
    """An epoch has eight steps, and two batches of validation."""
    calls = tf.Variable(0, trainable=False)

    def loss(config, planes, probabilities):
        factor = tf.where(calls.assign_add(1) > first, math.nan, 1.0)
        return kernel.unet_loss(config, planes, probabilities) * factor

    monkeypatch.setitem(kernel.NETWORKS, "unet", (build_small, loss))
    monkeypatch.setattr(kernel, "hash_code", lambda *functions: {})
    config = kernel.replace(tiny, epochs=9)
    training, history = train(kernel, config, labels, paths, tmp_path)
    assert len(history) == (3 if first else 1) and history.iloc[-1].isna().all()
    weights = read_weights(kernel, config, training)
    assert all(np.isfinite(array).all() for array in weights)
    if first:
        measured = measure_loss(kernel, config, training, paths, labels)
        assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    else:
        tf.keras.utils.set_random_seed(config.seed)
        assert_equal(weights, build_small(config, None, training.size).get_weights())
    name = training.folder.name
    assert (
        warnings[name] == f"The loss of {name} became nan. Its best weights before that are used."
    )
    # Begun again, it would end so again; so it does not begin, and warns again.
    warnings.clear()
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    train(kernel, config, labels, paths, tmp_path)
    assert name in warnings


def interrupt(kernel, monkeypatch, step):
    """Press Ctrl-C in a training step, counted from now."""
    steps, usual = [], kernel.TimeBudget.on_train_batch_end

    def count(budget, batch, logs=None):
        usual(budget, batch, logs)
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(kernel.TimeBudget, "on_train_batch_end", count)
    return steps


@pytest.mark.usefixtures("small")
def test_ctrl_c_ends_all_trainings_of_the_cell_and_they_go_on_when_begun_again(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, warnings
):
    """Of two members the first is interrupted in its third epoch."""
    config, folds = kernel.replace(tiny, epochs=4), pd.Series(np.arange(12) // 8, labels.index)
    labelled = labels, folds, paths[0].parent
    strategy, members = tf.distribute.get_strategy(), {}
    for name in ("interrupted", "whole"):
        own = [kernel.replace(config, folds=2, held_out=(fold,)) for fold in (1, 0)]
        members[name] = [{"unet": plan(kernel, c, labels, tmp_path / name)} for c in own]
    kernel.train_members(strategy, config, members["whole"], "unet", labelled, FOREVER)
    with monkeypatch.context() as patch:
        steps = interrupt(kernel, patch, 8 + 8 + 3)
        kept = kernel.train_members(
            strategy, config, members["interrupted"], "unet", labelled, FOREVER
        )
    first = members["interrupted"][0]["unet"]
    assert len(steps) == 19 and kept == members["interrupted"][:1]
    assert len(kernel.read_history(first)) == 2
    assert warnings["unet"].startswith(f"Interrupted in {first.folder.name}")
    kept = kernel.train_members(strategy, config, kept, "unet", labelled, FOREVER)
    assert not warnings  # taken back
    other = members["whole"][0]["unet"]
    assert_equal(read_weights(kernel, config, first), read_weights(kernel, config, other))
    pd.testing.assert_frame_equal(kernel.read_history(first), kernel.read_history(other))


@pytest.mark.usefixtures("small")
def test_if_nothing_was_trained_the_run_ends_with_a_sentence(
    kernel, tiny, labels, paths, tmp_path, monkeypatch
):
    folds = pd.Series(np.arange(12) // 8, labels.index)
    members = [{"unet": plan(kernel, tiny, labels, tmp_path)}]
    monkeypatch.setattr(kernel, "train", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(RuntimeError, match="No unet was trained"):
        kernel.train_members(None, tiny, members, "unet", (labels, folds, Path()), 0)


class Ticks:
    """A clock that is a second later each time that it is read."""

    def __init__(self):
        self.time = 0

    def __call__(self):
        self.time += 1
        return self.time


@pytest.mark.usefixtures("small")
def test_training_ends_when_its_time_is_over_says_so_and_goes_on_later(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, warnings
):
    """A look at the clock, and with it a step, takes a second."""
    config, optimizers = kernel.replace(tiny, epochs=6), []
    make_optimizer = kernel.make_optimizer
    monkeypatch.setattr(kernel, "hash_code", lambda *functions: {})
    monkeypatch.setattr(
        kernel,
        "make_optimizer",
        lambda *arguments: optimizers.append(make_optimizer(*arguments)) or optimizers[-1],
    )
    with monkeypatch.context() as patch:
        patch.setattr(kernel.time, "monotonic", Ticks())
        training, history = train(kernel, config, labels, paths, tmp_path, deadline=23)
    steps = int(optimizers[0].iterations)
    assert steps == 22 and len(history) == 3  # one second is for the validation
    assert float(optimizers[0].total_steps) == steps  # the rate has reached its end
    measured = measure_loss(kernel, config, training, paths, labels)
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    text = "was over after 22 of 48 steps of 1 s. A whole session has time for 450000.0 epochs"
    assert text in warnings[training.folder.name]
    _, history = train(kernel, config, labels, paths, tmp_path)
    assert len(history) == 6 and not warnings and not (training.folder / "state").exists()
    assert float(optimizers[1].total_steps) == int(optimizers[1].iterations) == 22 + 3 * 8


@pytest.mark.usefixtures("small")
def test_means_of_the_last_third_s_weights_are_validated_and_kept(
    kernel, tiny, labels, paths, tmp_path, monkeypatch
):
    """Every tenth step counts, and the training itself goes on as if there were none."""
    runs = {}

    class Recorder(kernel.TimeBudget):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            runs.setdefault(self.averaging, {})[self.done] = self.model.get_weights()

    monkeypatch.setattr(kernel, "TimeBudget", Recorder)
    for averaging in (False, True):
        config = kernel.replace(tiny, epochs=9, learning_rate=1.0, averaging=averaging)
        training, history = train(kernel, config, labels, paths, tmp_path / str(averaging))
    assert_equal(runs[False][72], runs[True][72])
    kept, model = read_weights(kernel, config, training), kernel.load_network(config, training)
    for epoch, counted in ((6, [50]), (7, [50, 60]), (8, [50, 60, 70])):
        means = [np.mean(part, axis=0) for part in zip(*(runs[True][step] for step in counted))]
        model.set_weights(means)
        model.save_weights(training.folder / "weights.h5")
        measured = measure_loss(kernel, config, training, paths, labels)
        assert history["val_loss"][epoch] == pytest.approx(measured, rel=1e-5)
        if history["val_loss"].idxmin() == epoch:
            np.testing.assert_allclose(kept[-1], means[-1], rtol=1e-5)
    assert history["val_loss"].idxmin() >= 6


@pytest.mark.parametrize(
    ("time", "steps"), [(1e6, 800), (2454, 800), (2453, 799), (100, 15), (1, 2)]
)
def test_steps_are_planned_into_the_time(kernel, monkeypatch, time, steps):
    """Steps of 3 s, and 20 steps' time that is kept back."""
    clock = iter([100, 103])
    monkeypatch.setattr(kernel.time, "monotonic", lambda: next(clock))
    budget = kernel.TimeBudget("unet", 103 + time, 20, False)
    budget.params, optimizer = {"epochs": 8, "steps": 100}, types.SimpleNamespace()
    budget.model = types.SimpleNamespace(optimizer=optimizer, stop_training=False)
    optimizer.iterations = tf.constant(0)
    budget.on_epoch_begin(0)
    for done in (1, 2):
        optimizer.iterations = tf.constant(done)
        budget.on_train_batch_end(0)
    assert budget.planned == optimizer.total_steps == steps
    assert budget.model.stop_training == (steps == 2)


@pytest.mark.usefixtures("small")
def test_a_batch_that_does_not_fit_is_halved_on_one_device(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, capsys
):
    config, fit, sizes = kernel.replace(tiny, batch_size=8), tf.keras.Model.fit, []

    def fail(model, batches, **options):
        sizes.append(batches.element_spec[0].shape[0])
        if sizes[-1] > 2:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")
        return fit(model, batches, **options)

    monkeypatch.setattr(tf.keras.Model, "fit", fail)
    _, history = train(kernel, config, labels, paths, tmp_path)
    assert sizes == [8, 4, 2] and len(history) == 1
    assert "a step of 8 images does not fit into memory" in capsys.readouterr().out
    training = plan(kernel, config, labels, tmp_path / "several")
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    monkeypatch.setattr(tf.distribute.MirroredStrategy, "num_replicas_in_sync", 2)
    with pytest.raises(MemoryError, match="Set batch_size to less than 8, or image_size"):
        kernel.train(strategy, config, training, split(paths, labels), FOREVER)


@pytest.mark.parametrize(
    ("memory", "replicas", "precision", "size", "batch"),
    [
        (15.0, 2, "mixed_float16", (1312, 2080), 4),
        (15.0, 1, "float32", (1312, 2080), 1),
        (16.0, 8, "mixed_bfloat16", (1312, 2080), 16),
        (1.0, 2, "float32", (1312, 2080), 2),  # at least one for each; it is tried
        (15.0, 1, "mixed_float16", (320, 480), 32),
    ],
)
def test_the_largest_batch_that_fits_is_taken(
    kernel, labels, tmp_path, memory, replicas, precision, size, batch
):
    config = kernel.replace(kernel.BEST, precision=precision, image_size=size)
    options = {"memory": memory, "replicas": replicas}
    assert plan(kernel, config, labels, tmp_path, **options).batch_size == batch


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        ("efficientnetb0", (224, 336)),
        ("efficientnetb1", (240, 360)),
        ("efficientnetb2", (260, 390)),
        ("efficientnetb3", (300, 450)),
        ("efficientnetb4", (380, 570)),
        ("efficientnetb5", (456, 684)),
        ((1.0, 1.0), (224, 336)),
        ((1.0, 1.3), (280, 420)),  # half way from B2 to B3
        ((0.5, 0.3), (224, 336)),
    ],
)
def test_classifiers_have_their_encoder_s_own_size(kernel, labels, tmp_path, encoder, size):
    config = kernel.replace(kernel.BEST, encoders=(encoder,), precision="float32")
    found = [plan(kernel, config, labels, tmp_path, network) for network in kernel.NETWORKS]
    assert [training.size for training in found] == [size, size, (1312, 2080)]
    assert [training.epochs for training in found] == [20, 20, 10]


# Several replicas, and XLA

REPLICAS = """
import math, numpy as np, tensorflow as tf
from pathlib import Path
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.keras.mixed_precision.set_global_policy(sys.argv[3])
sample, output, network = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]
labels = kernel.read_labels(sample / "train.csv")
paths = [sample / "train_images" / name for name in labels.index]
config = kernel.replace(kernel.SAMPLE, image_size=(64, 96), batch_size=4, precision=sys.argv[3])
config = kernel.replace(config, epochs=2 if network == "small" else 1, hours=1000.0)

def build(config, encoder, size):
    if network == "small":
        return tests.build_small(config, encoder, size)
    model = kernel.build_efficient_unet(config, (0.2, 0.1), size)
    for layer in model.get_layer(index=2).layers:
        if hasattr(layer, "rate"):
            layer.rate = 0.0
        if isinstance(layer, tf.keras.layers.BatchNormalization):  # not by a replica's own part
            layer.call = lambda inputs, training=None, call=layer.call: call(inputs, training=False)
    return model

kernel.NETWORKS["unet"] = build, kernel.unet_loss
kernel.hash_code = lambda *functions: {}
found = []
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    replicas = strategy.num_replicas_in_sync
    training = tests.plan(kernel, config, labels, output / str(replicas))
    parts = [(paths[:8], labels[:8]), (paths[7:], labels[7:])]  # validation is uneven
    kernel.train(strategy, config, training, parts, tests.FOREVER)
    history = kernel.read_history(training)
    with strategy.scope():
        unet = kernel.load_network(config, training)
        predictor = kernel.build_predictor(unet, network == "small")
    maps = list(kernel.predict_maps(config, [(training, predictor)], *parts[1]))
    found.append((history["val_loss"].iloc[-1], unet.get_weights(), np.array(maps)))
    measured = tests.measure(kernel, config, training, *parts[1])
    np.testing.assert_allclose(history["val_loss"].min(), measured, rtol=2e-4)
(loss, weights, maps), (other_loss, other_weights, other_maps) = found
moved = max(np.abs(w).max() for w in weights)
differences = [np.abs(a - b).max() for a, b in zip(weights, other_weights)]
print("loss", loss, other_loss, "weights", max(differences), "of", moved)
assert maps.shape == other_maps.shape == (5, 2, 350, 525, 4)
if network == "unet":
    assert abs(loss - other_loss) < 1e-5 and max(differences) < 1e-5 * moved
    assert np.abs(maps.astype(int) - other_maps).max() <= 1
"""


def measure(kernel, config, training, paths, labels):
    """The loss of the kept weights on some images, in batches as a network sees them."""
    model, losses = kernel.load_network(config, training), []
    for path, rles in zip(paths, labels.to_numpy()):
        image, plane = kernel.load_example(config, training.size, path, rles)
        probabilities = tf.cast(model(image[None], training=False), tf.float32)
        losses.append(float(kernel.unet_loss(config, tf.constant(plane[None]), probabilities)[0]))
    return np.mean(losses)


@pytest.mark.parametrize(
    ("precision", "network"),
    [("float32", "small"), ("mixed_float16", "small"), ("float32", "unet")],
)
def test_two_replicas_train_validate_and_predict_as_one(sample, tmp_path, precision, network):
    done = run_python(REPLICAS, sample, tmp_path, precision, network)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_training_step_and_a_prediction_compile_with_xla(kernel, tiny):
    """As a TPU needs it: nothing in them has a shape that depends on values."""
    tf.keras.utils.set_random_seed(1)
    model = kernel.build_efficient_unet(tiny, (0.3, 0.1), (64, 96))
    loss = kernel.functools.partial(kernel.unet_loss, tiny)
    model.compile(kernel.make_optimizer(tiny, 2, 10), loss, jit_compile=True, weighted_metrics=[])
    random = np.random.default_rng(0)
    images = random.integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    planes = random.integers(16, size=(2, 64, 96), dtype=np.uint8)
    assert np.isfinite(
        model.fit(images, planes, epochs=2, batch_size=2, verbose=0).history["loss"]
    ).all()
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

KILLED = """
import math, os, signal, shutil, tensorflow as tf
from pathlib import Path
sample, output, when, earlier = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
kernel.NETWORKS["unet"] = tests.build_small, kernel.unet_loss
labels = kernel.read_labels(sample / "train.csv")
paths = [sample / "train_images" / name for name in labels.index]
config = kernel.replace(kernel.SAMPLE, image_size=(64, 96), batch_size=2, epochs=3)
config = kernel.replace(config, precision="float32", hours=1000.0, held_out=(0,))
calls, callbacks = {}, tf.keras.callbacks

def die(place, name, number, half=lambda *arguments: None):
    whole = getattr(place, name)
    def count(*arguments, **options):
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == number:
            half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(place, name, count)

def write_half(model, path, **options):
    Path(path).write_bytes(b"HDF")

if when == "in the second epoch":
    die(kernel.TimeBudget, "on_train_batch_end", 11)
elif when == "in the best weights":
    die(tf.keras.Model, "save_weights", 2, write_half)
elif when == "before the state":
    die(callbacks.BackupAndRestore, "on_epoch_end", 2)
elif when == "while copying":
    die(shutil, "copyfile", 3)
options = {"earlier": [Path(place) for place in earlier]}
training, history = tests.train(kernel, config, labels, paths, output, **options)
print(training.folder.name, len(history))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sample):
    """The output of a training that was never killed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run_python(KILLED, sample, output, "never")
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def find_files(output):
    """The names of the files in an output, without what is only of the moment."""
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


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
    sample, tmp_path, uninterrupted, when, elsewhere
):
    """Begun again in its place, or in another with the killed one's output attached, read-only."""
    killed, folder = tmp_path / "killed", tmp_path / "killed"
    if when == "while copying":
        done = run_python(KILLED, sample, killed, "in the second epoch")
        assert done.returncode == -signal.SIGKILL
    if elsewhere:
        folder = tmp_path / "other"
    if when == "while copying":
        assert run_python(KILLED, sample, folder, when, killed).returncode == -signal.SIGKILL
        assert find_files(folder / "members") == []
    else:
        done = run_python(KILLED, sample, killed, when)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    for path in killed.rglob("*"):
        path.chmod(0o555 if path.is_dir() or elsewhere else 0o644)
    attached = [killed] if elsewhere else []
    for path in killed.rglob("*") if not elsewhere else []:
        path.chmod(0o755 if path.is_dir() else 0o644)
    done = run_python(KILLED, sample, folder, "never", *attached)
    assert done.returncode == 0, done.stderr[-2000:]
    known = {"before the state": 2, "in the best weights": 0}.get(when, 1)  # what was written
    assert f"{known} of 3 epochs are done" in done.stdout
    (first,), (second,) = (list(place.glob("members/*")) for place in (uninterrupted, folder))
    assert first.name == second.name
    assert_equal(*(read_arrays(path / "weights.h5") for path in (first, second)))
    histories = [pd.read_csv(path / "history.csv") for path in (first, second)]
    histories = [history.drop_duplicates("epoch", keep="last") for history in histories]
    pd.testing.assert_frame_equal(*(history.reset_index(drop=True) for history in histories))
    assert {path.name for path in second.iterdir()} == {
        "settings.json",
        "history.csv",
        "weights.h5",
    }


def read_arrays(path):
    """All arrays of an HDF5 file, in the order of their names."""
    import h5py

    arrays = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, part: arrays.append(part[()]) if hasattr(part, "shape") else None
        )
    return arrays


# Taken over or not


def test_code_is_hashed_with_all_that_it_uses_but_not_its_comments(kernel, tmp_path, monkeypatch):
    plain = "SIZE = 3\ndef inner():\n    return SIZE\ndef outer():\n    return inner()\n"
    source = {
        "plain": plain,
        "commented": plain.replace("    return SIZE", '    """Text."""\n    return  SIZE  # why'),
        "other constant": plain.replace("3", "4"),
        "other inner": plain.replace("return SIZE", "return -SIZE"),
    }
    hashes = {}
    for number, (name, text) in enumerate(source.items()):
        path = tmp_path / f"module{number}.py"
        path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        hashes[name] = kernel.hash_code(__import__(path.stem).outer)
    plain = hashes["plain"]
    assert set(plain) == {"outer", "inner", "SIZE"} and hashes["commented"] == plain
    for name, changed in (("other constant", "SIZE"), ("other inner", "inner")):
        assert {key for key in plain if hashes[name][key] != plain[key]} == {changed}


def test_the_code_that_shapes_a_network_is_all_of_ours_up_to_the_optimiser(kernel):
    names = kernel.hash_code(*kernel.NETWORKS["unet"], kernel.make_dataset, kernel.make_optimizer)
    expected = (
        "unet_loss exclude_overlaps cross_entropy split_planes build_efficient_unet build_part "
    )
    expected += "name_encoder make_dataset plan_epoch load_example make_augmentation read_image "
    expected += (
        "read_size read_plane fill_runs parse_rle make_optimizer CLASSES AS_IS ORIGINAL_SIZE"
    )
    assert set(names) == set(expected.split())


def edit(kernel, monkeypatch):
    """As if the loss were edited."""
    hash_code = kernel.hash_code
    monkeypatch.setattr(kernel, "hash_code", lambda *f: {**hash_code(*f), "unet_loss": 1})


@pytest.mark.usefixtures("small")
def test_a_network_of_other_code_is_not_taken_over_unless_it_is_wished(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, capsys, warnings
):
    training, _ = train(kernel, tiny, labels, paths, tmp_path)
    edit(kernel, monkeypatch)
    capsys.readouterr()
    other, _ = train(kernel, tiny, labels, paths, tmp_path)
    out = capsys.readouterr().out
    assert f"{training.folder} is not used: other code of unet_loss\n" in out
    assert other.folder != training.folder and "0 of 1 epochs are done" in out
    shutil.rmtree(other.folder)
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    wished = kernel.replace(tiny, other_code=True)
    assert train(kernel, wished, labels, paths, tmp_path)[0] == training
    (warning,) = warnings.values()
    assert warning == f"{training.folder} is taken over, with other code of unet_loss."


@pytest.mark.usefixtures("small")
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
    kernel, tiny, labels, paths, tmp_path, capsys, change, named
):
    training, _ = train(kernel, tiny, labels, paths, tmp_path)
    wished = kernel.replace(tiny, other_code=True)  # it is not only the code
    other = plan(kernel, kernel.replace(wished, **change), labels, tmp_path)
    assert other.folder != training.folder and not (other.folder / "weights.h5").exists()
    found = capsys.readouterr().out.rpartition("is not used: other ")[2].strip()
    assert ", ".join(sorted(found.split(", "))) == named


@pytest.mark.usefixtures("small")
def test_other_labels_are_another_training(kernel, tiny, labels, tmp_path, capsys):
    first = plan(kernel, tiny, labels, tmp_path)
    changed = labels.copy()
    changed.iloc[0, 0] = "1 1"
    assert plan(kernel, tiny, changed, tmp_path) != first
    assert "other labels" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_what_does_not_shape_a_network_may_change(kernel, tiny, labels, tmp_path):
    own = {"hours": 3.0, "decision": "half", "flips": False, "gate_recall": 0.5, "held_out": (0, 1)}
    other = kernel.replace(tiny, **own, precision="mixed_float16")
    assert plan(kernel, tiny, labels, tmp_path) == plan(kernel, other, labels, tmp_path)
    classifiers = {"classifier_epochs": (5, 3), "classifier_size": (32, 64)}
    other = kernel.replace(tiny, **classifiers)
    assert plan(kernel, tiny, labels, tmp_path) == plan(kernel, other, labels, tmp_path)
    unet = {"epochs": 7, "image_size": (32, 64), "cross_entropy_weight": 0.1}
    for network in ("baseline", "classifier"):
        first, second = (
            plan(kernel, config, labels, tmp_path, network)
            for config in (tiny, kernel.replace(tiny, **unet))
        )
        assert first == second
    other = kernel.replace(tiny, classifier_epochs=(tiny.classifier_epochs[0], 3))
    same = [
        plan(kernel, tiny, labels, tmp_path, network).folder
        == plan(kernel, other, labels, tmp_path, network).folder
        for network in ("baseline", "classifier")
    ]
    assert same == [True, False]


@pytest.mark.usefixtures("small")
def test_members_of_earlier_sessions_are_copied_whole(
    kernel, tiny, labels, paths, tmp_path, monkeypatch
):
    training, history = train(kernel, tiny, labels, paths, tmp_path / "earlier")
    half = tmp_path / "now" / "part"
    half.mkdir(parents=True)  # what a killed session has left
    (half / "old").touch()
    monkeypatch.setattr(kernel.tf.keras.Model, "fit", None)
    earlier = [tmp_path / "none", tmp_path / "earlier"]
    copied, same = train(kernel, tiny, labels, paths, tmp_path / "now", earlier=earlier)
    assert copied.folder == tmp_path / "now" / "members" / training.folder.name
    pd.testing.assert_frame_equal(history, same)
    assert find_files(training.folder) == find_files(copied.folder)
    assert_equal(read_weights(kernel, tiny, training), read_weights(kernel, tiny, copied))


@pytest.mark.usefixtures("small")
def test_of_several_earlier_sessions_the_one_with_the_most_epochs_is_taken(
    kernel, tiny, labels, tmp_path
):
    """Whatever their order, and whatever this session's own folder is called."""
    outputs = [tmp_path / name for name in "abc"]
    for output, epochs in zip(outputs, (2, 9, 5)):
        rows = "".join(f"{epoch},0.5,0.5\n" for epoch in range(epochs))
        history = plan(kernel, tiny, labels, output).folder / "history.csv"
        history.write_text(f"epoch,loss,val_loss\n{rows}")
    for index, order in enumerate(itertools.permutations(outputs)):
        taken = plan(kernel, tiny, labels, tmp_path / f"now{index}", earlier=order)
        assert len(kernel.read_history(taken)) == 9


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("factor", [4, 0.5])
def test_a_training_goes_on_with_another_batch_for_all_its_epochs(
    kernel, tiny, labels, paths, tmp_path, monkeypatch, warnings, factor
):
    """As on another accelerator, whose memory holds more or less."""
    config, whole = kernel.replace(tiny, epochs=6), kernel.train
    with monkeypatch.context() as patch:
        patch.setattr(kernel.time, "monotonic", Ticks())
        first, history = train(kernel, config, labels, paths, tmp_path, deadline=23)
    assert len(history) < 6
    wanted = int(first.batch_size * factor)

    def with_other_batch(strategy, config, training, *arguments):
        whole(strategy, config, kernel.replace(training, batch_size=wanted), *arguments)

    monkeypatch.setattr(kernel, "train", with_other_batch)
    _, history = train(kernel, config, labels, paths, tmp_path)
    assert len(history) == 6 and not warnings


def test_folders_without_whole_settings_are_passed_over(kernel, tiny, labels, tmp_path):
    first = plan(kernel, tiny, labels, tmp_path / "a")
    for name, text in (("x", None), ("y", "{"), ("z", "")):
        folder = tmp_path / "b" / "members" / name
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "settings.json").write_text(text)
    second = plan(kernel, tiny, labels, tmp_path / "b")
    assert second.folder.name == first.folder.name
    settings = json.loads((second.folder / "settings.json").read_text())
    assert settings["training"] == second.folder.name[:-9] and settings["seed"] == tiny.seed


@pytest.mark.usefixtures("small")
def test_weights_that_do_not_fit_are_named(kernel, tiny, labels, paths, tmp_path):
    training, _ = train(kernel, tiny, labels, paths, tmp_path)
    os.truncate(training.folder / "weights.h5", 999)
    with pytest.raises(ValueError, match=f"The weights in {training.folder} do not fit: "):
        kernel.load_network(tiny, training)


def test_baseline_trains_the_head_and_fine_tuning_all(kernel, tiny, labels, paths, tmp_path):
    config = kernel.replace(tiny, classifier_epochs=(1, 1), activation="softmax")
    folds = pd.Series(np.arange(12) // 8, labels.index)
    config = kernel.replace(config, held_out=(1,))
    names = ("baseline", "classifier")
    members = [{name: plan(kernel, config, labels, tmp_path, name) for name in names}]
    strategy, labelled = tf.distribute.get_strategy(), (labels, folds, paths[0].parent)
    for name in names:
        assert kernel.train_members(strategy, config, members, name, labelled, FOREVER) == members
    (member,) = members
    tf.keras.utils.set_random_seed(config.seed)
    fresh = kernel.build_classifier(config, (0.5, 0.3), (64, 96))
    weights = [fresh, *(kernel.load_network(config, member[name]) for name in names)]
    first, second, third = (model.get_weights() for model in weights)
    changed = [not np.array_equal(*pair) for pair in zip(first, second)]
    assert changed == [False] * (len(first) - 2) + [True] * 2  # the last layer's two
    assert np.mean([not np.array_equal(*pair) for pair in zip(second, third)]) > 0.8
    found = kernel.predict_presence(strategy, config, member["classifier"], paths[:3], labels[:3])
    assert list(found.index) == list(labels.index[:3]) and list(found) == list(kernel.CLASSES)
    for path, row in zip(paths, found.to_numpy()):
        expected = weights[2](kernel.read_image(path, (64, 96))[None])
        np.testing.assert_allclose(row, expected[0], rtol=1e-4)
