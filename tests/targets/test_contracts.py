"""Every module of targets/runtimes and targets/devices fits the contracts of targets/base.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lilliput import registry
from targets import base


def signature(owner: type[Any], name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)


@pytest.mark.parametrize("name", registry.known("runtimes"))
def test_a_runtime_fits(name: str) -> None:
    runtime = registry.load("runtimes", name)
    for method in ("open", "versions"):
        assert signature(runtime, method) == signature(base.Runtime, method)
    assert runtime.exporters
    assert all(isinstance(value, str) for value in (*runtime.exporters, *runtime.packages, runtime.extra))
    versions = runtime().versions()
    assert versions
    assert all(isinstance(value, str) and value[0].isdigit() for value in versions.values())


@pytest.mark.parametrize("name", registry.known("devices"))
def test_a_device_fits(name: str) -> None:
    device = registry.load("devices", name)
    for method in ("describe", "open"):
        assert signature(device, method) == signature(base.Device, method)
    connection = inspect.signature(device.open, eval_str=True).return_annotation
    for method in ("probe", "push", "run", "pull", "close"):
        assert signature(connection, method) == signature(base.Connection, method)
    assert issubclass(device.Options, BaseModel)
    with pytest.raises(ValidationError, match="Extra inputs"):
        device.Options(no_such_option=1)


def test_the_folders_are_not_empty() -> None:
    assert {"litert_cpu", "llamacpp_cpu", "ort_cpu", "torch_cpu"} <= set(registry.known("runtimes"))
    assert "host" in registry.known("devices")
