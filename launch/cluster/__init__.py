"""Ray clusters: access, options of workers, their work, and the command that watches them."""
