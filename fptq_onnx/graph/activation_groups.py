"""Group linear layers by the activation they read, so that each activation is quantized once."""

from __future__ import annotations

__all__ = ["ActivationGroup", "group_by_activation"]

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir

from fptq_onnx.graph.linears import LinearLayer


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationGroup:
    """All linear layers that read one activation, in execution order (q, k, v; gate, up; o alone).

    ``activation`` is the value behind any Identity nodes: the output of the node that computes it.
    """

    activation: ir.Value
    layers: tuple[LinearLayer, ...]

    @property
    def k(self) -> int:
        """Channels of the activation, the K of every layer of the group."""
        return self.layers[0].k


def group_by_activation(layers: Iterable[LinearLayer]) -> list[ActivationGroup]:
    """Group layers by the value they read, looking through Identity nodes; groups in order of their first layer."""
    groups: dict[ir.Value, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(_through_identity(layer.activation), []).append(layer)
    return [ActivationGroup(activation, tuple(members)) for activation, members in groups.items()]


def _through_identity(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type == "Identity" and node.domain == "":
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value
