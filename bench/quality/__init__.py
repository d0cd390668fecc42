"""Quality of what the presets learn: tables and pictures of gen_dist/README.md."""
