"""Show that images and masks belong together, on a few images.

    PYTHONPATH=tests python tests/benchmarks/overfit.py INPUT_FOLDER [EPOCHS]

First, in the batches of the generator, augmentation included: how much of the black band, which
labellers leave out, an image's own masks cover, and how much another image's masks would. Then
EfficientUNet is trained on all images without augmentation, up to a high training Dice.
"""

import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import KERNEL


def cover_of_band(config, paths, labels, batches):
    """The shares of the black band under an image's own masks, and under the next image's."""
    own, other, band = 0, 0, 0
    dataset = KERNEL.make_dataset(config, paths, labels, first=0)
    for images, planes in itertools.islice(dataset, batches):
        black = images.numpy().max(axis=-1) <= KERNEL.BAND_BRIGHTNESS
        masked = planes.numpy() > 0
        band += black.sum()
        own += (black & masked).sum()
        other += (black & np.roll(masked, 1, axis=0)).sum()
    return own / band, other / band


def main(folder, epochs):
    """Print both proofs."""
    labels = KERNEL.read_labels(folder / "train.csv")
    paths = [folder / "train_images" / name for name in labels.index]
    changes = {"encoder": "efficientnetb0", "epochs": epochs, "learning_rate": 5.7e-3}
    session = KERNEL.Session(KERNEL.make_strategy({}), KERNEL.Clock(1000))
    config = KERNEL.suit(KERNEL.replace(KERNEL.SAMPLE, **changes), session.accelerator)
    own, other = cover_of_band(config, paths, labels, batches=50)
    print(f"black pixels under masks: own {own:.2%}, another image's {other:.2%}")

    config = KERNEL.replace(config, augmentation_probability=0.0)
    KERNEL.tf.keras.utils.set_random_seed(config.seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        model, loss = (
            KERNEL.build_efficient_unet(config),
            functools.partial(KERNEL.unet_loss, config),
        )
        parts, files = [(paths, labels)] * 2, KERNEL.Files(Path(output), "unet")
        arguments = (model, loss, parts, epochs, files, lambda seconds: 1e6)
        history = KERNEL.train(session, config, *arguments)
    seconds = time.perf_counter() - start
    print(f"{epochs} epochs in {seconds:.0f} s, loss {history['val_loss'].min():.4f}")
    maps = functools.partial(KERNEL.find_maps, model, False)
    predict = KERNEL.distribute(session.accelerator.strategy, maps)
    _, (areas, overlaps) = KERNEL.count_validation([(config, predict)], paths, labels)
    decisions = np.full(areas.shape[:2], 128)
    scores = KERNEL.score_decisions(areas, overlaps, decisions)
    for name, score in zip(KERNEL.CLASSES, scores.mean(axis=0)):
        print(f"{name:7} {score:.4f}")
    print(f"mean    {scores.mean():.4f}  training Dice of {len(paths)} images at threshold 0.5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 120)
