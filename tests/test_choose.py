"""Choose takes a preset and single fields, what computes, and what earlier sessions have left.

It refuses what is not allowed.
"""

import dataclasses
import itertools
import math
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import run_cells
from hypothesis import given
from hypothesis import strategies as st

# The configuration

FIELDS = {  # of Config, by the type that says which networks they shape
    "NetworkConfig": "folds encoder_weights activation batch_norm_momentum averaging seed "
    "augmentation_probability rotation_limit batch_size learning_rate",
    "UNetConfig": "cross_entropy_weight decoder_filters",
    "Config": "encoders held_out classifier_size baseline_epochs classifier_epochs image_size "
    "epochs gate_recall flips decision precision hours image_limit broken_share",
}


def test_every_field_belongs_to_the_one_type_that_says_which_networks_it_shapes(kernel):
    """A type has its own fields and those of the types that it is made of."""
    shapes = {name: getattr(kernel, name) for name in FIELDS}
    own = {name: list(vars(shape)["__annotations__"]) for name, shape in shapes.items()}
    assert {name: sorted(names) for name, names in own.items()} == {
        name: sorted(text.split()) for name, text in FIELDS.items()
    }
    parts = {
        "NetworkConfig": ["NetworkConfig"],
        "UNetConfig": ["NetworkConfig", "UNetConfig"],
        "Config": list(FIELDS),
    }
    for name, shape in shapes.items():
        names = [field.name for field in dataclasses.fields(shape)]
        assert sorted(names) == sorted(field for part in parts[name] for field in own[part])


def test_paper_is_the_paper_and_the_others_depart_where_they_say(kernel):
    paper, best, sample = kernel.PAPER, kernel.BEST, kernel.SAMPLE
    assert paper.image_size == (1312, 2080) and paper.encoder_weights == "imagenet"
    assert (paper.activation, paper.decision) == ("softmax", "threshold and area")
    assert not paper.flips and not paper.averaging
    assert (paper.cross_entropy_weight, paper.rotation_limit) == (0.7, 20)
    assert (paper.folds, paper.held_out) == (5, (0,))
    assert (paper.baseline_epochs, paper.classifier_epochs) == (20, 20)
    assert paper.decoder_filters == (256, 128, 64, 32, 16)
    own = {"activation": "sigmoid", "decision": "expected", "flips": True, "averaging": True}
    own["decoder_filters"] = (128, 64, 32)
    assert best == kernel.replace(paper, **own)
    assert (sample.activation, sample.decision, sample.flips) == ("sigmoid", "expected", True)


@pytest.mark.parametrize(
    ("preset", "on_kaggle", "expected"),
    [
        (None, False, "SAMPLE"),
        (None, True, "BEST"),
        ("PAPER", True, "PAPER"),
        ("BEST", False, "BEST"),
        ("SAMPLE", True, "SAMPLE"),
    ],
)
def test_preset_is_the_chosen_one_or_that_of_the_place(kernel, preset, on_kaggle, expected):
    found = kernel.choose_config(preset, None, on_kaggle)
    assert found == (expected, getattr(kernel, expected))


def test_single_fields_are_overridden(kernel):
    own = {"held_out": (2,), "epochs": 7, "image_size": (64, 96)}
    overrides = own | {"image_size": [64, 96], "encoders": ["efficientnetb1", (1.0, 1.2)]}
    _, config = kernel.choose_config("PAPER", overrides)
    assert config == kernel.replace(kernel.PAPER, **own, encoders=("efficientnetb1", (1.0, 1.2)))


def test_an_unknown_preset_is_refused_with_those_that_are_known(kernel):
    for preset in ("GOOD", kernel.BEST, ["BEST"]):  # in quotes is what the second was to be
        with pytest.raises(ValueError, match="of \\['PAPER', 'BEST', 'SAMPLE'\\], in quotes"):
            kernel.choose_config(preset)


