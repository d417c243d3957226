"""The configuration, and the folders that a run reads and writes."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_presets_differ_where_they_say(kernel):
    assert kernel.PAPER.image_size == kernel.BEST.image_size == (1312, 2080)
    assert (kernel.PAPER.activation, kernel.BEST.activation) == ("softmax", "sigmoid")
    assert kernel.PAPER.encoder_weights == kernel.BEST.encoder_weights == "imagenet"
    assert kernel.SAMPLE.encoder_weights is None
    assert kernel.PAPER.cross_entropy_weight == 0.7
    assert kernel.PAPER.rotation_limit == 20
    assert kernel.PAPER.folds == 5 and kernel.PAPER.fold == 0


@pytest.mark.parametrize(
    ("cell", "environment", "expected"),
    [
        (None, {}, "SAMPLE"),
        (None, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "BEST"),
        ("PAPER", {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "PAPER"),
        ("PAPER", {"CLOUDS_PRESET": "BEST"}, "BEST"),
        ("BEST", {"CLOUDS_PRESET": ""}, "BEST"),
    ],
)
def test_preset_comes_from_environment_then_cell_then_place(kernel, cell, environment, expected):
    assert kernel.choose_config(cell, None, environment) == (expected, kernel.PRESETS[expected])


def test_single_fields_are_overridden(kernel):
    environment = {"CLOUDS_OVERRIDES": json.dumps({"epochs": 7, "image_size": [64, 96]})}
    _, config = kernel.choose_config("PAPER", {"fold": 2, "epochs": 3}, environment)
    assert config == kernel.replace(kernel.PAPER, fold=2, epochs=7, image_size=(64, 96))


def test_a_single_encoder_or_fold_replaces_the_preset_s_list(kernel):
    _, config = kernel.choose_config("SAMPLE", {"encoder": "efficientnetb1", "fold": 3}, {})
    assert (config.encoders, config.folds_to_run) == ((), ())
    environment = {"CLOUDS_OVERRIDES": '{"encoders": ["efficientnetb1", [1.0, 1.2]], "fold": 3}'}
    _, config = kernel.choose_config("SAMPLE", {}, environment)
    assert config.encoders == ("efficientnetb1", (1.0, 1.2))


def test_unknown_names_are_refused_with_what_is_known(kernel):
    with pytest.raises(ValueError, match="no preset 'GOOD', only PAPER, BEST, SAMPLE"):
        kernel.choose_config("GOOD", None, {})
    with pytest.raises(ValueError, match="no field epoch, only encoder, .*epochs"):
        kernel.choose_config("BEST", {"epoch": 1}, {})
    with pytest.raises(ValueError, match="no field x"):
        kernel.choose_config("BEST", {}, {"CLOUDS_OVERRIDES": '{"x": 1}'})


REFUSED = [
    (
        {"encoder": "resnet34"},
        "encoder is 'resnet34', it has to be 'efficientnetb0' or .*b7'; or a list of 2",
    ),
    ({"encoder": [1.0]}, r"encoder is \(1.0,\), it .* a list of 2, each a number from 0.1 to 10"),
    ({"encoder": [1.0, 0]}, r"encoder is \(1.0, 0\)"),
    ({"encoder": "../efficientnetb0"}, "encoder is '../efficientnetb0'"),
    (
        {"encoders": ["efficientnetb0", "b1"]},
        "encoders is .* a list of different ones, each 'effic",
    ),
    ({"encoders": ["efficientnetb0", "efficientnetb0"]}, "encoders is .* different ones"),
    ({"encoders": "efficientnetb0"}, "encoders is 'efficientnetb0'"),
    ({"encoder_weights": 1}, "encoder_weights is 1, it has to be 'imagenet', the path of an HDF5"),
    (
        {"image_size": [320, 500]},
        r"image_size is \(320, 500\), it has to be \(height, width\) from \(32, 32\) to "
        r"\(1376, 2080\) in multiples of 32, no higher than wide",
    ),
    ({"image_size": [1408, 2112]}, r"image_size is \(1408, 2112\)"),
    ({"image_size": [0, 0]}, r"image_size is \(0, 0\)"),
    ({"image_size": 320}, "image_size is 320"),
    ({"image_size": [480, 320]}, r"image_size is \(480, 320\)"),
    ({"image_size": [320.0, 480.0]}, "image_size is"),
    ({"classifier_size": [224, 2101]}, r"classifier_size is .* to \(1400, 2100\), no .* or None"),
    ({"activation": "relu"}, "activation is 'relu', it has to be 'softmax' or 'sigmoid'"),
    ({"precision": "float16"}, "precision is 'float16', it has to be 'float32' or 'mixed_float16'"),
    ({"batch_norm_momentum": 1.5}, "batch_norm_momentum is 1.5, it has to be a number from 0 to 1"),
    ({"augmentation_probability": -0.1}, "augmentation_probability is -0.1"),
    ({"augmentation_probability": math.nan}, "augmentation_probability is nan"),
    ({"rotation_limit": 360}, "rotation_limit is 360, it has to be a number from 0 to 180"),
    ({"folds": 1}, "folds is 1, it has to be a whole number from 2 to 1000"),
    ({"fold": 5}, "fold is 5, the folds are 0 to 4"),
    ({"fold": -1}, "fold is -1"),
    ({"fold": "0"}, "fold is '0'"),
    ({"folds_to_run": [0, 7]}, r"folds_to_run is \(0, 7\), the folds are 0 to 4"),
    ({"folds_to_run": [1, 1]}, "folds_to_run is .* different ones"),
    ({"batch_size": 0}, "batch_size is 0, it has to be a whole number from 1 to"),
    ({"batch_size": 2.5}, "batch_size is 2.5"),
    ({"classifier_batch_size": -4}, "classifier_batch_size is -4"),
    ({"epochs": 0}, "epochs is 0"),
    ({"epochs": True}, "epochs is True"),
    (
        {"classifier_epochs": [20, 0]},
        r"classifier_epochs is \(20, 0\), it has to be a list of 2, each a",
    ),
    ({"classifier_epochs": [20]}, "classifier_epochs is"),
    ({"learning_rate": 0}, "learning_rate is 0"),
    ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
    ({"warmup_proportion": 2}, "warmup_proportion is 2"),
    ({"cross_entropy_weight": 7}, "cross_entropy_weight is 7"),
    ({"dice_smoothing": 0}, "dice_smoothing is 0"),
    ({"gate_recall": 94}, "gate_recall is 94"),
    ({"flips": "yes"}, "flips is 'yes', it has to be True or False"),
    ({"flips": 1}, "flips is 1"),
    ({"decision": "half"}, "decision is 'half', it has to be 'best' or 'threshold 0.5' or"),
    ({"broken_share": 10}, "broken_share is 10"),
    ({"train": None}, "train is None"),
    ({"hours": -1}, "hours is -1, it has to be a number from 0.001 to 1000; or None"),
    ({"threads": 0}, "threads is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": None}, "seed is None"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda part: str(part)[:40])
def test_values_that_are_not_allowed_are_refused_with_those_that_are(kernel, fields, message):
    with pytest.raises(ValueError, match=f"^Config: {message}") as error:
        kernel.choose_config("PAPER", fields, {})
    print(error.value)
    environment = {"CLOUDS_OVERRIDES": json.dumps(fields)}
    with pytest.raises(ValueError, match=f"^Config: {message}"):
        kernel.choose_config("PAPER", {}, environment)


def test_every_field_has_a_rule_and_a_refused_value(kernel):
    names = [field.name for field in dataclasses.fields(kernel.Config)]
    assert list(kernel.RULES) != [] and set(kernel.RULES) == set(names)
    assert {name for fields, _ in REFUSED for name in fields} == set(names)
    assert set(kernel.DECISIONS) == {"best", *kernel.WAYS}
    for preset in kernel.PRESETS.values():
        assert kernel.check_config(preset) is preset


@given(
    field=st.sampled_from(sorted(field for fields, _ in REFUSED for field in fields)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=2),
        max_leaves=5,
    ),
)
@settings(max_examples=2000)
def test_any_value_is_allowed_or_refused_with_the_field_s_name(kernel, field, value):
    try:
        _, config = kernel.choose_config("BEST", {field: value}, {})
    except ValueError as error:
        assert field in str(error)
    else:
        assert getattr(config, field) == kernel.to_tuples(value)
        hash(config)


@pytest.mark.parametrize("text", ["{", "[1]", "1", '"fold"', "{fold: 1}"])
def test_overrides_that_are_no_object_are_refused(kernel, text):
    with pytest.raises(ValueError, match="^CLOUDS_OVERRIDES is .*, it has to be JSON like"):
        kernel.choose_config("BEST", {}, {"CLOUDS_OVERRIDES": text})


def test_overrides_in_the_cell_that_are_no_dictionary_are_refused(kernel):
    with pytest.raises(ValueError, match="overrides is 'fold', it has to be like {'fold': 1}."):
        kernel.choose_config("BEST", "fold", {})


def test_more_hours_than_kaggle_grants_are_refused_there(kernel):
    accelerator = kernel.make_strategy({})
    kaggle, longer = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, kernel.replace(kernel.BEST, hours=12)
    with pytest.raises(ValueError, match="hours is 12, with this accelerator Kaggle grants 11.75"):
        kernel.suit(longer, accelerator, kaggle)
    assert kernel.suit(longer, accelerator, {}).hours == 12
    assert kernel.suit(kernel.replace(longer, hours=2), accelerator, kaggle).hours == 2
    assert kernel.suit(kernel.BEST, accelerator, kaggle).hours == 11.75


def make_input(folder):
    """An empty folder in the layout of the competition's data."""
    for part in ("train_images", "test_images"):
        (folder / part).mkdir(parents=True)
    for part in ("train.csv", "sample_submission.csv"):
        (folder / part).touch()
    return folder


