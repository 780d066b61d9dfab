"""Settings of Sphinx, which makes a site of these pages.

The navigation is the `toctree` at the end of index.md. With `-W` a page that is not in it, a link
to a page or a heading that is not there, and a docstring that cannot be read are errors.
"""

import stepwiser_jax

project = "stepwiser_jax"
author = copyright = "The stepwiser_jax developers"
release = stepwiser_jax.__version__
html_title = f"{project} {release}"
html_theme = "furo"
html_show_sourcelink = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}  # GitHub, too, reads a fence named math as an equation
myst_heading_anchors = 3  # headings have the names that they have on GitHub

# Docstrings write `code` with one backtick, as Markdown does.
default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

# Equations are drawn by the library that draws them in reports, so the site needs no network.
html_static_path = ["../stepwiser_jax/report/vendor"]
mathjax_path = "temml.min.js"
mathjax_options = {"defer": "defer"}
DRAW = r"""
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".math")) {
    const tex = place.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
    temml.render(tex, place, {displayMode: place.tagName === "DIV"});
  }
});
"""
html_js_files = [(None, {"body": DRAW})]