REFUSED = [
    ({"encoders": ["resnet34"]}, "encoders.*'efficientnetb0', .* or 'efficientnetb7'.*'resnet34'"),
    ({"encoders": [[1.0]]}, "encoders.*Field required"),
    ({"encoders": [[1.0, 0]]}, "encoders.*greater than or equal to 0.1.*input_value=0"),
    ({"encoders": ["../efficientnetb0"]}, "encoders.*'../efficientnetb0'"),
    ({"encoders": []}, "encoders and held_out are lists"),
    ({"held_out": [0, 1, 0]}, "encoders and held_out are lists, no repeats"),
    ({"encoders": [[0.5, 0.3], [0.5, 0.3]]}, "encoders and held_out are lists, no repeats"),
    (
        {"encoders": "efficientnetb2"},
        r'encoders.*array.*PAPER has {"encoders": \["efficientnetb0"\]}',
    ),
    ({"held_out": 1}, r'held_out.*array.*PAPER has {"held_out": \[0\]}'),
    ({"encoder_weights": 1}, "encoder_weights.*valid string.*input_value=1"),
    ({"decoder_filters": [32, 0]}, "decoder_filters.1.*greater than or equal to 1.*input_value=0"),
    ({"decoder_filters": []}, "decoder_filters.*at least 1 item"),
    ({"decoder_filters": [8] * 6}, "decoder_filters.*at most 5 items"),
    ({"image_size": [320, 500]}, "image_size.*multiple of 32.*input_value=500"),
    ({"image_size": [1408, 2112]}, "image_size.*less than or equal to 2100.*input_value=2112"),
    ({"image_size": [0, 0]}, "image_size.*greater than or equal to 32.*input_value=0"),
    ({"image_size": 320}, "image_size.*valid array.*input_value=320"),
    ({"image_size": [480, 320]}, r"are \(height, width\), not the reverse.*\[1312, 2080\]"),
    ({"image_size": [320.0, 480.0]}, "image_size.*valid integer.*320.0"),
    ({"classifier_size": [224, 2101]}, "classifier_size.*less than or equal to 2100"),
    ({"classifier_size": [96, 64]}, r"image_size and classifier_size are \(height, width\)"),
    ({"activation": "relu"}, "activation.*'softmax' or 'sigmoid'.*'relu'"),
    ({"precision": "float16"}, "precision.*'float32', 'mixed_float16' or .*'float16'"),
    ({"batch_norm_momentum": 1.5}, "batch_norm_momentum.*less than or equal to 1.*1.5"),
    ({"augmentation_probability": -0.1}, "augmentation_probability.*-0.1"),
    ({"augmentation_probability": math.nan}, "augmentation_probability.*nan"),
    ({"rotation_limit": 360}, "rotation_limit.*less than or equal to 180.*360"),
    ({"folds": 1}, "folds.*greater than or equal to 2.*input_value=1"),
    ({"held_out": [5]}, "held_out are lists, no repeats, folds 0 to 4"),
    ({"held_out": [-1]}, "held_out are lists, no repeats, folds 0 to 4"),
    ({"held_out": []}, "held_out are lists"),
    ({"held_out": ["0"]}, "held_out.*valid integer.*'0'"),
    ({"batch_size": 0}, "batch_size.*greater than or equal to 1.*input_value=0"),
    ({"batch_size": 2.5}, "batch_size.*valid integer.*2.5"),
    ({"epochs": 0}, "epochs.*greater than or equal to 1.*input_value=0"),
    ({"epochs": True}, "epochs.*valid integer.*True"),
    ({"baseline_epochs": 0}, "baseline_epochs.*greater than or equal to 1"),
    ({"classifier_epochs": 0}, "classifier_epochs.*greater than or equal to 1"),
    ({"classifier_epochs": [20, 20]}, "classifier_epochs.*valid integer"),
    ({"learning_rate": 0}, "learning_rate.*greater than 0.*input_value=0"),
    ({"learning_rate": "1e-3"}, "learning_rate.*valid number.*'1e-3'"),
    ({"cross_entropy_weight": 7}, "cross_entropy_weight.*less than or equal to 1"),
    ({"gate_recall": 94}, "gate_recall.*less than or equal to 1.*94"),
    ({"flips": "yes"}, "flips.*valid boolean.*'yes'"),
    ({"flips": 1}, "flips.*valid boolean"),
    ({"averaging": 0.5}, "averaging.*valid boolean.*0.5"),
    ({"decision": "best"}, "decision.*'half', 'threshold and area', 'gated' or 'expected'"),
    ({"image_limit": 0}, "image_limit.*greater than or equal to 1"),
    ({"broken_share": 10}, "broken_share.*less than or equal to 1"),
    ({"hours": -1}, "hours.*greater than or equal to 0.001.*-1"),
    ({"seed": -1}, "seed.*greater than or equal to 0.*-1"),
    ({"seed": None}, "seed.*valid integer.*None"),
    ({"epoch": 1}, "there is no field 'epoch'; nearest is epochs"),
    ({"encoder": ["efficientnetb2"]}, "there is no field 'encoder'; nearest is encoders"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda part: str(part)[:40])
def test_values_that_are_not_allowed_are_refused_with_those_that_are(kernel, fields, message):
    with pytest.raises(ValueError, match=f"(?s)^overrides .*{message}") as error:
        kernel.choose_config("PAPER", fields)
    print(error.value)


def test_every_field_has_a_value_that_is_refused_also_by_replace(kernel):
    names = {field.name for field in dataclasses.fields(kernel.Config)}
    assert {name for fields, _ in REFUSED for name in fields} == {*names, "epoch", "encoder"}
    for fields, _ in REFUSED[:-2]:
        tuples = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
        with pytest.raises(ValueError, match="Config"):
            kernel.replace(kernel.PAPER, **tuples)


@given(
    field=st.sampled_from(sorted({field for fields, _ in REFUSED for field in fields})),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=2),
        max_leaves=5,
    ),
)
def test_any_value_is_allowed_or_refused_with_the_field_s_name(kernel, field, value):
    try:
        _, config = kernel.choose_config("BEST", {field: value})
    except ValueError as error:
        assert field in str(error)
    else:
        found = getattr(config, field)
        assert found == (tuple(value) if isinstance(value, list) else value)
        hash(config)


