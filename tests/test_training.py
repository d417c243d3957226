"""Training: on several replicas, compiled for a TPU, by the clock, and gone on with when killed."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

TESTS = Path(__file__).parent


def run_python(code, *arguments):
    """Run code that has the notebook's definitions as `kernel`, in a process of its own."""
    start = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from conftest import KERNEL as kernel\n"
    )
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def build_small(config):
    """A network of one layer in EfficientUNet's place."""
    images = tf.keras.layers.Input((*config.image_size, 3), dtype=tf.uint8)
    scaled = tf.keras.layers.Rescaling(1 / 255)(images)
    channels = 5 if config.activation == "softmax" else 4
    return tf.keras.Model(
        images, tf.keras.layers.Conv2D(channels, 1, activation=config.activation)(scaled)
    )


def allow_all(seconds):
    """The time that a training may take: more than any needs."""
    return 1e6


def split(paths, labels):
    """The first eight images of the sample for training, the others for validation."""
    return [(paths[:8], labels[:8]), (paths[8:], labels[8:])]


def train_small(kernel, session, config, paths, labels, output, allow=allow_all, loss=None):
    """Train a small network on eight images of the sample; returns it and its history."""
    tf.keras.utils.set_random_seed(config.seed)
    model, loss = build_small(config), loss or functools.partial(kernel.unet_loss, config)
    path = output / "small.weights.h5"
    arguments = (model, loss, split(paths, labels), config.epochs, path, allow)
    return model, kernel.train(session, config, *arguments)


def measure_loss(kernel, config, model, paths, labels):
    """The loss of a network on the validation images, by Keras's own loop."""
    losses = []
    for path, rles in zip(paths[8:], labels[8:].to_numpy()):
        image, plane = kernel.load_example(config, path, rles)
        probabilities = model.predict(image[None], verbose=0)
        losses.append(kernel.unet_loss(config, tf.constant(plane[None]), probabilities))
    return float(np.mean(losses))


def test_best_weights_are_kept_and_loaded_again(kernel, session, tiny, labels, paths, tmp_path):
    config = kernel.replace(tiny, epochs=6, learning_rate=12.0)  # so high that the loss jumps
    model, history = train_small(kernel, session, config, paths, labels, tmp_path)
    losses = history["val_loss"]
    assert losses.idxmin() < losses.index[-1] and list(losses.index) == [1, 2, 3, 4, 5, 6]
    measured = measure_loss(kernel, config, model, paths, labels)
    assert measured == pytest.approx(losses.min(), rel=1e-5)
    other = build_small(config)
    other.load_weights(tmp_path / "small.weights.h5")
    for first, second in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(first, second)
    saved = pd.read_csv(tmp_path / "small.csv", index_col="epoch", float_precision="round_trip")
    pd.testing.assert_frame_equal(saved, history)


def test_validation_weighs_the_images_of_an_uneven_batch_alike(
    kernel, session, tiny, labels, paths, tmp_path
):
    config = kernel.replace(tiny, batch_size=3, epochs=1)  # four images in two batches
    model, history = train_small(kernel, session, config, paths, labels, tmp_path)
    measured = measure_loss(kernel, config, model, paths, labels)
    assert history["val_loss"].item() == pytest.approx(measured, rel=1e-5)


def test_training_twice_gives_the_same_weights(kernel, session, tiny, labels, paths, tmp_path):
    models = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        models += train_small(kernel, session, tiny, paths, labels, tmp_path / name)[:1]
    for first, second in zip(*(model.get_weights() for model in models)):
        np.testing.assert_array_equal(first, second)


def test_a_loss_that_never_is_a_number_is_an_error(kernel, session, tiny, labels, paths, tmp_path):
    with pytest.raises(RuntimeError, match="never was finite"):
        train_small(
            kernel,
            session,
            tiny,
            paths,
            labels,
            tmp_path,
            loss=lambda m, p: p[:, 0, 0, 0] * math.nan,
        )


def test_progress_tells_the_time_left(kernel, monkeypatch, capsys):
    times = iter([100, 110, 120, 150, 160])
    monkeypatch.setattr(kernel.time, "monotonic", lambda: next(times))
    progress = kernel.Progress("Image", 7, done=2, pause=15)
    for number in range(5):
        progress.advance(f"({number})")
    assert capsys.readouterr().out.splitlines() == [
        "Image 5 of 7, 0.3 min left (2)",
        "Image 6 of 7, 0.3 min left (3)",
        "Image 7 of 7, 0.0 min left (4)",
    ]


