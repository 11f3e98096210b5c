"""From shards to batches: the order, the tiles, the loaders, augmentation on the device."""
