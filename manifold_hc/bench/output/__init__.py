"""Sheets of figures, result files, and the page and chart made from them."""
