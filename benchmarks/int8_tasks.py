"""The data and the metrics of ``int8_accuracy.py``: four real models, what they are fed, and how each is judged.

Everything is rendered or read on the spot from what is installed; seeds are fixed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]

WORDS = (
    "account address amount balance batch bridge camera channel client column contract customer date delivery device "
    "discount document east engine factory figure fragile garden glass harbour height invoice island journey kitchen "
    "label letter library machine market meeting method minute model morning network notice number office order paper "
    "parcel payment platform point price product quality quantity receipt record return river school section serial"
).split()


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Attributes:
        shapes: what ``prepare`` gets.
        calibration, evaluation: ``[count, ...]`` of the only input; they share no sample.
        truth: what ``score`` compares with; None where that is the FP32 output itself.
        score: (outputs ``[count, ...]``, truth) -> a share of 1.
    """

    name: str
    model: Path
    shapes: dict[str, tuple[int | str, ...]]
    calibration: Array
    evaluation: Array
    truth: Any
    score: Callable[[Array, Any], float]
    metric: str
    allowed: dict[str, float]


def packaged(path: str) -> Path:
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"install the package {package} to run this benchmark")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def rec_task(count: int = 512) -> Task:
    """PP-OCRv4 recognition: exact match of a greedy CTC decoding. No upper case: FP32 takes O for 0."""
    model = packaged("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    keys = ["", *metadata["character"].split("\n"), " "]

    def exact(outputs: Array, truth: Sequence[str]) -> float:
        found = [_decode(row, keys) for row in outputs]
        # Blanks are left out: FP32 drops every tenth, and noise puts some of those back.
        wanted = [text.replace(" ", "") for text in truth]
        return float(np.mean([text == other for text, other in zip(found, wanted, strict=True)]))

    calibration, _ = _rendered(32, seed=11, width=320)
    evaluation, truth = fresh("rec4", 12, count)
    allowed = {"onnxruntime-x86": 0.005, "tensorrt": 0.01, "ascend": 0.01, "tvm": 0.005}
    shapes: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 48, 320)}
    return Task("rec4", model, shapes, calibration, evaluation, truth, exact, "exact match", allowed)


def cls_task(count: int = 512) -> Task:
    """PP-OCR direction classifier: upright or turned by 180 degrees."""
    model = packaged("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    calibration, _ = _turned(*_rendered(32, seed=21, width=192, hard=True))
    evaluation, labels = fresh("cls", 22, count)
    allowed = dict.fromkeys(("onnxruntime-x86", "tensorrt", "ascend", "tvm"), 0.0025)
    shapes: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 48, 192)}
    return Task("cls", model, shapes, calibration, evaluation, labels, _top1, "top1", allowed)


def fresh(task: str, seed: int, count: int) -> tuple[Array, Any]:
    """Another set of evaluation samples with their truth, of a task whose lines are rendered."""
    if task == "rec4":
        return _rendered(count, seed=seed, width=320)
    return _turned(*_rendered(count, seed=seed, width=192, hard=True))


SUFFIXES = {
    **{".py": "python", ".html": "html", ".json": "json", ".js": "javascript", ".css": "css", ".xml": "xml"},
    **{".so": "elf", ".png": "png", ".jpg": "jpeg", ".md": "markdown", ".toml": "toml", ".yaml": "yaml", ".c": "c"},
    **{".sh": "shell", ".csv": "csv", ".svg": "svg", ".ttf": "ttf", ".pyc": "pythonbytecode", ".gz": "gzip"},
    **{".pl": "perl", ".npz": "npz", ".npy": "npy", ".onnx": "onnx", ".cpp": "cpp", ".rst": "rst", ".zip": "zip"},
}


def magika_task(count: int = 400, each: int = 24) -> Task:
    """Magika v3.3: the type of real files, by their suffix, from site-packages and /usr."""
    folder = packaged("magika/models/standard_v3_3")
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    files = _files([Path(path) for path in (*sys.path, "/usr/share", "/usr/include", "/usr/lib")], each)
    files = [files[index] for index in np.random.RandomState(31).permutation(len(files))]
    features = np.stack([magika_features(path.read_bytes()) for path in files])
    truth = np.array([labels.index(SUFFIXES[path.suffix]) for path in files])
    known = 32
    taken = slice(known, known + count)
    allowed = dict.fromkeys(("onnxruntime-x86", "tensorrt", "ascend", "tvm"), 0.0025)
    shapes: dict[str, tuple[int | str, ...]] = {"bytes": ("batch", 2048)}
    model = folder / "model.onnx"
    return Task("magika", model, shapes, features[:known], features[taken], truth[taken], _top1, "top1", allowed)


