"""Scores of whole predicted scenes: what a user of the maps gets."""
