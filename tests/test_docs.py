"""Every code block of README and docs runs and prints what stands beside it; the links of the built pages resolve."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import tomllib
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import cuda_on_cpu
import numpy as np
import pytest

import cugn

ROOT = Path(__file__).parent.parent
HTML = ROOT / "docs" / "_build" / "html"
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if path.exists() and not {"_build", "gallery"} & set(path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]+)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    line: int
    body: str
    output: str | None
    """What a text block right behind it says that it prints."""


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    blocks = []
    for i, match in enumerate(found):
        following = found[i + 1] if i + 1 < len(found) else None
        adjacent = following is not None and not text[match.end() : following.start()].strip()
        output = following["body"] if adjacent and following["language"] == "text" else None
        blocks.append(Block(match["language"], text[: match.start()].count("\n") + 2, match["body"], output))
    return blocks


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def missing_modules(source: str) -> list[str]:
    """Modules that the code imports and that cannot be used here."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    missing = [name for name in sorted(names) if importlib.util.find_spec(name) is None]
    if "mpi4py" in names - set(missing):
        try:
            importlib.import_module("mpi4py.MPI")
        except (ImportError, RuntimeError):  # installed, but without a library of MPI that it finds
            missing.append("an MPI library")
    return missing


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, or the emulator in its place."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.is_available():
        yield
    elif cuda_on_cpu.REASON:
        pytest.skip(cuda_on_cpu.REASON)
    else:
        with cuda_on_cpu.emulated() as library:
            monkeypatch.setattr(cupy, "asarray", library.array)
            yield


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks_of(p))], ids=name_of)
def test_code_blocks_run(page, tmp_path, monkeypatch, request):
    """In one namespace a page, in order; comments behind print() and text blocks behind a block are its output."""
    monkeypatch.chdir(tmp_path)
    if page.name == "gpu.md":
        request.getfixturevalue("gpu")
    namespace: dict[str, object] = {"__name__": "__main__"}
    without = []
    for block in blocks_of(page):
        if block.language != "python":
            continue
        missing = missing_modules(block.body)
        if missing:
            without += missing
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                if page.name == "migration.md":  # other libraries' imports may warn
                    warnings.simplefilter("ignore")
                # Blank lines before it, so that a traceback has the page's line numbers.
                exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), namespace)
        except NameError:
            if not without:
                raise
            continue  # it goes on from a block that was left out
        for expected in re.findall(r"^ *print\(.*\)  # (.*)$", block.body, re.M):
            assert expected in printed.getvalue().splitlines(), f"{page}:{block.line} prints\n{printed.getvalue()}"
        if block.output is not None:
            assert printed.getvalue().strip() == block.output.strip(), f"{page}:{block.line}"
    if without:
        pytest.skip(f"blocks that need {', '.join(sorted(set(without)))} were left out; the others ran")


def sections_of(page: Path) -> dict[str, str]:
    """Text of each section of a page, what stands before the first under an empty name."""
    title, *parts = re.split(r"^## (.+)$", page.read_text(), flags=re.M)
    return {"": title, **dict(zip(parts[::2], parts[1::2], strict=True))}


MIGRATION = sections_of(ROOT / "docs" / "migration.md")
NEEDS = {"JAX": "flax"}  # a section that goes on from another one


@pytest.mark.parametrize("section", [name for name in MIGRATION if name])
def test_calls_of_other_libraries_and_the_calls_that_replace_them_agree(section):
    """Each line of a table under "Coming from elsewhere": both sides give the same array."""
    namespace: dict[str, Any] = {}
    for name in ("", *([NEEDS[section]] if section in NEEDS else []), section):
        for match in FENCE.finditer(MIGRATION[name]):
            missing = missing_modules(match["body"])
            if missing:
                pytest.skip(f"{', '.join(missing)} not installed")
            with warnings.catch_warnings():  # other libraries' imports may warn
                warnings.simplefilter("ignore")
                exec(match["body"], namespace)
    lines = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", MIGRATION[section], re.M)
    assert lines
    if section in ("Chainer", "xarray-spatial"):
        pytest.skip(f"{section}: no release that has the function runs under NumPy 2")
    for theirs, ours in lines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.asarray(_detached(eval(theirs, namespace)))
        result = np.asarray(_detached(eval(ours, namespace)))
        # Theirs may have float32 statistics: |y| < 10, so some tens of eps(float32).
        np.testing.assert_allclose(result, expected, rtol=0, atol=3e-5, err_msg=f"{theirs} -> {ours}")


def _detached(array: Any) -> Any:
    return array.detach() if hasattr(array, "detach") else array


def test_shell_blocks_are_shell_and_install_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = [(page, block) for page in PAGES for block in blocks_of(page) if block.language == "sh"]
    assert found
    for page, block in found:
        result = subprocess.run(["bash", "-n"], input=block.body, text=True, capture_output=True, check=False)
        assert result.returncode == 0, f"{page}:{block.line}: {result.stderr}"
        for named in re.findall(r"cugn\[([\w,]+)\]", block.body):
            assert set(named.split(",")) <= set(extras), f"{page}:{block.line}"


def test_every_public_name_has_its_place_in_the_api():
    listed: dict[str, set[str]] = {}
    for part in (ROOT / "docs" / "api" / "index.rst").read_text().split(".. currentmodule:: ")[1:]:
        listed.setdefault(part.split()[0], set()).update(re.findall(r"^   (\w+)$", part, re.M))
    listed["cugn"] |= {"__version__", *(name.partition(".")[2] for name in listed if name == "cugn.diagnostics")}
    for name, names in listed.items():
        module = pytest.importorskip(name, reason=f"{name} cannot be imported here")
        assert names == set(module.__all__), name
    modules = {f"cugn.{path.stem}" for path in Path(cugn.__file__).parent.glob("*.py") if path.stem[0] != "_"}
    inner = {
        "activations",
        "command",
        "dask",
        "dask_tasks",
        "engines",
        "family",
        "formats",
        "functional",
        "layout",
        "memory",
        "moments",
        "overlap",
        "parts",
        "plan",
        "progress",
        "threads",
        "warm",
    }
    assert modules - set(listed) == {f"cugn.{name}" for name in inner | {"reference", "report", "results"}}


def test_links_between_the_sources_resolve():
    """Links from one page's source to another file, without a build."""
    broken, found = [], 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        if not page.exists():
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            if urlsplit(link).scheme or link.startswith("#"):
                continue
            found += 1
            target = page.parent / unquote(urlsplit(link).path)
            if not any(path.exists() for path in (target, target.with_suffix(".md"), target.with_suffix(".rst"))):
                broken.append(f"{name_of(page)}: {link}")
    assert not broken
    assert found


class Page(HTMLParser):
    """Targets of a page's links, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        self.links += [value for name in ("href", "src") if (value := given.get(name))]


def test_internal_links_resolve():
    if not (HTML / "index.html").exists():
        pytest.skip("the pages are not built: python -m sphinx -W docs docs/_build/html")
    # asv's own page finds its parts by JavaScript
    ours = (path for path in HTML.rglob("*.html") if path.relative_to(HTML).parts[0] not in ("_static", "asv"))
    pages = {path: Page(path) for path in ours}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                broken.append(f"{path.relative_to(HTML)}: {link}")
    assert not broken
    assert len(pages) > 40  # the API's, the guide's and the gallery's were looked at
