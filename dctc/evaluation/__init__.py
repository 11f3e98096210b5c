"""Scores of a segmentation: one exact confusion matrix, and the accumulators logged beside it."""
