"""All that only a GPU shows."""
