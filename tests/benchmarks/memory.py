"""Compare the memory of real training steps on the CPU with the notebook's estimate.

PYTHONPATH=tests python tests/benchmarks/memory.py [CASE ...]

A case is ENCODER,HEIGHT,WIDTH,IMAGES,PRECISION,NETWORK; an encoder may be WIDTHxDEPTH. Each is
measured in a process of its own: the peak of its memory in two steps, less what it had before them,
and less what the same network needs beyond its estimate at 64 x 96, which is TensorFlow's graph.
"""

import functools
import os
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
from conftest import KERNEL

CASES = (
    "efficientnetb0,320,480,4,float32,unet",
    "efficientnetb0,320,480,4,mixed_bfloat16,unet",
    "efficientnetb0,1312,2080,1,float32,unet",
    "efficientnetb0,1312,2080,1,mixed_bfloat16,unet",
    "efficientnetb2,640,960,1,float32,unet",
    "efficientnetb5,640,960,1,float32,unet",
    "0.5x0.3,640,960,4,float32,unet",
    "efficientnetb0,224,336,32,float32,classifier",
)


def make_config(encoder, height, width, images, precision):
    """The configuration of a case."""
    if "x" in encoder:
        encoder = tuple(map(float, encoder.split("x")))
    sizes = {"image_size": (height, width), "classifier_size": (height, width)}
    config = KERNEL.replace(KERNEL.BEST, encoder=encoder, encoder_weights=None, **sizes)
    return KERNEL.replace(config, precision=precision, batch_size=images)


def read_status(name):
    """A line of the process's status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def take_steps(case):
    """Do two training steps; print the bytes that they take, their seconds and their losses."""
    encoder, height, width, images, precision, network = case.split(",")
    size, images = (int(height), int(width)), int(images)
    config = make_config(encoder, *size, images, precision)
    model = KERNEL.build_network(config, network)
    measure = KERNEL.unet_loss if network == "unet" else KERNEL.classifier_loss
    loss = functools.partial(measure, config)
    optimizer = KERNEL.make_optimizer(config, 100, model.trainable_variables)
    random = np.random.default_rng(0)
    batch = random.integers(256, size=(images, *size, 3), dtype=np.uint8)
    planes = random.integers(16, size=(images, *size), dtype=np.uint8)
    step = KERNEL.make_step(model, loss, optimizer, 1)
    step = KERNEL.distribute(tf.distribute.get_strategy(), step)
    before, seconds, losses = read_status("VmRSS"), [], []
    for _ in range(2):
        start = time.perf_counter()
        losses.append(float(step(tf.constant(batch), tf.constant(planes)).numpy().mean()))
        seconds.append(time.perf_counter() - start)
    print("bytes", read_status("VmHWM") - before, *seconds, *losses)


def measure(case):
    """What take_steps prints, from a process of its own."""
    command = [sys.executable, __file__, "steps", case]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer = next(line for line in output.splitlines() if line.startswith("bytes "))
    return [float(word) for word in answer.split()[1:]]


def main(cases):
    """Print a line for each case."""
    overheads = {}
    for case in cases:
        encoder, height, width, images, precision, network = case.split(",")
        config = make_config(encoder, int(height), int(width), int(images), precision)
        estimate = KERNEL.find_footprint(config, network).step_memory(int(images))
        if (encoder, network) not in overheads:
            tiny = make_config(encoder, 64, 96, 1, "float32")
            known = KERNEL.find_footprint(tiny, network).step_memory(1)
            took = measure(f"{encoder},64,96,1,float32,{network}")[0]
            overheads[encoder, network] = took - known
        took, first, second, *losses = measure(case)
        measured = took - overheads[encoder, network]
        print(
            f"{case:48} measured {measured / 2**30:5.2f} GiB, estimate {estimate / 2**30:5.2f}, "
            f"ratio {estimate / measured:.2f}; graph {overheads[encoder, network] / 2**30:.2f}; "
            f"steps {first:.0f} and {second:.0f} s, losses {losses[0]:.4f} and {losses[1]:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if sys.argv[1:2] == ["steps"]:
        take_steps(sys.argv[2])
    else:
        main(sys.argv[1:] or CASES)
