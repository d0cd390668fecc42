"""Parent of the modules that single files of plug-ins become.

In a process that another one started, e.g. to compile or to unpickle, an import of one of them imports this module
first, which loads the files that the other process had.
"""

import os

from gen_dist.plugins.loading import FILES_VARIABLE, load

__path__: list[str] = []
for _file in os.environ.get(FILES_VARIABLE, "").split("\n"):
    if os.path.exists(_file):
        load(_file)
