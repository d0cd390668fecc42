"""Training data: each source is packed into a memory-mapped array, from which training gathers batches."""

from gen_dist.data.batches import TrainBatches, image_indices
from gen_dist.data.cache import cache_directory
from gen_dist.data.catalogue import open_dataset, pack_given, survey_source
from gen_dist.data.dataset import Dataset, Split

__all__ = [
    "Dataset",
    "Split",
    "TrainBatches",
    "cache_directory",
    "image_indices",
    "open_dataset",
    "pack_given",
    "survey_source",
]
