"""Make an int8 `.tflite` of a Keras model or SavedModel: `python converter_child.py REQUEST.json`. numpy and tensorflow
alone, in a process of its own, as loading a model and converting it can crash, and both talk much.

    model          a .keras or .h5 file, or a SavedModel's folder
    samples        an .npz with an array (n, …) for each input; every held_out-th is kept from calibration, `most` are
                   taken, `least` are needed
    allow_unsafe   whether a model may bring Python code (Lambda layers) or touch files when it runs
    tflite         where the file is written
    scratch        an empty folder
    out            .npz: `refused` (why) alone; or `facts` (JSON), `input.NAME` and `output.NAME` (held out, 1, …)

A Keras model is exported to a SavedModel by Keras itself; its signature, with a batch of one, is what is converted.
Outputs are the float model's own, computed here: Keras's where it is a Keras model, else the signature's.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}

import numpy as np
import tensorflow as tf

DTYPES = ("float32", "int32", "int64")
TOUCHING = {"ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
TOLERANCE = 1e-4  # of the outputs' spread, between Keras and what it exports
SAID = 300  # characters of others' messages


class RefusedError(Exception):
    """What the caller is told in one line."""


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        found = answer(request)
    except RefusedError as error:
        found = {"refused": np.array(str(error))}
    np.savez(request["out"], allow_pickle=False, **found)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    path, scratch = Path(request["model"]), Path(request["scratch"])
    keras_model = None if path.is_dir() else keras_of(path, request["allow_unsafe"])
    folder = path if keras_model is None else exported(keras_model, scratch / "saved")
    loaded = saved_model(folder, request["allow_unsafe"])
    signature = signature_of(loaded)
    specs = inputs_of(signature)
    batches = samples(Path(request["samples"]), specs, request)
    held = batches[:: request["held_out"]]
    calibration = [batch for i, batch in enumerate(batches) if i % request["held_out"]]
    outputs = [answered(signature, batch) for batch in held]
    proof = "the float reference is the SavedModel's own signature"
    if keras_model is not None:
        own = [of_keras(keras_model, signature, batch) for batch in held]
        proof, outputs = proven(own, outputs), own
    Path(request["tflite"]).write_bytes(converted(loaded, signature, specs, calibration))
    facts = {"proof": proof, "calibration": len(calibration), "tensorflow": tf.__version__}
    arrays = {f"input.{name}": np.stack([batch[name] for batch in held]) for name in specs}
    arrays |= {f"output.{name}": np.stack([found[name] for found in outputs]) for name in outputs[0]}
    return {"facts": np.array(json.dumps(facts)), **arrays}


def keras_of(path: Path, allow_unsafe: bool) -> Any:
    import keras

    try:
        return keras.saving.load_model(str(path), compile=False, safe_mode=not allow_unsafe)
    except Exception as error:  # Keras raises many kinds
        text = str(error)
        if "Lambda" in text and "safe_mode" in text:
            raise RefusedError(
                "has a Lambda layer, which is Python code: allow it explicitly (allow_pickle) if you trust its source"
            ) from error
        unknown = re.search(r"(?:Could not locate (?:class|function)|Unknown \w+:) '?([\w.>]+)'?", text)
        if unknown:
            raise RefusedError(
                f"{unknown[1]!r} is no object of Keras's own: give a SavedModel (model.export), which holds its graph"
            ) from error
        raise RefusedError(f"Keras cannot open it ({short(text)}), wanted a whole model saved by Keras 3") from error


def exported(model: Any, folder: Path) -> Path:
    """The folder of the SavedModel that Keras writes."""
    if not getattr(model, "inputs", None):
        raise RefusedError("has no inputs of known shape: call or build the model before it is saved")
    try:
        model.export(str(folder), verbose=False)
    except Exception as error:  # Keras raises many kinds
        raise RefusedError(f"Keras cannot export it ({short(str(error))})") from error
    return folder


def saved_model(folder: Path, allow_unsafe: bool) -> Any:
    from tensorflow.core.protobuf import saved_model_pb2

    try:
        graphs = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
        nodes = {n.op for g in graphs for n in g.graph_def.node}
        nodes |= {n.op for g in graphs for f in g.graph_def.library.function for n in f.node_def}
        found = sorted(nodes & TOUCHING)
        if found and not allow_unsafe:
            raise RefusedError(
                f"runs {', '.join(found)}, which can touch files or run code: allow it explicitly (allow_pickle) if "
                "you trust its source"
            )
        return tf.saved_model.load(str(folder))
    except RefusedError:
        raise
    except Exception as error:  # protobuf's and tensorflow's own
        raise RefusedError(f"tensorflow cannot open it ({short(str(error))}), wanted a whole SavedModel") from error


def signature_of(loaded: Any) -> Any:
    named = dict(loaded.signatures)
    if "serving_default" in named:
        return named["serving_default"]
    if len(named) != 1:
        raise RefusedError(f"has the signatures {sorted(named)}, wanted serving_default, or only one")
    return next(iter(named.values()))


def inputs_of(signature: Any) -> dict[str, tf.TensorSpec]:
    """The inputs by name, their first size one."""
    found = {}
    for name, spec in signature.structured_input_signature[1].items():
        if spec.dtype.name not in DTYPES:
            raise RefusedError(f"input {name!r} is {spec.dtype.name}, wanted one of {', '.join(DTYPES)}")
        if spec.shape.rank is None or spec.shape.rank < 1 or None in spec.shape[1:] or spec.shape[0] not in (None, 1):
            raise RefusedError(
                f"input {name!r} is {spec.shape}, wanted fixed sizes behind a batch of any size, or of 1"
            )
        found[name] = tf.TensorSpec((1, *spec.shape[1:]), spec.dtype, name)
    return found


def samples(path: Path, specs: dict[str, tf.TensorSpec], request: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """One sample each, by input (1, …)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise RefusedError(f"--samples {path}: not a readable .npz of plain arrays ({short(str(error))})") from error
    for name, spec in specs.items():
        shape = tuple(spec.shape[1:])
        if name not in arrays or arrays[name].shape[1:] != shape:
            seen = f"{name} {arrays[name].shape}" if name in arrays else f"only {sorted(arrays)}"
            raise RefusedError(f"--samples {path}: {seen}, wanted {name} (n, {str(shape)[1:]}")
        if arrays[name].dtype.kind not in "fiub" or not np.isfinite(arrays[name]).all():
            raise RefusedError(f"--samples {path}: {name} is no array of finite numbers")
        arrays[name] = arrays[name].astype(spec.dtype.as_numpy_dtype)
    counts = {len(arrays[name]) for name in specs}
    if len(counts) != 1:
        raise RefusedError(f"--samples {path}: its arrays have {sorted(counts)} samples, wanted one number")
    count = counts.pop()
    if count < request["least"]:
        raise RefusedError(f"--samples {path}: {count} samples, wanted {request['least']} at least")
    return [{name: arrays[name][i : i + 1] for name in specs} for i in range(min(count, request["most"]))]


