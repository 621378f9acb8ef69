"""Converted models are complete without the op library."""

from __future__ import annotations

import families
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from conversions import converted, relative_error

from fptq_onnx.graph.model_file import load_model
from fptq_onnx.ops import BODY_OPSET
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.inline_functions import InlineFunctionsPass

# The class of the library's results: both run in float32 behind the integers.
KERNEL_AGREES = 1e-4


@pytest.mark.parametrize("family", [families.DYNAMO, families.DYNAMO_KV, families.GENAI_FP32])
def test_function_bodies_agree_with_the_kernels(family: str) -> None:
    result = converted("llama", family)
    token_ids = result.tiny.token_ids()
    kernels, bodies = (result.run(token_ids, library=library) for library in (True, False))
    assert relative_error(bodies, kernels) < KERNEL_AGREES
    assert relative_error(kernels, result.tiny.run(token_ids)) > 100 * KERNEL_AGREES  # both are quantized


def test_file_passes_the_checker() -> None:
    path = converted("llama", families.DYNAMO).path
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {(f.domain, f.name) for f in model.functions} == {
        ("fptq", "W4A8MatMul"),
        ("fptq", "DynamicQuantizePerToken"),
    }
    assert {o.domain: o.version for o in model.opset_import}["fptq"] == 1


def test_only_what_is_used() -> None:
    """No function, and no import of the domain, for an op that is not there; a second run adds nothing."""
    model = load_model(families.model("llama", families.DYNAMO).path)
    assert not AddFunctionsPass()(model).modified
    assert not model.functions and "fptq" not in model.opset_imports

    static = load_model(converted("gpt2", families.DYNAMO).path)
    assert [identifier[:2] for identifier in static.functions] == [("fptq", "W4A8MatMul")]
    assert not AddFunctionsPass()(static).modified


def test_inlining_keeps_other_functions() -> None:
    """Also in a model of a later opset than the bodies are written in."""
    model = load_model(converted("llama", families.GENAI_FP32).path)
    assert model.graph.opset_imports[""] > BODY_OPSET
    body = '<domain: "mine", opset_import: ["" : 22]>\nTwice (x) => (y) { y = Add(x, x) }'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(body))
    model.functions[function.identifier()] = function
    assert InlineFunctionsPass()(model).modified
    assert [identifier[:2] for identifier in model.functions] == [("mine", "Twice")]
    assert "fptq" not in model.opset_imports and not [node for node in model.graph if node.domain == "fptq"]
    assert not InlineFunctionsPass()(model).modified
