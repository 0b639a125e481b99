"""Sphinx configuration; ``python -m sphinx -W docs docs/_build/html`` builds the pages and runs the gallery."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import cugn
import cugn.files

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples")]  # gallery_style, page_parts; the gallery runs the examples

project = "cugn"
author = "the cugn developers"
copyright = author
version = release = cugn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",  # the built pages need no network
    "page_parts",
    "asv_site",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "gallery_src", "**/*.inc.md"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3


def own_members(kind: type) -> list[tuple[str, str]]:
    """Public methods and properties that a class defines itself: not what it has from tuple, nor its fields."""
    members = [(name, value) for name, value in vars(kind).items() if name[0] != "_"]
    return [("automethod", name) for name, value in members if inspect.isfunction(value)] + [
        ("autoproperty", name) for name, value in members if isinstance(value, property)
    ]


autosummary_generate = True
autosummary_context = {
    "own_members": {
        f"{module.__name__}.{name}": own_members(getattr(module, name))
        for module in (cugn, cugn.diagnostics, cugn.files)
        for name in module.__all__
        if inspect.isclass(getattr(module, name))
    }
}
templates_path = ["_templates"]
autodoc_typehints = "none"  # numpydoc's sections say it in words
numpydoc_show_class_members = False
numpydoc_validation_checks: set[str] = set()
add_function_parentheses = False
default_role = "py:obj"  # single backquotes in docstrings are links, as in NumPy's

sphinx_gallery_conf = {
    "examples_dirs": ["gallery_src"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "gallery_style.reset"),
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "doc_module": ("cugn",),
    "backreferences_dir": "api/backreferences",
    "inspect_global_variables": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "cugn"
html_static_path = ["_static"]
html_css_files = ["cugn.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "cugn"},
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "performance": [], "comparison": [], "migration": []}
