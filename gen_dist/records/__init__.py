"""Records of a run on disk, on the screen and on wandb."""
