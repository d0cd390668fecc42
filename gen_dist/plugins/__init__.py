"""Parts by name, ours and those of plug-ins."""
