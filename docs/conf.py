"""How `just docs` builds the site: Markdown pages, no network."""

from typing import Any

from latex2mathml.converter import convert

project = "lora-lite"
author = "The lora-lite developers"
extensions = ["myst_parser", "sphinx_design"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "lora-lite"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_math_renderer = "mathml"


def _inline(translator: Any, node: Any) -> None:
    """Formulas become MathML here, so that the pages fetch nothing."""
    from docutils.nodes import SkipNode

    translator.body.append(convert(node.astext()))
    raise SkipNode


def _display(translator: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>\n')
    raise SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
