"""Configure the run takes a preset, single fields and folders, and refuses what is not allowed."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_paper_is_the_paper_and_the_others_depart_where_they_say(kernel):
    paper, best, sample = kernel.PAPER, kernel.BEST, kernel.SAMPLE
    assert paper.image_size == (1312, 2080) and paper.encoder_weights == "imagenet"
    assert (paper.activation, paper.decision) == ("softmax", "threshold and area")
    assert not paper.flips and not paper.averaging
    assert (paper.cross_entropy_weight, paper.rotation_limit) == (0.7, 20)
    assert (paper.folds, paper.held_out, paper.classifier_epochs) == (5, (0,), (20, 20))
    own = {"activation": "sigmoid", "decision": "expected", "flips": True, "averaging": True}
    assert best == kernel.replace(paper, **own)
    assert (sample.activation, sample.decision, sample.flips) == ("sigmoid", "expected", True)


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
    found = kernel.choose_config(cell, None, environment)
    assert found == (expected, getattr(kernel, expected))


def test_single_fields_are_overridden_by_the_cell_and_then_by_the_environment(kernel):
    environment = {"CLOUDS_OVERRIDES": json.dumps({"epochs": 7, "image_size": [64, 96]})}
    overrides = {"held_out": [2], "epochs": 3, "encoders": ["efficientnetb1", (1.0, 1.2)]}
    _, config = kernel.choose_config("PAPER", overrides, environment)
    own = {"held_out": (2,), "epochs": 7, "image_size": (64, 96)}
    assert config == kernel.replace(kernel.PAPER, **own, encoders=("efficientnetb1", (1.0, 1.2)))


def test_an_unknown_preset_is_refused_with_those_that_are_known(kernel):
    with pytest.raises(ValueError, match="no preset 'GOOD', only PAPER, BEST, SAMPLE"):
        kernel.choose_config("GOOD", None, {})


REFUSED = [
    ({"encoders": ["resnet34"]}, "encoders.*'efficientnetb0', .* or 'efficientnetb7'.*'resnet34'"),
    ({"encoders": [[1.0]]}, "encoders.*Field required"),
    ({"encoders": [[1.0, 0]]}, "encoders.*greater than or equal to 0.1.*input_value=0"),
    ({"encoders": ["../efficientnetb0"]}, "encoders.*'../efficientnetb0'"),
    ({"encoders": []}, "encoders and held_out are lists"),
    ({"encoders": "efficientnetb0"}, "encoders.*valid array.*'efficientnetb0'"),
    ({"encoder_weights": 1}, "encoder_weights.*valid string.*input_value=1"),
    ({"image_size": [320, 500]}, "image_size.*multiple of 32.*input_value=500"),
    ({"image_size": [1408, 2112]}, "image_size.*less than or equal to 2100.*input_value=2112"),
    ({"image_size": [0, 0]}, "image_size.*greater than or equal to 32.*input_value=0"),
    ({"image_size": 320}, "image_size.*valid array.*input_value=320"),
    ({"image_size": [480, 320]}, r"image_size and classifier_size are \(height, width\)"),
    ({"image_size": [320.0, 480.0]}, "image_size.*valid integer.*320.0"),
    ({"classifier_size": [224, 2101]}, "classifier_size.*less than or equal to 2100"),
    ({"activation": "relu"}, "activation.*'softmax' or 'sigmoid'.*'relu'"),
    ({"precision": "float16"}, "precision.*'float32', 'mixed_float16' or .*'float16'"),
    ({"batch_norm_momentum": 1.5}, "batch_norm_momentum.*less than or equal to 1.*1.5"),
    ({"augmentation_probability": -0.1}, "augmentation_probability.*-0.1"),
    ({"augmentation_probability": math.nan}, "augmentation_probability.*nan"),
    ({"rotation_limit": 360}, "rotation_limit.*less than or equal to 180.*360"),
    ({"folds": 1}, "folds.*greater than or equal to 2.*input_value=1"),
    ({"held_out": [5]}, "held_out are lists, the folds 0 to 4"),
    ({"held_out": [-1]}, "held_out are lists, the folds 0 to 4"),
    ({"held_out": []}, "held_out are lists"),
    ({"held_out": ["0"]}, "held_out.*valid integer.*'0'"),
    ({"batch_size": 0}, "batch_size.*greater than or equal to 1.*input_value=0"),
    ({"batch_size": 2.5}, "batch_size.*valid integer.*2.5"),
    ({"epochs": 0}, "epochs.*greater than or equal to 1.*input_value=0"),
    ({"epochs": True}, "epochs.*valid integer.*True"),
    ({"classifier_epochs": [20, 0]}, "classifier_epochs.*greater than or equal to 1"),
    ({"classifier_epochs": [20]}, "classifier_epochs.*Field required"),
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
    ({"other_code": None}, "other_code.*valid boolean.*None"),
    ({"seed": -1}, "seed.*greater than or equal to 0.*-1"),
    ({"seed": None}, "seed.*valid integer.*None"),
    ({"epoch": 1}, "epoch.*Unexpected keyword argument"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda part: str(part)[:40])
def test_values_that_are_not_allowed_are_refused_with_those_that_are(kernel, fields, message):
    with pytest.raises(ValueError, match=f"(?s)^overrides .*{message}") as error:
        kernel.choose_config("PAPER", fields, {})
    print(error.value)
    environment = {"CLOUDS_OVERRIDES": json.dumps(fields)}
    with pytest.raises(ValueError, match=f"(?s)^overrides .*{message}"):
        kernel.choose_config("PAPER", {}, environment)


def test_every_field_has_a_value_that_is_refused_also_by_replace(kernel):
    names = {field.name for field in dataclasses.fields(kernel.Config)}
    assert {name for fields, _ in REFUSED for name in fields} == {*names, "epoch"}
    for fields, _ in REFUSED[:-1]:
        tuples = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
        with pytest.raises(ValueError, match="Config"):
            kernel.replace(kernel.PAPER, **tuples)


@given(
    field=st.sampled_from(sorted(field for fields, _ in REFUSED for field in fields)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=2),
        max_leaves=5,
    ),
)
def test_any_value_is_allowed_or_refused_with_the_field_s_name(kernel, field, value):
    try:
        _, config = kernel.choose_config("BEST", {field: value}, {})
    except ValueError as error:
        assert field in str(error)
    else:
        found = getattr(config, field)
        assert found == (tuple(value) if isinstance(value, list) else value)
        hash(config)


@pytest.mark.parametrize("text", ["{", "[1]", "1", '"fold"', "{fold: 1}"])
def test_overrides_that_are_no_object_are_refused_with_their_name(kernel, text):
    with pytest.raises(ValueError, match="and CLOUDS_OVERRIDES .*: "):
        kernel.choose_config("BEST", {}, {"CLOUDS_OVERRIDES": text})
    with pytest.raises(ValueError, match="^overrides fold and CLOUDS_OVERRIDES {}"):
        kernel.choose_config("BEST", "fold", {})


def test_earlier_outputs_are_found_where_kaggle_mounts_them_or_where_it_is_said(kernel, tmp_path):
    attached, dataset = tmp_path / "notebooks" / "someone" / "clouds-b1", tmp_path / "my-dataset"
    for folder in (attached, dataset):
        (folder / "members").mkdir(parents=True)
    assert kernel.find_earlier(None, {}, tmp_path) == [dataset, attached]
    assert kernel.find_earlier([str(attached)], {}, tmp_path) == [attached]
    listed = {"CLOUDS_EARLIER": f"{attached}{os.pathsep}{dataset}"}
    assert kernel.find_earlier(["elsewhere"], listed, tmp_path) == [attached, dataset]
    assert kernel.find_earlier(None, {}, tmp_path / "none") == []
    with pytest.raises(FileNotFoundError, match="no members in elsewhere"):
        kernel.find_earlier(["elsewhere"], {}, tmp_path)


def test_an_output_that_cannot_be_written_is_refused_by_its_name(begin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", Path("/proc/output")):
        monkeypatch.setenv("CLOUDS_OUTPUT", str(folder))
        with pytest.raises(OSError, match=str(folder)):
            begin()
    assert (tmp_path / "file").read_text() == "text"
