"""Renderings of `report.json`: HTML, Markdown and the model card of a bundle."""
