"""Sources of images: each hands blocks of images to `gen_dist.data.packing`."""
