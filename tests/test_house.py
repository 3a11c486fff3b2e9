"""The house's own rules, counted: what a file may import, and how dense and how long code may be.

The last two decide how the code reads. A limit on lines alone packs lines, so the syntax nodes of a
line are counted too; one that says one thing has 5 to 8.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

LINE_LIMIT = 100  # columns
FUNCTION_LIMIT = 60  # lines, its docstring left out
LAMBDA_LIMIT = 10  # in all of the tree but the tests
DENSITY_LIMIT = 9.0  # syntax nodes a line of code, on average over a file
DENSITY_LIMITS = {"loopus.py": 8.0, "train.py": 8.0, "sample.py": 8.0}

# The files that are read from top to bottom and run. Each may import the ones before it.
CHAPTERS = ["loopus", "load_weights", "tiny", "train", "sample", "visualize", "evaluate", "bench"]
OPTIONAL = ["transformers", "tokenizers", "lm_eval", "datasets"]  # the README says what needs them

UNCOUNTED = (ast.Load, ast.Store, ast.Del, ast.operator, ast.cmpop, ast.boolop, ast.unaryop)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- reading the tree ----------------------------------------------------------------------------


@functools.cache
def project_files():
    """The names of all Python files that belong to the project."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to the project is known to git only")
    command = ["git", "ls-files", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def text_of(file):
    return (ROOT / file).read_text(encoding="utf-8")


@functools.cache
def nodes_of(file):
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse(text_of(file))))


def docstring_of(node):
    """The statement that is the docstring of a module, class or function; None without one."""
    if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
        return None
    return None if ast.get_docstring(node, clean=False) is None else node.body[0]


def imports_of(file):
    """The modules that a file imports anywhere in it, by their full names."""
    modules = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            if node.module == "appendix":
                modules |= {f"appendix.{alias.name}" for alias in node.names}
    return modules


def package_of(module):
    return module.partition(".")[0]


def own_modules():
    """The project's modules outside the tests -> their files."""
    files = [file for file in project_files() if not file.startswith("tests/")]
    return {file.removesuffix(".py").replace("/", "."): file for file in files}


def above(limit, measured):
    """Of {where: number} those above a limit, a line each."""
    return [f"{where}: {number}" for where, number in measured.items() if number > limit]


# ---- who imports whom ----------------------------------------------------------------------------


def test_loopus_imports_torch_and_its_errors_only():
    packages = {package_of(module) for module in imports_of("loopus.py")}
    assert packages - sys.stdlib_module_names <= {"torch", "appendix"}
    assert own_modules().keys() & imports_of("loopus.py") == {"appendix.errors"}


def test_a_chapter_imports_no_later_chapter():
    chapters = {module for module in own_modules() if "." not in module}
    assert chapters <= set(CHAPTERS)  # else a new one has no place in the order yet
    for module in chapters:
        later = CHAPTERS[CHAPTERS.index(module) :]
        assert not imports_of(f"{module}.py") & set(later), module


def test_the_appendix_imports_no_chapter_but_loopus():
    for module, file in own_modules().items():
        if package_of(module) == "appendix":
            assert imports_of(file) & set(CHAPTERS) <= {"loopus"}, file


def test_no_two_files_import_each_other():
    modules = own_modules()
    graph = {module: imports_of(file) & modules.keys() for module, file in modules.items()}
    for imported in graph.values():
        imported.discard("appendix")  # the package, when one of its files is meant
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the files


def test_what_is_imported_is_pinned_or_optional():
    imported = {package_of(module) for file in project_files() for module in imports_of(file)}
    own = {file.removesuffix(".py").split("/")[-1] for file in project_files()} | {"appendix"}
    needed = imported - own - sys.stdlib_module_names - set(OPTIONAL)
    pinned = re.findall(r"^([\w-]+)==[\w.]+$", text_of("requirements.txt"), re.MULTILINE)
    assert needed <= set(pinned)

    readme = text_of("README.md")
    for package in imported & set(OPTIONAL):
        assert re.search(package.replace("_", "[-_]"), readme), package


# ---- how it reads --------------------------------------------------------------------------------


def test_every_file_says_what_it_is_for():
    assert [file for file in project_files() if docstring_of(nodes_of(file)[0]) is None] == []


def test_no_line_is_too_long():
    lengths = {}
    for file in project_files():
        for number, line in enumerate(text_of(file).splitlines(), start=1):
            lengths[f"{file}:{number}"] = len(line)
    found = above(LINE_LIMIT, lengths)
    assert not found, "\n".join(found)


def test_no_function_is_too_long():
    lengths = {}
    for file in project_files():
        for node in nodes_of(file):
            if isinstance(node, FUNCTIONS):
                docstring = docstring_of(node)
                lines = node.end_lineno - node.lineno + 1
                if docstring:
                    lines -= docstring.end_lineno - docstring.lineno + 1
                lengths[f"{file}:{node.lineno} {node.name}"] = lines
    found = above(FUNCTION_LIMIT, lengths)
    assert not found, "\n".join(found)


def test_lambdas_are_few():
    found = []
    for file in own_modules().values():
        for node in nodes_of(file):
            if isinstance(node, ast.Lambda):
                found.append(f"{file}:{node.lineno}")
    assert len(found) <= LAMBDA_LIMIT, found


def density(file):
    """Syntax nodes a line, over the lines that have any; docstrings are left out."""
    prose = set()
    for node in nodes_of(file):
        docstring = docstring_of(node)
        if docstring:
            prose |= {docstring, docstring.value}
    lines = Counter()
    for node in nodes_of(file):
        if hasattr(node, "lineno") and node not in prose and not isinstance(node, UNCOUNTED):
            lines[node.lineno] += 1
    return lines.total() / max(1, len(lines))


def test_no_file_is_too_dense():
    for file in project_files():
        assert density(file) <= DENSITY_LIMITS.get(file, DENSITY_LIMIT), file
