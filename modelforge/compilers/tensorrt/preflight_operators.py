"""Rules of the preflight about one operator's attributes and operands, as rows: operator, reason, fix, source."""

from __future__ import annotations

from collections.abc import Callable

from modelforge.compilers.tensorrt.preflight import NEVER
from modelforge.compilers.tensorrt.preflight_model import Model, Node
from modelforge.compilers.tensorrt.preflight_rules import PARSER, SINGLE, Rule
from modelforge.compilers.tensorrt.product import MEASURED

LARGEST_K = 3840
"""Of TopK ("K exceeds the maximum value allowed (3840)")."""

_RESIZE_MODES = frozenset({"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"})
_HALF = frozenset({"float16", "bfloat16"})


def _dilations(node: Node) -> str | None:
    dilations = node.attributes.get("dilations", ())
    return f"its dilations are {list(dilations)}" if any(each != 1 for each in dilations) else None


def _training(node: Node) -> str | None:
    return "it is in training mode" if node.attributes.get("training_mode") else None


def _one_output(node: Node) -> str | None:
    return f"it has {len(node.outputs)} outputs, and one is the most" if len(node.outputs) > 1 else None


def _norm(node: Node) -> str | None:
    order = node.attributes.get("p", 2)
    return f"p is {order}: only 1 and 2" if order not in (1, 2) else None


def _resize(node: Node) -> str | None:
    mode = node.text("coordinate_transformation_mode", "half_pixel")
    if mode not in _RESIZE_MODES:
        return f'its coordinate_transformation_mode is "{mode}"'
    if mode == "tf_half_pixel_for_nn" and node.text("nearest_mode", "round_prefer_floor") != "round_prefer_floor":
        return "tf_half_pixel_for_nn goes with nearest_mode round_prefer_floor only"
    if node.attributes.get("antialias"):
        return "it asks for antialiasing"
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    return f'its keep_aspect_ratio_policy is "{policy}"' if policy != "stretch" else None


def _reduction(node: Node) -> str | None:
    reduction = node.text("reduction", "none")
    return f'its reduction is "{reduction}"' if reduction != "none" else None


def _equation(node: Node) -> str | None:
    equation = node.text("equation", "")
    wrong = sorted(set(equation) - set("abcdefghijklmnopqrstuvwxyz->., "))
    return f"its equation has {', '.join(wrong)}: only lower-case letters" if wrong else None


def _coupled(node: Node) -> str | None:
    return "input_forget is set" if node.attributes.get("input_forget") else None


def _peepholes(node: Node) -> str | None:
    data = node.input(0)
    has_peepholes = node.input(7) is not None
    return f"it has peepholes, in {data.dtype}" if has_peepholes and data is not None and data.dtype in _HALF else None


