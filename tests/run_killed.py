"""Run a script and kill it in the middle: python run_killed.py FOLDER N SCRIPT FLAGS...

The Nth time that anything in the folder is opened to be written, renamed, removed or made, the
process prints what it was about to do and ends as by kill -9.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

folder = sys.argv[1]
left = int(sys.argv[2])
sys.argv = sys.argv[3:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))


def count_down(event, args):
    """An audit hook: Python calls it before every such operation."""
    global left
    writes = event == "open" and args[1] in ("w", "wb", "a")
    if (event in CHANGES or writes) and folder in str(args[0]):
        left -= 1
        if left == 0:
            print(event, *args, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(count_down)
runpy.run_path(sys.argv[0], run_name="__main__")