@pytest.mark.parametrize("overrides", ["{", "fold", [1], 1, {"epochs"}, {"epochs": {1}}], ids=str)
def test_overrides_that_are_no_object_are_refused_with_their_name(kernel, overrides):
    with pytest.raises(ValueError) as error:
        kernel.choose_config("BEST", overrides)
    named = f"overrides {overrides}: ", 'and overrides a dictionary, for example {"epochs": 3}.'
    assert named[not isinstance(overrides, dict)] in str(error.value)


# The device and the hours


def pretend_gpus(kernel, monkeypatch, tmp_path, gpus, status):
    """Let TensorFlow find a number of GPUs and nvidia-smi, if there is one, end with a status.

    Returns a file that is there as soon as nvidia-smi was asked.
    """
    asked = tmp_path / "asked"
    if status is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n: > {asked}\nexit {status}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    devices = [types.SimpleNamespace(name=f"GPU:{number}") for number in range(gpus)]
    monkeypatch.setattr(kernel.tf.config, "list_physical_devices", lambda kind: devices)
    monkeypatch.setattr(kernel.tf.distribute, "MirroredStrategy", lambda: "mirrored")
    monkeypatch.setattr(kernel.tf.distribute, "get_strategy", lambda: "single")
    return asked


@pytest.mark.parametrize("on_kaggle", [True, False])
@pytest.mark.parametrize(
    ("gpus", "status", "expected"),
    [
        (2, 0, ("mirrored", "mixed_float16")),
        (1, 0, ("single", "mixed_float16")),
        (2, 9, ("mirrored", "mixed_float16")),
        (1, None, ("single", "mixed_float16")),
        (0, 9, ("single", "float32")),
        (0, None, ("single", "float32")),
    ],
)
def test_all_gpus_are_used_whatever_the_driver_says(
    kernel, monkeypatch, tmp_path, warnings, on_kaggle, gpus, status, expected
):
    asked = pretend_gpus(kernel, monkeypatch, tmp_path, gpus, status)
    assert kernel.choose_device({}, on_kaggle) == expected and not warnings
    assert asked.exists() == (on_kaggle and gpus == 0 and status is not None)


