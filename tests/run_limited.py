"""Run a script as if the disk were full: python run_limited.py BYTES SCRIPT FLAGS...

No file of the process may grow beyond so many bytes.
"""

import resource
import runpy
import sys
from pathlib import Path

limit = int(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
