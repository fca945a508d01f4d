"""Runs .om files on an NPU. A file of its own for CANN's Python: standard library, NumPy, and ais_bench or acl.

``python3 device_worker.py REQUEST.json ANSWER.json``. Sources: ais_bench's InferSession (msit, components/benchmark),
pyACL's reference (hiascend.com, acl.mdl and acl.rt). Knows nothing of ModelForge but main.json.
"""

import importlib
import importlib.util
import inspect
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
HUGE_FIRST = 0
WARM_UP, ROUNDS = 3, 30


def main(argv: list[str]) -> int:
    request = json.loads(Path(argv[0]).read_text())
    try:
        answer = {"probe": probe, "run": run, "race": race}[request["do"]](request)
    except Exception as error:  # whatever the vendor's modules throw becomes one clear failure of this call
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(argv[1]).write_text(json.dumps(answer))
    return 0


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """The chip's exact name, and which interface there is."""
    del request
    return {"soc": importlib.import_module("acl").get_soc_name(), "api": api()}


def api() -> str:
    return "ais_bench" if importlib.util.find_spec("ais_bench") else "pyACL"


def run(request: dict[str, Any]) -> dict[str, Any]:
    """All samples of an .npz, in batches that the model has; outputs into an .npz, samples along the first axis."""
    import numpy as np

    manifest = json.loads(Path(request["manifest"]).read_text())
    samples = np.load(request["inputs"], allow_pickle=False)
    variant = Variant(manifest, Path(request["manifest"]).parent)
    collected: dict[str, list[Any]] = {name: [] for name in manifest["outputs"]}
    count, at = len(samples[manifest["inputs"][0]["name"]]), 0
    while at < count:
        size = min(variant.batch_for(min(request["batch"], count - at)), max(1, request["batch"]), count - at)
        arrays = [samples[each["name"]][at : at + size] for each in manifest["inputs"]]
        for name, value in zip(manifest["outputs"], variant.infer(arrays, size)):  # noqa: B905 - Python 3.7 has no strict
            collected[name].append(value)
        at += size
    joined: dict[str, Any] = {name: np.concatenate(values) for name, values in collected.items()}
    np.savez(request["outputs"], **joined)
    arrays = [samples[each["name"]][:1] for each in manifest["inputs"]]
    times = timed([variant], [arrays])[0]
    return {"soc": probe({})["soc"], "api": api(), "milliseconds": {"median": times, "batch": 1, "runs": ROUNDS}}


