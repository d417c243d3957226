"""Time the generator on one thread beside its floor, the decoding of the JPEG files alone.

PYTHONPATH=tests python tests/benchmarks/generator.py INPUT_FOLDER [EXAMPLES]
"""

import sys
import time
from pathlib import Path

import cv2
import numpy as np
from conftest import KERNEL

FLAGS = {(1312, 2080): cv2.IMREAD_COLOR, (320, 480): cv2.IMREAD_REDUCED_COLOR_4}


def measure(function, examples):
    """The mean milliseconds of processor time of a function of a number, after a few to warm up."""
    for number in range(5):
        function(number)
    start = time.process_time()
    for number in range(examples):
        function(number)
    return 1000 * (time.process_time() - start) / examples


def main(folder, examples):
    """Print the floor and the generator at both sizes."""
    labels = KERNEL.read_labels(folder / "train.csv")
    paths = [folder / "train_images" / name for name in labels.index]
    rows = [picture for _, picture in labels.assign(path=paths).iterrows()]
    files = [np.fromfile(path, np.uint8) for path in paths]
    count = len(paths)
    cv2.setNumThreads(1)
    check = measure(lambda number: KERNEL.read_image(paths[number % count], (175, 262)), examples)
    print(f"{check:.1f} ms to look for a fault in an image")
    for size, flag in FLAGS.items():
        floor = measure(lambda n, flag=flag: cv2.imdecode(files[n % count], flag), examples)
        print(f"{size}: {floor:.1f} ms to decode an image")
        kinds = {"half of the examples augmented": 0.5, "with all four transforms": 1.0}
        for kind, probability in kinds.items():
            config = KERNEL.replace(KERNEL.PAPER, augmentation_probability=probability)
            plans = (KERNEL.plan_epoch(count, epoch, 0) for epoch in range(examples))
            plan = np.concatenate(list(plans))

            def load(number, config=config, plan=plan, size=size):
                index, draw = plan[number]
                KERNEL.load_example(config, rows[index], size, draw)

            found = measure(load, examples)
            print(f"  {kind}: {found:.1f} ms an example, {found / floor:.2f} x decoding")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