def yolo_task(count: int = 160) -> Task:
    """YOLOv8n (NudeNet 320n): AP at IoU 0.5 against FP32's own detections, on crops and compositions of photographs."""
    photos = _photographs()
    images = [_composition(np.random.RandomState(4000 + index), photos) for index in range(count + 32)]
    stack = np.stack(images)
    allowed = dict.fromkeys(("onnxruntime-x86", "tensorrt", "ascend", "tvm"), 0.02)
    shapes: dict[str, tuple[int | str, ...]] = {"images": ("batch", 3, 320, 320)}
    model = packaged("nudenet/320n.onnx")
    return Task("320n", model, shapes, stack[:32], stack[32:], None, detection_agreement, "agreement", allowed)


TASKS: dict[str, Callable[[], Task]] = {"rec4": rec_task, "cls": cls_task, "magika": magika_task, "320n": yolo_task}


def magika_features(content: bytes) -> Array:
    """The first and last 1024 bytes of the first and last 4096, blanks stripped, padded with 256 (Magika's config)."""
    begin = np.frombuffer(content[:4096].lstrip()[:1024], np.uint8).astype(np.int32)
    end = np.frombuffer(content[-4096:].rstrip()[-1024:], np.uint8).astype(np.int32)
    features = np.full(2048, 256, np.int32)
    features[: begin.size] = begin
    features[2048 - end.size :] = end
    return features


