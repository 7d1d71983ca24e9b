"""Reads Markdown as the tests of the texts want it: prose, fenced blocks and inline code, each apart."""

import re
from dataclasses import dataclass

FENCE = re.compile(r"([ >]*(?:[-*+] +|\d+[.)] +)?)(`{3,}|~{3,})(.*)")
CODE = re.compile(r"(?<![`\\])(`+)(?!`)((?:(?!\n[ \t]*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block: the first word after its opening fence, its lines, and the number of the first of them."""

    language: str
    text: str
    line: int


def split_fences(text: str) -> tuple[str, list[Fence]]:
    """Return a text with its fenced code blanked, line for line, and the fenced blocks."""
    prose, fences, opened, lines = [], [], None, []
    for number, line in enumerate(text.split("\n"), 1):
        mark = FENCE.match(line)
        if opened is None and mark and not (mark[2][0] == "`" and "`" in mark[3]):
            opened, lines, first = mark, [], number + 1
            line = ""
        elif opened is not None:
            if mark and mark[2].startswith(opened[2]) and not mark[3].strip():
                fences.append(Fence((opened[3].split() or [""])[0], "\n".join(lines), first))
                opened = None
            else:
                # What stands before the opening fence, such as a list's indentation, is no part of the code.
                lines.append(re.sub(rf"^[ >]{{0,{len(opened[1])}}}", "", line))
            line = ""
        prose.append(line)
    if opened is not None:  # a fence that is never closed goes on to the end
        fences.append(Fence((opened[3].split() or [""])[0], "\n".join(lines), first))
    return "\n".join(prose), fences


def without_fences(text: str) -> str:
    """Return a text with its fenced code and HTML comments blanked, line for line."""
    return re.sub(r"<!--.*?-->", lambda comment: "\n" * comment[0].count("\n"), split_fences(text)[0],
                  flags=re.DOTALL)


def without_code(text: str) -> str:
    """Return a text with its fenced code blanked, and x in place of each letter of inline code."""
    return CODE.sub(lambda code: re.sub(r"\S", "x", code[0]), without_fences(text))


def inline_code(text: str) -> list[str]:
    """Return what stands in inline code, each on one line."""
    return [" ".join(code.split()) for _, code in CODE.findall(without_fences(text))]
