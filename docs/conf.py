"""The site: ``make docs``."""

import fastsoftmax

project = "fastsoftmax"
author = "the fastsoftmax developers"
copyright = f"2026, {author}"
version = release = fastsoftmax.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
nitpicky = False  # types in docstrings are prose: "array_like", "int or None"
myst_heading_anchors = 3
numpydoc_show_class_members = False
autodoc_typehints = "none"  # they stand in the docstrings, in words

html_theme = "furo"
html_title = f"fastsoftmax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
