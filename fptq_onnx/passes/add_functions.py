"""Make a model self-contained: every `fptq` op it uses gets a function body of standard operators."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from fptq_onnx.ops import (
    DOMAIN,
    VERSION,
    dynamic_quantize_per_token,
    dynamic_quantize_w4a8_matmul,
    fused_quantize,
    group_query_attention,
    w4a8_matmul,
    w8a8_matmul,
)

__all__ = ["AddFunctionsPass"]

# By name and overload.
FUNCTIONS: dict[tuple[str, str], Callable[[], ir.Function]] = {
    (dynamic_quantize_per_token.NAME, ""): dynamic_quantize_per_token.function,
    (dynamic_quantize_w4a8_matmul.NAME, ""): dynamic_quantize_w4a8_matmul.function,
    (
        dynamic_quantize_w4a8_matmul.NAME,
        w4a8_matmul.INTEGER_SCALES,
    ): dynamic_quantize_w4a8_matmul.integer_scales_function,
    (w4a8_matmul.NAME, ""): w4a8_matmul.function,
    (w4a8_matmul.NAME, w4a8_matmul.INTEGER_SCALES): w4a8_matmul.integer_scales_function,
    (w8a8_matmul.NAME, ""): w8a8_matmul.function,
    **{(name, ""): function for name, function in fused_quantize.FUNCTIONS.items()},
    **{(name, ""): function for name, function in group_query_attention.FUNCTIONS.items()},
}


class AddFunctionsPass(ir.passes.InPlacePass):
    """Import the `fptq` domain and add the model-local functions of the ops in use.

    A runtime that has the op library registered runs its kernels; any other inlines the functions.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add what is used and not there yet."""
        used = {(node.op_type, node.overload) for node in model.graph if node.domain == DOMAIN}
        modified = False
        for op in sorted(used):
            function = FUNCTIONS[op]()
            if function.identifier() not in model.functions:
                model.functions[function.identifier()] = function
                modified = True
        if used:
            model.graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified)
