"""Number formats of the weights in an ONNX graph: float16 for the disk, blocks of 8 or 4 bits for disk and speed.

A block is 32 weights in a row with a scale and a zero point. The embedding keeps 8 bits where the other matrices have
4, and shares them with the output projection if these are tied.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsekd.export._tracing import constant

_BLOCK = 32


def change(graph: Any, weights: str) -> None:
    """Changes the number format of the matrices of an `onnx_ir` graph in place; vectors stay float32."""
    if weights == "float16":
        _halve(graph)
    elif weights.startswith("int"):
        _Quantiser(graph, int(weights.removeprefix("int"))).run()


def _halve(graph: Any) -> None:
    """Stores matrices as float16; ONNX Runtime makes float32 of them when it opens the file."""
    import onnx_ir

    for value in list(graph.initializers.values()):
        if value.dtype == onnx_ir.DataType.FLOAT and len(value.shape) == 2:
            cast = onnx_ir.node("Cast", [], {"to": onnx_ir.DataType.FLOAT})
            value.replace_all_uses_with(cast.outputs[0])
            half = constant(graph, f"{value.name}.half", value.const_value.numpy().astype(np.float16))
            cast.resize_inputs(1)
            cast.replace_input_with(0, half)
            graph.insert_before(graph[0], cast)
            del graph.initializers[value.name]


class _Quantiser:
    """Replaces products with matrices, and the rows that are taken from an embedding."""

    def __init__(self, graph: Any, bits: int):
        self.graph, self.bits = graph, bits
        self.made: dict[str, list[Any]] = {}  # of a matrix: numbers, scales, zero points

    def run(self) -> None:
        embeddings = {node.inputs[0].name: node for node in self.graph if _is_lookup(node)}
        for node in list(self.graph):
            if node.op_type == "MatMul":
                self._product(node, embeddings)
        for node in embeddings.values():
            self._lookup(node)

    def _product(self, node: Any, embeddings: dict[str, Any]) -> None:
        import onnx_ir

        source, is_turned = node.inputs[1], False
        turning = source.producer()
        if turning is not None and turning.op_type == "Transpose":
            source, is_turned = turning.inputs[0], True
        if source.const_value is None or len(source.shape) != 2:
            return
        is_last = node.outputs[0].is_graph_output()
        bits = 8 if is_last or source.name in embeddings else self.bits
        matrix = source.const_value.numpy()
        parts = self._parts(source.name, matrix if is_turned else matrix.T, bits)
        rows, columns = matrix.shape if is_turned else matrix.shape[::-1]
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
        made = onnx_ir.node("MatMulNBits", [node.inputs[0], *parts], sizes, domain="com.microsoft")
        self._replace(node, made)
        if turning is not None and is_turned and not turning.outputs[0].uses():
            self.graph.remove(turning, safe=True)
        self._forget(source)

    def _lookup(self, node: Any) -> None:
        """Of a matrix whose rows are whole blocks; others stay."""
        import onnx_ir

        source = node.inputs[0]
        rows, columns = source.shape
        if columns % _BLOCK:
            return
        numbers, *rest = self._parts(source.name, source.const_value.numpy(), 8)
        flat = constant(self.graph, f"{source.name}.shape", np.array([rows, columns]))
        reshape = onnx_ir.node("Reshape", [numbers, flat])
        self.graph.insert_before(node, reshape)
        sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": _BLOCK, "bits": 8}
        inputs = [reshape.outputs[0], node.inputs[1], *rest]
        self._replace(node, onnx_ir.node("GatherBlockQuantized", inputs, sizes, domain="com.microsoft"))
        self._forget(source)

    def _parts(self, name: str, matrix: np.ndarray, bits: int) -> list[Any]:
        """The numbers, scales and zero points of a matrix of O x I, as the graph's own."""
        from onnxruntime.quantization import matmul_nbits_quantizer as library

        if name not in self.made:
            config = library.DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=False, bits=bits)
            found = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix.T))
            endings = ("numbers", "scales", "zeros")
            self.made[name] = [
                constant(self.graph, f"{name}.{ending}", array) for ending, array in zip(endings, found, strict=True)
            ]
        return self.made[name]

    def _replace(self, node: Any, made: Any) -> None:
        old, new = node.outputs[0], made.outputs[0]
        name, new.shape, new.type = old.name, old.shape, old.type
        self.graph.insert_before(node, made)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        new.name = name

    def _forget(self, source: Any) -> None:
        if not source.uses():
            del self.graph.initializers[source.name]


def _is_lookup(node: Any) -> bool:
    """Whether rows of a matrix are taken by tokens."""
    source = node.inputs[0] if node.op_type == "Gather" else None
    return source is not None and source.const_value is not None and len(source.shape) == 2