def test_a_gpu_that_tensorflow_does_not_see_ends_the_run_on_kaggle(
    kernel, monkeypatch, tmp_path, warnings
):
    pretend_gpus(kernel, monkeypatch, tmp_path, 0, 0)
    with pytest.raises(RuntimeError, match="does not see the GPU. Restart"):
        kernel.choose_device({}, True)
    assert kernel.choose_device({}, False) == ("single", "float32") and not warnings


def test_a_gpu_that_is_hidden_on_purpose_is_not_asked_for(kernel, monkeypatch, tmp_path, warnings):
    asked = pretend_gpus(kernel, monkeypatch, tmp_path, 0, 0)
    found = kernel.choose_device({"CUDA_VISIBLE_DEVICES": "-1"}, True)
    assert found == ("single", "float32") and not warnings and not asked.exists()


def test_a_tpu_machine_without_a_tpu_ends_the_run_and_says_what_to_do(kernel):
    """TensorFlow's own build has no TPU, as Kaggle's image before the installation."""
    with pytest.raises(RuntimeError, match="does not find the TPU. Restart .* internet access on"):
        kernel.choose_device({"ISTPUVM": "1"})


@pytest.mark.parametrize(
    ("on_kaggle", "hours", "expected"),
    [
        (True, None, 11.75),
        (True, 3.0, 3.0),
        (True, 20.0, 11.75),
        (False, 20.0, 20.0),
        (False, None, 1e3),
    ],
)
def test_a_run_takes_the_chosen_hours_but_not_more_than_kaggle_grants(
    kernel, source, tmp_path, on_kaggle, hours, expected
):
    folders = {"input_folder": source, "output_folder": tmp_path / "output", "earlier_folders": []}
    overrides = {"hours": hours, "precision": "float32"}
    parameters = folders | {"overrides": overrides, "ON_KAGGLE": on_kaggle}
    found = run_cells(kernel, "Split, augment, batch", **parameters)
    assert found["config"].hours == expected
    assert found["session_end"] == found["started"] + 3600 * expected


def test_the_chosen_precision_and_the_strategy_are_set_for_all_networks(begin):
    try:
        found = begin(until="Split, augment, batch", precision="mixed_bfloat16")
        assert tf.keras.mixed_precision.global_policy().name == "mixed_bfloat16"
        assert tf.distribute.get_strategy() is found["strategy"]
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


# What earlier sessions have left


def write_network(output, name, epochs, text="weights"):
    """A network's folder in an output, with a history of some epochs."""
    folder = output / "networks" / name
    (folder / "state").mkdir(parents=True)
    rows = "".join(f"{epoch},0.5,0.5\n" for epoch in epochs)
    (folder / "history.csv").write_text(f"epoch,loss,val_loss\n{rows}")
    for part in ("settings.json", "weights.h5", "state/checkpoint"):
        (folder / part).write_text(f"{part} {text}")
    return folder


