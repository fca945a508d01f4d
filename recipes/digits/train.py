"""Trains the digits model and writes everything that recipe.toml names beside itself.

    pip install torch==2.13.0 scikit-learn onnx numpy
    python train.py

The committed model.onnx, calibration.npz and evaluation.npz came from this file as it stands. It is not part of a
build: `modelforge build` reads only the three files. The data are the 1797 digits that scikit-learn carries (Alpaydin
and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, CC BY 4.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
SEED = 20
EPOCHS = 40
EVALUATION_SAMPLES = 360
CALIBRATION_SAMPLES = 128


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    digits = load_digits()
    # Pixels are 0..16; the model takes 0..1. Scaling here keeps the data files and the deployer's input the same.
    images = (digits.images / 16.0).astype(np.float32)[:, None, :, :]
    x, x_held_out, y, y_held_out = train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=EVALUATION_SAMPLES,
        stratify=digits.target,
        random_state=SEED,
    )

    network = train(x, y)
    onnx.save(to_onnx(network), FOLDER / "model.onnx")
    # Calibration samples come from the training half: evaluation data that also set the ranges would flatter INT8.
    np.savez_compressed(FOLDER / "calibration.npz", x=x[:CALIBRATION_SAMPLES])
    np.savez_compressed(FOLDER / "evaluation.npz", x=x_held_out, label=y_held_out)

    with torch.no_grad():
        right = network(torch.from_numpy(x_held_out)).argmax(1).numpy() == y_held_out
    print(f"top-1 on {EVALUATION_SAMPLES} held-out digits: {right.mean():.4f}")


class Residual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.first_norm = convolution(channels, channels)
        self.second, self.second_norm = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(inner)))


class DigitsNetwork(nn.Module):
    """[batch, 1, 8, 8] in 0..1 to [batch, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = convolution(1, 16)
        self.block = Residual(16)
        self.widen, self.widen_norm = convolution(16, 32)
        self.wide_block = Residual(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem_norm(self.stem(x))))
        x = torch.max_pool2d(x, 2)
        x = self.wide_block(torch.relu(self.widen_norm(self.widen(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def convolution(channels_in: int, channels_out: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)


def train(x: np.ndarray, y: np.ndarray) -> DigitsNetwork:
    """Train on images [n, 1, 8, 8] and labels [n]; returns the network in evaluation mode."""
    network = DigitsNetwork().train()
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1e-2)
    batches = [len(images) // 64] * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=sum(batches))
    for steps in batches:
        for chosen in torch.randperm(len(images))[: steps * 64].split(64):
            loss = nn.functional.cross_entropy(network(shifted(images[chosen])), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def shifted(images: Tensor) -> Tensor:
    """The batch moved by up to one pixel each way: 1437 digits are few."""
    down, right = (int(step) for step in torch.randint(-1, 2, (2,)))
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


class GraphWriter:
    """Appends ONNX nodes with named weights; each method returns the name of the tensor that it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Tensor) -> str:
        self.weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def add(self, kind: str, name: str, inputs: list[str], **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def conv_norm(self, name: str, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
        """BatchNormalization stays a node of its own, as exporters leave it: folding it is the forge's work."""
        y = self.add(
            "Conv", f"{name}_conv", [x, self.weight(f"{name}.weight", conv.weight)], kernel_shape=[3, 3], pads=[1] * 4
        )
        statistics = {"gamma": norm.weight, "beta": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
        names = [self.weight(f"{name}.{key}", value) for key, value in statistics.items() if value is not None]
        return self.add("BatchNormalization", f"{name}_norm", [y, *names], epsilon=norm.eps)

    def residual(self, name: str, x: str, block: Residual) -> str:
        y = self.conv_norm(f"{name}_first", x, block.first, block.first_norm)
        y = self.add("Relu", f"{name}_first_relu", [y])
        y = self.conv_norm(f"{name}_second", y, block.second, block.second_norm)
        return self.add("Relu", f"{name}_relu", [self.add("Add", f"{name}_add", [x, y])])


def to_onnx(network: DigitsNetwork) -> onnx.ModelProto:
    """Write the network by hand, so that no exporter's version changes the file. Opset 17, dynamic batch."""
    graph = GraphWriter()
    y = graph.add("Relu", "stem_relu", [graph.conv_norm("stem", "x", network.stem, network.stem_norm)])
    y = graph.residual("block", y, network.block)
    y = graph.add("MaxPool", "pool", [y], kernel_shape=[2, 2], strides=[2, 2])
    y = graph.add("Relu", "widen_relu", [graph.conv_norm("widen", y, network.widen, network.widen_norm)])
    y = graph.residual("wide_block", y, network.wide_block)
    y = graph.add("Flatten", "features", [graph.add("GlobalAveragePool", "mean", [y])])
    head = [graph.weight("head.weight", network.head.weight), graph.weight("head.bias", network.head.bias)]
    graph.add("Gemm", "logits", [y, *head], transB=1)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "digits",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # what opset 17 came with; old runtimes refuse newer ones
        producer_name="modelforge-recipe-digits",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    main()
