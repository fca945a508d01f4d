"""Independent programs judge our signatures: openssl, securesystemslib, and npm's @sigstore/verify.

Each accepts what we signed and rejects every kind of tampering that it can see.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from filelock import FileLock

from modelforge.bundle import dsse
from modelforge.bundle.keys import load_private_key
from modelforge.bundle.layout import write_bundle
from modelforge.bundle.p256 import is_signed
from modelforge.bundle.provenance import statement
from modelforge.bundle.read import open_bundle
from modelforge.store import canonical_json
from tests.bundle.bundle_contents import MakeContent
from tests.bundle.signing_keys import PASSWORD, KeyPair

SIGSTORE_VERIFY = ("@sigstore/verify@4.1.3", "@sigstore/bundle@5.0.1", "@sigstore/core@4.0.1")

Change = Callable[[dict[str, Any]], object]


def flip(text: str, at: int) -> str:
    data = bytearray(base64.b64decode(text))
    data[at] ^= 1
    return base64.b64encode(data).decode()


def flip_payload(value: dict[str, Any]) -> None:
    value["dsseEnvelope"]["payload"] = flip(value["dsseEnvelope"]["payload"], 40)


def flip_signature(value: dict[str, Any]) -> None:
    (signature,) = value["dsseEnvelope"]["signatures"]
    signature["sig"] = flip(signature["sig"], -1)


TAMPERING: dict[str, Change] = {"payload byte": flip_payload, "signature byte": flip_signature}


@pytest.fixture
def document(tmp_path: Path, make_content: MakeContent, pair: KeyPair) -> bytes:
    bundle = open_bundle(write_bundle(tmp_path / "bundle", make_content()).path)
    return dsse.seal(statement(bundle), pair.key)


def tampered(document: bytes, change: Change) -> bytes:
    value = json.loads(document)
    change(value)
    return canonical_json(value)


# -- openssl: the pre-authentication encoding, written down here a second time


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl(tmp_path: Path, document: bytes, pair: KeyPair, other_pair: KeyPair) -> None:
    def judge(document: bytes, public: Path) -> bool:
        envelope = json.loads(document)["dsseEnvelope"]
        kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
        encoded = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
        (tmp_path / "pae").write_bytes(encoded)
        (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
        command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(tmp_path / "sig")]
        done = subprocess.run([*command, str(tmp_path / "pae")], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1)
        return done.stdout.strip() == "Verified OK"

    assert judge(document, pair.public)
    assert not judge(document, other_pair.public)
    for change in TAMPERING.values():
        assert not judge(tampered(document, change), pair.public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_opens_our_private_key_with_the_password_only(pair: KeyPair) -> None:
    def opened(password: str) -> bool:
        command = ["openssl", "pkey", "-in", str(pair.private), "-passin", "env:SECRET", "-pubout"]
        done = subprocess.run(
            command, capture_output=True, env={**os.environ, "SECRET": password}, check=False, text=True
        )
        return done.returncode == 0 and done.stdout == pair.public.read_text()

    assert opened(PASSWORD)
    assert not opened("wrong horse battery staple")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_key_that_openssl_sealed_anew(tmp_path: Path, pair: KeyPair) -> None:
    """The guide's way to more rounds of key derivation than `cryptography` offers."""
    command = [*"openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256 -iter 60000".split(), "-in", pair.private]
    command += ["-passin", "env:SECRET", "-passout", "env:SECRET", "-out", tmp_path / "strong.key"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "SECRET": PASSWORD})
    strong = load_private_key(tmp_path / "strong.key", PASSWORD)
    assert strong.public.id == pair.key.public.id
    assert is_signed(b"message", strong.sign(b"message"), pair.key.public.point)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_example_of_the_guide(tmp_path: Path, document: bytes, pair: KeyPair, other_pair: KeyPair) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "signing.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(# without-modelforge\n.*?)```", page, re.DOTALL)

    def run(document: bytes, public: Path) -> tuple[int, str]:
        (tmp_path / "it.sigstore.json").write_bytes(document)
        env = {**os.environ, "SIGNATURE": str(tmp_path / "it.sigstore.json"), "KEY": str(public)}
        done = subprocess.run(
            ["sh", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    digest = open_bundle(tmp_path / "bundle").digest
    assert run(document, pair.public) == (0, f"Verified OK\nppocr-cls:1.2.0 {digest}\n")
    assert run(document, other_pair.public)[0] != 0
    assert run(tampered(document, flip_payload), pair.public)[0] != 0


# -- securesystemslib: the library of in-toto and TUF


def test_securesystemslib(document: bytes, pair: KeyPair, other_pair: KeyPair) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    def judge(document: bytes, key: KeyPair) -> bool:
        public = load_pem_public_key(key.public.read_bytes())
        trusted = SSlibKey.from_crypto(public, keyid=pair.key.public.id)  # type: ignore[arg-type]  # wider than its stub
        envelope = Envelope.from_dict(json.loads(document)["dsseEnvelope"])
        try:
            return len(envelope.verify([trusted], threshold=1)) == 1
        except VerificationError:
            return False

    assert judge(document, pair)
    assert not judge(document, other_pair)
    for change in TAMPERING.values():
        assert not judge(tampered(document, change), pair)


# -- npm: the verifier of the Sigstore project


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """@sigstore/verify, fetched once into the user's cache: the one test that needs a package registry."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelforge-tests" / "sigstore-verify-4.1.3"
    )
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        if not (cache / "done").exists():
            (cache / "package.json").write_text("{}")
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *SIGSTORE_VERIFY]
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode != 0:
                pytest.skip(f"npm could not fetch {SIGSTORE_VERIFY[0]}: {done.stderr[-300:]}")
            (cache / "done").touch()
    return cache


JUDGE = """
const { bundleFromJSON } = require('@sigstore/bundle');
const { Verifier, toSignedEntity } = require('@sigstore/verify');
const { crypto } = require('@sigstore/core');
const cases = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const none = { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0, tsaThreshold: 0 };
const results = cases.map(({ document, key }) => {
  try {
    const material = {
      certificateAuthorities: [], timestampAuthorities: [], tlogs: [], ctlogs: [],
      publicKey: () => ({ publicKey: crypto.createPublicKey(key), validFor: () => true }),
    };
    new Verifier(material, none).verify(toSignedEntity(bundleFromJSON(document)));
    return 'accepted';
  } catch (error) {
    return `${error.code ?? error.name}: ${error.message}`;
  }
});
console.log(JSON.stringify(results));
"""


@pytest.mark.sigstore
def test_sigstore_verify(node_modules: Path, document: bytes, pair: KeyPair, other_pair: KeyPair) -> None:
    cases = [(document, pair), *((tampered(document, change), pair) for change in TAMPERING.values())]
    cases.append((document, other_pair))
    stdin = json.dumps([{"document": json.loads(text), "key": key.public.read_text()} for text, key in cases])
    env = {**os.environ, "NODE_PATH": str(node_modules / "node_modules")}
    done = subprocess.run(
        ["node", "-e", JUDGE], input=stdin, capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    accepted, *rejected = json.loads(done.stdout)
    assert accepted == "accepted"
    # Rejected for the signature's sake, not because something could not be read.
    assert [result.partition(":")[0] for result in rejected] == ["SIGNATURE_ERROR"] * 3, rejected
