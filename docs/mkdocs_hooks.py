"""Hooks of the documentation site (mkdocs.yml): pages that are written elsewhere, and their links.

Documents of the repository outside of docs/ become pages, and so does the list of config keys. A
link between documents is written relative to its file, as on a code host; here it is rewritten to
the page. A link to code, which has no page, becomes its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clouds.cli.list_config import allowed_values
from clouds.config import KEYS, Key

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "DEVIATIONS.md": "DEVIATIONS.md",
    "datasets.md": "datasets/README.md",
    "street_renderer.md": "projects/street_renderer/README.md",
    "street_models.md": "projects/street_models/README.md",
    "street_clip.md": "projects/street_models/weights/street_clip.md",
}
"""Page -> document outside of docs/, relative to the repository."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, document in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    files.append(File.generated(config, "config.md", content=config_reference()))
    return files


def config_reference() -> str:
    """A heading for each config key, so that it can be linked and searched, by sections."""
    sections: dict[str, list[Key]] = {}
    for key in KEYS:
        parts = key.name.split(".")
        depth = 2 if parts[0] == "MODEL" and len(parts) > 2 else 1
        section = ".".join(parts[:depth]) if len(parts) > 1 else "General"
        sections.setdefault(section, []).append(key)
    lines = [
        "---\ntoc_depth: 2\n---\n# Config keys\n",
        "Every key with its default, the values that are allowed, and its meaning, as "
        "`clouds list-config` prints them.\n",
    ]
    for section, keys in sections.items():
        lines.append(f"## {section}\n")
        for key in keys:
            lines.append(f"### `{key.name}`\n\n{key.doc}\n")
            lines.append(f"Default: `{key.default!r}`. Allowed: {allowed_values(key)}.\n")
    return "\n".join(lines)


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of documents as links of pages."""
    own = page.file.src_uri
    folder = Path(PAGES.get(own, f"docs/{own}")).parent
    page_of = {document: name for name, document in PAGES.items()}

    def rewritten(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        name, _, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        document = os.path.normpath(folder / name)
        known = page_of.get(document)
        if known is None and document.startswith("docs/"):
            known = document.removeprefix("docs/")
        if known is None:
            return label
        relative = os.path.relpath(known, Path(own).parent)
        return f"{image}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewritten, text)
