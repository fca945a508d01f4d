"""Shell text that holds an atc command -> the words that atc would get. Runs nothing, expands nothing.

Reads what people paste: README lines and scripts, with continuations, comments, quotes, redirections, pipes,
environment prefixes, prompts. `${name}`, `$1`, `$(…)`, `{name}` and `<name>` stay in the words as they are: see
`placeholders_in`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from modelforge.compilers.ascend.findings import Finding, error, fixed, warning
from modelforge.errors import InputError

_PROGRAMS = ("atc", "atc.bin", "pyatc", "ge.pyatc")
_BLANKS = " \t"
_PLACEHOLDER = re.compile(
    r"\$\{[^}]*\}|\$\([^)]*\)|\$\{?[A-Za-z_]\w*|\$[0-9@*#?]|`[^`]*`"  # of a shell
    r"|\{[\w.$ \[\]'\"]*\}|%\(\w+\)[sd]|%[sd](?![0-9A-Za-z])"  # of Python
    r"|<[A-Za-z_][^<>]*>|\$?｛[^｛｝]*｝|[xX]{3,}(?![A-Za-z0-9])|\*{3,}"  # of people
)
_PROMPT = re.compile(r"\A\s*(?:\([^)\n]*\)\s*)?(?:\[[^\]\n]*\]|[\w.-]+@[\w.-]+:[^\s#$]*)?\s*[#$>]\s+(?=\S*atc\b)")
_FENCE = re.compile(r"^\s*(?:```|~~~)[^\n]*$", re.M)


@dataclass(frozen=True)
class CommandLine:
    """The atc command of a text.

    Attributes:
        words: the arguments, without the program.
        findings: what was wrong with the text itself.
    """

    words: tuple[str, ...]
    findings: tuple[Finding, ...]


def read_command(text: str) -> CommandLine:
    """The first atc command in ``text``; text that begins with ``--`` is taken as its arguments alone.

    Raises:
        InputError: there is no atc command in it.
    """
    reader = _Reader(_undecorated(text))
    commands = list(_commands(reader.tokens()))
    findings = list(reader.findings)
    found = [words for command in commands if (words := _arguments_of(command)) is not None]
    if not found:
        bare = next((words for words in commands if words[0].startswith("-")), None)
        if bare is None:
            raise InputError(
                "there is no atc command in this text",
                where=repr(" ".join(text.split())[:60]),
                fix='give a line such as "atc --model=a.onnx --framework=5 --output=a --soc_version=Ascend310P3"',
            )
        found = [bare]
    if len(found) > 1:
        findings.append(
            warning(
                "several-commands", None, f"{len(found)} atc commands are in this text", "only the first is checked"
            )
        )
    return CommandLine(tuple(found[0]), tuple(findings))


def placeholders_in(value: str) -> tuple[str, ...]:
    """What in a value is still to be filled in: ``${name}``, ``$1``, ``{name}``, ``%s``, ``<name>``, ``xxx``."""
    return tuple(_PLACEHOLDER.findall(value))


def without_placeholders(value: str, stand_in: str = "") -> str:
    """The value with ``stand_in`` for each placeholder."""
    return _PLACEHOLDER.sub(stand_in, value)


def shell_text(words: Sequence[str]) -> str:
    """Words as one line to be pasted into a shell; placeholders of variables stay such."""
    return " ".join(_quoted(word) if placeholders_in(word) else shlex.quote(word) for word in words)


def _quoted(word: str) -> str:
    if re.fullmatch(r"[\w./=:${}-]+", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _undecorated(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    stripped = text.strip()
    # Inline code of a README: one pair of ticks around all of it. A fence only before and after, on lines of its own.
    if re.fullmatch(r"`[^`]*`", stripped):
        text = stripped[1:-1]
    lines = text.split("\n")
    while lines and (not lines[0].strip() or _FENCE.match(lines[0])):
        lines.pop(0)
    return _PROMPT.sub("", "\n".join(lines), count=1)


def _arguments_of(command: list[str]) -> list[str] | None:
    for at, word in enumerate(command):
        if word.startswith("-") and word != "-m":
            continue
        # `cd atc` is none: the program comes first, or options follow it.
        if word.rsplit("/", 1)[-1] in _PROGRAMS and (at == 0 or any(each[:1] == "-" for each in command[at + 1 :][:1])):
            return command[at + 1 :]
    return None


def _commands(tokens: Iterator[_Token]) -> Iterator[list[str]]:
    command: list[str] = []
    skip = False
    for token in tokens:
        if token.operator:
            skip = token.text == "redirect"
            if not skip and command:
                yield command
                command = []
        elif skip:
            skip = False
        else:
            command.append(token.text)
    if command:
        yield command


@dataclass(frozen=True)
class _Token:
    text: str
    operator: bool = False


@dataclass
class _Reader:
    """Splits text as a POSIX shell does, and notes what a shell would stumble over."""

    text: str
    at: int = 0
    findings: list[Finding] = field(default_factory=list)
    _word: list[str] = field(default_factory=list)
    _in_word: bool = False
    _begun: bool = False  # whether the command has words already

    def tokens(self) -> Iterator[_Token]:
        while self.at < len(self.text):
            yield from self._step(self.text[self.at])
        yield from self._end_word()

    def _step(self, char: str) -> Iterator[_Token]:
        if char in _BLANKS:
            self.at += 1
            yield from self._end_word()
        elif char == "#" and not self._in_word:
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end
        elif char == "<" and (name := re.compile(r"<[A-Za-z_][^<>|&;\n]*>").match(self.text, self.at)):
            self._take_angle_placeholder(name[0])
        elif char in "\n;|&<>()":
            yield from self._operator(char)
        elif char == "\\":
            self._take_escape()
        elif char == "'":
            self._take_quoted("'", self.text.find("'", self.at + 1))
        elif char == '"':
            self._take_double_quoted()
        elif char == "`":
            self._take_backquote()
        elif char == "$":
            self._take_expansion()
        else:
            self._add(char)
            self.at += 1

    def _add(self, text: str) -> None:
        self._word.append(text)
        self._in_word = True

    def _end_word(self) -> Iterator[_Token]:
        if self._in_word:
            self._begun = True
            yield _Token("".join(self._word))
        self._word, self._in_word = [], False

    def _operator(self, char: str) -> Iterator[_Token]:
        if char in "<>" or self.text.startswith("&>", self.at):
            # `2>` and `1>`: the number is the stream, not a word.
            if self._in_word and re.fullmatch("[0-9]+", "".join(self._word)):
                self._word, self._in_word = [], False
            yield from self._end_word()
            redirect = re.compile(r"(?:&>>?|[<>]{1,3}&?\|?)(?:[0-9]+(?=[\s;|&)]|$)|-(?=\s|$))?").match(
                self.text, self.at
            )
            assert redirect is not None
            self.at = redirect.end()
            if not re.search(r"[0-9-]$", redirect[0]):
                yield _Token("redirect", operator=True)
            return
        if char == "(" and self._in_word:
            self.findings.append(
                error(
                    "shell-syntax", None, "an open parenthesis outside quotes: the shell stops there", "quote the value"
                )
            )
            self._add(char)
            self.at += 1
            return
        yield from self._end_word()
        self.at += 1
        self._begun = False
        yield _Token(char, operator=True)

    def _take_escape(self) -> None:
        rest = re.compile(r"\\([ \t]*)(\n|\Z)").match(self.text, self.at)
        if rest is None:
            self._add(self.text[self.at + 1])
            self.at += 2
            return
        self.at = rest.end()
        if not rest[2]:
            self.findings.append(
                warning(
                    "trailing-backslash",
                    None,
                    "the text ends in a backslash",
                    "look whether its last lines are missing",
                )
            )
        elif rest[1]:
            # What follows would be another command to the shell. Read on as it was meant, so that all is checked.
            if not any(each.code == "continuation" for each in self.findings):
                self.findings.append(
                    fixed(
                        "continuation",
                        None,
                        "a backslash with a blank after it: a shell would end the command there",
                        "read as continued, as it was meant",
                        refuses=False,
                    )
                )
            self.at -= 1
            self.text = self.text[: self.at] + " " + self.text[self.at + 1 :]

    def _take_quoted(self, quote: str, end: int) -> None:
        if end < 0:
            self._unclosed(quote, self.at)
            end = len(self.text)
        text = self.text[self.at + 1 : end]
        if text.strip() or self._in_word or end < len(self.text):
            self._add(text.rstrip() if end == len(self.text) else text)
        self.at = end + 1

    def _take_double_quoted(self) -> None:
        opened = self.at
        self.at += 1
        if self.text[self.at :].strip() or self._in_word:
            self._add("")
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("\n", '"', "\\", "`", "$"):
                following = self.text[self.at + 1]
                self._add("" if following == "\n" else following)
                self.at += 2
            elif char == "$":
                self._take_expansion()
            else:
                self._add(char)
                self.at += 1
        self._unclosed('"', opened)

    def _unclosed(self, quote: str, opened: int) -> None:
        if not self.text[opened + 1 :].strip():
            # The end of `command="atc …"` in a script.
            self.findings.append(fixed("shell-syntax", None, f"a stray {quote} at the end", "it was left out"))
            return
        self.findings.append(
            error(
                "shell-syntax", None, f"a {quote} is opened and not closed", "close it; look whether lines are missing"
            )
        )

    def _take_backquote(self) -> None:
        fence = re.compile("`{2,}").match(self.text, self.at)
        end = self.text.find("`", self.at + 1)
        if fence is None and end > 0 and "\n" not in self.text[self.at : end]:
            self._add(self.text[self.at : end + 1])
            self.at = end + 1
            return
        self.at = fence.end() if fence else self.at + 1
        if fence and not (self._begun or self._in_word):
            return  # a Markdown fence on a line of its own
        if fence:
            what = f'"{fence[0]}" after the command, the end of a Markdown block, belongs to no option'
            self.findings.append(fixed("non-option", None, what, "it was left out"))
        else:
            self.findings.append(fixed("shell-syntax", None, "a ` is opened and not closed", "it was left out"))

    def _take_expansion(self) -> None:
        nested = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}\n]*\}").match(self.text, self.at)
        text = nested[0] if nested else "$"
        self._add(text)
        self.at += len(text)

    def _take_angle_placeholder(self, text: str) -> None:
        if re.search(r"\s", text):
            self.findings.append(
                error(
                    "not-filled-in",
                    None,
                    f"{text} is still to be filled in, and the shell splits it at its blanks",
                    "fill it in",
                )
            )
        self._add(text)
        self.at += len(text)
