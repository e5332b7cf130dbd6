"""Owns the demo's text: the docstrings and help topics of the running Python's standard library, as pages to read on.

A *document* is a top-level module with everything in it (``_pydecimal`` counts as ``decimal``), or one topic of
``help()``. Its *page* lists what is documented in it, in source order: a title, then the prose. A *window* is some text
of a page that begins with a sentence. Documents are split into training and held-out by a hash of their name, before
anything is trained; a held-out window that shares eight words in a row with any training page is left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import pydoc_data.topics
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

NGRAM_WORDS = 8
WINDOW_CHARACTERS = 380
_HELD_OUT_PERCENT = 7
_NOT_PROSE = re.compile(r"^\s*(>>>|\.\.\. |[-+|=*#~]{3,}|\$ |%|@)|[|=]{4,}")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "turtledemo"}
_SAME_DOCUMENT = {"pydecimal": "decimal", "pyio": "io", "datetimemodule": "datetime", "elementtree": "xml"}


@dataclass(frozen=True)
class Sentence:
    """One sentence as it stands on a page, with the white space and the title line before it."""

    title: str
    before: str
    text: str


@dataclass(frozen=True)
class Page:
    """The prose of one document."""

    document: str
    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The whole page."""
        return "".join(s.before + s.text for s in self.sentences)


@dataclass(frozen=True)
class Window:
    """Text of a page from the beginning of a sentence; `first` is the length of that sentence in words."""

    document: str
    title: str
    text: str
    first: int
    ends: bool


def pages() -> list[Page]:
    """Return the pages of the running interpreter in a stable order; a text that occurs twice is on one page only."""
    seen: set[str] = set()
    entries: dict[str, list[Sentence]] = {}
    for document, title, doc in _docs():
        if doc not in seen:
            seen.add(doc)
            entries.setdefault(document, []).extend(_entry(title, doc))
    return [Page(name, tuple(sentences)) for name, sentences in sorted(entries.items()) if sentences]


def split(all_pages: list[Page]) -> tuple[list[Page], list[Page]]:
    """Return (training, held-out) pages."""
    return [p for p in all_pages if not _is_held_out(p.document)], [p for p in all_pages if _is_held_out(p.document)]


def windows(page: Page, rng: random.Random) -> Iterator[Window]:
    """Yield windows that cover the page without overlap, from a random sentence near its top on."""
    start = rng.randrange(min(4, len(page.sentences)))
    while start < len(page.sentences):
        text, end = "", start
        while end < len(page.sentences) and len(text) < WINDOW_CHARACTERS:
            sentence = page.sentences[end]
            text += (sentence.before if end > start else "") + sentence.text
            end += 1
        ends = end == len(page.sentences) and len(text) <= WINDOW_CHARACTERS
        first = page.sentences[start]
        if len(text) > WINDOW_CHARACTERS:
            text = text[:WINDOW_CHARACTERS].rsplit(" ", 1)[0]
        yield Window(page.document, first.title, text, len(first.text.split(" ")), ends)
        start = end


def unshared(candidates: list[Window], training: list[Page]) -> list[Window]:
    """Return the windows that share no run of `NGRAM_WORDS` words with the training pages."""
    known = {gram for page in training for gram in ngrams(page.text)}
    return [window for window in candidates if known.isdisjoint(ngrams(window.text))]


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Yield every run of `NGRAM_WORDS` words of `text`, lower case, punctuation ignored."""
    words = re.findall(r"[a-z0-9_]+", text.lower())
    for i in range(len(words) - NGRAM_WORDS + 1):
        yield tuple(words[i : i + NGRAM_WORDS])


def _is_held_out(document: str) -> bool:
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT


def _docs() -> Iterator[tuple[str, str, str]]:
    """Yield (document, title, text) of everything documented."""
    yield from _source_docs(Path(sysconfig.get_path("stdlib")))
    yield from _extension_docs()
    for topic, text in pydoc_data.topics.topics.items():
        yield f"topic {topic}", f"help({topic!r})", inspect.cleandoc(text)


def _document_of(module: str) -> str:
    name = module.split(".")[0].lstrip("_")
    return _SAME_DOCUMENT.get(name, name)


def _source_docs(library: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # the library keeps some broken sources on purpose, as test data of lib2to3
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield from _node_docs(tree, module, module)


def _node_docs(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str, name: str
) -> Iterator[tuple[str, str, str]]:
    doc = ast.get_docstring(node)
    if doc:
        arguments = "" if isinstance(node, ast.Module | ast.ClassDef) else f"({ast.unparse(node.args)})"
        yield _document_of(module), name + arguments, doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _node_docs(child, module, f"{name}.{child.name}")


def _extension_docs() -> Iterator[tuple[str, str, str]]:
    """Yield the docstrings of modules written in C, which have no source to parse."""
    for module_name in sorted(set(sys.builtin_module_names) | _extension_names()):
        module = importlib.import_module(module_name)
        yield from _object_docs(module, module_name)


def _extension_names() -> set[str]:
    folder = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    names = {path.name.split(".")[0] for path in folder.glob("*.so")}
    return {name for name in names if not re.search(r"test|xxlimited|tkinter", name)}


def _object_docs(module: ModuleType, module_name: str) -> Iterator[tuple[str, str, str]]:
    document = _document_of(module_name)
    if module.__doc__:
        yield document, module_name, inspect.cleandoc(module.__doc__)
    for name, member in sorted(vars(module).items()):
        if isinstance(member, type) and member.__module__ == module.__name__:
            for attribute, value in [("", member), *sorted(vars(member).items())]:
                doc = value.__doc__ if callable(value) or inspect.isdatadescriptor(value) else None
                if isinstance(doc, str):
                    yield document, f"{module_name}.{name}{'.' if attribute else ''}{attribute}", inspect.cleandoc(doc)
        elif inspect.isbuiltin(member) and member.__doc__:
            yield document, f"{module_name}.{name}", inspect.cleandoc(member.__doc__)


def _entry(title: str, doc: str) -> Iterator[Sentence]:
    """Yield the prose of `doc`, sentence by sentence."""
    title = title if len(title) <= 60 else title.split("(")[0] + "(...)"
    before = f"\n\n{title}\n"
    for paragraph in _paragraphs(doc):
        for text in re.split(r"(?<=[.!?:;]) (?=[A-Z*`'\"])", paragraph):
            yield Sentence(title, before, text)
            before = " "
        before = "\n"


def _paragraphs(doc: str) -> Iterator[str]:
    """Yield paragraphs of prose, unwrapped; examples, tables and rules are left out."""
    for block in re.split(r"\n\s*\n", doc):
        lines = block.split("\n")
        letters = sum(c.isalpha() or c == " " for c in block)
        if any(_NOT_PROSE.search(line) for line in lines) or letters < 0.8 * len(block) or not block.isascii():
            continue
        yield re.sub(r"\s+", " ", block).strip()
