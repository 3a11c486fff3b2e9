"""JSON files that are read with one-line errors, and files that are never half written."""

import hashlib
import json
import os

from appendix.errors import InputError, require


def read_json(path):
    """A file that holds a JSON object -> dict. InputError where it does not."""
    try:
        # utf-8-sig is UTF-8 with or without the byte order mark that some Windows programs write.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{path}: not readable as JSON (nested too deeply)") from None
    require(
        isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}"
    )
    return value


def shorten(value, length=80):
    """Something from a file, as a message can show it: on one line, and not all of a long one."""
    text = repr(value)
    if len(text) <= length:
        return text
    return text[: length - 2] + " …"


def write_whole(path, write):
    """Write a file so that no reader, and no crash, ever finds half of it.

    write(partial): makes the file under the name `partial`, beside `path`; it is renamed after.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, in UTF-8, by `write_whole`."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Write a file by `write_whole`."""

    def write(partial):
        partial.write_bytes(content)

    write_whole(path, write)


def make_folder(path):
    """Make a folder for what --out names. InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: not writable ({error}); choose another folder") from None


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
