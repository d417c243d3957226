"""Build the classifier and EfficientUNet: what is installed, what computes, what is inside."""

import inspect
import os
import subprocess
import sys
import types

import efficientnet.tfkeras
import numpy as np
import pytest
import segmentation_models
import tensorflow as tf
from conftest import ROOT

SMALL = "segmentation-models==1.0.1 image-classifiers==1.0.0 efficientnet==1.0.0 "
SMALL += "keras-applications==1.0.8 keras-rectified-adam==0.20.0"
TPU = [
    "uninstall --yes tensorflow tensorflow-cpu",
    "install tensorflow-tpu==2.19.1 libtpu==0.0.10",
    "install --no-deps tf_keras==2.19.0",
]
SKIMAGE = "scikit-image==0.25.2 lazy-loader==0.4"


@pytest.mark.parametrize(
    ("environment", "modules", "calls"),
    [
        ({}, {"skimage"}, [f"install --no-deps {SMALL}"]),
        ({}, set(), [f"install --no-deps {SMALL} {SKIMAGE}"]),
        ({"ISTPUVM": "1"}, set(), [f"install --no-deps {SMALL} {SKIMAGE}", *TPU]),
    ],
    ids=["GPU", "bare", "TPU"],
)
def test_each_image_of_kaggle_gets_what_it_lacks(kernel, environment, modules, calls):
    assert kernel.list_pip_calls(environment, modules.__contains__) == calls


def test_where_all_is_there_nothing_is_installed(kernel):
    assert kernel.list_pip_calls({}) == []


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


def test_keras_3_loaded_before_the_notebook_is_refused_at_the_imports():
    code = "import tensorflow as tf; tf.keras.Model; exec(open('kernel.py').read())"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "RuntimeError: Keras 3 is loaded already. Restart" in done.stderr


ENCODER = (0.5, 0.3)


@pytest.fixture(scope="module")
def unets(kernel, tiny):
    """The U-Net with either activation."""
    configs = {name: kernel.replace(tiny, activation=name) for name in ("sigmoid", "softmax")}
    return {x: kernel.build_efficient_unet(c, ENCODER, (64, 96)) for x, c in configs.items()}


@pytest.fixture(scope="module")
def images():
    """Two random images."""
    return np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize(("activation", "channels"), [("sigmoid", 4), ("softmax", 5)])
def test_unet_takes_bytes_and_gives_float32_probabilities(unets, images, activation, channels):
    probabilities = unets[activation](images).numpy()
    assert probabilities.shape == (2, 64, 96, channels) and probabilities.dtype == np.float32
    assert probabilities.min() >= 0 and probabilities.max() <= 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_classifier_takes_bytes_and_gives_float32_probabilities(kernel, tiny, images, activation):
    config = kernel.replace(tiny, activation=activation)
    probabilities = kernel.build_classifier(config, ENCODER, (64, 96))(images).numpy()
    assert probabilities.shape == (2, 4) and probabilities.dtype == np.float32
    assert probabilities.min() > 0 and probabilities.max() < 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_normalisation_is_the_one_the_encoder_was_trained_with(unets, images):
    model = unets["sigmoid"]
    normalised = tf.keras.Model(model.input, model.get_layer(index=1).output)(images)
    expected = efficientnet.tfkeras.preprocess_input(images.astype(np.float32))
    np.testing.assert_allclose(normalised, expected, atol=1e-5)


def upsampling_layers(unet):
    """The five layers that double the size."""
    return [layer for layer in unet.layers if isinstance(layer, tf.keras.layers.UpSampling2D)]


def test_decoder_upsamples_bilinearly(unets):
    unet = unets["sigmoid"].get_layer(index=2)
    layers = upsampling_layers(unet)
    assert len(layers) == 5
    ends = tf.keras.Model(unet.input, [(layer.input, layer.output) for layer in layers])
    for low, high in ends(tf.random.stateless_normal((1, 64, 96, 3), (0, 0))):
        expected = tf.image.resize(low, high.shape[1:3], "bilinear")
        np.testing.assert_allclose(high, expected, rtol=1e-4, atol=1e-5)


def test_whole_network_follows_the_interpolation(unets, images):
    model = unets["sigmoid"]
    bilinear = model(images).numpy()
    for layer in upsampling_layers(model.get_layer(index=2)):
        layer.interpolation = "nearest"
    nearest = model(images).numpy()
    for layer in upsampling_layers(model.get_layer(index=2)):
        layer.interpolation = "bilinear"
    assert np.abs(bilinear - nearest).max() > 1e-3
    np.testing.assert_array_equal(model(images), bilinear)


def test_batch_normalisation_takes_its_momentum_from_the_configuration(unets, tiny):
    layers = unets["sigmoid"].get_layer(index=2).layers
    momenta = {x.momentum for x in layers if isinstance(x, tf.keras.layers.BatchNormalization)}
    assert momenta == {tiny.batch_norm_momentum}


@pytest.mark.parametrize(
    ("encoder", "size"), [("efficientnetb0", (32, 64)), ("efficientnetb3", (96, 160))]
)
def test_unet_has_the_parameters_of_the_package_s_own(kernel, tiny, encoder, size):
    model = kernel.build_efficient_unet(tiny, encoder, size)
    reference = segmentation_models.Unet(encoder, (*size, 3), classes=4, encoder_weights=None)
    assert model.count_params() == reference.count_params()
    assert model(np.zeros((1, *size, 3), np.uint8)).shape == (1, *size, 4)


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


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_halves_are_used_in_the_layers_only(kernel, tiny, images, precision):
    tf.keras.mixed_precision.set_global_policy(precision)
    try:
        model = kernel.build_efficient_unet(tiny, ENCODER, (64, 96))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert model.get_layer(index=2).output.dtype.name == precision.removeprefix("mixed_")
    assert model.output.dtype == tf.float32
    assert {weight.dtype for weight in model.weights} == {tf.float32}  # batch statistics too
    loss = kernel.unet_loss(tiny, tf.zeros((2, 64, 96), tf.uint8), model(images))
    assert loss.dtype == tf.float32 and loss.shape == (2,) and np.isfinite(loss).all()


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
