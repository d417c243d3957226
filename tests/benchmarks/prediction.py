"""Show that the memory of a prediction does not grow with the number of images.

PYTHONPATH=tests python tests/benchmarks/prediction.py [IMAGES ...]

Predicts the sample's test images again and again, in a process for each number of images, with an
untrained network at 128 x 192, and prints the peak of that process's memory.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import KERNEL

SAMPLE = Path(__file__).parents[1] / "sample" / "test_images"


def predict(count):
    """Predict `count` images from the decoding to the encoded masks; print the peak in bytes."""
    config = KERNEL.replace(KERNEL.SAMPLE, precision="float32")
    unet = KERNEL.build_efficient_unet(config, config.encoders[0], config.image_size)
    training = KERNEL.Training("a", "unet", config.encoders[0], 0, config.image_size, 4, 1, None)
    predictors = [(training, KERNEL.build_predictor(unet, True))]
    decide = KERNEL.use_half(config, None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        images, paths = sorted(SAMPLE.iterdir()), []
        for index in range(count):
            paths.append(Path(folder) / f"{index:05}.jpg")
            paths[-1].symlink_to(images[index % len(images)])
        presence = np.ones((count, len(KERNEL.CLASSES)))
        empty = pd.DataFrame("", [path.name for path in paths], KERNEL.CLASSES)
        start = time.perf_counter()
        images = paths, empty
        rles = KERNEL.predict_rles(config, predictors, images, presence, decide, float("inf"))
        seconds = time.perf_counter() - start
    with open("/proc/self/status") as lines:
        peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print("bytes", peak, len(rles), sum(map(len, rles.values())), seconds)


def main(counts):
    """Print the peak for each number of images."""
    for count in counts:
        command = [sys.executable, __file__, "predict", count]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        answer = next(line for line in output.splitlines() if line.startswith("bytes "))
        peak, rows, characters, seconds = map(float, answer.split()[1:])
        print(
            f"{count:>5} images: peak {peak / 2**20:.0f} MiB, {rows:.0f} masks encoded in "
            f"{characters / 1e6:.1f} MB, {seconds:.0f} s"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(int(sys.argv[2]))
    else:
        main(sys.argv[1:] or ["256", "1024"])
