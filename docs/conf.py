"""Sphinx configuration: Markdown pages and the API from docstrings."""

project = "geopd"
author = "the geopd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "geopd"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
myst_heading_anchors = 3
