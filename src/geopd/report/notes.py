"""Notes of whoever made the runs, as HTML: paragraphs, tables, lists, bold and code; everything else stays text."""

from __future__ import annotations

import re
from html import escape

_RULE = re.compile(r"^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$")


def notes_html(text: str) -> str:
    """A small, safe subset of Markdown. The text is escaped first, so no tag of its own can survive."""
    blocks = re.split(r"\n\s*\n", text.strip())
    return "\n".join(_block(block.splitlines()) for block in blocks if block.strip())


def _block(lines: list[str]) -> str:
    if len(lines) > 1 and "|" in lines[0] and _RULE.match(lines[1]):
        head = "".join(f"<th>{cell}</th>" for cell in _cells(lines[0]))
        body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in _cells(line)) + "</tr>" for line in lines[2:])
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if all(re.match(r"\s*[-*] ", line) for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line.strip()[2:])}</li>" for line in lines) + "</ul>"
    if len(lines) == 1 and (heading := re.match(r"#{1,6} (.*)", lines[0])):
        return f"<h4>{_inline(heading[1])}</h4>"
    return f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>"


def _cells(line: str) -> list[str]:
    return [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]


def _inline(text: str) -> str:
    safe = escape(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
