"""Where ImageNet's weights come from, and that a session without them ends at its start."""

import pytest

NAME = "efficientnet-b3_weights_tf_dim_ordering_tf_kernels_autoaugment_notop.h5"


@pytest.fixture
def config(kernel):
    """BEST with B3."""
    return kernel.replace(kernel.BEST, encoder="efficientnetb3")


@pytest.fixture
def offline(kernel, monkeypatch):
    """No file can be downloaded; what was tried is collected."""
    tried = []

    def fail(name, url, **options):
        tried.append((name, url, options))
        raise Exception("URL fetch failure")  # as Keras does

    monkeypatch.setattr(kernel.tf.keras.utils, "get_file", fail)
    return tried


def touch(path):
    """An empty file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def test_keras_s_folder_wins_over_datasets_and_these_over_a_download(
    kernel, config, tmp_path, offline
):
    mount, home = tmp_path / "input", tmp_path / "home"
    known = touch(
        mount / "efficientnet-keras-weights-b0b5" / "efficientnet-b3_imagenet_1000_notop.h5"
    )
    touch(mount / "efficientnet-keras-weights-b0b5" / "efficientnet-b2_imagenet_1000_notop.h5")
    assert kernel.find_weights(config, mount, home) == known
    exact = touch(mount / "datasets" / "someone" / "weights" / NAME)
    assert kernel.find_weights(config, mount, home) == exact
    kept = touch(home / ".keras" / "models" / NAME)
    assert kernel.find_weights(config, mount, home) == kept
    assert offline == []


def test_the_package_s_own_file_is_downloaded_and_checked(kernel, config, tmp_path, monkeypatch):
    def download(name, url, file_hash, cache_subdir, cache_dir):
        assert url.endswith(f"/efficientnet/{name}") and url.startswith("https://github.com/")
        assert len(file_hash) == 64
        return f"{cache_dir}/{cache_subdir}/{name}"

    monkeypatch.setattr(kernel.tf.keras.utils, "get_file", download)
    expected = str(tmp_path / ".keras" / "models" / NAME)
    assert kernel.find_weights(config, tmp_path / "none", tmp_path) == expected


@pytest.mark.parametrize("preset", ["PAPER", "BEST"])
def test_without_any_the_three_ways_are_named(kernel, preset, tmp_path, offline):
    message = (
        r"no ImageNet weights for efficientnetb0.*internet.*downloaded.*attach a dataset with "
        r"efficientnet-b0_weights.* or efficientnet-b0_imagenet_1000_notop.h5, such as "
        r"efficientnet-keras-weights-b0b5.*put .* into .*models"
    )
    with pytest.raises(FileNotFoundError, match=message):
        kernel.find_weights(kernel.PRESETS[preset], tmp_path, tmp_path)
    assert len(offline) == 1


def test_other_weights_are_not_looked_for(kernel, config, tmp_path, offline):
    mine = touch(tmp_path / "mine.h5")
    for weights in (None, mine):
        own = kernel.replace(config, encoder_weights=weights)
        assert kernel.find_weights(own, tmp_path, tmp_path) == weights
    with pytest.raises(FileNotFoundError, match="encoder_weights: there is no file no.h5."):
        kernel.find_weights(kernel.replace(config, encoder_weights="no.h5"), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="efficientnet-1.0-1.2 has no ImageNet weights"):
        kernel.find_weights(kernel.replace(config, encoder=(1.0, 1.2)), tmp_path, tmp_path)
    assert offline == []
