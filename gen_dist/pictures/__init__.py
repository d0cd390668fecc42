"""Images and charts as PNG files."""
