"""What Sphinx needs to be told about this project: three small steps of `conf.py`.

- Source pages. The documentation links to files of the code. On the site these links lead to pages that show the code.
- Docstrings. They are plain English with drawings of shapes, written for people who read the code, and not in Sphinx's
  markup. Indented parts are shown as they stand, the rest as text.
- Nothing is forgotten: a public name that `api.rst` does not place in a section comes at its end, and a page that
  `index.rst` does not name comes at the end of the list of pages.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx

import paligemma

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/*.py"))]
SHOWN += [path for pattern in ("*.py", "*.md", "*.h", "*.cpp") for path in sorted((ROOT / "paligemma").rglob(pattern))]

# ---------------------------------------------------------------------------------------------- source pages


def page_of(path: Path) -> str | None:
    """The page that shows a file or folder, from the site's root, without ".html"; None if there is none."""
    path = path / "__init__.py" if path.is_dir() else path
    if path.is_relative_to(ROOT / "docs") and path.suffix == ".md":
        name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        return "index" if name == "README" else name
    return f"source/{path.relative_to(ROOT).as_posix()}" if path in SHOWN else None


def lead_to_source_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Links that leave the documentation. MyST makes downloads of files, and unresolved references of the rest."""
    document = app.env.current_document.docname
    for link in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        target = Path(os.path.normpath(Path(app.srcdir, document).parent / link["reftarget"].partition("#")[0]))
        if link.get("refdomain") == "doc":  # MyST has taken the ending off
            target = target.with_name(target.name + ".md")
        if target.is_relative_to(ROOT / "docs") or not target.exists() or (page := page_of(target)) is None:
            continue
        uri = os.path.relpath(page, Path(document).parent) + ".html"
        link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in SHOWN:
        text, name = path.read_text("utf-8"), page_of(path)
        assert name is not None
        title = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            body = MarkdownIt("commonmark").enable("table").render(text)
            body = re.sub(r'(href|src)="([^"#]+)', lambda link, path=path: f'{link[1]}="{_moved(link[2], path)}', body)
            body = body.replace('src="', 'alt="" data-file="')  # pictures of the repository have no page
        else:
            code = highlight(text, get_lexer_for_filename(path.name), HtmlFormatter(cssclass="highlight"))
            body = f"<h1>{title}</h1>{code}"
        yield name, {"title": title, "body": body}, "page.html"


def _moved(link: str, path: Path) -> str:
    """A link in a file, as it must be in the page of that file."""
    page = None if link.startswith("http") else page_of((path.parent / link).resolve())
    here = page_of(path)
    return link if page is None or here is None else os.path.relpath(page, Path(here).parent) + ".html"


# ---------------------------------------------------------------------------------------------- docstrings


def as_markup(lines: list[str]) -> list[str]:
    """A docstring's lines → reStructuredText that shows them: indented blocks as they are, `code` as code."""
    shown: list[str] = []
    for block in "\n".join(lines).strip("\n").split("\n\n"):
        rows = block.split("\n")
        drawn = [row for row in rows if row.startswith("    ")]
        if drawn and len(drawn) == len([row for row in rows if row.strip()]):
            shown += ["::", "", *rows, ""]
        elif all(row.startswith(("- ", "  ")) for row in rows):
            shown += [*(_escaped(row) for row in rows), ""]
        elif any(re.match(r"\w+(, \w+)*: ", row) for row in rows[1:]):  # parameters, one a line
            shown += [*(f"| {_escaped(row.strip())}" for row in rows), ""]
        else:
            shown += [" ".join(_escaped(row.strip()) for row in rows), ""]
    return shown


def _escaped(row: str) -> str:
    pieces = re.split(r"(`[^`]+`)", row)
    return "".join(
        f"`{piece}`" if index % 2 else re.sub(r"([*_|\\`])", r"\\\1", piece) for index, piece in enumerate(pieces)
    )


def show_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = as_markup(lines)


# ---------------------------------------------------------------------------------------------- nothing is forgotten


def complete_pages(app: Sphinx, document: str, source: list[str]) -> None:
    if document != "index":
        return
    placed = {*re.findall(r"^   ([\w/-]+)$", source[0], re.MULTILINE), "README"}
    rest = sorted({path.stem for path in Path(app.srcdir).glob("*.md")} - placed)
    if rest:
        source[0] += "\n.. toctree::\n   :hidden:\n   :caption: More\n\n" + "".join(f"   {name}\n" for name in rest)


def complete_reference(app: Sphinx, document: str, source: list[str]) -> None:
    if document != "api":
        return
    placed = set(re.findall(r"paligemma\.(\w+)", source[0]))
    rest = [name for name in paligemma.__all__ if name not in placed and not name.startswith("__")]
    kinds = {name: "class" if isinstance(getattr(paligemma, name), type) else "function" for name in rest}
    if rest:
        source[0] += "\nFurther names\n-------------\n\n"
        source[0] += "".join(f".. auto{kind}:: paligemma.{name}\n" for name, kind in kinds.items())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", lead_to_source_pages, priority=100)  # before Sphinx collects what is to be downloaded
    app.connect("html-collect-pages", source_pages)
    app.connect("autodoc-process-docstring", show_docstring)
    app.connect("source-read", complete_pages)
    app.connect("source-read", complete_reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