def test_paper_trains_and_predicts(kernel, session, labels, paths, sample, tmp_path):
    """The softmax path with the real networks; the notebook itself runs the path with sigmoids."""
    sizes = {"image_size": (64, 96), "batch_size": 4, "epochs": 5, "folds": 3}
    network = {"encoder": (0.5, 0.3), "encoder_weights": None, "learning_rate": 8.5e-3}
    config = kernel.replace(kernel.PAPER, **sizes, **network)
    config = kernel.suit(config, session.accelerator)
    (run,) = kernel.list_runs(config, tmp_path)
    folds = kernel.assign_folds(labels, 3, seed=0)
    history = kernel.train_unet(session, run, labels, folds, sample / "train_images")
    assert np.isfinite(history.to_numpy()).all()
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    strategy = session.accelerator.strategy
    unet = kernel.load_network(run, "unet", strategy)
    predict = kernel.distribute(strategy, functools.partial(kernel.find_maps, unet, True))
    maps = list(kernel.predict_maps(config, predict, paths[9:]))
    assert len(maps) == 3 and maps[0].shape == (350, 525, 4)


# Several replicas, and XLA

REPLICAS = """
import functools, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
frozen = sys.argv[1] == "different"
config = kernel.replace(kernel.SAMPLE, image_size=(64, 96), batch_size=4, precision=sys.argv[2])
config = kernel.replace(config, learning_rate=0.1)  # so that three steps move the weights
random = np.random.default_rng(0)
steps = []
for step in range(3):
    images = random.integers(256, size=(4, 64, 96, 3), dtype=np.uint8)
    planes = random.integers(16, size=(4, 64, 96), dtype=np.uint8)
    if not frozen:  # both replicas see the same, so that their batch statistics are those of all
        images[2:], planes[2:] = images[:2], planes[:2]
    steps.append((tf.constant(images), tf.constant(planes)))
loss = functools.partial(kernel.unet_loss, config)
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
found = []
for strategy in (tf.distribute.get_strategy(), mirrored):
    tf.keras.utils.set_random_seed(1)
    with strategy.scope():
        model = kernel.build_efficient_unet(config)
    for layer in kernel.list_layers(model):
        if isinstance(layer, kernel.StochasticDepth):
            layer.rate = 0.0
        if isinstance(layer, tf.keras.layers.BatchNormalization) and frozen:
            layer.trainable = False
    with strategy.scope():
        optimizer = kernel.make_optimizer(config, 10, model.trainable_variables)
    before = [weight.numpy() for weight in model.trainable_weights]
    replicas = strategy.num_replicas_in_sync
    step = kernel.distribute(strategy, kernel.make_step(model, loss, optimizer, replicas))
    losses = [step(*batch).numpy() for batch in steps]
    after = [weight.numpy() for weight in model.trainable_weights]
    changed = max(np.abs(new - old).max() for new, old in zip(after, before))
    found.append((replicas, losses, after, changed))
(_, losses, weights, changed), (replicas, other_losses, other_weights, _) = found
print("replicas", replicas, "losses", np.mean(losses, axis=1), "moved", changed)
print("differences: losses", np.abs(np.subtract(losses, other_losses)).max())
differences = [np.abs(a - b).max() for a, b in zip(weights, other_weights)]
print("weights", max(differences))
assert replicas == 2 and changed > 1e-3
np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
for first, second in zip(weights, other_weights):
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3 * changed)
"""


@pytest.mark.parametrize(
    ("halves", "precision"),
    [("different", "float32"), ("equal", "float32"), ("different", "mixed_float16")],
)
def test_two_replicas_train_like_one_device_with_the_whole_batch(halves, precision):
    """With different halves batch statistics are frozen, as each replica would have its own."""
    done = run_python(REPLICAS, halves, precision)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]


