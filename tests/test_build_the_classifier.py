"""Build the classifier takes what computes, builds encoders and finds their weights.

The classifier, its loss and its optimiser are what their definitions say.
"""

import inspect
import math
import subprocess
import types

import efficientnet.tfkeras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ENCODER, pack

# What computes


def pretend_gpus(monkeypatch, kernel, gpus, answer):
    """Let TensorFlow find a number of GPUs and the driver answer with a text or fail."""

    def run(*command, **options):
        if answer is None:
            raise FileNotFoundError("nvidia-smi")
        if answer == "failed":
            raise subprocess.CalledProcessError(9, "nvidia-smi")
        return types.SimpleNamespace(stdout=answer)

    devices = [types.SimpleNamespace(name=f"GPU:{number}") for number in range(gpus)]
    monkeypatch.setattr(kernel.tf.config, "list_physical_devices", lambda kind: devices)
    monkeypatch.setattr(kernel.tf.distribute, "MirroredStrategy", lambda: "mirrored")
    monkeypatch.setattr(kernel.tf.distribute, "get_strategy", lambda: "single")
    monkeypatch.setattr(kernel.subprocess, "run", run)


@pytest.mark.parametrize(
    ("gpus", "answer", "expected", "memories"),
    [
        (2, "15360\n15360\n", ("mirrored", "mixed_float16"), [15, 15]),
        (1, "16280\n", ("single", "mixed_float16"), [16280 / 1024]),
        (2, "15360\n4096\n", ("mirrored", "mixed_float16"), [15, 4]),
        (1, "[N/A]\n", ("single", "mixed_float16"), [15]),
        (1, None, ("single", "mixed_float16"), []),
        (1, "failed", ("single", "mixed_float16"), []),
        (0, None, ("single", "float32"), []),
    ],
)
def test_all_gpus_are_used_whatever_the_driver_says(
    kernel, monkeypatch, gpus, answer, expected, memories
):
    pretend_gpus(monkeypatch, kernel, gpus, answer)
    assert kernel.choose_accelerator({}) == expected and kernel.ask_driver() == memories
    assert not kernel.WARNINGS


def test_a_gpu_that_tensorflow_does_not_see_ends_the_run_on_kaggle(kernel, monkeypatch, warnings):
    pretend_gpus(monkeypatch, kernel, 0, "15360\n")
    with pytest.raises(RuntimeError, match="does not see the GPU. Restart"):
        kernel.choose_accelerator({"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert kernel.choose_accelerator({}) == ("single", "float32")
    assert "tensorflow[and-cuda]" in warnings["GPU"]


def test_a_tpu_machine_without_a_tpu_ends_the_run_and_says_what_to_do(kernel):
    """TensorFlow's own build has no TPU, as Kaggle's image before the installation."""
    with pytest.raises(RuntimeError, match="does not find the TPU. Restart .* internet access on"):
        kernel.choose_accelerator({"ISTPUVM": "1"})


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
    """Keras's get_file, given a checksum, also compares a file that is there already."""
    config = kernel.replace(tiny, encoder_weights="imagenet")
    build_part = kernel.build_part
    monkeypatch.setattr(kernel, "build_part", lambda *args: build_part(*args, mount=tmp_path))
    build = getattr(kernel, network)
    build(config, "efficientnetb0", (64, 96))
    assert sources == [f"downloaded {NAME}"]
    other = tmp_path / "efficientnet-keras-weights-b0b5" / "efficientnet-b0_imagenet_1000_notop.h5"
    for path in (other, tmp_path / "datasets" / "someone" / "weights" / NAME):
        path.parent.mkdir(parents=True)
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


def test_rectified_adam_warms_up_and_decays(kernel):
    """Step for step equal to the algorithm of arXiv 1908.03265 with a linear rise and fall."""
    total, peak, first_decay, second_decay = 40, 0.01, 0.9, 0.999
    # Eight images in a step: the square root of a quarter of the rate for 32.
    config = kernel.replace(kernel.BEST, learning_rate=2 * peak)
    variable = tf.Variable([1.0, -2.0])
    optimizer = kernel.make_optimizer(config, 8, total)
    expected = np.array([1.0, -2.0])
    mean, square = np.zeros(2), np.zeros(2)
    longest = 2 / (1 - second_decay) - 1
    for step in range(1, total + 1):
        gradient = np.array([math.sin(step), 0.5])
        optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        mean = first_decay * mean + (1 - first_decay) * gradient
        square = second_decay * square + (1 - second_decay) * gradient**2
        length = longest - 2 * step * second_decay**step / (1 - second_decay**step)
        rate = peak * step / 4 if step <= 4 else peak + (peak / 100 - peak) * (step - 4) / 36
        update = mean / (1 - first_decay**step)
        if length >= 5:
            update /= np.sqrt(square / (1 - second_decay**step)) + 1e-7
            numerator = (length - 4) * (length - 2) * longest
            update *= math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
        expected = expected - rate * update
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-4)


def test_each_update_is_the_package_s_own(kernel):
    """For gradients of all sizes, with a last step that is moved on the way."""
    fused = kernel.make_optimizer(kernel.replace(kernel.PAPER, learning_rate=1e-3), 32, 60)
    (package,) = {base for base in type(fused).__mro__ if base.__name__ == "RAdam"}
    own = package(1e-3, total_steps=60, warmup_proportion=0.1, min_lr=1e-5)
    random = np.random.default_rng(0)
    first, second = (tf.Variable(np.zeros((3, 4), np.float32)) for _ in range(2))
    for step in range(70):
        if step == 40:
            fused.total_steps = own.total_steps = 50.0
        gradient = random.normal(size=(3, 4)) * 10.0 ** random.uniform(-3, 3, (3, 4))
        before = second.numpy()
        for optimizer, variable in ((fused, first), (own, second)):
            optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        assert np.abs(second.numpy() - before).max() > 1e-7
        np.testing.assert_allclose(first.numpy(), second.numpy(), rtol=1e-5, atol=1e-6)
