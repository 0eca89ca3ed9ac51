"""Sheets of figures, their renderers, result files, and the page and chart made from them."""