TWO = """
import functools, numpy as np, tensorflow as tf
from pathlib import Path
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sample, output = Path(sys.argv[1]), Path(sys.argv[2])
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
accelerator = kernel.replace(kernel.make_strategy({}), strategy=strategy)
session = kernel.Session(accelerator, kernel.Clock(1000))
labels = kernel.read_labels(sample / "train.csv")
sizes = {"image_size": (64, 96), "classifier_size": (64, 96), "folds": 3, "folds_to_run": ()}
config = kernel.replace(kernel.SAMPLE, epochs=1, classifier_epochs=(1, 1), **sizes)
config = kernel.suit(config, accelerator)
(run,) = kernel.list_runs(config, output)
run = kernel.fit_run(run, config, accelerator)
labelled = labels, kernel.assign_folds(labels, 3, seed=0), sample / "train_images"
kernel.train_classifier(session, run, *labelled)
kernel.train_unet(session, run, *labelled)
paths = [labelled[2] / name for name in labels.index[:5]]
for network in ("baseline", "classifier"):
    found = [kernel.predict_presence(run, network, paths, one) for one in (strategy, None)]
    np.testing.assert_allclose(*found, rtol=1e-4)
maps = []
for one in (strategy, tf.distribute.get_strategy()):
    unet = kernel.load_network(run, "unet", one)
    predict = kernel.distribute(one, functools.partial(kernel.find_maps, unet, True))
    maps.append(list(kernel.predict_maps(run.config, predict, paths)))
assert np.shape(maps[0]) == (5, 350, 525, 4) and np.ptp(maps[0]) > 0
assert np.abs(np.subtract(*np.array(maps, int))).max() <= 1
"""


def test_two_replicas_train_and_predict_from_end_to_end(sample, tmp_path):
    done = run_python(TWO, sample, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.weights.h5"))) == 3


@pytest.mark.parametrize("network", ["classifier", "unet"])
def test_a_whole_training_step_compiles_for_a_tpu(kernel, tiny, network):
    """XLA compiles it, with static shapes, and it does what TensorFlow's own step does."""
    random = np.random.default_rng(0)
    images = tf.constant(random.integers(256, size=(2, 64, 96, 3), dtype=np.uint8))
    planes = tf.constant(random.integers(16, size=(2, 64, 96), dtype=np.uint8))
    results = []
    for compiled in (True, False):
        tf.keras.utils.set_random_seed(0)
        model = kernel.build_network(tiny, network)
        measure = kernel.unet_loss if network == "unet" else kernel.classifier_loss
        loss = functools.partial(measure, tiny)
        optimizer = kernel.make_optimizer(tiny, 10, model.trainable_variables)
        step = kernel.make_step(model, loss, optimizer, 1)
        step = tf.function(step, autograph=False, jit_compile=compiled)
        results.append([step(images, planes).numpy() for _ in range(2)])
    assert step.get_concrete_function(images, planes).outputs[0].shape == (2,)
    np.testing.assert_allclose(*results, rtol=2e-3)


def test_a_prediction_compiles_for_a_tpu(kernel, tiny):
    """With static shapes; and its resizing is TensorFlow's own, which XLA has not."""
    model = kernel.build_efficient_unet(tiny)
    images = np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    predict = functools.partial(kernel.find_maps, model, False)
    predict = tf.function(predict, autograph=False, jit_compile=True)
    maps = predict(tf.constant(images))
    assert maps.shape == (2, 350, 525, 4)
    resized = tf.image.resize(model(images, training=False), (350, 525), antialias=True)
    assert np.abs(maps.numpy() - 255 * resized.numpy()).max() < 0.51


@pytest.mark.parametrize(("length", "target"), [(1312, 350), (2080, 525), (64, 350)])
def test_resizing_by_matrices_is_tensorflow_s(kernel, length, target):
    line = np.random.default_rng(0).random((1, length, 1, 1)).astype(np.float32)
    expected = tf.image.resize(line, (target, 1), antialias=True).numpy()[0, :, 0, 0]
    found = kernel.resizing_weights(length, target) @ line[0, :, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_stochastic_depth_depends_on_the_step_and_the_layer_only(kernel):
    maps = tf.ones((4000, 1, 1, 2))
    layer, other = (kernel.StochasticDepth(0.3, name=name) for name in ("a_drop", "b_drop"))
    first = layer(maps, training=True).numpy()
    np.testing.assert_array_equal(first, layer(maps, training=True))
    np.testing.assert_array_equal(first[..., 0], first[..., 1])
    assert set(np.unique(first)) == {0, np.float32(1 / 0.7)}
    assert 0.27 < (first == 0).mean() < 0.33
    assert 0.4 < (first == other(maps, training=True).numpy()).mean() < 0.7
    layer.steps = lambda: tf.constant(1, tf.int64)
    assert 0.4 < (first == layer(maps, training=True).numpy()).mean() < 0.7
    np.testing.assert_array_equal(layer(maps, training=False), maps)


# The clock


class Ticks:
    """A time that passes by a second each time it is asked for."""

    def __init__(self, each=1.0):
        self.time, self.each = 0.0, each

    def __call__(self):
        self.time += self.each
        return self.time


def test_the_clock_counts_from_the_start_of_the_notebook(kernel):
    now = Ticks(600)
    clock = kernel.Clock(2, start=0, now=now)
    assert [clock.left(), clock.left()] == [6600, 6000]


def test_a_training_may_take_a_share_of_what_predictions_leave(kernel):
    session = kernel.Session(None, kernel.Clock(1, start=0, now=lambda: 600))
    assert session.allow(1.0, 0, 0, 5) == 3000
    assert session.allow(0.5, 900, 80, 10) == 0.5 * (3000 - 900 - 1000)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(1e6, 800), (2800, 733), (1500, 400), (1499, 399), (340, 80), (90, 10), (62, 0), (20, 0)],
)
def test_steps_are_planned_into_the_time(kernel, seconds, steps):
    """Steps of 3 s, 80 in an epoch, and a validation of 60 s after each and after the last step."""
    time = iter([100, 103, 106, 109, 200])
    plan = kernel.Plan("unet", 10, 80, 200 + seconds, 60, lambda: next(time))
    for _ in range(4):
        plan.count_step()
    plan.revise(0)
    assert (plan.timed, plan.total) == (3, steps)
    time_taken = 3 * steps + 60 * math.ceil(steps / 80)
    assert time_taken <= seconds


