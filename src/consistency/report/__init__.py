"""Figures, captions, sentences and the page, made from finished tables. Nothing is measured here."""