def answered(signature: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = signature(**{name: tf.constant(array) for name, array in batch.items()})
    return {name: np.asarray(value.numpy(), np.float32) for name, value in found.items()}


def of_keras(model: Any, signature: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The Keras model's own outputs, under the names that its export gave them."""
    import keras

    names = {spec.name: name for name, spec in signature.structured_input_signature[1].items()}
    given = [tf.constant(batch[names[tensor.name]]) for tensor in model.inputs]
    whole = isinstance(model, keras.Sequential)
    found = model(given[0] if whole else keras.tree.pack_sequence_as(model.input, given), training=False)
    if not isinstance(found, dict):
        found = {f"output_{i}": value for i, value in enumerate(keras.tree.flatten(found))}
    if found.keys() != signature.structured_outputs.keys():
        raise RefusedError(
            f"gives {sorted(found)}, its export {sorted(signature.structured_outputs)}: name them plainly"
        )
    return {name: np.asarray(value.numpy(), np.float32) for name, value in found.items()}


def proven(own: list[dict[str, np.ndarray]], given: list[dict[str, np.ndarray]]) -> str:
    """The sentence of the proof that what is converted computes what Keras computes."""
    worst = 0.0
    for name in own[0]:
        theirs = np.stack([found[name] for found in own])
        ours = np.stack([found[name] for found in given])
        worst = max(worst, float(np.abs(ours - theirs).max()) / (float(theirs.std()) or 1.0))
    if not worst <= TOLERANCE:
        raise RefusedError(
            f"its export differs from Keras by {worst:.1e} of the outputs' spread, wanted {TOLERANCE:.0e}"
        )
    return f"the SavedModel that was converted gives Keras's own outputs within {worst:.1e} of their spread"


def converted(loaded: Any, signature: Any, specs: dict[str, Any], batches: list[dict[str, Any]]) -> bytes:
    """The file: int8 from inputs to outputs, where tensorflow has integer kernels; float operators between them."""

    def one(*inputs: Any) -> Any:
        return signature(**dict(zip(specs, inputs, strict=True)))

    def representative() -> Iterator[dict[str, np.ndarray]]:
        yield from batches

    function = tf.function(one, input_signature=list(specs.values())).get_concrete_function()
    try:
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], loaded)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        found: bytes = converter.convert()
    except Exception as error:  # tensorflow's converter raises many kinds
        said = re.search(r"error: (.+)", str(error))
        raise RefusedError(f"tensorflow's converter refuses it ({short(said[1] if said else str(error))})") from error
    return found


def short(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "it said nothing")
    return line if len(line) <= SAID else f"{line[:SAID]}…"


if __name__ == "__main__":
    main()
