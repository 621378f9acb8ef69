"""Replace the ops of the `fptq` domain by their function bodies: a model of standard operators."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common

from fptq_onnx.ops import DOMAIN

__all__ = ["InlineFunctionsPass"]


class InlineFunctionsPass(ir.passes.InPlacePass):
    """Inline what `AddFunctionsPass` added, and forget the domain; other functions of the model stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        for function in model.functions.values():
            if function.domain == DOMAIN:
                # The operators of the bodies mean the same in later opsets; only equal ones can be inlined.
                function.opset_imports[""] = model.graph.opset_imports[""]
        result = onnx_ir.passes.common.InlinePass(lambda function: function.domain == DOMAIN)(model)
        model.graph.opset_imports.pop(DOMAIN, None)
        return result
