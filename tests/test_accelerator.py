"""What is installed, what is computed on, and what a training step takes of its memory."""

import sys
import types

import pytest
import tensorflow as tf

PIP = ["install", "--quiet"]
SMALL = [
    "image-classifiers==1.0.0",
    "efficientnet==1.0.0",
    "keras-applications==1.0.8",
    "keras-rectified-adam==0.20.0",
    "segmentation-models==1.0.1",
]
ORDINARY = [
    "albumentations==2.0.8",
    "opencv-python-headless==4.13.0.92",
    "opencv-python==4.13.0.92",
    "matplotlib==3.10.0",
    "numpy==2.0.2",
    "pandas==2.2.2",
    "scikit-learn==1.6.1",
]
TPU = [
    ["uninstall", "--quiet", "--yes", "tensorflow", "tensorflow-cpu"],
    [*PIP, "tensorflow-tpu==2.19.1", "libtpu==0.0.10"],
]
KAGGLE = {"albumentations", "cv2", "matplotlib", "numpy", "pandas", "sklearn"}
KAGGLE |= {"tensorflow", "tf_keras"}


@pytest.mark.parametrize(
    ("environment", "modules", "packages", "calls"),
    [
        ({}, KAGGLE, set(), [[*PIP, "--no-deps", *SMALL]]),
        (
            {},
            set(),
            set(),
            [
                [*PIP, *ORDINARY, "tensorflow==2.20.0", "tf_keras==2.20.1"],
                [*PIP, "--no-deps", *SMALL],
            ],
        ),
        (
            {"ISTPUVM": "1"},
            KAGGLE,
            {"tensorflow-cpu"},
            [*TPU, [*PIP, "--no-deps", *SMALL, "tf_keras==2.19.0"]],
        ),
        (
            {"ISTPUVM": "1"},
            set(),
            set(),
            [*TPU, [*PIP, *ORDINARY], [*PIP, "--no-deps", *SMALL, "tf_keras==2.19.0"]],
        ),
        ({"ISTPUVM": "1"}, KAGGLE, {"tensorflow-tpu"}, [[*PIP, "--no-deps", *SMALL]]),
    ],
    ids=["GPU", "bare", "TPU", "bare TPU", "TPU, run again"],
)
def test_each_image_of_kaggle_gets_what_it_lacks(kernel, environment, modules, packages, calls):
    assert (
        kernel.plan_installation(environment, modules.__contains__, packages.__contains__) == calls
    )


def test_where_all_is_there_nothing_is_installed(kernel):
    assert kernel.plan_installation({}) == []
    assert kernel.has_package("numpy") and not kernel.has_package("no-such-package")
    assert not kernel.has_module("no_such_module")


def test_pip_is_called_in_this_python_and_its_failure_is_not_passed_over(kernel, monkeypatch):
    commands, done = [], types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(kernel.subprocess, "run", lambda c: commands.append(c) or done)
    kernel.install([["install", "a"], ["install", "b"]])
    assert commands == [[sys.executable, "-m", "pip", "install", name] for name in "ab"]
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="'pip no-such-command' failed.*internet access on"):
        kernel.install([["no-such-command"]])