def _last_chunk(node: Node) -> str | None:
    data, parts = node.input(0), node.attributes.get("num_outputs")
    if data is None or not data.shape or not parts:
        return None
    axis = int(node.attributes.get("axis", 0))
    size = data.shape[axis] if -len(data.shape) <= axis < len(data.shape) else None
    if not isinstance(size, int) or size - (parts - 1) * -(-size // parts) > 0:
        return None
    return f"it splits {size} into {parts} parts, and nothing is left for the last"


def _directions(node: Node) -> str | None:
    if node.text("direction", "forward") != "bidirectional":
        return None
    for name in ("activations", "activation_alpha", "activation_beta"):
        each = list(node.attributes.get(name, ()))
        if each[: len(each) // 2] != each[len(each) // 2 :]:
            return f"its {name} differ between the two directions"
    return None


def _random(node: Node) -> str | None:
    float_types = (1, 10)  # TensorProto.FLOAT, TensorProto.FLOAT16
    return "its dtype is neither float32 nor float16" if node.attributes.get("dtype", 1) not in float_types else None


def _cast(node: Node) -> str | None:
    made = node.outputs[0].dtype
    return None if made else "the type that it casts to is unknown"


def _remainder(node: Node) -> str | None:
    data = node.input(0)
    if data is None or not data.dtype or node.attributes.get("fmod"):
        return None
    return f"without fmod it takes no {data.dtype}" if data.dtype not in ("int32", "int64") else None


def _vector(node: Node) -> str | None:
    left, right = (each.rank if each is not None else None for each in (node.input(0), node.input(1)))
    if left == 1 and right is not None and right > 2:
        return f"it multiplies a vector by a tensor of {right} dimensions"
    return None


def _two_dimensions(node: Node) -> str | None:
    data = node.input(0)
    return "its operand has fewer than two dimensions" if data is not None and data.rank in (0, 1) else None


def _k(node: Node) -> str | None:
    wanted, data = node.input(1), node.input(0)
    if wanted is None or wanted.value is None or wanted.value.size != 1:
        return None
    k = int(wanted.value.reshape(-1)[0])
    if k > LARGEST_K:
        return f"k is {k}, and {LARGEST_K} is the most"
    axis = int(node.attributes.get("axis", -1))
    size = data.shape[axis] if data is not None and data.shape and -len(data.shape) <= axis < len(data.shape) else None
    return f"k is {k} of {size} elements" if isinstance(size, int) and k > size else None


def _cache(node: Node, model: Model, _: int) -> str | None:
    mode = node.text("mode", "linear")
    past = node.input(0)
    if mode != "linear":
        return f'its mode is "{mode}"'
    if past is not None and past.rank not in (None, 4):
        return f"its cache has {past.rank} dimensions and must have 4"
    if past is not None and past.name not in {each.name for each in model.inputs}:
        return "its cache is not an input of the model"
    update = node.input(1)
    return "its update is a constant" if update is not None and update.is_weight else None


def _attention(node: Node) -> str | None:
    query, key = node.input(0), node.input(1)
    if query is None or key is None:
        return None
    if query.name == key.name:
        return "query and key are one tensor, which crashes the builder"
    if node.attributes.get("softcap"):
        return "it has a softcap"
    if "softmax_precision" in node.attributes:
        return "it has a softmax_precision"
    if node.input(4) is not None or node.input(5) is not None:
        return "it has a past key and value"
    if node.input(3) is not None and node.attributes.get("is_causal"):
        return "it has a mask and is causal"
    return _attention_heads(node)


def _attention_heads(node: Node) -> str | None:
    """Fused kernels are for FP16 and BF16; one that is given in three dimensions and is plain is taken apart."""
    query, key, value = (node.inputs[place] for place in range(3))
    if query is None or key is None or value is None or query.shape is None or key.shape is None:
        return None
    many, few = (int(node.attributes.get(name, 1)) for name in ("q_num_heads", "kv_num_heads"))
    split = query.rank == 3
    sizes = [query.shape[-1], key.shape[-1], value.shape[-1] if value.shape else None]
    if not all(isinstance(size, int) for size in sizes):
        return None
    width, key_width, value_width = (
        int(size or 0) // (heads if split else 1) for size, heads in zip(sizes, (many, few, few), strict=True)
    )
    if key_width != value_width:
        return f"its keys have {key_width} and its values {value_width} elements a head"
    is_grouped = many != few if split else query.shape[1] != key.shape[1]
    is_plain = node.input(3) is None and not node.attributes.get("is_causal") and not is_grouped
    if split and is_plain and not (key.is_weight or value.is_weight):
        return None
    if query.dtype in SINGLE:
        return "it is in FP32, for which there is no fused attention"
    if query.dtype in _HALF and not (16 <= width <= 256 and width % 8 == 0):
        return f"it has {width} elements a head; fused attention takes multiples of 8 from 16 to 256"
    return None


def _bounds(node: Node) -> str | None:
    data = node.input(0)
    return "with bounds it takes no int8" if data is not None and data.dtype == "int8" and node.inputs[1:] else None


def _grid(node: Node) -> str | None:
    data, grid = node.input(0), node.input(1)
    if data is None or grid is None or not data.dtype or not grid.dtype or data.dtype == grid.dtype:
        return None
    return f"its input is {data.dtype} and its grid {grid.dtype}" if {data.dtype, grid.dtype} - SINGLE else None


def _rule(
    name: str,
    ops: str,
    broken: Callable[[Node], str | None],
    fix: str,
    source: str = MEASURED,
    *,
    live_only: bool = False,
) -> Rule:
    return Rule(
        name,
        frozenset(ops.split()),
        lambda node, model, sm: broken(node),
        fix,
        source,
        live_only=live_only,
        classic=source == PARSER,
        lasting=True,
    )


_WITHOUT = "export the model without it, or split the model there"
_PLAIN = "write it out as MatMul and Softmax when the model is exported"

OPERATORS = (
    _rule("operator", " ".join(NEVER), lambda node: NEVER[node.op], _WITHOUT),
    _rule("dilations", "AveragePool MaxPool LpPool", _dilations, "use dilations of 1", PARSER),
    _rule("training-mode", "BatchNormalization", _training, "export the model for inference", PARSER),
    _rule("one-output", "MaxPool", _one_output, "leave the indices out", PARSER),
    _rule("one-output", "LayerNormalization Attention", _one_output, "leave the other outputs out"),
    _rule("norm", "LpPool LpNormalization", _norm, "use p = 1 or 2", PARSER),
    _rule("resize", "Resize", _resize, "use another way to resize", PARSER),
    _rule("reduction", "ScatterElements ScatterND", _reduction, "scatter without a reduction"),
    _rule("equation", "Einsum", _equation, "rename the indices", PARSER),
    _rule("lstm", "LSTM", _coupled, "export it without input_forget", PARSER),
    # Seen in a held-out case: the state of the layer stays in FP32.
    _rule("peepholes", "LSTM", _peepholes, "keep this layer in FP32, or export it without peepholes"),
    _rule("chunks", "Split", _last_chunk, "give the sizes of the parts"),
    _rule("directions", "LSTM GRU RNN", _directions, "use the same activations in both directions", PARSER),
    _rule("random", "RandomNormal RandomNormalLike RandomUniform RandomUniformLike", _random, "use float32", PARSER),
    _rule("cast", "Cast", _cast, "cast to a standard type", PARSER),
    _rule("clip", "Clip", _bounds, "clip before quantizing"),
    _rule("grid", "GridSample", _grid, "cast the grid to the type of the input"),
    _rule("fmod", "Mod", _remainder, "set fmod = 1, or use int32"),
    _rule("vector-product", "MatMul", _vector, "make the vector a matrix of one row"),
    _rule("softmax-rank", "Softmax LogSoftmax Hardmax", _two_dimensions, "put a dimension of 1 in front"),
    _rule("top-k", "TopK", _k, "use a smaller k", live_only=True),
    Rule("tensor-scatter", frozenset({"TensorScatter"}), _cache, "use ScatterND", lasting=True),
    _rule("attention", "Attention", _attention, _PLAIN),
)
