"""Files that are read with one-line errors, and written beside and renamed."""

import json, os, hashlib
from appendix.errors import InputError, require


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    require(
        isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}"
    )
    return value


def write_whole(path, write):
    """Have `write` make a file beside `path`, and rename it: none is ever half written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