def test_training_ends_when_its_time_is_over_and_keeps_its_best_weights(
    kernel, tiny, labels, paths, tmp_path, capsys
):
    """Each look at the clock takes a second: a step one, a validation two."""
    config = kernel.replace(tiny, epochs=500)
    session = kernel.Session(kernel.make_strategy({}), kernel.Clock(1, start=0, now=Ticks()))
    model, history = train_small(
        kernel, session, config, paths, labels, tmp_path, allow=lambda seconds: 60
    )
    assert 1 < len(history) < 10 and history["step"].iloc[-1] < 70
    measured = measure_loss(kernel, config, model, paths, labels)
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert "of 500 epochs are planned" in capsys.readouterr().out
    assert not json.loads((tmp_path / "small.state" / "settings.json").read_text())["finished"]


def test_the_learning_rate_reaches_its_end_at_the_last_planned_step(
    kernel, tiny, labels, paths, tmp_path, monkeypatch
):
    optimizers, make_optimizer = [], kernel.make_optimizer
    monkeypatch.setattr(
        kernel,
        "make_optimizer",
        lambda *arguments: optimizers.append(make_optimizer(*arguments)) or optimizers[-1],
    )
    session = kernel.Session(kernel.make_strategy({}), kernel.Clock(1, start=0, now=Ticks()))
    _, history = train_small(
        kernel,
        session,
        kernel.replace(tiny, epochs=500),
        paths,
        labels,
        tmp_path,
        allow=lambda seconds: 60,
    )
    total = float(optimizers[0].inner_optimizer.total_steps)
    assert total == history["step"].iloc[-1]


def test_prediction_ends_before_the_clock_does(kernel, paths, monkeypatch, capsys):
    monkeypatch.setattr(kernel, "make_masks", lambda maps, found, decide: np.ones((350, 525, 4)))
    monkeypatch.setattr(kernel, "predict_together", lambda predictors, paths: [[0]] * len(paths))
    monkeypatch.setattr(kernel, "average_maps", lambda several: None)
    clock = kernel.Clock(1, start=0, now=Ticks(900))
    rles = kernel.predict_rles([], paths, np.zeros((12, 4)), None, clock)
    assert len(rles) == 4 * 4 and "8 images get empty masks" in capsys.readouterr().out


# Going on

