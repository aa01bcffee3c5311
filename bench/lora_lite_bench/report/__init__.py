"""The report: tables and pictures of results files, for the terminal, as one page, as PNG, as Markdown."""
