"""What our driver uses of NVIDIA's module, read out of the driver's own source: so that no list of it can drift.

Walks the syntax trees of the files that load the module. ``trt`` is the module, ``vendor.X`` in an annotation its
class X; the types of everything else follow from the recorded signatures of the real bindings. An attribute of
something whose
type is not known makes this fail: the driver's source must say it in an annotation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelforge.compilers.tensorrt as driver

FILES = ("worker.py", "engine.py", "vendor.py")
"""The only files that load NVIDIA's module; a test holds that there is no other."""

SOURCES = Path(driver.__file__).parent


@dataclass(frozen=True)
class Use:
    """One use: of the module (``kind`` is "") or of a class. ``positional`` is None where it is not called."""

    where: str
    kind: str
    attribute: str
    positional: int | None = None
    keywords: tuple[str, ...] = ()
    only: str | None = None


@dataclass(frozen=True)
class Faults:
    """What a version of the bindings does not have, and what could not be followed."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    uses: tuple[Use, ...]


def check(api: dict[str, Any], product: str) -> Faults:
    """Hold the driver's sources against one version of the bindings."""
    missing: list[str] = []
    unknown: list[str] = []
    uses: list[Use] = []
    trees = {name: ast.parse((SOURCES / name).read_text(encoding="utf-8")) for name in FILES}
    returns = {name: kind for tree in trees.values() for name, kind in _returns(tree).items()}
    for name, tree in trees.items():
        reader = _Reader(name, api["classes"], _class_attributes(tree, returns), returns)
        for function, only in _functions(tree):
            if only in (None, product):
                reader.read(function)
        uses += reader.uses
        unknown += reader.unknown
        missing += [fault for use in reader.uses if (fault := _fault(use, api["classes"]))]
    return Faults(tuple(missing), tuple(unknown), tuple(uses))


def accepts(signature: str, positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether ``name(self: T, a: A, b: B = 1) -> R`` takes that many arguments besides ``self``, and these keywords."""
    parameters = split_parameters(signature)[1:]
    names = [re.split(r"[:=]", each)[0].strip() for each in parameters]
    required = [name for name, each in zip(names, parameters, strict=True) if not re.search(r"[^=]= ?[^=]", each)]
    given = [*names[:positional], *keywords]
    return positional <= len(names) and set(keywords) <= set(names) and set(required) <= set(given)


def split_parameters(signature: str) -> list[str]:
    """The parameters of a pybind11 signature; brackets hold commas of their own."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")", 0, signature.rindex(" -> "))]
    parts, depth, current = [], 0, ""
    for letter in inside:
        depth += letter in "[(<"
        depth -= letter in "])>"
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()]


def _fault(use: Use, classes: dict[str, Any]) -> str | None:
    called = "" if use.positional is None else f" with {use.positional} arguments and {list(use.keywords)}"
    told = f"{use.where}: {use.kind or 'trt'}.{use.attribute}{called}"
    if not use.kind:
        if use.attribute == "__version__":
            return None
        if use.attribute not in classes:
            return told
        return None if use.positional is None else _call_fault(classes[use.attribute], "__init__", use, told)
    known = classes[use.kind]
    if use.attribute in known["enum"] or (use.attribute in ("__members__", "name") and known["enum"]):
        return None
    if use.attribute not in known["attributes"]:
        return told
    return None if use.positional is None else _call_fault(known, use.attribute, use, told)


def _call_fault(known: dict[str, Any], name: str, use: Use, told: str) -> str | None:
    signatures = known["attributes"].get(name)
    if not isinstance(signatures, list):
        return f"{told}: it is a property"
    if any(accepts(each, use.positional or 0, use.keywords) for each in signatures):
        return None
    return f"{told}: it takes {signatures}"


def _returns(tree: ast.Module) -> dict[str, str]:
    """What our own functions return, where that is NVIDIA's."""
    return {
        node.name: kind
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (kind := _vendor_class(node.returns))
    }


def _class_attributes(tree: ast.Module, returns: dict[str, str]) -> dict[str, str]:
    """``self._engine`` and the like: vendor types by name, from annotations and annotated returns of our functions."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        target, value = None, None
        if isinstance(node, ast.AnnAssign):
            target, value = node.target, _vendor_class(node.annotation)
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        ):
            target, value = node.targets[0], returns.get(node.value.func.id)
        if isinstance(target, ast.Attribute) and value:
            found[target.attr] = value
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str | None]]:
    """Every function, with the product that it is for; functions inside functions are read with the outer one."""
    for node in tree.body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, ast.FunctionDef):
                marks = [
                    mark.args[0].value
                    for mark in each.decorator_list
                    if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "only"
                    if isinstance(mark.args[0], ast.Constant)
                ]
                yield each, str(marks[0]) if marks else None


def _vendor_class(annotation: ast.expr | None) -> str | None:
    """``vendor.IBuilderConfig`` as ``IBuilderConfig``; ``vendor.ILogger.Severity`` as ``Severity``."""
    if isinstance(annotation, ast.Attribute) and ast.unparse(annotation).startswith("vendor."):
        return annotation.attr
    return None


_MODULE = "<module>"
_OURS = "<ours>"
"""Anything that is not NVIDIA's: paths, lists, numbers, our own objects."""


