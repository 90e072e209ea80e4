"""Tiny Keras models and SavedModels, and what the converter's child answers to each: `python tiny_keras.py FOLDER`.

It runs in a process of its own, as tensorflow and torch in one would be slow to load and talk much.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

COUNT = 24


def write(folder: Path) -> None:
    """Models and samples."""
    import keras

    keras.utils.set_random_seed(0)
    cnn(keras).save(folder / "cnn.keras")
    cnn(keras).save(folder / "cnn.h5")
    cnn(keras).export(str(folder / "saved"), verbose=False)
    image = keras.Input((12, 10, 3), name="image")
    several(keras).save(folder / "several.keras")
    keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)]).save(folder / "sequential.keras")
    keras.Model(image, keras.ops.sin(keras.layers.Conv2D(4, 3)(image))).save(folder / "sine.keras")
    keras.Model(image, keras.layers.Lambda(lambda x: x * 2)(image)).save(folder / "lambda.keras")
    keras.Model(image, foreign(keras)(image)).save(folder / "foreign.keras")
    wide = keras.Input((None, None, 3), name="image")
    keras.Model(wide, keras.layers.GlobalAveragePooling2D()(wide)).save(folder / "dynamic.keras")
    (folder / "damaged.keras").write_text("no zip")
    (folder / "damaged.h5").write_text("no HDF5")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "saved_model.pb").write_text("no protobuf")
    reads_a_file(folder / "reads")
    rng = np.random.default_rng(0)
    found = images(rng)
    np.savez(folder / "images.npz", image=found)
    np.savez(folder / "few.npz", image=found[:5])
    np.savez(folder / "other.npz", image=found.transpose(0, 3, 1, 2))
    np.savez(folder / "nan.npz", image=np.where(found > 2, np.nan, found))
    tokens = rng.integers(0, 10, (COUNT, 5))
    np.savez(folder / "several.npz", tokens=tokens, first_x=rng.standard_normal((COUNT, 4)), x=found[:, 0, :3, 0])
    np.savez(folder / "rows.npz", x=rng.standard_normal((COUNT, 4)).astype(np.float32))


def images(rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(COUNT, 12, 10, 3), normal."""
    return rng.standard_normal((COUNT, 12, 10, 3)).astype(np.float32)


def cnn(keras: Any) -> Any:
    """(12, 10, 3) images to 5 classes, its batch norm with statistics of its own."""
    layers = keras.layers
    image = keras.Input((12, 10, 3), name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same")(image)
    norm = layers.BatchNormalization()
    x = layers.ReLU(max_value=6)(norm(x))
    norm.set_weights([w + 0.1 * np.arange(8, dtype=np.float32) for w in norm.get_weights()])
    x = layers.Activation("hard_swish")(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.Concatenate()([layers.Conv2D(8, 1, activation="relu")(x), layers.Conv2D(8, 1, activation="sigmoid")(x)])
    return keras.Model(image, layers.Dense(5, name="logits")(layers.GlobalAveragePooling2D()(x)))


def several(keras: Any) -> Any:
    """Three inputs, one of token ids, in a dictionary; two outputs by name."""
    layers = keras.layers
    x, first_x = keras.Input((3,), name="x"), keras.Input((4,), name="first_x")
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    words = layers.GlobalAveragePooling1D()(layers.Embedding(10, 4)(tokens))
    sums = layers.Dense(2)(layers.Concatenate()([x, first_x, words]))
    return keras.Model(
        {"x": x, "tokens": tokens, "first_x": first_x}, {"sums": sums, "classes": layers.Softmax()(layers.Dense(3)(x))}
    )


def foreign(keras: Any) -> Any:
    class OwnLayer(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + 1.0

    return OwnLayer()


def reads_a_file(folder: Path) -> None:
    import tensorflow as tf

    class Reads(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, 12, 10, 3), tf.float32, name="image")])
        def __call__(self, image: Any) -> Any:
            size = tf.strings.length(tf.io.read_file("/etc/hostname"))
            return image * tf.cast(size, tf.float32)

    module = Reads()
    tf.saved_model.save(module, str(folder), signatures=module.__call__.get_concrete_function())


# name → (model, samples, allowed)
CASES = {
    "h5": ("cnn.h5", "images.npz", False),
    "several": ("several.keras", "several.npz", False),
    "sequential": ("sequential.keras", "rows.npz", False),
    "lambda": ("lambda.keras", "images.npz", False),
    "lambda allowed": ("lambda.keras", "images.npz", True),
    "foreign": ("foreign.keras", "images.npz", False),
    "dynamic": ("dynamic.keras", "images.npz", False),
    "damaged zip": ("damaged.keras", "images.npz", False),
    "damaged h5": ("damaged.h5", "images.npz", False),
    "damaged folder": ("damaged", "images.npz", False),
    "reads": ("reads", "images.npz", False),
    "few": ("cnn.keras", "few.npz", False),
    "other": ("cnn.keras", "other.npz", False),
    "nan": ("cnn.keras", "nan.npz", False),
    "no npz": ("cnn.keras", "damaged.h5", False),
    "no input": ("cnn.keras", "rows.npz", False),
}


def answers(folder: Path) -> dict[str, Any]:
    """By case: why it was refused, or names and shapes."""
    from lilliput.converted import converter_child as child

    found: dict[str, Any] = {}
    for name, (model, samples, allowed) in CASES.items():
        scratch = folder / "scratch" / name
        scratch.mkdir(parents=True)
        request = {
            "model": str(folder / model), "samples": str(folder / samples), "allow_unsafe": allowed, "held_out": 8,
            "least": 8, "most": COUNT, "scratch": str(scratch), "tflite": str(scratch / "model.tflite"),
        }  # fmt: skip
        try:
            made = child.answer(request)
        except child.RefusedError as error:
            found[name] = str(error)
        else:
            found[name] = {key: list(array.shape) for key, array in made.items() if key != "facts"}
            found[name]["proof"] = json.loads(str(made["facts"]))["proof"]
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    import lilliput.converted.converter_child  # noqa: F401  (its environment, before tensorflow is loaded)

    write(place)
    (place / "answers.json").write_text(json.dumps(answers(place)))
