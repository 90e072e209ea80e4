"""tensorflow's interpreter on this machine's CPU: a second runtime for static networks in `.tflite`.

It is built apart from ai-edge-litert, of another version of the same kernels, and runs here without a delegate, by the
reference's own arithmetic rather than XNNPACK's: a file on which both agree says the same to any LiteRT.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from importlib.metadata import version
from typing import ClassVar

from lilliput.artifact import Artifact
from targets.runtimes.litert_static_cpu import InterpreterSession


class NetworkRuntime:
    exporters: ClassVar[tuple[str, ...]] = ("litert_static", "tensorflow_converter")
    packages: ClassVar[tuple[str, ...]] = ("tensorflow",)
    extra: ClassVar[str] = "litert"

    def open(self, artifact: Artifact, threads: int) -> InterpreterSession:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it tells of the processor at length
        import tensorflow as tf

        resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = partial(tf.lite.Interpreter, experimental_op_resolver_type=resolver)
        with warnings.catch_warnings():  # it announces its own end, and names ai-edge-litert, which runs beside it
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated", UserWarning)
            return InterpreterSession(interpreter, artifact, threads)

    def versions(self) -> dict[str, str]:
        return {"tensorflow": version("tensorflow")}
