"""Two processes against one, and the forecast for more."""
