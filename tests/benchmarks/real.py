"""Train on real pictures what the notebook does, what others do, and single changes, and score it.

    PYTHONPATH=tests python tests/benchmarks/real.py CLOUDS OUTPUT [--ways best paper popular]
        [--minutes 10] [--seeds 0] [--size 64 96] [--images 500]

CLOUDS is a folder of the competition's data, or of resized copies, whose test pictures have their
true rows in test_truth.csv. All train the same encoder from random weights for the same time, on
four fifths of the training pictures, or on the first `images` of these. Minutes are those of one
processor core, so that other work beside does not count. Rules learn on the last fifth; scored are
the test pictures, and those of the last fifth by rules that learned on others of them. The ways are

- best: BEST's U-Net for nine tenths of the time, its classifier for one;
- paper: PAPER's U-Net for the whole time, threshold and minimum area for each class;
- popular: the recipe of the competition's popular Keras notebooks: sigmoid, cross-entropy + Dice of
  a whole batch, Adam, whose rate falls where the validation loss stands still, flips, threshold and
  minimum area for each class;
- mirrored: best, whose classifier judges mirror images too;
- started: best, whose classifier starts from the U-Net's encoder;
- alone: best without a classifier, the U-Net for nine tenths of the time;
- plain: best without means of weights;
- head: best's U-Net for the whole time, with presence as a second output of its encoder;
- present, half present: best, whose U-Net's loss weighs absent classes by 0.2, by 0.5;
- batch: best, whose U-Net's Dice loss is of whole batches;
- longer: best, whose classifier has four times as long;
- dropout, smoothed, larger: longer, with dropout of 0.3 before the classifier's last layer, with
  labels of 0.05 and 0.95, with pictures of twice the height and width.

Prints for each the Dice by the rule it uses, the average precision of its classifier, and the gain
over the first way, the mean over the seeds with its 95 % interval. OUTPUT keeps what was trained,
and the ways that share a network with another take it from there.
"""

import argparse
import functools
import time
import types
from pathlib import Path

import numpy as np
from conftest import KERNEL
from sklearn.metrics import average_precision_score

tf = KERNEL.tf
ENCODER = (0.5, 0.3)
FIELDS = {
    "encoders": (ENCODER,),
    "encoder_weights": None,
    "precision": "float32",
    "batch_norm_momentum": 0.95,
    "batch_size": 16,
    "classifier_epochs": (1, 5),
    "learning_rate": 3e-3,
}
CLASSIFIER_SHARE = 0.1
HEAD_WEIGHT = 0.2
NETWORKS = dict(KERNEL.NETWORKS)
KERNEL.time = types.SimpleNamespace(monotonic=time.process_time)


def build_with_head(config, encoder, size):
    """EfficientUNet, and from its encoder's last map the probabilities of presence."""
    unet, layers = KERNEL.build_efficient_unet(config, encoder, size), tf.keras.layers
    part = unet.get_layer(index=2)
    both = tf.keras.Model(part.input, [part.output, part.get_layer("top_activation").output])
    maps, top = both(unet.get_layer(index=1)(unet.input))
    average = layers.GlobalAveragePooling2D(name="average")(top)
    presence = layers.Dense(4, "sigmoid", dtype="float32", name="presence")(average)
    return tf.keras.Model(unet.input, [layers.Activation("sigmoid")(maps), presence])


def loss_with_head(config, planes, probabilities):
    """The U-Net's loss of the maps, a share of the classifier's of the presence."""
    if probabilities.shape.rank == 2:
        return HEAD_WEIGHT * KERNEL.classifier_loss(config, planes, probabilities)
    return KERNEL.unet_loss(config, planes, probabilities)


