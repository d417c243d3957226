"""Training: on several replicas, compiled for a TPU, by the clock, and gone on with when killed."""

import functools
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
    files = kernel.Files(output, "small")
    arguments = (model, loss, split(paths, labels), config.epochs, files, allow)
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


# Ends before the time


def lose(kernel, config, first, last=10**6):
    """The loss, but nan from a number of calls in training on, up to another."""
    calls = tf.Variable(0, trainable=False)

    def loss(planes, probabilities):
        number = calls.assign_add(1)  # of training steps and of batches of validation
        factor = tf.where((number >= first) & (number <= last), math.nan, 1.0)
        return kernel.unet_loss(config, planes, probabilities) * factor

    return loss


@pytest.fixture
def own_session(kernel, session):
    """A session with warnings of its own."""
    return kernel.Session(session.accelerator, session.clock)


def test_a_loss_that_becomes_nan_ends_the_training_with_its_best_weights(
    kernel, own_session, tiny, labels, paths, tmp_path, monkeypatch
):
    """An epoch has eight steps, and two batches of validation; two more are for timing."""
    config = kernel.replace(tiny, epochs=9)
    loss = lose(kernel, config, 2 + 10 + 10 + 5)  # within the third epoch
    model, history = train_small(kernel, own_session, config, paths, labels, tmp_path, loss=loss)
    assert list(history.index) == [1, 2] and np.isfinite(history).all().all()
    assert all(np.isfinite(weights).all() for weights in model.get_weights())
    measured = measure_loss(kernel, config, model, paths, labels)
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    (warning,) = own_session.warnings.values()
    best = int(history["val_loss"].idxmin())
    assert warning == (
        f"small ended early: its validation loss became nan. Its weights are those of epoch {best}."
    )
    # Begun again, it would end so again; so it does not begin, and warns again.
    monkeypatch.setattr(kernel, "make_step", None)
    own_session.warnings.clear()
    train_small(kernel, own_session, config, paths, labels, tmp_path, loss=loss)
    assert list(own_session.warnings.values()) == [warning]


def test_a_loss_that_is_nan_from_the_start_leaves_the_weights_as_they_were(
    kernel, own_session, tiny, labels, paths, tmp_path
):
    loss = lose(kernel, tiny, 0)
    kernel_steps = kernel.replace(tiny, batch_size=1, epochs=3)  # 16 steps in an epoch
    model, history = train_small(
        kernel, own_session, kernel_steps, paths, labels, tmp_path, loss=loss
    )
    assert len(history) == 0
    tf.keras.utils.set_random_seed(tiny.seed)
    for first, second in zip(model.get_weights(), build_small(tiny).get_weights()):
        np.testing.assert_array_equal(first, second)
    (warning,) = own_session.warnings.values()
    assert warning == "small ended early: its loss became nan. Its weights are those it began with."
    figure, axes = kernel.plt.subplots()
    kernel.plot_histories(axes, {"small": history}, "title", "loss")
    kernel.plt.close(figure)


def test_float16_may_recover_from_a_few_steps_that_are_nan(kernel):
    losses = [1.0] + 9 * [math.nan]
    kernel.check_losses(losses, kernel.Interrupt())
    with pytest.raises(kernel.Stop, match="its loss became nan"):
        kernel.check_losses([*losses, math.nan], kernel.Interrupt())


def interrupt_at(kernel, monkeypatch, step):
    """Press Ctrl-C in a step of training, counted from the first of a session."""
    steps, count_step = [], kernel.Plan.count_step

    def count(plan):
        count_step(plan)
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(kernel.Plan, "count_step", count)
    return steps


def test_ctrl_c_ends_the_training_and_it_goes_on_when_begun_again(
    kernel, own_session, tiny, labels, paths, tmp_path, monkeypatch, capsys
):
    usual = signal.getsignal(signal.SIGINT)
    config = kernel.replace(tiny, epochs=4)
    (tmp_path / "whole").mkdir()
    _, expected = train_small(kernel, own_session, config, paths, labels, tmp_path / "whole")
    steps = interrupt_at(kernel, monkeypatch, 8 + 8 + 3)
    with own_session.interrupt:
        model, history = train_small(kernel, own_session, config, paths, labels, tmp_path)
    assert len(steps) == 19 and list(history.index) == [1, 2]
    assert signal.getsignal(signal.SIGINT) is usual
    measured = measure_loss(kernel, config, model, paths, labels)
    assert measured == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert own_session.warnings["small"].startswith("small ended early: it was interrupted. Its ")
    capsys.readouterr()
    with own_session.interrupt:
        _, history = train_small(kernel, own_session, config, paths, labels, tmp_path)
    assert "small goes on after 16 steps" in capsys.readouterr().out
    pd.testing.assert_frame_equal(history, expected)
    assert not own_session.warnings  # taken back


