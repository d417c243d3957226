"""Measure what a training step of EfficientUNet takes for each million pixels, on the CPU.

PYTHONPATH=tests python tests/benchmarks/memory.py [PRESET [ENCODER ...]]

The decoder is PAPER's or that of another preset. The plan of choose_batch_size is tested against
these numbers. Each comes from the peak memory of two processes, in float32 and in bfloat16, which
do the same step with few and with more images: their difference is what the images take. The
weights and TensorFlow's graph are in neither.
"""

import subprocess
import sys

import numpy as np
import tensorflow as tf
from conftest import KERNEL

SIZE, FEW, MORE = (320, 480), 2, 6


def take_steps(preset, encoder, precision, images):
    """Do two training steps on random images and print the process's peak memory in bytes."""
    tf.keras.mixed_precision.set_global_policy(precision)
    filters = getattr(KERNEL, preset).decoder_filters
    config = KERNEL.replace(KERNEL.BEST, encoder_weights=None, decoder_filters=filters)
    model = KERNEL.build_efficient_unet(config, encoder, SIZE)
    model.compile("sgd", KERNEL.functools.partial(KERNEL.unet_loss, config))
    random = np.random.default_rng(0)
    pictures = random.integers(256, size=(2 * images, *SIZE, 3), dtype=np.uint8)
    planes = random.integers(16, size=(2 * images, *SIZE), dtype=np.uint8)
    model.fit(pictures, planes, batch_size=images, verbose=0)
    with open("/proc/self/status") as lines:
        peak = next(line for line in lines if line.startswith("VmHWM"))
    print("peak", 1024 * int(peak.split()[1]))


def measure(preset, encoder, precision, images):
    """What take_steps prints, from a process of its own."""
    command = [sys.executable, __file__, "steps", preset, encoder, precision, str(images)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.rpartition("peak ")[2])


def main(preset="PAPER", *encoders):
    """Print a line for each encoder."""
    pixels = (MORE - FEW) * SIZE[0] * SIZE[1] / 1e6
    for encoder in encoders or [f"efficientnetb{number}" for number in range(8)]:
        found = []
        for precision in ("float32", "mixed_bfloat16"):
            few, more = (measure(preset, encoder, precision, count) for count in (FEW, MORE))
            found.append((more - few) / 2**30 / pixels)
        each = "{:.2f} GiB in 32 bits, {:.2f} in 16 bits".format(*found)
        print(f"{encoder}: {each} for a million pixels", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["steps"]:
        take_steps(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main(*sys.argv[1:])
