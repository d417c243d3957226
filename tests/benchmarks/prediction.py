"""Show that the memory of a prediction does not grow with the number of images.

PYTHONPATH=tests python tests/benchmarks/prediction.py [IMAGES ...]

Predicts four drawn pictures of the original size again and again, in a process for each number of
images, with an untrained network at 128 x 192, and prints the peak of that process's memory.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import KERNEL
from make_sample import draw_sample

SIZE = (128, 192)


def predict(folder, count):
    """Predict `count` images from the decoding to the encoded masks; print the peak in bytes.

    They are those in `folder`, again and again.
    """
    config = KERNEL.replace(KERNEL.SAMPLE, precision="float32")
    parts = KERNEL.build_efficient_unet, KERNEL.unet_loss, KERNEL.dice_at_half
    unet = KERNEL.Network("U-Net", config.encoders[0], 0, KERNEL.UNetConfig, SIZE, 1, *parts)
    model = KERNEL.build_predictor(unet.build(config, unet.encoder, SIZE), True)
    predictors = [KERNEL.replace(unet, batch_size=4, model=model)]
    decide = KERNEL.use_half(config, None, None, None)
    paths = list(itertools.islice(itertools.cycle(sorted(folder.iterdir())), count))
    pictures = pd.DataFrame({"path": paths}, [f"{index:05}.jpg" for index in range(count)])
    presence = np.ones((count, len(KERNEL.CLASSES)))
    start = time.perf_counter()
    rles = KERNEL.predict_rles(predictors, pictures, presence, decide, float("inf"))
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as lines:
        peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print("bytes", peak, len(rles), sum(map(len, rles.values())), seconds)


def main(counts):
    """Print the peak for each number of images."""
    with tempfile.TemporaryDirectory() as folder:
        draw_sample(Path(folder), train=0, test=4, seed=0, size=KERNEL.ORIGINAL_SIZE)
        for count in counts:
            command = [sys.executable, __file__, "predict", f"{folder}/test_images", count]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            answer = next(line for line in output.splitlines() if line.startswith("bytes "))
            peak, rows, characters, seconds = map(float, answer.split()[1:])
            print(
                f"{count:>5} images: peak {peak / 2**20:.0f} MiB, {rows:.0f} masks encoded in "
                f"{characters / 1e6:.1f} MB, {seconds:.0f} s"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(sys.argv[1:] or ["256", "1024"])
