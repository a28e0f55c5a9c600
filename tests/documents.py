"""The Python code of the documents, which tests run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def text_of(page: str, heading: str = "") -> str:
    """A page, or one section of it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"## {heading}\n")[1].split("\n## ")[0] if heading else text


def blocks(page: str, heading: str = "") -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page, heading), re.DOTALL)


def run(code: str, page: str, names: dict[str, Any]) -> Any:
    """Its loss, if there is one."""
    exec(compile(code, page, "exec"), names)
    return names.get("loss")


def defined(page: str, *headings: str, **names: Any) -> dict[str, Any]:
    """What a page's blocks define, or those of some sections, run in order in one namespace."""
    for heading in headings or ("",):
        for block in blocks(page, heading):
            run(block, page, names)
    return names
