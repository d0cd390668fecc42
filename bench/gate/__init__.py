"""The performance regression gate: this tree against a commit, in turns."""
