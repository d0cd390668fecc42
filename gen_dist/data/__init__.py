"""Images to learn: every source becomes one packed, memory-mapped array, and training gathers batches from it."""

from gen_dist.data.batches import TrainBatches
from gen_dist.data.order import image_indices
from gen_dist.data.packed import Dataset, Split, cache_directory
from gen_dist.data.sources import open_dataset

__all__ = ["Dataset", "Split", "TrainBatches", "cache_directory", "image_indices", "open_dataset"]
