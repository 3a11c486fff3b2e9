"""Errors for people: one line that says what was found, where, what was expected and what to do."""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch

LONGEST = 900  # characters of a line
CLEAR = "\r\x1b[K"  # a terminal's line, emptied


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line for the user."""


def require(ok, problem):
    """InputError with this message unless ok."""
    if not ok:
        raise InputError(problem)


def free_memory(device):
    """Bytes that can still be had on a device; inf where the system does not say."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + kept
    if device.type == "cpu" and sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return math.inf


def require_memory(needed, device, what, advice):
    """InputError unless `needed` bytes are free on the device."""
    free = free_memory(device)
    require(
        needed < free,
        f"{what}, takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}: "
        + advice,
    )


def run_main(main):
    """Run a script's main and end the program with its exit code.

    Bad input is one line and code 2, Ctrl-C is code 130; neither shows a traceback. What the
    terminal's encoding lacks is printed as a question mark.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start, as by >&- in a shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the program ends)
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")
    script = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        end(f"{script}: error: {one_line(error)}", 2)
    except KeyboardInterrupt:
        end("\ninterrupted", 130)
    except BrokenPipeError:  # python sample.py | head
        without_stdout()
        sys.exit(141)  # what the shell gives for a program that SIGPIPE ended
    except torch.OutOfMemoryError as error:
        end(f"{script}: error: out of memory on the device ({first_line(error)})", 2)
    except OSError as error:  # a full disk while the log is written, say
        end(f"{script}: error: {one_line(error)}", 2)


def end(words, code):
    """Say something on stderr, if anybody listens, and end the program."""
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


def one_line(error):
    """An exception's message on one line, and not too long a one: names may hold anything."""
    line = " ".join(str(error).splitlines())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"


def first_line(error):
    """The first line of an exception's message, or its kind where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def without_stdout():
    """From now on what is printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(words, end="\n"):
    """Print a line, and go on without a reader if the terminal or the pipe is gone."""
    try:
        if sys.stdout.isatty():
            words = CLEAR + words
        print(words, end=end, flush=True)
    except OSError:  # a closed pipe is EPIPE, a terminal that is gone EIO
        without_stdout()


def say_over(words):
    """In a terminal, print a line that the next one is written over."""
    say(words, end="")