def pretend_gpus(monkeypatch, kernel, devices):
    """Let TensorFlow find GPUs, each a name, a compute capability and mebibytes."""
    gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{i}") for i in range(len(devices))]
    details = {
        gpu.name: {"device_name": name, "compute_capability": capability}
        for gpu, (name, capability, _) in zip(gpus, devices)
    }
    monkeypatch.setattr(kernel.tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(
        kernel.tf.config.experimental, "get_device_details", lambda gpu: details[gpu.name]
    )
    monkeypatch.setattr(kernel.tf.distribute, "MirroredStrategy", lambda: "mirrored")
    monkeypatch.setattr(kernel.tf.distribute, "get_strategy", lambda: "single")
    answer = types.SimpleNamespace(stdout="".join(f"{device[2]}\n" for device in devices))
    monkeypatch.setattr(kernel.subprocess, "run", lambda *command, **options: answer)


@pytest.mark.parametrize(
    ("devices", "strategy", "name", "precision", "mebibytes"),
    [
        (
            [("Tesla T4", (7, 5), 15360)] * 2,
            "mirrored",
            "Tesla T4, Tesla T4",
            "mixed_float16",
            15360,
        ),
        ([("Tesla T4", (7, 5), 15360)], "single", "Tesla T4", "mixed_float16", 15360),
        ([("Tesla P100", (6, 0), 16280)], "single", "Tesla P100", "float32", 16280),
        (
            [("Tesla T4", (7, 5), 15360), ("Old", (5, 2), 4096)],
            "mirrored",
            "Tesla T4, Old",
            "float32",
            4096,
        ),
    ],
)
def test_all_gpus_are_used_in_the_precision_of_the_weakest(
    kernel, monkeypatch, devices, strategy, name, precision, mebibytes
):
    pretend_gpus(monkeypatch, kernel, devices)
    found = kernel.make_strategy({})
    assert (found.strategy, found.name, found.precision) == (strategy, name, precision)
    assert (found.memory, found.hours) == (mebibytes * 2**20, 11.75)


def test_without_a_gpu_the_cpu_is_used_in_float32(kernel):
    found = kernel.make_strategy({})
    assert (found.name, found.precision, found.replicas) == ("CPU", "float32", 1)
    assert 2**28 < found.memory == pytest.approx(kernel.free_memory(), rel=0.2)


def test_a_tpu_machine_without_a_tpu_ends_the_run_and_says_what_to_do(kernel):
    """TensorFlow's own build has no TPU, as Kaggle's image before the installation."""
    with pytest.raises(RuntimeError, match="Restart .* install tensorflow-tpu==2.19.1.* T4 x2"):
        kernel.make_strategy({"ISTPUVM": "1"})


def test_a_tpu_computes_in_bfloat16(kernel, monkeypatch):
    eight = types.SimpleNamespace(num_replicas_in_sync=8)
    monkeypatch.setattr(kernel, "start_tpu", lambda: eight)
    found = kernel.make_strategy({"ISTPUVM": "1"})
    assert (found.name, found.precision, found.replicas) == ("TPU, 8 cores", "mixed_bfloat16", 8)
    assert (found.memory, found.hours) == (16 * 2**30, 8.75)


def test_what_the_configuration_leaves_open_follows_the_accelerator(kernel, session):
    gpu = kernel.replace(session.accelerator, precision="mixed_float16", hours=12)
    config = kernel.suit(kernel.BEST, gpu)
    assert (config.precision, config.hours) == ("mixed_float16", 12) and config.threads >= 1
    own = kernel.replace(kernel.BEST, precision="float32", hours=3, threads=7)
    assert kernel.suit(own, gpu) == own


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("network", ["classifier", "unet"])
def test_halves_are_used_in_the_layers_only(kernel, tiny, precision, network):
    config = kernel.replace(tiny, precision=precision)
    model = kernel.build_network(config, network)
    assert model.output.dtype == tf.float32
    assert {weight.dtype for weight in model.weights} == {tf.float32}  # batch statistics too
    dtypes = {layer.compute_dtype for layer in kernel.list_layers(model)}
    assert precision.removeprefix("mixed_") in dtypes
    images = tf.zeros((2, 64, 96, 3), tf.uint8)
    planes = tf.zeros((2, 64, 96), tf.uint8)
    measure = kernel.unet_loss if network == "unet" else kernel.classifier_loss
    loss = measure(config, planes, model(images))
    assert loss.dtype == tf.float32 and loss.shape == (2,)


def test_the_loss_is_scaled_for_float16_only(kernel, tiny):
    variable = tf.Variable(1.0)
    for precision, scale in (("float32", 1), ("mixed_bfloat16", 1), ("mixed_float16", 2**15)):
        config = kernel.replace(tiny, precision=precision)
        optimizer = kernel.make_optimizer(config, 10, [variable])
        assert optimizer.get_scaled_loss(tf.constant(3.0)).numpy() == 3 * scale


# Memory and operations


@pytest.mark.parametrize("network", ["classifier", "unet"])
def test_operations_are_those_of_tensorflow_s_profiler(kernel, tiny, network):
    model = kernel.build_network(tiny, network)
    function = tf.function(lambda images: model(images, training=False))
    graph = function.get_concrete_function(tf.TensorSpec((1, 64, 96, 3), tf.uint8)).graph
    compat = tf.compat.v1
    options = compat.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    options["account_type_regexes"] = ["Conv2D", "DepthwiseConv2dNative", "MatMul"]
    profile = compat.profiler.profile(graph, options=options)
    assert kernel.find_footprint(tiny, network).operations == pytest.approx(
        profile.total_float_ops, rel=0.01
    )


def build_chain():
    """A convolution, its normalisation, a swish and another convolution, of 8 x 10 pixels."""
    layers = tf.keras.layers
    images = layers.Input((8, 10, 3))
    maps = layers.Conv2D(5, 3, padding="same")(images)
    maps = layers.Activation(tf.nn.swish)(layers.BatchNormalization()(maps))
    return tf.keras.Model(images, layers.Conv2D(2, 1)(maps))


def test_the_footprint_of_a_chain_worked_by_hand(kernel):
    found = kernel.measure_network(build_chain())
    pixels = 8 * 10
    kept = 4 * pixels * (3 + 5 + 5 + 5)  # inputs of convolutions, normalisation and swish
    assert found.memory == kept + round(kernel.AT_WORK * 4 * pixels * (5 + 5))
    assert found.operations == 2 * pixels * (3 * 3 * 3 * 5 + 5 * 2)
    assert found.parameters == 3 * 3 * 3 * 5 + 5 + 4 * 5 + 5 * 2 + 2
    assert found.step_memory(3) == 16 * found.parameters + 3 * found.memory


@pytest.mark.parametrize(
    ("images", "replicas", "wanted", "batch"),
    [(9.5, 1, 32, 9), (9.5, 2, 32, 18), (9.5, 8, 32, 32), (1.5, 8, 4, 8), (40, 1, 4, 4)],
)
def test_the_largest_batch_that_fits_is_taken(
    kernel, tiny, session, images, replicas, wanted, batch
):
    cost = kernel.find_footprint(tiny, "unet")
    memory = (cost.step_memory(0) + images * cost.memory) / kernel.MEMORY_SHARE
    strategy = types.SimpleNamespace(num_replicas_in_sync=replicas)
    accelerator = kernel.replace(session.accelerator, memory=memory, strategy=strategy)
    assert kernel.fit_batch(accelerator, tiny, "unet", wanted) == batch


def test_a_run_is_fitted_to_the_session(kernel, tiny, session, tmp_path):
    (run,) = kernel.list_runs(
        kernel.replace(tiny, folds_to_run=(), precision="mixed_float16", threads=9), tmp_path
    )
    fitted = kernel.fit_run(run, tiny, session.accelerator)
    assert fitted.config == kernel.replace(tiny, folds_to_run=()) and fitted.results is run.results


def test_if_no_image_fits_it_is_said_what_would(kernel, tiny, session, monkeypatch):
    smallest = dict(list(kernel.ENCODERS.items())[:3])
    monkeypatch.setattr(kernel, "ENCODERS", smallest)  # to build fewer of them
    config = kernel.replace(tiny, encoder="efficientnetb1", image_size=(128, 192))
    cost = kernel.find_footprint(config, "unet")
    small = kernel.find_footprint(kernel.replace(config, image_size=(64, 96)), "unet")
    memory = (small.step_memory(1) + 1e6) / kernel.MEMORY_SHARE
    accelerator = kernel.replace(session.accelerator, memory=memory)
    assert cost.step_memory(1) > kernel.MEMORY_SHARE * memory
    with pytest.raises(MemoryError, match=r"unet with efficientnetb1 takes .* size of \(64, 96\)"):
        kernel.fit_batch(accelerator, config, "unet", 4)
    b0 = kernel.find_footprint(kernel.replace(config, encoder="efficientnetb0"), "unet")
    memory = (b0.step_memory(1) + 1) / kernel.MEMORY_SHARE
    accelerator = kernel.replace(session.accelerator, memory=memory)
    with pytest.raises(MemoryError, match="or the encoders efficientnetb0[.]"):
        kernel.fit_batch(accelerator, config, "unet", 4)
