"""The configuration, and the folders that a run reads and writes."""

import json

import pytest


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
    with pytest.raises(FileNotFoundError, match="elsewhere is a folder with train.csv"):
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


def test_a_file_is_written_whole_or_not_at_all(kernel, tmp_path, monkeypatch):
    kernel.write_whole(tmp_path / "results.json", "old")

    def fail(*arguments):
        raise OSError("killed before the rename")

    monkeypatch.setattr(kernel.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        kernel.write_whole(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"
