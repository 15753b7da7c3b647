"""Hooks of the documentation site, so that it loads nothing from elsewhere.

The theme would load mermaid and a worker for the search from a server. Both are npm packages of requirements/npm.txt:
where `make packages` has installed them they are copied into the site, else a diagram is shown as its source.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Final

_LOCAL: Final = {
    "assets/mermaid.js": "@mermaid-js/tiny/dist/mermaid.tiny.js",
    "assets/iframe-worker.js": "iframe-worker/shim/index.js",
}
_WORKER: Final = re.compile(r'<script src="https://[^"]*/iframe-worker/shim"></script>')
_KIND: Final = re.compile(r"^```python (?:fragment|test)$", re.MULTILINE)  # says to tests how to run a block

log = logging.getLogger("mkdocs.hooks.forebay")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make plain Python of blocks that are marked as a fragment or a test."""
    return _KIND.sub("```python", markdown)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Let a page load its scripts from the site: the search's worker, and mermaid where there is a diagram."""
    return _with_local_scripts(output, root="../" * page.url.count("/"), config=config)


def on_post_template(output_content: str, *, template_name: str, config: Any) -> str:
    """Do the same for pages that are made of a template, such as 404.html."""
    if not template_name.endswith(".html"):
        return output_content
    return _with_local_scripts(output_content, root="", config=config)


def on_post_build(config: Any) -> None:
    """Copy the scripts into the site."""
    for name in _LOCAL:
        source = _source(name, config)
        if source.exists():
            target = Path(config["site_dir"]) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        else:
            log.info("%s is not installed (make packages)", _LOCAL[name])


def _with_local_scripts(html: str, *, root: str, config: Any) -> str:
    html = _WORKER.sub(_tag("assets/iframe-worker.js", root, config), html)
    if 'class="mermaid"' not in html:
        return html
    mermaid = _tag("assets/mermaid.js", root, config)
    if not mermaid:
        return html.replace('class="mermaid"', 'class="diagram"')
    return html.replace("</head>", f"{mermaid}</head>", 1)  # before the theme's own script, which then takes this one


def _tag(name: str, root: str, config: Any) -> str:
    return f'<script src="{root}{name}"></script>' if _source(name, config).exists() else ""


def _source(name: str, config: Any) -> Path:
    return Path(config["config_file_path"]).parent / "build" / "npm" / "node_modules" / _LOCAL[name]
