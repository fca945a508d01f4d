"""A Python for arm64 with ONNX Runtime in a folder, to be run by qemu: Debian's packages and wheels, unpacked.

Nothing is installed on this machine: apt gets a state of its own in that folder. Needs Debian, root, and a network.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ONNXRUNTIME = "onnxruntime==1.19.2"
"""The newest that runs under qemu 7.2: 1.32 ends in a segmentation fault there, at import."""
_PACKAGES = (
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 libexpat1 zlib1g libffi8 "
    "libbz2-1.0 liblzma5 libssl3 libcrypt1 libuuid1"
).split()
_TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def make(folder: Path) -> tuple[Path, Path]:
    """The root (for ``qemu -L``) and the folder of packages (for ``sys.path``); made once."""
    root, site = folder / "root", folder / "site"
    if not (folder / "ready").exists():
        _debian(folder, root)
        _wheels(folder / "wheels", site)
        (folder / "ready").touch()
    return root, site


def _debian(folder: Path, root: Path) -> None:
    state, archives = folder / "state", folder / "cache" / "archives"
    (state / "lists" / "partial").mkdir(parents=True)
    (archives / "partial").mkdir(parents=True)
    (state / "status").touch()
    settings = folder / "apt.conf"
    settings.write_text(
        f'Dir::State "{state}";\nDir::State::status "{state / "status"}";\nDir::Cache "{folder / "cache"}";\n'
        'APT::Architecture "arm64";\nAPT::Architectures {"arm64";};\nAPT::Sandbox::User "root";\n'
    )
    environment = {"APT_CONFIG": str(settings), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
    subprocess.run(["apt-get", "download", "-qq", *_PACKAGES], env=environment, check=True, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)


def _wheels(wheels: Path, site: Path) -> None:
    tags = [option for tag in _TAGS for option in ("--platform", f"{tag}_aarch64")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.11",
    ]
    subprocess.run([*pip, *tags, "-d", str(wheels), ONNXRUNTIME, "numpy<2.3"], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
