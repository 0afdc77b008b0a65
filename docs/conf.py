"""Sphinx: pages in Markdown (MyST), the API from the docstrings; every warning is an error (`make docs`)."""

import re
import sys

from sphinx.pycode import ModuleAnalyzer

import gradacc

project = "gradacc"
author = "the gradacc developers"
release = version = gradacc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gradacc {release}"

default_role = "py:obj"  # single backticks in docstrings: a link where there is something to link to

myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say them in words
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_custom_sections = [("Source", "notes"), ("Edge cases", "notes"), ("Raises (when called)", "notes")]


def describe_aliases(app, what, name, obj, options, lines):
    """An alias of a type has its words in the module that defines it, where autodoc does not look."""
    if what == "data":
        alias = "", name.rpartition(".")[2]
        rooms = [ModuleAnalyzer.for_module(module) for module in sys.modules if module.split(".")[0] == "gradacc"]
        lines[:] = next(docs[alias] for docs in (room.find_attr_docs() for room in rooms) if alias in docs)


def link_pages(app, what, name, obj, options, lines):
    """Docstrings name pages by their files, which reads well anywhere; on the site they are links."""
    lines[:] = [re.sub(r"``docs/(\w+)\.md``", r":doc:`docs/\1.md <\1>`", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", describe_aliases, priority=400)  # before napoleon's and ours
    app.connect("autodoc-process-docstring", link_pages)
