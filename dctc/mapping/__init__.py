"""Whole scenes in, georeferenced maps out."""
