"""What the presets learn: the tables and pictures of gen_dist/README.md."""