def read_files(folder):
    """The files below a folder, by their path in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_earlier_outputs_are_found_where_kaggle_mounts_them_or_where_it_is_said(
    kernel, tmp_path, monkeypatch
):
    mount, now = tmp_path / "mount", tmp_path / "now"
    outputs = [mount / "notebooks" / "someone" / "clouds-b1", mount / "my-dataset"]
    for output, name in zip(outputs, "ab"):
        write_network(output, name, range(2))

    def copy(earlier, mount=mount):
        shutil.rmtree(now, ignore_errors=True)
        (now / "networks").mkdir(parents=True)
        kernel.copy_networks(now, earlier, mount)
        return sorted(path.name for path in (now / "networks").iterdir())

    assert copy(None) == ["a", "b"]
    assert copy([str(outputs[0])]) == ["a"] and copy(outputs[1:]) == ["b"]
    monkeypatch.setenv("HOME", str(mount))
    assert copy(["~/my-dataset", outputs[0]]) == ["a", "b"]
    assert copy([]) == copy(None, mount / "none") == []
    with pytest.raises(FileNotFoundError, match="no networks in elsewhere, .*other"):
        copy([outputs[0], "elsewhere", tmp_path / "other"])
    assert read_files(now) == {}


def test_the_cell_s_earlier_outputs_are_copied_and_counted(kernel, source, tmp_path, capsys):
    earlier = write_network(tmp_path / "earlier", "a", range(2))
    folders = {"input_folder": source, "output_folder": tmp_path / "new" / "output"}
    folders["earlier_folders"] = [str(tmp_path / "earlier")]
    run_cells(kernel, "Split, augment, batch", **folders)
    assert read_files(tmp_path / "new" / "output" / "networks" / "a") == read_files(earlier)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"{earlier} is copied.",
        f"{tmp_path / 'new' / 'output'} holds 1 networks so far",
    ]


def test_networks_of_earlier_sessions_are_copied_whole_and_once(kernel, tmp_path, capsys):
    """Folders without settings are none, and what a killed session has left is no part of them."""
    earlier, now = tmp_path / "earlier", tmp_path / "now"
    networks = [write_network(earlier, name, range(2), text=name) for name in "ab"]
    (write_network(earlier, "c", range(9)) / "settings.json").unlink()
    (now / "networks").mkdir(parents=True)
    for name in ("old", "settings.json"):
        (now / "part" / "state" / name).parent.mkdir(parents=True, exist_ok=True)
        (now / "part" / "state" / name).write_text("half")
    for copies in (2, 0):
        kernel.copy_networks(now, [earlier])
        assert read_files(now) == {
            f"networks/{network.name}/{name}": content
            for network in networks
            for name, content in read_files(network).items()
        }
        assert capsys.readouterr().out.count("is copied") == copies


KILLED = """
import os, signal, shutil
from pathlib import Path
from conftest import KERNEL as kernel
earlier, output, place, name, number = sys.argv[1:]

