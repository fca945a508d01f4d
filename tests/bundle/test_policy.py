"""The user's policy: the first rule that fits counts, and a policy that cannot be read is never "no policy"."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.bundle.policy import policy_keys
from modelforge.errors import IntegrityError

POLICY = """
[[require]]
repository = "registry.example.com/vision/legacy-*"
keys = ["old.pub", "/etc/keys/release.pub"]

[[require]]
repository = "registry.example.com/vision/*"
keys = ["~/release.pub"]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("MODELFORGE_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def policy(home: Path) -> Path:
    path = home / ".config" / "modelforge" / "policy.toml"
    path.parent.mkdir(parents=True)
    path.write_text(POLICY)
    return path


def test_without_a_policy_nothing_is_demanded(home: Path) -> None:
    assert policy_keys("registry.example.com/vision/ocr") is None


def test_the_first_rule_that_fits(home: Path, policy: Path) -> None:
    assert policy_keys("registry.example.com/vision/ocr") == (home / "release.pub",)
    assert policy_keys("registry.example.com/vision/team/ocr") == (home / "release.pub",)
    assert policy_keys("registry.example.com/vision/legacy-ocr") == (
        policy.parent / "old.pub",
        Path("/etc/keys/release.pub"),
    )
    assert policy_keys("registry.example.com/other") is None
    assert policy_keys("registry.example.com.evil.org/vision/ocr") is None


@pytest.mark.parametrize(
    "spelling",
    ["REGISTRY.example.com/vision/ocr", "registry.example.com:443/vision/ocr", "registry.example.com./vision/ocr"],
)
def test_other_spellings_of_one_host_do_not_evade_it(policy: Path, spelling: str) -> None:
    assert policy_keys(spelling) is not None


def test_ports_are_part_of_a_host(policy: Path) -> None:
    policy.write_text('[[require]]\nrepository = "localhost:5000/*"\nkeys = ["a.pub"]\n')
    assert policy_keys("localhost:5000/x")
    assert policy_keys("localhost:5001/x") is None
    assert policy_keys("localhost/x") is None


def test_named_by_the_environment(home: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = home / "other.toml"
    other.write_text('[[require]]\nrepository = "*"\nkeys = ["all.pub"]\n')
    monkeypatch.setenv("MODELFORGE_CONFIG", str(other))
    assert policy_keys("anything.example/x") == (home / "all.pub",)
    monkeypatch.setenv("MODELFORGE_CONFIG", str(policy.parent))  # a folder that holds policy.toml
    assert policy_keys("registry.example.com/vision/ocr")
    monkeypatch.setenv("MODELFORGE_CONFIG", str(home / "absent.toml"))
    with pytest.raises(IntegrityError, match="names a policy that is not there"):
        policy_keys("registry.example.com/vision/ocr")
    monkeypatch.setenv("MODELFORGE_CONFIG", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "empty"))
    assert policy_keys("registry.example.com/vision/ocr") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[require]\n", "is not TOML"),
        ("\xff", "is not TOML"),
        ('[[requires]]\nrepository = "*"\nkeys = ["a"]\n', 'unknown key "requires".*did you mean "require"'),
        ('[[require]]\nrepository = "*"\nkey = ["a"]\n', 'unknown key "key"'),
        ('[[require]]\nrepository = "*"\n', "required and missing"),
        ('[[require]]\nrepository = "*"\nkeys = []\n', "at least 1"),
        ('[[require]]\nrepository = ""\nkeys = ["a"]\n', "at least 1"),
        ('[[require]]\nrepository = "*"\nkeys = "a"\n', "array"),
        ("# " + "x" * (1 << 20), "more than"),
    ],
    ids=["syntax", "encoding", "table", "key", "missing", "no keys", "no repository", "no array", "huge"],
)
def test_a_policy_that_cannot_be_read_is_a_refusal(policy: Path, text: str, said: str) -> None:
    policy.write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=f"(?s){said}") as caught:
        policy_keys("unrelated.example/x")
    assert str(policy) in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "loop"])
def test_a_policy_that_is_no_file_is_a_refusal(policy: Path, kind: str) -> None:
    policy.unlink()
    match kind:
        case "folder":
            policy.mkdir()
        case "loop":
            policy.symlink_to(policy)
        case _:
            policy.symlink_to(policy.parent / "absent")
    with pytest.raises(IntegrityError, match="cannot be read"):
        policy_keys("unrelated.example/x")


def test_a_folder_that_cannot_be_entered_is_a_refusal(home: Path) -> None:
    """A loop of links stands for missing rights, which a test run by root has not."""
    folder = home / ".config" / "modelforge"
    folder.parent.mkdir()
    folder.symlink_to(folder)
    with pytest.raises(IntegrityError, match="cannot be read"):
        policy_keys("unrelated.example/x")