@dataclass
class _Reader:
    """Reads one file, function by function, and keeps what it uses."""

    file: str
    classes: dict[str, Any]
    attributes: dict[str, str]
    returns: dict[str, str]
    uses: list[Use] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _types: dict[str, str] = field(default_factory=dict)

    def read(self, function: ast.FunctionDef) -> None:
        self._types = {}
        for inner in [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef)]:
            for argument in inner.args.args:
                self._types[argument.arg] = (
                    _MODULE if argument.arg == "trt" else _vendor_class(argument.annotation) or _OURS
                )
        self._statements(function.body)

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.AnnAssign):
            self._value(node.value)
            self._bind(node.target, _vendor_class(node.annotation) or _OURS)
        elif isinstance(node, ast.Assign):
            kind = self._value(node.value)
            for target in node.targets:
                self._bind(target, kind)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                kind = self._value(base)
                own = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                self.uses += [Use(f"{self.file}:{each.lineno}", kind, each.name) for each in own if kind != _OURS]
            self._statements([each for each in node.body if not isinstance(each, ast.Expr)])
        elif isinstance(node, ast.FunctionDef):
            self._statements(node.body)
        else:
            for name, value in ast.iter_fields(node):
                self._field(node, name, value)

    def _field(self, node: ast.AST, name: str, value: Any) -> None:
        if name == "target" and isinstance(node, ast.For):
            self._bind(value, _OURS)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.stmt):
                self._statement(each)
            elif isinstance(each, ast.withitem):
                self._value(each.context_expr)
                if each.optional_vars:
                    self._bind(each.optional_vars, _OURS)
            elif isinstance(each, ast.expr) and name != "target":
                self._value(each)

    def _bind(self, target: ast.expr, kind: str) -> None:
        if isinstance(target, ast.Name):
            self._types[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for each in target.elts:
                self._bind(each, _OURS)
        elif isinstance(target, ast.Attribute):
            self._value(target)

    def _value(self, node: ast.expr | None) -> str:
        """The type of an expression; notes every use inside it."""
        if isinstance(node, ast.Name):
            return self._types.get(node.id, _OURS)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, None)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for each in node.generators:
                self._value(each.iter)
                self._bind(each.target, _OURS)
                for condition in each.ifs:
                    self._value(condition)
        for child in ast.iter_child_nodes(node) if node else ():
            if isinstance(child, ast.expr):
                self._value(child)
        return _OURS

    def _call(self, node: ast.Call) -> str:
        for each in node.args:
            self._value(each)
        for keyword in node.keywords:
            self._value(keyword.value)
        if isinstance(node.func, ast.Attribute):
            return self._attribute(node.func, node)
        if isinstance(node.func, ast.Name):
            return _MODULE if node.func.id == "load" else self.returns.get(node.func.id, _OURS)
        return _OURS

    def _attribute(self, node: ast.Attribute, call: ast.Call | None) -> str:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return _MODULE if node.attr == "_trt" else self.attributes.get(node.attr, _OURS)
        base = self._value(node.value)
        if base == _OURS:
            return _OURS
        where = f"{self.file}:{node.lineno}"
        if base != _MODULE and base not in self.classes:
            self.unknown.append(f"{where}: .{node.attr} of a {base}")
            return _OURS
        self.uses.append(self._use(where, "" if base == _MODULE else base, node.attr, call))
        return self._type_of(base, node.attr, call is not None)

    @staticmethod
    def _use(where: str, kind: str, attribute: str, call: ast.Call | None) -> Use:
        if call is None:
            return Use(where, kind, attribute)
        arguments = call.args
        # `trt.ILogger.__init__(self)` passes what a bound call would have.
        positional = len(arguments) - (attribute == "__init__")
        return Use(where, kind, attribute, positional, tuple(each.arg for each in call.keywords if each.arg))

    def _type_of(self, base: str, attribute: str, called: bool) -> str:
        if base == _MODULE:
            return attribute if attribute in self.classes else _OURS
        known = self.classes[base]
        if attribute in known["enum"]:
            return base
        value = known["attributes"].get(attribute, _OURS)
        if isinstance(value, list):
            value = value[0].rpartition(" -> ")[2] if called and value else _OURS
        value = value.removeprefix("nvonnxparser::").removeprefix("nvinfer1::")
        return value if value in self.classes else (_OURS if value in _PLAIN else f"{value}")


_PLAIN = frozenset("int bool str float None list tuple Dims bytes".split()) | {_OURS, "?"}
