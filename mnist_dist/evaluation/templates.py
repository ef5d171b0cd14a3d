"""Renders the templates of pages: their frame, their style, their few scripts, and the filters that they share.

Owns: how a template becomes one self-contained page. Does not own: what a page shows (`report`, `pages`).

Contract: a page loads nothing from the network, all text from outside is escaped, and its content policy lets a browser
run the scripts named here and nothing else.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

SORT_TABLES = "sort_tables.js"
"""The script that sorts tables with the class `sortable`."""
MAX_PATH_CHARS = 30
"""Characters of a path in a caption: two lines."""


def render_page(template: str, *, title: str, scripts: Sequence[str] = (SORT_TABLES,), **values: Any) -> str:
    """Renders a template that extends `page_base.html.j2`.

    Args:
        template: name of its file in this package.
        title: heading and title of the page.
        scripts: names of files in this package, run at the end of the page.
        values: what the template shows; `kind` and `subtitle` stand in the header of every page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_dist.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": unbroken, "path_end": path_end}
    texts = [resources.files("mnist_dist.evaluation").joinpath(name).read_text() for name in scripts]
    known = {"kind": "", "subtitle": "", "title": title, "scripts": texts, "content_policy": _policy(texts)}
    return environment.get_template(template).render(**known | values)


def unbroken(text: str) -> Markup:
    """Escapes a text, and keeps its numbers and their percent signs on one line."""
    return Markup(re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(escape(text))))


def path_end(uri: str, max_chars: int = MAX_PATH_CHARS) -> str:
    """The end of a path, which tells files apart: cut at the front, behind a separator where the name fits."""
    if len(uri) <= max_chars:
        return uri
    end = uri[1 - max_chars :]
    separator = re.search(r"[/!]", end)
    return "…" + (end[separator.start() :] if separator and separator.start() < len(end) - 1 else end)


def _policy(scripts: Sequence[str]) -> str:
    """The page's content policy. Source: https://www.w3.org/TR/CSP3/."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
