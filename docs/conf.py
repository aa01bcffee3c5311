"""How `just docs` builds the site: Markdown pages, no network."""

project = "lora-lite"
author = "The lora-lite developers"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "lora-lite"
