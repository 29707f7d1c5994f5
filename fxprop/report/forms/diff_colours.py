"""A unified diff in colour: for a terminal, and as HTML."""

from __future__ import annotations

import html
import re

# a hunk's heading, which names its layer
_LAYER = re.compile(r"@@ [^@]* @@ (.+?): ")
_RESET = "\x1b[0m"
# as git colours them: file names bold, headings cyan, removed red, added green
_TERMINAL = {"file": "\x1b[1m", "hunk": "\x1b[36m", "removed": "\x1b[31m", "added": "\x1b[32m"}

_STYLE = """\
<style>
.fxprop-diff { color-scheme: light dark; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
.fxprop-diff .file, .fxprop-diff .module { font-weight: bold; }
.fxprop-diff .module { user-select: none; }
.fxprop-diff .hunk { color: light-dark(#0550ae, #79c0ff); }
.fxprop-diff .removed { background: light-dark(#ffebe9, #5a1e1e); }
.fxprop-diff .added { background: light-dark(#dafbe1, #12401f); }
</style>
"""


def for_terminal(diff: str) -> str:
    """`diff` with ANSI colours."""
    return "".join(
        f"{_TERMINAL[kind]}{line}{_RESET}\n" if (kind := _kind(line)) else f"{line}\n"
        for line in diff.splitlines()
    )


def as_html(diff: str) -> str:
    """`diff` as an HTML fragment with its style, light and dark; the code in it is escaped.

    Hunks stand under the path of the module that their layer is in.
    """
    lines, module = [], None
    for line in diff.splitlines():
        layer = _LAYER.match(line)
        if layer is not None and module != (module := layer[1].rpartition(".")[0]):
            lines.append(f'<span class="module">{html.escape(module or "the model itself")}\n</span>')
        lines.append(f'<span class="{_kind(line) or "context"}">{html.escape(line)}\n</span>')
    return f'{_STYLE}<pre class="fxprop-diff">{"".join(lines)}</pre>\n'


def _kind(line: str) -> str | None:
    # generated code is indented, so that no removed or added line begins with ---  or +++
    if line.startswith(("--- ", "+++ ")):
        return "file"
    return {"@": "hunk", "-": "removed", "+": "added"}.get(line[:1])