def weigh_absent(config, planes, probabilities, absent_weight):
    """The U-Net's loss, class by class, of absent ones only a share."""
    truth = tf.cast(KERNEL.split_planes(planes), tf.float32)
    entropy = tf.keras.backend.binary_crossentropy(truth, probabilities)
    overlap = tf.reduce_sum(truth * probabilities, axis=(1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(1, 2))
    share, soft_dice = config.cross_entropy_weight, (2 * overlap + 1) / (total_area + 1)
    losses = share * tf.reduce_mean(entropy, axis=(1, 2)) + (1 - share) * (1 - soft_dice)
    present = tf.cast(tf.reduce_any(truth > 0, axis=(1, 2)), tf.float32)
    return tf.reduce_mean((present + absent_weight * (1 - present)) * losses, axis=-1)


def loss_of_present(config, planes, probabilities):
    """The U-Net's loss with a fifth of the weight for absent classes."""
    return weigh_absent(config, planes, probabilities, 0.2)


def loss_of_half_present(config, planes, probabilities):
    """The U-Net's loss with half of the weight for absent classes."""
    return weigh_absent(config, planes, probabilities, 0.5)


def loss_of_batch(config, planes, probabilities):
    """The U-Net's loss, with the Dice coefficients of all pixels of a batch."""
    truth = tf.cast(KERNEL.split_planes(planes), tf.float32)
    entropy = tf.reduce_mean(KERNEL.cross_entropy(config, truth, probabilities), axis=(1, 2))
    overlap = tf.reduce_sum(truth * probabilities, axis=(0, 1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(0, 1, 2))
    share, soft_dice = config.cross_entropy_weight, (2 * overlap + 1) / (total_area + 1)
    return share * entropy + (1 - share) * (1 - tf.reduce_mean(soft_dice))


def build_with_dropout(config, encoder, size):
    """The classifier, with dropout before its last layer."""
    model = KERNEL.build_classifier(config, encoder, size)
    dropped = tf.keras.layers.Dropout(0.3)(model.get_layer("average").output)
    output = model.get_layer("probabilities")(model.get_layer("logits")(dropped))
    return tf.keras.Model(model.input, output)


def loss_of_smoothed(config, planes, probabilities):
    """The classifier's loss, with labels of 0.05 and 0.95."""
    presence = tf.reduce_any(KERNEL.split_planes(planes) > 0, axis=(1, 2))
    truth = 0.05 + 0.9 * tf.cast(presence, tf.float32)
    return KERNEL.cross_entropy(config, truth, probabilities)


UNET, CLASSIFIER, CLASSIFIER_LOSS = KERNEL.build_efficient_unet, *NETWORKS["classifier"]
OTHERS = {
    "head": {"unet": (build_with_head, loss_with_head)},
    "present": {"unet": (UNET, loss_of_present)},
    "half present": {"unet": (UNET, loss_of_half_present)},
    "batch": {"unet": (UNET, loss_of_batch)},
    "dropout": dict.fromkeys(("baseline", "classifier"), (build_with_dropout, CLASSIFIER_LOSS)),
    "smoothed": dict.fromkeys(("baseline", "classifier"), (CLASSIFIER, loss_of_smoothed)),
}
LONGER = ("longer", "dropout", "smoothed", "larger")


def write_encoder(config, unet, path):
    """Write the weights of a U-Net's encoder as initial weights of another network."""
    encoder = KERNEL.build_classifier(config, ENCODER, config.image_size).get_layer(index=2)
    for layer in (layer for layer in encoder.layers if layer.weights):
        layer.set_weights(unet.get_layer(index=2).get_layer(layer.name).get_weights())
    encoder.save_weights(path)


def train_popular(config, parts, deadline, path):
    """The popular recipe; keeps the weights of the lowest validation loss in a file."""
    model = KERNEL.build_efficient_unet(config, ENCODER, config.image_size)
    if path.exists():
        model.load_weights(path)
        return model

    def read(images):
        batches = [*KERNEL.make_dataset(config, config.image_size, 1, *images)]
        return tf.data.Dataset.from_tensor_slices(
            tuple(np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
        )

    def flip(image, plane):
        both = tf.concat([image, plane[..., None]], axis=-1)
        both = tf.image.random_flip_up_down(tf.image.random_flip_left_right(both))
        return both[..., :3], tf.cast(KERNEL.split_planes(both[..., 3]), tf.float32)

    def split(image, plane):
        return image, tf.cast(KERNEL.split_planes(plane), tf.float32)

    def end(batch, logs):
        model.stop_training |= time.process_time() > deadline

    training, validation = (read(images).cache() for images in parts)
    training = training.shuffle(10**5).map(flip).batch(config.batch_size)
    validation = validation.map(split).batch(config.batch_size)
    loss = KERNEL.segmentation_models.losses.bce_dice_loss
    model.compile(tf.keras.optimizers.legacy.Adam(1e-3), loss)
    callbacks = [
        tf.keras.callbacks.LambdaCallback(on_train_batch_end=end),
        tf.keras.callbacks.ReduceLROnPlateau(patience=3),
        tf.keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True),
    ]
    model.fit(training, validation_data=validation, epochs=999, callbacks=callbacks, verbose=2)
    model.load_weights(path)
    return model


def train(config, network, parts, labels, deadline, folder, earlier, begin=None):
    """A network of the notebook's, or one that is there; its Training."""
    plan = functools.partial(KERNEL.plan_training, config, network, ENCODER, 0, labels, 1, 1000.0)
    training = plan(folder, earlier)
    if not (training.folder / "done").exists():
        KERNEL.train(tf.distribute.get_strategy(), config, training, parts, deadline, 0, begin)
        (training.folder / "done").touch()  # also if the clock has ended it
    return training


def judge(config, training, images, mirrored):
    """A classifier's probabilities of presence, perhaps the mean over mirror images."""
    model, turns = KERNEL.load_network(config, training), [[], [1], [2], [1, 2]]
    views = [model(tf.reverse(model.input, turn)) for turn in (turns if mirrored else [[]])]
    batches = KERNEL.make_dataset(config, training.size, 50, *images)
    several = tf.keras.Model(model.input, tf.add_n(views) / len(views))
    return several.predict(batches, verbose=0)[: len(images[0])]


def run(way, seed, source, output, minutes, size, images):
    """Train one way and score it on the held-out and on the test pictures.

    Returns their Dice, and the probabilities and the truth of presence: (images, classes) each.
    """
    preset = KERNEL.PAPER if way == "paper" else KERNEL.BEST
    own = {"epochs": 999, "seed": seed, "hours": minutes / 60, "image_size": size, **FIELDS}
    own |= {"flips": False, "decision": "threshold and area"} if way == "popular" else {}
    own |= {"averaging": False} if way == "plain" else {}
    own |= {"classifier_epochs": (1, 50)} if way in LONGER else {}
    own |= {"classifier_size": tuple(2 * side for side in size)} if way == "larger" else {}
    config = KERNEL.replace(preset, **{"classifier_size": size, **own})
    labels, truth = (KERNEL.read_labels(source / name) for name in ("train.csv", "test_truth.csv"))
    parts = KERNEL.split_images(
        labels, KERNEL.assign_folds(labels, 5, 0), source / "train_images", 0
    )
    parts[0] = [part[:images] for part in parts[0]]
    tests = [source / "test_images" / name for name in truth.index], truth
    both, folder = (parts[1], tests), output / f"{way}-{seed}"
    (folder / "members").mkdir(parents=True, exist_ok=True)
    earlier = [path.parent for path in sorted(output.glob(f"*-{seed}/members"))]
    start, whole = time.process_time(), 60 * minutes
    tf.keras.utils.set_random_seed(seed)
    KERNEL.NETWORKS = NETWORKS | OTHERS.get(way, {})
    presence = [np.full((len(rows), 4), 0.5) for _, rows in both]
    if way == "popular":
        unet = train_popular(config, parts, start + whole, folder / "weights.h5")
        training = KERNEL.Training("", "unet", ENCODER, 0, size, 16, 1, folder)
    else:
        end = start + whole * (1 if way in ("paper", "head") else 1 - CLASSIFIER_SHARE)
        training = train(config, "unet", parts, labels, end, folder, earlier)
        unet = KERNEL.load_network(config, training)
    if way == "head":
        head = tf.keras.Model(unet.input, unet.outputs[1])
        unet = tf.keras.Model(unet.input, unet.outputs[0])
        batches = [KERNEL.make_dataset(config, size, 50, *images) for images in both]
        presence = [head.predict(b, verbose=0)[: len(i[0])] for b, i in zip(batches, both)]
    elif way not in ("paper", "popular", "alone"):
        own = config
        if way == "started":
            write_encoder(config, unet, folder / "encoder.h5")
            own = KERNEL.replace(config, encoder_weights=str(folder / "encoder.h5"))
        end = time.process_time() + whole * CLASSIFIER_SHARE * (4 if way in LONGER else 1)
        shared = parts, labels, end, folder, earlier
        begin = train(own, "baseline", *shared)
        classifier = train(own, "classifier", *shared, begin)
        presence = [judge(config, classifier, images, way == "mirrored") for images in both]
    predictors = [(training, KERNEL.build_predictor(unet, config.flips))]
    known, new = (KERNEL.count_validation(config, predictors, *images)[-1] for images in both)
    decide = KERNEL.WAYS[config.decision](config, *known, presence[0])
    decided = KERNEL.cross_validate(config, *known, presence[0])[config.decision]
    scores = (
        KERNEL.score_decisions(*known, decided),
        KERNEL.score_decisions(*new, decide(new[0], presence[1])),
    )
    there = [rows != "" for _, rows in both]
    return tuple(np.concatenate(part) for part in (scores, presence, there))


def main():
    """Print the scores and the gains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ways", nargs="+", default=["best", "paper", "popular"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--images", type=int)
    args, scores = parser.parse_args(), {}
    for way in args.ways:
        for seed in args.seeds:
            path = args.output / f"{way}-{seed}.npz"
            if not path.exists():
                shared = args.source, args.output, args.minutes, tuple(args.size), args.images
                np.savez(path, *run(way, seed, *shared))
            score, presence, truth = np.load(path).values()
            scores.setdefault(way, []).append(score)
            average = [average_precision_score(*pair) for pair in zip(truth.T, presence.T)]
            text = f"{way}, seed {seed}: Dice {score.mean():.4f}, average precision"
            print(text, f"{np.mean(average):.3f} {np.round(average, 3)}", flush=True)
        pair = (np.mean(scores[name], axis=0) for name in (way, args.ways[0]))
        gain, *interval = KERNEL.bound_difference(*pair, 0)
        print("{}: {:+.4f} [{:+.4f}, {:+.4f}]".format(way, gain, *interval), flush=True)


if __name__ == "__main__":
    main()
