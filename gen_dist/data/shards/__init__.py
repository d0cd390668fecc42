"""Sets of images in many files, local or at a URL, which are read by ranges and are never whole on this machine."""
