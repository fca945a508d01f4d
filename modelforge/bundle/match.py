"""Can a variant run on a device? Said before it is tried, from the record and the device's facts alone.

What a variant needs stands in its record under ``runtime.needs`` and in its target's profile, in one vocabulary
(:data:`NEEDS`). What is not known of a device is neither a pass nor a failure: it is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelforge.bundle import versions
from modelforge.bundle.device import SOFTWARE, DeviceFacts, this_device
from modelforge.bundle.read import Variant
from modelforge.bundle.record import VariantRecord
from modelforge.errors import TargetError, UnsupportedError
from modelforge.target import Registry

Verdict = Literal["runs", "unknown", "cannot"]


@dataclass(frozen=True)
class Match:
    """Whether a variant can run on a device.

    Attributes:
        cannot: why it cannot, a sentence each; empty if nothing known speaks against it.
        unknown: what could not be told, a sentence each.
        met: what it needs and the device has.
    """

    cannot: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    met: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """``runs``: nothing speaks against it, and all that it needs was found here."""
        return "cannot" if self.cannot else "unknown" if self.unknown else "runs"

    def to_json(self) -> dict[str, Any]:
        told = {"cannot": list(self.cannot), "unknown": list(self.unknown), "met": list(self.met)}
        return {"verdict": self.verdict, **told}


@dataclass(frozen=True)
class Profile:
    """What choosing takes from a target: its name, its tier, its architecture.

    Attributes:
        tier: ``device``, ``edge``, ``cloud``, or "" where no profile was found.
        arch: the profile's ``[arch]`` table: ``kind`` and the keys of that kind.
    """

    tag: str
    title: str = ""
    tier: str = ""
    arch: Mapping[str, Any] | None = None

    @property
    def is_accelerator(self) -> bool:
        return self.arch is not None and self.arch.get("kind") != "cpu"


def match(record: VariantRecord, device: DeviceFacts, profile: Profile | None = None) -> Match:
    """Compare what a variant needs with what a device has.

    Args:
        profile: of the record's target, as :func:`profile_of` gives it.
    """
    if record.status != "compiled":
        return Match(cannot=(_not_compiled(record),))
    arch_needs, notes = ({}, [_NO_PROFILE]) if profile is None or profile.arch is None else (_arch(profile.arch), [])
    needs = {**arch_needs, **needs_of(record)}
    if not needs_of(record) and record.runtime is not None:
        notes.append(f"the record says in words alone what runtime it needs: {record.runtime.requires}")
    faults: list[str] = []
    unknown: list[str] = []
    met: list[str] = []
    for key, wanted in needs.items():
        if key == "cpuinfo" and faults and "isa" in needs:
            continue  # flags of another instruction set say nothing more
        answer, sentence = _check(key, wanted, device)
        (met if answer else unknown if answer is None else faults).append(sentence)
    return Match(tuple(faults), (*unknown, *notes), tuple(met))


def needs_of(record: VariantRecord) -> dict[str, Any]:
    """``runtime.needs`` of a record; empty where it has none."""
    needs = None if record.runtime is None else (record.runtime.model_extra or {}).get("needs")
    return dict(needs) if isinstance(needs, dict) else {}


def needed(record: VariantRecord, profile: Profile | None = None) -> tuple[str, ...]:
    """What a variant needs, in words: what a device would have to be."""
    arch = {} if profile is None or profile.arch is None else _arch(profile.arch)
    needs = {**arch, **needs_of(record)}
    return tuple(_words(key, wanted) for key, wanted in needs.items() if wanted not in ([], ""))


def profile_of(about: Mapping[str, Any], tag: str, registry: Registry | None = None, *, stage: str = "main") -> Profile:
    """The profile of a target: the bundle's own (``about.targets``), else that of this ModelForge.

    A stage for the CPU beside an NPU has another than the tag.
    """
    own = about.get("targets")
    given = own.get(f"{tag}/{stage}", own.get(tag)) if isinstance(own, dict) else None
    if isinstance(given, dict) and isinstance(given.get("arch"), dict):
        return Profile(tag, str(given.get("title", "")), str(given.get("tier", "")), given["arch"])
    try:
        target = (registry or Registry()).get(tag)
    except TargetError:
        return Profile(tag)
    return Profile(tag, target.title, target.tier, target.arch.model_dump(mode="json", exclude_none=True))


def check(about: Mapping[str, Any], variants: Iterable[Variant], device: DeviceFacts | None = None) -> dict[str, Match]:
    """Hold variants against a device, as `pull --check` does: by ``TARGET`` (``TARGET/STAGE`` of a split model).

    Args:
        about: of their bundle.
        device: None: this machine.
    """
    facts = device or this_device()
    registry = Registry()
    found: dict[str, Match] = {}
    for variant in variants:
        record = variant.record
        name = record.target if record.stage == "main" else f"{record.target}/{record.stage}"
        one = match(record, facts, profile_of(about, record.target, registry, stage=record.stage))
        # Of variants for several batch sizes, one that runs is enough.
        if name not in found or found[name].verdict == "cannot":
            found[name] = one
    return found


def refuse_if_none_runs(matches: Mapping[str, Match], where: str) -> None:
    """Raise where every variant is known not to run here. ``matches`` by a variant's name in words.

    Raises:
        UnsupportedError: says why, for each.
    """
    if matches and all(found.verdict == "cannot" for found in matches.values()):
        reasons = "".join(f"\n  {name}: {'; '.join(found.cannot)}" for name, found in matches.items())
        raise UnsupportedError(
            f"cannot run on this device:{reasons}",
            where=where,
            fix="choose a variant for this device: `modelforge select` lists them with their reasons",
        )


# -- the vocabulary of needs


@dataclass(frozen=True)
class Need:
    """One key of ``runtime.needs``.

    Attributes:
        check: (wanted, device) -> (answer, what is here in words); the answer None: not known.
        words: what is wanted, in words: "an NVIDIA GPU of compute capability 7.5".
    """

    check: Callable[[Any, DeviceFacts], tuple[bool | None, str]]
    words: Callable[[Any], str]


# What reading a value raises that is not of the form it should have: it comes from a file of somebody else.
_UNREADABLE = (ValueError, TypeError, AttributeError)


def _words(key: str, wanted: Any) -> str:
    try:
        return NEEDS[key].words(wanted)
    except (KeyError, *_UNREADABLE):
        return f"{key} {wanted!r}"


def _check(key: str, wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
    need = NEEDS.get(key)
    if need is None:
        return None, f"needs {key} {wanted}: this ModelForge does not know what that is"
    try:
        answer, here = need.check(wanted, device)
        said = need.words(wanted)
    except _UNREADABLE:
        return None, f"needs {key} {wanted!r}: this ModelForge cannot read that"
    return answer, f"needs {said}" + ("" if answer else f"; {here}")


def _check_isa(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
    if device.isa is None:
        return None, "the CPU's instruction set is not known"
    return device.isa in _strings(wanted), f"this CPU is {device.isa}"


def _check_flags(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
    flags = _strings(wanted)
    if not flags:
        return True, ""
    if device.cpuinfo is None:
        return None, "the CPU's flags are not known"
    missing = [flag for flag in flags if flag not in device.cpuinfo]
    return not missing, f"this CPU lacks {', '.join(missing)}"


def _check_sm(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
    if device.gpus is None:
        return None, "which NVIDIA GPU is here is not known"
    if not device.gpus:
        return False, "there is none here"
    here = ", ".join(f"{gpu.name or 'a GPU'} ({dotted(gpu.sm)})" for gpu in device.gpus)
    return any(_is_sm(gpu.sm, wanted) for gpu in device.gpus), f"here: {here}"


def _is_sm(sm: int, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return bool(versions.satisfies(str(sm), wanted))
    return sm in (wanted if isinstance(wanted, (list, tuple)) else [wanted])


def _check_word(name: str, what: str) -> Callable[[Any, DeviceFacts], tuple[bool | None, str]]:
    def check(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
        here: Sequence[str] | None = getattr(device, name)
        if here is None:
            return None, f"which {what} is here is not known"
        return bool(
            set(here).intersection(_strings(wanted))
        ), f"here: {', '.join(here)}" if here else "there is none here"

    return check


def _check_hexagon(name: str) -> Callable[[Any, DeviceFacts], tuple[bool | None, str]]:
    def check(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
        if device.qualcomm is None:
            return None, "which Qualcomm chip is here is not known"
        here = [getattr(each, name) for each in device.qualcomm]
        if None in here:
            return None, "its number is not known here"
        return int(wanted) in here, f"here: {', '.join(map(str, here))}" if here else "there is none here"

    return check


def _check_version(key: str) -> Callable[[Any, DeviceFacts], tuple[bool | None, str]]:
    def check(wanted: Any, device: DeviceFacts) -> tuple[bool | None, str]:
        here = device.versions.get(key)
        if here is None:
            return None, "none was found here, and it may be installed elsewhere"
        if not here:
            return False, "it is not installed here"
        answers = [versions.satisfies(each, str(wanted)) for each in here]
        shown = ", ".join(here)
        if True in answers:
            return True, ""
        return (None, f"{shown} is here, which does not say enough") if None in answers else (False, f"{shown} is here")

    return check


def _strings(wanted: Any) -> list[str]:
    return [wanted] if isinstance(wanted, str) else [str(each) for each in wanted]


def _either(wanted: Any) -> str:
    return " or ".join(_strings(wanted))


def dotted(sm: int) -> str:
    """75 as ``7.5``, 120 as ``12.0``."""
    return f"{sm // 10}.{sm % 10}"


def _sm_words(wanted: Any) -> str:
    if isinstance(wanted, str):
        return f"an NVIDIA GPU of compute capability (without its dot) {wanted}"
    numbers = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    return f"an NVIDIA GPU of compute capability {' or '.join(dotted(int(number)) for number in numbers)}"


NEEDS: Mapping[str, Need] = {
    "isa": Need(_check_isa, lambda wanted: f"a CPU of {_either(wanted)}"),
    "cpuinfo": Need(_check_flags, lambda wanted: f"the CPU flags {' '.join(_strings(wanted))}".rstrip()),
    "sm": Need(_check_sm, _sm_words),
    "soc_version": Need(_check_word("ascend", "Ascend processor"), lambda wanted: f"an {_either(wanted)} processor"),
    "platform": Need(_check_word("rockchip", "Rockchip NPU"), lambda wanted: f"a Rockchip NPU of {_either(wanted)}"),
    "htp_arch": Need(_check_hexagon("htp_arch"), lambda wanted: f"a Qualcomm Hexagon v{wanted}"),
    "soc_model": Need(_check_hexagon("soc_model"), lambda wanted: f"the Qualcomm SoC with QNN's number {wanted}"),
    **{
        key: Need(_check_version(key), lambda wanted, title=title: f"{title} {wanted}")  # type: ignore[misc] # bound now
        for key, title in SOFTWARE.items()
    },
}
"""Key -> how it is checked. ``isa`` and the chips take a word or a list of which one will do; ``cpuinfo`` a list of
flags that all must be there; ``sm`` a number, a list, or a condition (``">=80"``); versions a condition
(``"==1.7.1.116"``, ``">=8.0.RC1,<9"``). docs/guides/deploying.md lists them."""

_ARCH_KEYS = ("isa", "cpuinfo", "sm", "soc_version", "platform", "htp_arch", "soc_model")
_NO_PROFILE = "no profile of the target is known here: its architecture was not compared"


def _arch(arch: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's architecture, as needs."""
    return {key: arch[key] for key in _ARCH_KEYS if arch.get(key) not in (None, [], ())}


def _not_compiled(record: VariantRecord) -> str:
    if record.status == "deferred":
        return "it is deferred: `modelforge finalize` compiles it on the device"
    return f"it is {record.status}" + (f": {record.notes[-1]}" if record.notes else "")


def summary(found: Match) -> str:
    """One line: why not, else what is not known, else that it runs."""
    return "; ".join(found.cannot or found.unknown) or "nothing speaks against it"
