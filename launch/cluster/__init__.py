"""A Ray cluster: reaching it, the options of its workers, what they do and how the command watches them."""