def test_ctrl_c_ends_all_trainings_of_the_cell(
    kernel, own_session, tiny, labels, sample, tmp_path, monkeypatch
):
    """Of two runs, the first is interrupted in its baseline."""
    config = kernel.replace(tiny, classifier_epochs=(1, 1), folds=3, folds_to_run=(0, 1))
    runs = kernel.list_runs(config, tmp_path)
    folds = kernel.assign_folds(labels, 3, seed=0)
    steps = interrupt_at(kernel, monkeypatch, 3)
    kept, members, histories = kernel.train_runs(
        own_session,
        runs,
        [*runs, "earlier"],
        lambda index, run: kernel.train_classifier(
            own_session, run, labels, folds, sample / "train_images"
        ),
    )
    assert len(steps) == 3 and list(histories) == [runs[0].name]
    assert kept == runs[:1] and members == [runs[0], "earlier"]
    assert list(own_session.warnings.values()) == [
        f"{network}-{runs[0].name} ended early: it was interrupted. Its weights are those it began "
        "with."
        for network in ("baseline", "classifier")
    ] + [f"Interrupted, the session goes on without {runs[1].name}."]
    found = kernel.predict_presence(
        runs[0], "classifier", [sample / "train_images" / labels.index[0]]
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("last", [9, 10**6])
def test_the_decoded_images_are_forgotten_when_a_training_ends(
    kernel, own_session, tiny, labels, paths, tmp_path, monkeypatch, last
):
    cache, sizes = {}, []
    monkeypatch.setattr(kernel, "make_cache", lambda config, count: sizes.append(count) or cache)
    steps = interrupt_at(kernel, monkeypatch, last)
    count = kernel.Plan.count_validation
    monkeypatch.setattr(
        kernel.Plan,
        "count_validation",
        lambda plan, start: count(plan, start) or sizes.append(len(cache)),
    )
    config = kernel.replace(tiny, epochs=2)
    with own_session.interrupt:
        train_small(kernel, own_session, config, paths, labels, tmp_path)
    assert len(steps) == min(last, 16) and sizes == [12] * (2 if last == 9 else 3) and cache == {}


def test_a_second_ctrl_c_acts_as_usual(own_session):
    with pytest.raises(KeyboardInterrupt), own_session.interrupt:
        signal.raise_signal(signal.SIGINT)
        assert own_session.interrupt.asked
        signal.raise_signal(signal.SIGINT)


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
    assert not kernel.Files(tmp_path, "small").read()["finished"]


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


def test_prediction_ends_before_the_clock_does(kernel, paths, monkeypatch):
    monkeypatch.setattr(kernel, "make_masks", lambda maps, found, decide: np.ones((350, 525, 4)))
    monkeypatch.setattr(kernel, "predict_together", lambda predictors, paths: [[0]] * len(paths))
    monkeypatch.setattr(kernel, "average_maps", lambda several: None)
    session = kernel.Session(None, kernel.Clock(1, start=0, now=Ticks(900)))
    rles = kernel.predict_rles([], paths, np.zeros((12, 4)), None, session)
    assert len(rles) == 4 * 4
    warning = "The time is over: 8 test images are predicted to be empty."
    assert list(session.warnings.values()) == [warning]


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
            (self.files.state / "ckpt-2_temp").mkdir()  # as TensorFlow does when it begins to save
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
    assert [path.name for path in (folder / f"{name}.state").iterdir()] == ["training.json"]


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


@pytest.mark.parametrize("part", ["state", "weights", "history"])
def test_a_training_whose_files_are_damaged_begins_anew_and_says_why(
    kernel, own_session, tiny, labels, paths, tmp_path, part, capsys
):
    """As when an attached output was not copied whole."""
    config = kernel.replace(tiny, epochs=3)
    own = kernel.Session(kernel.make_strategy({}), kernel.Clock(1, start=0, now=Ticks()))
    (tmp_path / "second").mkdir()
    arguments = kernel, own, config, paths, labels
    train_small(*arguments, tmp_path / "second", allow=lambda seconds: 20)
    files = {"state": "small.state/ckpt-*.data*", "weights": "*.h5", "history": "*.csv"}
    (damaged,) = (tmp_path / "second").glob(files[part])
    os.truncate(damaged, damaged.stat().st_size // 2)
    session = kernel.replace(own_session, earlier=(tmp_path / "second",))
    (tmp_path / "third").mkdir()
    capsys.readouterr()
    _, history = train_small(kernel, session, config, paths, labels, tmp_path / "third")
    assert f"small in {tmp_path / 'second'} is not gone on with: " in capsys.readouterr().out
    assert list(history["step"]) == [8, 16, 24]


# Killed while writing

DIE = """
import os, signal
from pathlib import Path

def die_in(place, name, number, half):
    calls, whole = [], getattr(place, name)
    def count(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(place, name, count)

def write_half(path, text):
    Path(path).write_bytes(text.encode()[: len(text) // 2])
"""
WRITING = (
    DIE
    + """
import test_training
sample, output, when, earlier = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
labels = kernel.read_labels(sample / "train.csv")
paths = [sample / "train_images" / name for name in labels.index]
session = kernel.Session(kernel.make_strategy({}), kernel.Clock(1000), tuple(map(Path, earlier)))
config = kernel.replace(kernel.SAMPLE, image_size=(64, 96), classifier_size=(64, 96))
config = kernel.suit(kernel.replace(config, batch_size=2, epochs=3), session.accelerator)
if when == "in the best weights":  # the third time, in the second epoch
    die_in(kernel.tf.keras.Model, "save_weights", 3, lambda model, path: write_half(path, "HDF"))
elif when == "before the best weights are renamed":  # all that was written before is three files
    die_in(os, "replace", 6, lambda *paths: None)
elif when == "in the history":
    die_in(Path, "write_text", 4, write_half)
elif when == "in the state":
    half = lambda manager: write_half(output / "small.state/ckpt-2.data-00000-of-00001", "abc")
    die_in(kernel.tf.train.CheckpointManager, "save", 2, half)
elif when == "while copying":
    die_in(kernel.shutil, "copyfile", 1, lambda source, target: write_half(target, "HDF"))
elif when == "while finishing":
    die_in(Path, "unlink", 1, lambda path: None)
test_training.train_small(kernel, session, config, paths, labels, output)
"""
)


@pytest.mark.parametrize(
    "when",
    [
        "in the best weights",
        "before the best weights are renamed",
        "in the history",
        "in the state",
        "while copying",
        "while finishing",
    ],
)
def test_whenever_a_training_is_killed_no_file_is_half_and_it_ends_as_if_it_had_not_been(
    kernel, own_session, tiny, labels, paths, sample, tmp_path, when
):
    config = kernel.replace(tiny, epochs=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected, history = train_small(kernel, own_session, config, paths, labels, whole)
    attached = (whole,) if when == "while copying" else ()
    done = run_python(WRITING, sample, killed, when, *attached)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = {path.name for path in killed.iterdir() if not path.name.startswith("part.")}
    if when == "while copying":
        assert left == set()
    else:
        assert left == {"small.weights.h5", "small.csv", "small.state"}
        known = kernel.Files(killed, "small").read()
        assert known["finished"] == (when == "while finishing")
        assert kernel.find_damage(kernel.Files(killed, "small"), known["finished"]) is None
        build_small(config).load_weights(killed / "small.weights.h5")
        rows = kernel.read_history(killed / "small.csv").set_index("epoch")
        assert len(rows) == {"in the state": 2, "while finishing": 3}.get(when, 1)
        pd.testing.assert_frame_equal(rows, history.iloc[: len(rows)])
    session = kernel.replace(own_session, earlier=attached)
    model, again = train_small(kernel, session, config, paths, labels, killed)
    pd.testing.assert_frame_equal(again, history)
    for first, second in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_array_equal(first, second)


REPLACING = (
    DIE
    + """
path, when = Path(sys.argv[1]), sys.argv[2]
figure, axes = kernel.plt.subplots()
if when == "in the file":
    die_in(Path, "write_text", 1, write_half)
    die_in(type(figure), "savefig", 1, lambda figure, path: write_half(path, "PNG"))
elif when == "before the rename":
    die_in(os, "replace", 1, lambda *paths: None)
if path.suffix == ".png":
    kernel.save_figure(figure, path)
else:
    kernel.write_submission({"a.jpg_Fish": "1 5"}, path.with_name("sample.csv"), path)
os.kill(os.getpid(), signal.SIGKILL)
"""
)


@pytest.mark.parametrize("name", ["figure.png", "submission.csv"])
@pytest.mark.parametrize("when", ["in the file", "before the rename", "after the rename"])
def test_whenever_writing_is_killed_the_old_file_or_the_new_one_is_there(
    kernel, tmp_path, when, name
):
    rows = "".join(f"a.jpg_{name},\n" for name in kernel.CLASSES)
    (tmp_path / "sample.csv").write_text("Image_Label,EncodedPixels\n" + rows)
    path = tmp_path / name
    path.write_text("old")
    done = run_python(REPLACING, path, when)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    if when != "after the rename":
        assert path.read_text() == "old"
    elif name == "figure.png":
        assert kernel.plt.imread(path).ndim == 3
    else:
        table = kernel.check_submission(path, tmp_path / "sample.csv")
        assert table["EncodedPixels"].tolist() == ["1 5", "", "", ""]
