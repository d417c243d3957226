"""Steps, hours and memory of one fold at full size, on paper.

PYTHONPATH=tests python tests/benchmarks/scale.py [MILLISECONDS]

Operations and bytes are counted from the networks' layers and divided by the rates that the makers
of the devices publish; what takes longest, computing, moving maps or the input, is the time. No
device reaches these rates: read them as the least it can take. MILLISECONDS is what a processor
needs for a training example (benchmarks/generator.py), of which a machine with two T4 has four.
"""

import sys
from types import SimpleNamespace

import tensorflow as tf
from conftest import KERNEL

TRAINING, VALIDATION, TEST = 4437, 1109, 3698  # images of one fold of five
DEVICES = {
    # name: replicas, bytes of memory, operations and bytes in a second, precision, processors
    "2 x T4": (2, 15360 * 2**20, 65e12, 320e9, "mixed_float16", 4),
    "v5e-8": (8, 16 * 2**30, 197e12, 819e9, "mixed_bfloat16", None),
}


def count_traffic(model):
    """The bytes of maps that the layers read and write to predict an image."""
    total = 0
    for layer in KERNEL.list_layers(model):
        tensors = tf.nest.flatten([layer.get_input_at(0), layer.get_output_at(0)])
        total += KERNEL.count_bytes(tensors, layer.compute_dtype)
    return total


def main(milliseconds):
    """Print a row of a table for each device and encoder."""
    print("| device | encoder | images in a step | GiB a device | steps | s a step | hours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for device, (replicas, memory, rate, bandwidth, precision, processors) in DEVICES.items():
        strategy = SimpleNamespace(num_replicas_in_sync=replicas)
        accelerator = KERNEL.Accelerator(strategy, device, precision, memory, 12)
        for number in range(6):
            config = KERNEL.replace(
                KERNEL.BEST, encoder=f"efficientnetb{number}", precision=precision
            )
            config = KERNEL.replace(config, encoder_weights=None)
            cost = KERNEL.find_footprint(config, "unet")
            batch = KERNEL.fit_batch(accelerator, config, "unet", config.batch_size)
            traffic = count_traffic(KERNEL.build_efficient_unet(config))
            image = max(cost.operations / rate, traffic / bandwidth)  # seconds to predict one
            example = 3 * image / replicas  # the way back takes twice as long
            if processors:
                example = max(example, milliseconds / 1000 / processors)
            steps = -(-2 * TRAINING // batch) * config.epochs
            predictions = config.epochs * VALIDATION + 4 * (VALIDATION + TEST)
            seconds = steps * batch * example + predictions * image / replicas
            gibibytes = cost.step_memory(batch // replicas) / 2**30
            print(
                f"| {device} | B{number} | {batch} | {gibibytes:.1f} | {steps:,} | "
                f"{batch * example:.2f} | {seconds / 3600:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 38.0)