def detection_agreement(outputs: Array, reference: Array) -> float:
    """AP at IoU 0.5, classes pooled: FP32's detections (score 0.25 on) are the truth, ranked by the other's scores."""
    ranked: list[tuple[float, bool]] = []
    wanted = 0
    for output, exact in zip(outputs, reference, strict=True):
        theirs = detections(exact, 0.25)
        wanted += len(theirs)
        free = list(range(len(theirs)))
        for box, kind, score in detections(output, 0.05):
            hits = [index for index in free if theirs[index][1] == kind and _iou(box, theirs[index][0]) >= 0.5]
            if hits:
                free.remove(max(hits, key=lambda index: _iou(box, theirs[index][0])))
            ranked.append((score, bool(hits)))
    hit = np.cumsum([found for _, found in sorted(ranked, reverse=True)])
    precision = hit / np.arange(1, len(hit) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(hit, prepend=0)
    return float((precision * steps).sum() / max(wanted, 1))


def detections(output: Array, score: float = 0.25, overlap: float = 0.45) -> list[tuple[Array, int, float]]:
    """``[4 + classes, anchors]`` -> (x0 y0 x1 y1, class, score) after non-maximum suppression, best first."""
    scores = output[4:].max(0)
    kept: list[tuple[Array, int, float]] = []
    for anchor in np.argsort(-scores):
        if scores[anchor] < score:
            break
        x, y, w, h = output[:4, anchor]
        box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        if all(_iou(box, other) < overlap for other, _, _ in kept):
            kept.append((box, int(output[4:, anchor].argmax()), float(scores[anchor])))
    return kept


def _iou(a: Array, b: Array) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return float(w * h / (both - w * h))


def _top1(outputs: Array, truth: Array) -> float:
    return float(np.mean(outputs.argmax(-1) == truth))


def _decode(row: Array, keys: Sequence[str]) -> str:
    best = row.argmax(-1)
    kept = [index for place, index in enumerate(best) if index and (place == 0 or index != best[place - 1])]
    return "".join(keys[index] for index in kept).replace(" ", "")


def _fonts() -> list[Any]:
    names = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
    folder = Path("/usr/share/fonts/truetype/dejavu")
    files = [folder / f"{name}.ttf" for name in names if (folder / f"{name}.ttf").exists()]
    sizes = (18, 24, 32)
    return [ImageFont.truetype(str(file), size) for file in files for size in sizes] or [
        ImageFont.load_default(size) for size in sizes
    ]


def _rendered(count: int, seed: int, width: int, hard: bool = False) -> tuple[Array, list[str]]:
    """Lines of words and figures, ``[count, 3, 48, width]`` in -1..1 (BGR), zeros right of the line, and their text.

    ``hard``: small, pale and noisy, without which the classifier is right on every line by a wide margin.
    """
    random = np.random.RandomState(seed)
    fonts = _fonts()
    arrays, texts = [], []
    for _ in range(count):
        font = fonts[random.randint(len(fonts))]
        words = [WORDS[random.randint(len(WORDS))] for _ in range(random.randint(0, 3))]
        words.insert(random.randint(len(words) + 1), str(random.randint(100, 100_000)))
        text = (" ".join(words), " ".join(words).title())[random.randint(2)]
        if hard:
            font = font.font_variant(size=(10, 13, 16)[random.randint(3)])
        arrays.append(_line(random, font, text, width, 40 if hard else 15))
        texts.append(text)
    return np.stack(arrays), texts


def _line(random: np.random.RandomState, font: Any, text: str, width: int, noisy: int) -> Array:
    paper = random.randint(150, 256, 3)
    ink = (paper * random.uniform(0.0, 0.55 if noisy < 40 else 0.7)).astype(int)
    if random.randint(3) == 0:
        paper, ink = ink, paper
    left, top, right, bottom = font.getbbox(text)
    margins = random.randint(1, 6, 4)
    size = (int(right - left + margins[0] + margins[1]), int(bottom - top + margins[2] + margins[3]))
    image = Image.new("RGB", size, tuple(paper.tolist()))
    ImageDraw.Draw(image).text((int(margins[0] - left), int(margins[2] - top)), text, tuple(ink.tolist()), font)
    noise = random.randint(-noisy, noisy + 1, (size[1], size[0], 1)) * random.uniform()
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    wide = max(1, min(width, round(48 * image.width / image.height)))
    pixels = np.asarray(image.resize((wide, 48), Image.Resampling.BILINEAR), np.float32)
    x = np.zeros((3, 48, width), np.float32)
    x[:, :, :wide] = (pixels[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return x


def _turned(lines: Array, _: list[str]) -> tuple[Array, Array]:
    """Turn every second line by 180 degrees within its own width."""
    labels = np.arange(len(lines)) % 2
    for line in lines[1::2]:
        inside = np.flatnonzero(np.abs(line).sum((0, 1)))
        wide = int(inside[-1]) + 1 if inside.size else line.shape[-1]
        line[:, :, :wide] = line[:, ::-1, :wide][:, :, ::-1]
    return lines, labels


def _files(roots: Sequence[Path], each: int) -> list[Path]:
    """Up to ``each`` files of every suffix, spread over the folders in the order of their names."""
    found: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for root in dict.fromkeys(path.resolve() for path in roots if path.is_dir()):
        for path in sorted(root.rglob("*")):
            names = found.get(path.suffix)
            if names is not None and len(names) < 60 * each and path.is_file() and path.stat().st_size >= 256:
                names.append(path)
    return [path for names in found.values() for path in names[:: max(1, len(names) // each)][:each]]


def _photographs() -> list[Image.Image]:
    """Real photographs that installed packages carry, two of them of people."""
    names = (
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        "skimage/data/astronaut.png",
        "sklearn/datasets/images/china.jpg",
        "sklearn/datasets/images/flower.jpg",
    )
    return [Image.open(packaged(name)).convert("RGB") for name in names]


def _composition(random: np.random.RandomState, photos: Sequence[Image.Image]) -> Array:
    """A crop of a landscape with crops of people put in, ``[3, 320, 320]`` in 0..1."""
    canvas = _crop(random, photos[random.randint(2, len(photos))], 0.4).resize((320, 320))
    for _ in range(random.randint(1, 3)):
        person = _crop(random, photos[random.randint(2)], 0.75)
        if random.randint(2):
            person = person.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        high = random.randint(120, 300)
        wide = max(60, int(high * person.width / person.height))
        place = (random.randint(-40, 321 - min(wide, 300)), random.randint(-20, 321 - high))
        canvas.paste(person.resize((wide, high), Image.Resampling.BILINEAR), place)
    light = random.uniform(0.6, 1.1)
    pixels = (np.asarray(canvas, np.float32) * light).clip(0, 255) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _crop(random: np.random.RandomState, photo: Image.Image, least: float) -> Image.Image:
    share = random.uniform(least, 1.0)
    wide, high = int(photo.width * share), int(photo.height * share)
    x, y = random.randint(photo.width - wide + 1), random.randint(photo.height - high + 1)
    return photo.crop((x, y, x + wide, y + high))