def test_input_is_found_at_each_mount_point_newest_first(kernel, tmp_path):
    kaggle = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    deep = make_input(tmp_path / "datasets" / "someone" / "clouds")
    assert kernel.find_input(None, kaggle, tmp_path) == deep
    former = make_input(tmp_path / "understanding_cloud_organization")
    assert kernel.find_input(None, kaggle, tmp_path) == former
    present = make_input(tmp_path / "competitions" / "understanding_cloud_organization")
    assert kernel.find_input(None, kaggle, tmp_path) == present
    assert kernel.find_input(str(deep), kaggle, tmp_path) == deep
    assert kernel.find_input(str(deep), {"CLOUDS_INPUT": str(former)}, tmp_path) == former


def test_missing_input_says_how_to_attach_it_on_kaggle(kernel, tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(FileNotFoundError, match="competitions/understanding.*Add Input.*accept"):
        kernel.find_input(None, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, tmp_path)
    with pytest.raises(FileNotFoundError, match="elsewhere has no train.csv, train_images, sample"):
        kernel.find_input(None, {"CLOUDS_INPUT": str(tmp_path / "elsewhere")}, tmp_path)


def test_without_competition_data_the_sample_is_read(kernel, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(sample.parents[1])
    assert kernel.find_input(None, {}, tmp_path).resolve() == sample


def test_output_folder_is_chosen_and_made(kernel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(kernel.make_output(None, {})) == "output"
    assert (tmp_path / "output").is_dir()
    assert kernel.make_output("a", {"CLOUDS_OUTPUT": str(tmp_path / "b" / "c")}).is_dir()
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel.make_output("~/c", {}) == tmp_path / "c"


def test_a_file_is_written_whole_or_not_at_all(kernel, tmp_path, monkeypatch):
    kernel.write_whole(tmp_path / "results.json", "old")

    def fail(*arguments):
        raise OSError("killed before the rename")

    monkeypatch.setattr(kernel.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        kernel.write_whole(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"
