"""Triton's own definition of ``config.pbtxt``: model_config.proto, as the tritonclient package carries it compiled."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def _model_config() -> Any:
    """The module alone: tritonclient.grpc itself wants grpc, which nothing here needs."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(text: str) -> Any:
    """A ModelConfig message; a key or a value that Triton does not know raises."""
    module = _model_config()
    if module is None:
        pytest.skip("tritonclient, which carries model_config.proto, is not installed")
    from google.protobuf import text_format

    return text_format.Parse(text, module.ModelConfig())


def dtype(config: Any, tensor: Any) -> str:
    name: str = (
        type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    )
    return name