def die(place, name, number):
    whole, calls = getattr(place, name), []
    def count(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(place, name, count)

die({"shutil": shutil, "Path": Path}[place], name, int(number))
kernel.copy_networks(Path(output), [earlier])
"""


@pytest.mark.parametrize("own", [None, range(1)])
@pytest.mark.parametrize(("place", "number"), [("shutil.copyfile", 3), ("Path.rename", 1)])
def test_a_half_copy_left_by_a_kill_is_replaced(kernel, tmp_path, own, place, number):
    """Until it is whole, a copy takes no network's name."""
    earlier, now = write_network(tmp_path / "earlier", "a", range(2), text="new"), tmp_path / "now"
    (now / "networks").mkdir(parents=True)
    if own:
        write_network(now, "a", own, text="old")
    before = read_files(now / "networks")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{KILLED}"
    command = [sys.executable, "-c", code, tmp_path / "earlier", now, *place.split("."), number]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert read_files(now / "networks") == (before if place == "shutil.copyfile" else {})
    assert read_files(now / "part")
    kernel.copy_networks(now, [tmp_path / "earlier"])
    assert read_files(now) == {f"networks/a/{k}": v for k, v in read_files(earlier).items()}


@pytest.mark.parametrize("own", [None, 1, 9, 10])
def test_of_several_sessions_the_network_with_the_most_epochs_is_taken(kernel, tmp_path, own):
    """Whatever their order; this session's own counts too, and an epoch that stands twice once."""
    histories = {"a": range(2), "b": range(9), "c": range(5), "d": [0, 1, 2, 0, 1, 2] * 3}
    for name, epochs in histories.items():
        write_network(tmp_path / name, "net", epochs, text=name)
    outputs = [tmp_path / name for name in histories]
    for index, order in enumerate(itertools.permutations(outputs)):
        now = tmp_path / f"now{index}"
        (now / "networks").mkdir(parents=True)
        if own:
            write_network(now, "net", range(own), text="own")
        kernel.copy_networks(now, order)
        taken = now / "networks" / "net"
        expected = "own" if own and own >= 9 else "b"
        assert (taken / "weights.h5").read_text() == f"weights.h5 {expected}"
        assert len(kernel.read_history(taken)) == max(own or 0, 9)


def test_a_network_without_a_history_is_copied_but_not_over_another(kernel, tmp_path):
    """As one that was killed in its first epoch."""
    now = tmp_path / "now"
    (now / "networks").mkdir(parents=True)
    for name, text in (("a", None), ("b", "")):
        history = write_network(tmp_path / name, "net", [], text=name) / "history.csv"
        history.unlink() if text is None else history.write_text(text)
    for _ in range(2):
        kernel.copy_networks(now, [tmp_path / "a", tmp_path / "b"])
        assert (now / "networks" / "net" / "weights.h5").read_text() == "weights.h5 a"


def test_links_below_the_mount_are_followed(kernel, tmp_path):
    """To outputs, to networks and to files; the copies are no links."""
    mount, now = tmp_path / "mount", tmp_path / "now"
    for folder in (mount / "notebooks", mount / "dataset" / "networks", now / "networks"):
        folder.mkdir(parents=True)
    first = write_network(tmp_path / "elsewhere", "a", range(2))
    (mount / "notebooks" / "clouds").symlink_to(tmp_path / "elsewhere")
    second = write_network(tmp_path / "other", "b", range(2))
    (mount / "dataset" / "networks" / "b").symlink_to(second)
    (second / "weights.h5").rename(tmp_path / "weights.h5")
    (second / "weights.h5").symlink_to(tmp_path / "weights.h5")
    kernel.copy_networks(now, None, mount)
    for folder in (first, second):
        assert read_files(now / "networks" / folder.name) == read_files(folder)
    assert not any(path.is_symlink() for path in now.rglob("*"))


def test_copies_of_what_may_only_be_read_may_be_written(kernel, tmp_path):
    """Kaggle mounts outputs so; a copy is then trained further, or replaced by a later one."""
    now = tmp_path / "now"
    (now / "networks").mkdir(parents=True)
    outputs = [tmp_path / name for name in "ab"]
    for output, epochs in zip(outputs, (2, 3)):
        write_network(output, "net", range(epochs))
        for path in [output, *output.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    for output in outputs:
        kernel.copy_networks(now, [output])
        assert read_files(now / "networks") == read_files(output / "networks")
        assert all(path.stat().st_mode & 0o200 for path in [now, *now.rglob("*")])


def test_an_output_whose_name_tensorflow_takes_for_a_pattern_is_refused(begin, tmp_path):
    for name in ("a[1]", "a{1}", "a*", "a?"):
        with pytest.raises(ValueError, match=re.escape(f"cannot save in {tmp_path / name}: ")):
            begin(output_folder=tmp_path / name)
        assert not (tmp_path / name).exists()


def test_an_output_that_cannot_be_written_is_refused_by_its_name(begin, tmp_path):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", Path("/proc/output")):
        with pytest.raises(OSError, match=str(folder)):
            begin(output_folder=folder)
    assert (tmp_path / "file").read_text() == "text"