def race(request: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds of several variants on the same batch, in interleaved rounds."""
    import numpy as np

    samples = np.load(request["inputs"], allow_pickle=False)
    manifests = [json.loads(Path(path).read_text()) for path in request["manifests"]]
    variants = [Variant(manifest, Path(path).parent) for manifest, path in zip(manifests, request["manifests"])]  # noqa: B905 - as above
    feeds = [[samples[each["name"]][: request["batch"]] for each in manifest["inputs"]] for manifest in manifests]
    return {"milliseconds": timed(variants, feeds)}


def timed(variants: list[Any], feeds: list[Any]) -> list[float]:
    taken: list[list[float]] = [[] for _ in variants]
    for turn in range(WARM_UP + ROUNDS):
        for place, variant in enumerate(variants):
            begun = time.perf_counter()
            variant.infer(feeds[place], len(feeds[place][0]))
            if turn >= WARM_UP:
                taken[place].append((time.perf_counter() - begun) * 1000)
    return [round(statistics.median(each), 4) for each in taken]


class Variant:
    """The .om files of one variant, each loaded when it is first needed."""

    def __init__(self, manifest: dict[str, Any], folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self.sessions: dict[str, Any] = {}

    def batch_sizes(self) -> list[int]:
        """Sizes of the first dimension, rising; empty where the samples are not along it."""
        first = self.manifest["inputs"][0]["shape"][:1]
        if not first:
            return []
        if isinstance(first[0], int):
            return [first[0]] if first[0] == 1 else []
        return sorted({row[first[0]] for model in self.manifest["models"] for row in model["sizes"]})

    def batch_for(self, count: int) -> int:
        """The largest size up to ``count``; where all are larger, the smallest, to be filled up."""
        sizes = self.batch_sizes() or [1]
        fitting = [size for size in sizes if size <= count]
        return fitting[-1] if fitting else sizes[0]

    def infer(self, arrays: list[Any], count: int) -> list[Any]:
        """Outputs of ``count`` samples."""
        import numpy as np

        sizes = self.batch_sizes()
        feeds = []
        for each, array in zip(self.manifest["inputs"], arrays):  # noqa: B905 - Python 3.7 has no strict
            value = array if sizes else array[0]
            if sizes and self.batch_for(count) > count:
                value = np.concatenate([value, np.repeat(value[-1:], self.batch_for(count) - count, axis=0)])
            feeds.append(np.ascontiguousarray(raw(value, self.manifest["aipp"].get(each["name"]))))
        shapes = [list(np.shape(array)) if sizes else list(np.shape(array))[1:] for array in arrays]
        if sizes:
            shapes = [[self.batch_for(count), *shape[1:]] for shape in shapes]
        model, row = self.choose(shapes)
        outputs = self.session(model).infer(feeds, model, row, shapes)
        return [value[:count] if sizes else value[None] for value in outputs]

    def choose(self, shapes: list[list[int]]) -> Any:
        """The model, and its row of sizes, that takes these shapes."""
        for model in self.manifest["models"]:
            for row in model["sizes"]:
                wanted = [[row.get(size, size) for size in each["shape"]] for each in self.manifest["inputs"]]
                if wanted == shapes:
                    return model, row
        raise ValueError(f"no .om of this variant takes the shapes {shapes}")

    def session(self, model: dict[str, Any]) -> Any:
        if model["file"] not in self.sessions:
            kind = AisBench if api() == "ais_bench" else PyAcl
            self.sessions[model["file"]] = kind(str(self.folder / model["file"]))
        return self.sessions[model["file"]]


def raw(value: Any, section: Any) -> Any:
    """A normalized NCHW array as the 8-bit NHWC image that AIPP takes: exact where it was made from 8-bit pixels."""
    import numpy as np

    if section is None:
        return value
    if section["source"] not in ("rgb888", "bgr888", "gray8") or section.get("crop"):
        raise ValueError(f"samples cannot be turned back into {section['source']} images")
    mean = np.array(section["mean"], np.float32)[: value.shape[1]].reshape(1, -1, 1, 1)
    std = np.array(section["std"], np.float32)[: value.shape[1]].reshape(1, -1, 1, 1)
    pixels = np.clip(np.rint(value * std + mean), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    swapped = (section["source"], section["colour"]) in (("rgb888", "bgr"), ("bgr888", "rgb"))
    return pixels[..., ::-1] if swapped else pixels


class AisBench:
    """ais_bench's InferSession. Older releases spell modes dym..., newer ones dyn...: the installed one is asked."""

    def __init__(self, path: str) -> None:
        self.kind = importlib.import_module("ais_bench.infer.interface").InferSession
        self.session = self.kind(0, path)

    def infer(self, feeds: list[Any], model: dict[str, Any], row: dict[str, int], shapes: list[list[int]]) -> list[Any]:
        del row, shapes
        dynamic = {"dynamic_batch_size": "batch", "dynamic_image_size": "hw", "dynamic_dims": "dims"}.get(
            model["gears"]
        )
        if dynamic is None:
            return list(self.session.infer(feeds, mode="static"))
        spelled = "dym" if "dymbatch" in inspect.getsource(self.kind) else "dyn"
        return list(self.session.infer(feeds, mode=spelled + dynamic))


class PyAcl:
    """The C interface's Python twin. Every call gives a code, 0 where it worked."""

    def __init__(self, path: str) -> None:
        self.acl = importlib.import_module("acl")
        self.acl.init()
        self.check(self.acl.rt.set_device(0), "set_device")
        self.context = self.taken(self.acl.rt.create_context(0), "create_context")
        self.model = self.taken(self.acl.mdl.load_from_file(path), "load_from_file")
        self.description = self.acl.mdl.create_desc()
        self.check(self.acl.mdl.get_desc(self.description, self.model), "get_desc")

    def infer(self, feeds: list[Any], model: dict[str, Any], row: dict[str, int], shapes: list[list[int]]) -> list[Any]:
        acl, mdl = self.acl, self.acl.mdl
        inputs, given = self.dataset(mdl.get_num_inputs(self.description), mdl.get_input_size_by_index)
        outputs, made = self.dataset(mdl.get_num_outputs(self.description), mdl.get_output_size_by_index)
        try:
            for (pointer, size), value in zip(given, feeds):  # noqa: B905 - a gear's own input has no array
                data = value.tobytes()
                copied = acl.rt.memcpy(pointer, size, acl.util.bytes_to_ptr(data), len(data), HOST_TO_DEVICE)
                self.check(copied, "memcpy")
            self.set_gear(inputs, model, row, shapes)
            self.check(mdl.execute(self.model, inputs, outputs), "execute")
            return [self.output(place, pointer) for place, (pointer, _) in enumerate(made)]
        finally:
            for pointer, _ in given + made:
                acl.rt.free(pointer)
            for dataset in (inputs, outputs):
                for place in range(mdl.get_dataset_num_buffers(dataset)):
                    acl.destroy_data_buffer(mdl.get_dataset_buffer(dataset, place))
                mdl.destroy_dataset(dataset)

    def dataset(self, count: int, size_of: Any) -> Any:
        dataset, buffers = self.acl.mdl.create_dataset(), []
        for place in range(count):
            size = size_of(self.description, place)
            pointer = self.taken(self.acl.rt.malloc(size, HUGE_FIRST), "malloc")
            buffers.append((pointer, size))
            added = self.acl.mdl.add_dataset_buffer(dataset, self.acl.create_data_buffer(pointer, size))
            self.check(added[-1] if isinstance(added, tuple) else added, "add_dataset_buffer")
        return dataset, buffers

    def set_gear(self, inputs: Any, model: dict[str, Any], row: dict[str, int], shapes: list[list[int]]) -> None:
        if model["gears"] is None:
            return
        mdl = self.acl.mdl
        # The name of the input that ATC adds for gears (acl_mdl.h, ACL_DYNAMIC_TENSOR_NAME).
        place = self.taken(mdl.get_input_index_by_name(self.description, "ascend_mbatch_shape_data"), "gear input")
        if model["gears"] == "dynamic_batch_size":
            code = mdl.set_dynamic_batch_size(self.model, inputs, place, shapes[0][0])
        elif model["gears"] == "dynamic_image_size":
            height, width = next(shape[2:] for shape in shapes if len(shape) == 4)
            code = mdl.set_dynamic_hw_size(self.model, inputs, place, height, width)
        else:
            flat = [size for shape in shapes for size in shape]
            code = mdl.set_input_dynamic_dims(
                self.model, inputs, place, {"name": "", "dimCount": len(flat), "dims": flat}
            )
        self.check(code, f"gear {row}")

    def output(self, place: int, pointer: Any) -> Any:
        import numpy as np

        mdl = self.acl.mdl
        dims = self.taken(mdl.get_cur_output_dims(self.description, place), "get_cur_output_dims")["dims"]
        dtype = _DTYPES[mdl.get_output_data_type(self.description, place)]
        array = np.zeros(dims, dtype)
        buffer = self.taken(self.acl.rt.malloc_host(array.nbytes), "malloc_host")
        try:
            copied = self.acl.rt.memcpy(buffer, array.nbytes, pointer, array.nbytes, DEVICE_TO_HOST)
            self.check(copied, "memcpy")
            data = self.acl.util.ptr_to_bytes(buffer, array.nbytes)
        finally:
            self.acl.rt.free_host(buffer)
        return np.frombuffer(data, dtype).reshape(dims).copy()

    def taken(self, answer: Any, what: str) -> Any:
        value, code = answer
        self.check(code, what)
        return value

    def check(self, code: int, what: str) -> None:
        if code != 0:
            raise RuntimeError(f"acl: {what} gave {code}")


# aclDataType (acl_base.h) -> NumPy.
_DTYPES = {
    0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32", 9: "int64",
    10: "uint64", 11: "float64", 12: "bool",
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
