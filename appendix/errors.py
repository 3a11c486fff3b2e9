"""Errors for people: one line that says what was found, where, what was expected and what to do."""

import math, os, sys
from pathlib import Path
import torch


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, found, expected, what to do."""


def require(ok, problem):
    if not ok:
        raise InputError(problem)


def free_memory(device):
    """Bytes that can still be had on a device; inf where the system does not say."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    if device.type == "cpu" and sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            return next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
            )
    return math.inf


def run(main):
    """Run a script's main: bad input is one line and exit code 2, Ctrl-C is exit code 130, neither a traceback."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk while the log is written, say
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
