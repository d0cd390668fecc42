"""The figures of each commit, and a page of them."""
