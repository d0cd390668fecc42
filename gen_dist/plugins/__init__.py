"""Parts by name, ours and those of plug-ins: `gen_dist.plugins.load("my_gan.py")` adds the parts of a file."""

from gen_dist.plugins.loading import Plugin, load

__all__ = ["Plugin", "load"]
