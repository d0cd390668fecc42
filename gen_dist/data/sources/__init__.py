"""Where images come from: each source hands blocks of images to `gen_dist.data.packing`."""
