"""The toolkit's table of layers: rows of a real log, and what is counted from them."""

from __future__ import annotations

from modelforge.compilers.rockchip.layers import delegation, read_complaints, read_layers

HEAD = "D RKNN: ID   OpType   DataType Target InputShape   OutputShape  Cycles(DDR/NPU/Total)    RW(KB)       FullName"


def row(number: int, op: str, target: str, inputs: str, outputs: str, dtype: str = "FLOAT16") -> str:
    return (
        f"D RKNN: {number:<4} {op:<18} {dtype:<8} {target:<6} {inputs:<42} {outputs:<22} 10/20/30   36   {op}:n{number}"
    )


LOG = "\n".join(
    [
        "I rknn building ...",
        HEAD,
        row(0, "InputOperator", "CPU", "\\", "(1,3,48,192)"),
        row(1, "ConvHardSwish", "NPU", "(1,3,48,192),(8,3,3,3),(8)", "(1,8,24,96)"),
        row(2, "ConvRelu", "NPU", "(1,8,24,96),(1,8,3,3),(8)", "(1,8,12,96)"),
        row(3, "GlobalAveragePool", "NPU", "(1,8,12,96)", "(1,8,1,1)"),
        row(4, "exMatMul", "CPU", "(1,1,4,8),(8,5)", "(1,1,4,5)"),
        row(5, "ConvTranspose", "NPU", "(1,8,4,4),(8,2,2,2),(2)", "(1,2,8,8)"),
        row(6, "exDataConvert", "NPU", "(1,2,8,8)", "(1,2,8,8)"),
        row(7, "ConvAddRelu", "NPU", "(1,2,8,8),(4,2,1,1),(4),...", "(1,4,8,8)"),
        row(8, "OutputOperator", "CPU", "(1,2)", "\\"),
        "E RKNN: REGTASK: The bit width of field value exceeds the limit, target: v2",
        "E RKNN: REGTASK: The bit width of field value exceeds the limit, target: v2",
    ]
)


def test_layers_and_their_multiplications() -> None:
    layers = read_layers(LOG)
    assert [layer.op for layer in layers] == [
        *("ConvHardSwish", "ConvRelu", "GlobalAveragePool", "exMatMul", "ConvTranspose", "exDataConvert", "ConvAddRelu")
    ]
    assert [layer.macs for layer in layers] == [
        8 * 24 * 96 * 3 * 9,  # a full convolution
        8 * 12 * 96 * 9,  # depthwise: one filter a channel
        0,
        4 * 5 * 8,
        8 * 4 * 4 * 2 * 4,  # each input value meets each weight of its channel
        0,
        4 * 8 * 8 * 2,  # the third operand was cut off
    ]


def test_delegation_counts_both_sides() -> None:
    found = delegation(read_layers(LOG))
    assert found["operators"] == {"npu": 6, "cpu": 1}
    assert found["macs"] == {"npu": 8 * 24 * 96 * 27 + 8 * 12 * 96 * 9 + 1024 + 512, "cpu": 160}
    assert found["off_npu"] == ["exMatMul exMatMul:n4"]


def test_a_log_without_a_table_is_unknown_and_not_zero() -> None:
    found = delegation(read_layers("I rknn building done."))
    assert found["operators"] is None
    assert found["macs"] is None
    assert "unknown" in found["source"]


def test_a_shape_that_was_cut_off_makes_the_macs_unknown() -> None:
    found = delegation(read_layers(LOG.replace("(8,3,3,3),(8)", "(8,3,3,...")))
    assert found["operators"] == {"npu": 6, "cpu": 1}
    assert found["macs"] is None


def test_complaints_are_told_once() -> None:
    assert read_complaints(LOG) == ["REGTASK: The bit width of field value exceeds the limit, target: v2"]
