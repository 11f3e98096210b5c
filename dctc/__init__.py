"""Semi-supervised semantic segmentation of remote-sensing images, from shards to maps."""

import os

# Before torch loads OpenMP: threads that wait by spinning make training on a shared CPU up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
