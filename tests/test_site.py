"""The documentation as a site: it builds without a warning, asks no other server, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import paligemma
from paligemma import explore

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_no_page_asks_another_server_for_anything(site):
    for page in site.rglob("*.html"):
        asked = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text("utf-8")
        )
        assert asked and not [link for link in asked if re.match(r"(https?:)?//", link)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text("utf-8")), style


def test_links_lead_somewhere(site):
    for page in site.rglob("*.html"):
        if page.name.endswith((".py.html", ".h.html", ".cpp.html")):
            continue  # shows code, which holds all kinds of text
        for link in re.findall(r"<a\b[^>]*?href=\"([^\"#]+)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"


def test_every_page_and_chapter_is_there(site):
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert (site / ("index.html" if name == "README.html" else name)).is_file()
        contents = (DOCS / "README.md").read_text("utf-8") + (DOCS / "course" / "README.md").read_text("utf-8")
        assert f"{page.name})" in contents or page.name == "README.md", f"no table of contents names {page.name}"
    assert (site / "source/paligemma/modeling_siglip.py.html").is_file()


def test_the_reference_is_complete(site):
    reference = (site / "api.html").read_text("utf-8")
    names = [f"paligemma.{name}" for name in paligemma.__all__ if name not in ("__version__", "explore")]
    names += [f"paligemma.explore.{name}" for name in explore.__all__]
    assert [name for name in names if f'id="{name}"' not in reference] == []