KILLED = """
import os, signal, pandas as pd
from pathlib import Path
sample, output, when = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
labels = kernel.read_labels(sample / "train.csv")
folds = kernel.assign_folds(labels, 3, seed=0)
session = kernel.Session(kernel.make_strategy({}), kernel.Clock(1000))
sizes = {"image_size": (64, 96), "batch_size": 4, "epochs": 3, "folds": 3}
config = kernel.suit(kernel.replace(kernel.SAMPLE, **sizes, folds_to_run=()), session.accelerator)
(run,) = kernel.list_runs(config, output)

class Dying(kernel.Plan):
    steps_done = 0
    def count_step(self):
        super().count_step()
        Dying.steps_done += 1
        if when == "in the second epoch" and Dying.steps_done == 6:
            os.kill(os.getpid(), signal.SIGKILL)

class DyingRecord(kernel.Record):
    def add(self, row):
        if when == "before the second state" and len(self.epochs) == 1:
            (self.state / "ckpt-2_temp").mkdir()  # as TensorFlow does when it begins to save
            self.manager.save = lambda: os.kill(os.getpid(), signal.SIGKILL)
        super().add(row)

kernel.Plan, kernel.Record = Dying, DyingRecord
history = kernel.train_unet(session, run, labels, folds, sample / "train_images")
print(history.to_csv())
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sample):
    """The folder of a training of EfficientUNet that was never killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_python(KILLED, sample, folder, "never")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    ("when", "elsewhere"), [("in the second epoch", False), ("before the second state", True)]
)
def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(
    kernel, sample, tmp_path, uninterrupted, when, elsewhere
):
    killed = tmp_path / "killed"
    killed.mkdir()
    assert run_python(KILLED, sample, killed, when).returncode == -signal.SIGKILL
    folder = killed
    code = KILLED
    if elsewhere:  # attached to another session
        folder = tmp_path / "other"
        folder.mkdir()
        code = code.replace("kernel.Clock(1000))", f"kernel.Clock(1000), (Path({str(killed)!r}),))")
    done = run_python(code, sample, folder, "never")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"goes on after 4 steps, in {killed}" in done.stdout
    name = "unet-efficientnet-0.5-0.3-fold0"
    histories = [(path / f"{name}.csv").read_text() for path in (uninterrupted, folder)]
    assert histories[0] == histories[1]
    networks = []
    for path in (uninterrupted, folder):
        sizes = {"image_size": (64, 96), "precision": "float32"}
        model = kernel.build_efficient_unet(kernel.replace(kernel.SAMPLE, **sizes))
        model.load_weights(path / f"{name}.weights.h5")
        networks.append(model.get_weights())
    for first, second in zip(*networks):
        np.testing.assert_array_equal(first, second)
    assert [path.name for path in (folder / f"{name}.state").iterdir()] == ["settings.json"]


def test_a_finished_training_is_not_repeated(
    kernel, session, tiny, labels, paths, tmp_path, monkeypatch
):
    model, history = train_small(kernel, session, tiny, paths, labels, tmp_path)
    monkeypatch.setattr(kernel, "make_step", None)
    again, same = train_small(kernel, session, tiny, paths, labels, tmp_path)
    pd.testing.assert_frame_equal(history, same)
    for first, second in zip(model.get_weights(), again.get_weights()):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"epochs": 2}, "epochs"), ({"seed": 1, "rotation_limit": 5}, "rotation_limit, seed")],
)
def test_another_training_begins_anew_and_says_why(
    kernel, session, tiny, labels, paths, tmp_path, capsys, change, named
):
    train_small(kernel, session, tiny, paths, labels, tmp_path)
    other = kernel.replace(tiny, **change)
    _, history = train_small(kernel, session, other, paths, labels, tmp_path)
    assert f"is not gone on with: other {named}\n" in capsys.readouterr().out
    assert len(history) == other.epochs and history["step"].iloc[0] == 8


def test_other_labels_are_another_training(kernel, session, tiny, labels, paths, tmp_path, capsys):
    train_small(kernel, session, tiny, paths, labels, tmp_path)
    changed = labels.copy()
    changed.iloc[0, 0] = "1 1"
    train_small(kernel, session, tiny, paths, changed, tmp_path)
    assert "other labels" in capsys.readouterr().out


def test_what_does_not_shape_a_training_may_change(
    kernel, session, tiny, labels, paths, tmp_path, monkeypatch
):
    train_small(kernel, session, tiny, paths, labels, tmp_path)
    monkeypatch.setattr(kernel, "make_step", None)
    other = kernel.replace(tiny, threads=7, hours=3, decision="threshold", flips=False)
    train_small(kernel, session, other, paths, labels, tmp_path)


def test_with_training_switched_off_the_weights_are_loaded(
    kernel, session, tiny, labels, paths, tmp_path
):
    model, history = train_small(kernel, session, tiny, paths, labels, tmp_path)
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    off = kernel.replace(tiny, train=False, seed=7, epochs=9)
    other, same = train_small(kernel, session, off, paths, labels, tmp_path)
    pd.testing.assert_frame_equal(history, same)
    for first, second in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(first, second)
    assert before == {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}
