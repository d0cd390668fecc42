"""What the presets learn: the tables and pictures of the README."""
