"""The report as text, Markdown, page, CSV and picture."""
