"""Hooks of the site: pages link to files of the repository as they do on GitHub, by relative paths."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Show CONTRIBUTING.md as a page, and link files outside docs/ to the repository."""
    source = f"docs/{page.file.src_uri}"
    if source == "docs/contributing.md":
        source, markdown = "CONTRIBUTING.md", (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs reports it
        if path.startswith("docs/"):
            target = posixpath.relpath(path, posixpath.dirname(f"docs/{page.file.src_uri}"))
            return f"[{text}]({target}{anchor})"
        return f"[{text}]({config.repo_url}/blob/HEAD/{path}{anchor})"

    return _LINK.sub(link, markdown)
