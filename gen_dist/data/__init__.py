"""Training data: each source is packed into a memory-mapped array, from which training gathers batches."""

from gen_dist.data.batches import TrainBatches
from gen_dist.data.cache import Dataset, Split, cache_directory
from gen_dist.data.catalogue import open_dataset
from gen_dist.data.order import image_indices

__all__ = ["Dataset", "Split", "TrainBatches", "cache_directory", "image_indices", "open_dataset"]
