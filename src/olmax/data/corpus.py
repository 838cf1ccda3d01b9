"""The embedded corpus: text every installation has, for training tiny models without a download.

Four sources, split into training and held-out documents by a hash of their text:

- `code`: the running Python's standard library, without its tests;
- `tests`: the tests of the standard library, where they are installed (repetitive code, like
  unfiltered web text);
- `docs`: Python's language reference (pydoc_data.topics) and the docstrings of the libraries this
  project depends on;
- `arithmetic`: generated sums and word problems, `Question: ...` / `Answer: ...`.

Another patch version of Python or of a library gives another text; `fingerprint` tells.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator

from olmax.data.arithmetic import problem
from olmax.data.documents import Document, DocumentSource
from olmax.errors import UserError

SOURCES = ("code", "tests", "docs", "arithmetic")
# Always installed with olmax, and a quarter or more of their source is prose.
DOCSTRING_PACKAGES = ("numpy", "pandas", "matplotlib", "flax", "optax")
HELD_OUT_FRACTION = 0.05
ARITHMETIC_DOCUMENTS = 50_000
_MIN_CHARACTERS = 40  # empty packages and one-line stubs teach nothing


def source(
    name: str,
    *,
    split: str = "train",
    held_out_fraction: float = HELD_OUT_FRACTION,
    arithmetic_documents: int = ARITHMETIC_DOCUMENTS,
    seed: int = 0,
) -> DocumentSource:
    """One source of the embedded corpus.

    Args:
        name: one of `SOURCES`.
        split: "train" or "held_out".
        held_out_fraction: share of the documents held out, by a hash of their text: equal texts are
            on the same side.
        arithmetic_documents: problems generated, both splits together.
        seed: of the generated problems.

    Raises:
        UserError: no such source or split.
    """
    if name not in SOURCES:
        raise UserError(f"no embedded source {name!r}; there are {', '.join(SOURCES)}")
    if split not in ("train", "held_out"):
        raise UserError(f"no split {split!r} of the embedded corpus; there are train and held_out")
    readers: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
        "code": lambda: _standard_library(tests=False),
        "tests": lambda: _standard_library(tests=True),
        "docs": _documentation,
        "arithmetic": functools.partial(_arithmetic, arithmetic_documents, seed),
    }
    read = readers[name]

    def documents() -> Iterator[Document]:
        seen: set[bytes] = set()
        for identifier, text in read():
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < _MIN_CHARACTERS or digest in seen:
                continue
            seen.add(digest)
            held_out = int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
            if held_out == (split == "held_out"):
                yield Document(text=text, id=identifier, source=name)

    if name == "arithmetic":
        versions = [str(arithmetic_documents), str(seed)]
    elif name == "docs":
        versions = [platform.python_version()]
        versions += [f"{p} {importlib.metadata.version(p)}" for p in _installed_packages()]
    else:
        # Distributions patch and trim the same version of the library, so the files themselves
        # count.
        root = _library_root()
        files = _library_files(tests=name == "tests")
        versions = [f"{file} {(root / file).stat().st_size}" for file in files]
    described = "/".join(["embedded-1", name, split, str(held_out_fraction), *versions])
    return DocumentSource(
        name=name,
        fingerprint=hashlib.sha256(described.encode()).hexdigest()[:16],
        read=documents,
    )


def _standard_library(*, tests: bool) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the standard library's modules, in an order that mixes packages."""
    root = _library_root()
    for name in _library_files(tests=tests):
        try:
            yield name, (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few tests of source encodings are not UTF-8 on purpose


def _library_root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _library_files(*, tests: bool) -> list[str]:
    root = _library_root()
    names = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # `encodings` and the pydoc topics are tables and prose, not code; site-packages is not
        # Python's own.
        if {"site-packages", "dist-packages", "encodings", "pydoc_data"} & set(parts):
            continue
        if tests == any(p in ("test", "tests", "idle_test") for p in parts):
            names.append("/".join(parts))
    return sorted(names, key=_stable_order)


@functools.cache  # parsing takes seconds, and both splits read all pages
def _documentation() -> tuple[tuple[str, str], ...]:
    """The language reference by topic, then the docstrings of each installed module as one page."""
    from pydoc_data.topics import topics

    pages = [
        (f"python/{topic}", topics[topic].strip() + "\n")
        for topic in sorted(topics, key=_stable_order)
    ]
    modules = []
    for package in _installed_packages():
        spec = importlib.util.find_spec(package)
        for directory in (spec.submodule_search_locations or []) if spec else []:
            root = pathlib.Path(directory)
            for path in root.rglob("*.py"):
                parts = path.relative_to(root).parts
                if not {"test", "tests", "testing", "_vendor"} & set(parts):
                    modules.append(("/".join((package, *parts)), path))
    for name, path in sorted(modules, key=lambda item: _stable_order(item[0])):
        page = _docstrings(path)
        if page:
            pages.append((name, page))
    return tuple(pages)


def _docstrings(path: pathlib.Path) -> str:
    """The docstrings of a module as a page of text, each under the name of what it documents."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError):
        return ""
    parts = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in getattr(node, "body", ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(child)
                name = prefix + child.name
                if text:
                    is_class = isinstance(child, ast.ClassDef)
                    signature = "" if is_class else f"({ast.unparse(child.args)})"
                    parts.append(f"{name}{signature}\n\n{text}\n")
                if isinstance(child, ast.ClassDef):
                    visit(child, name + ".")

    module = ast.get_docstring(tree)
    if module:
        parts.append(module + "\n")
    visit(tree, "")
    return "\n".join(parts)


def _installed_packages() -> list[str]:
    found = []
    for package in DOCSTRING_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(package)
    return found


def _arithmetic(count: int, seed: int) -> Iterator[tuple[str, str]]:
    for index in range(count):
        yield f"arithmetic/{seed}/{index}", problem(seed, index)


def _stable_order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
