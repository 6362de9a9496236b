"""How the site is built from the Markdown files: `sphinx-build -W docs build/site`, without any network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "PaliGemma, from scratch"
author = "the contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "site_pages"]
root_doc = "index"  # which includes README.md, the table of contents
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
