"""The browser tool of gpt-oss: search, open and find over numbered pages, which the model cites as 【cursor†L1-L2】."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ValidationError

from gptoss_compile.runtime.api.tool_server.base import ToolError

WIDTH = 80  # columns of a line, which citations count
VIEW = 4096  # characters of a page shown at once, about 1,024 tokens
MATCHES = 50
_MARKDOWN_LINK = re.compile(r"!?\[([^\[\]\n]{1,200})\]\(([^()\s]{1,2000})\)")
_CITATION = re.compile(r"【(\d{1,6})†[^【】]{0,200}】")


@dataclass(frozen=True)
class Document:
    """A page as a backend gives it; links in the text are markdown's."""

    url: str
    title: str
    text: str


class SearchBackend(Protocol):
    """Where pages come from. Both methods raise ToolError."""

    source: str  # what the model is told of it

    async def search(self, query: str, count: int) -> list[Document]:
        """The best matches first, each with an excerpt as its text."""

    async def fetch(self, url: str) -> Document: ...


@dataclass(frozen=True)
class Link:
    url: str
    line: int = 0


@dataclass(frozen=True)
class Page:
    """What the model sees under one cursor. links: by id."""

    url: str
    title: str
    lines: Sequence[str]
    links: Sequence[Link] = ()


class Search(BaseModel):
    query: str
    topn: int = 10
    source: str | None = None


class Open(BaseModel):
    id: int | str = -1
    cursor: int = -1
    loc: int = -1
    num_lines: int = -1
    view_source: bool = False
    source: str | None = None


class Find(BaseModel):
    pattern: str
    cursor: int = -1


A = TypeVar("A", Search, Open, Find)


class Browser:
    """The pages of one conversation, oldest first; a page's place in them is its cursor."""

    def __init__(self, backend: SearchBackend, pages: Sequence[Page] = ()) -> None:
        self._backend = backend
        self.pages = list(pages)

    def action(self, function: str, arguments: str) -> dict[str, Any]:
        """The call as the `action` of a web_search_call item. Raises ToolError for one that makes no sense."""
        match parsed := _parse(function, arguments):
            case Search():
                return {"type": "search", "query": parsed.query, "queries": [parsed.query]}
            case Find():
                return {"type": "find_in_page", "pattern": parsed.pattern, "url": self._page(parsed.cursor).url}
            case Open():
                return {"type": "open_page", "url": self._target(parsed).url}

    async def call(self, function: str, arguments: str) -> str:
        """Do it; what the model gets to see. Raises ToolError."""
        match parsed := _parse(function, arguments):
            case Search():
                return await self._search(parsed)
            case Find():
                return self._find(parsed)
            case Open():
                return await self._open(parsed)

    def sources(self) -> list[str]:
        """The addresses that the newest page links to."""
        return list(dict.fromkeys(link.url for link in self.pages[-1].links)) if self.pages else []

    def citations(self, text: str) -> Iterator[dict[str, Any]]:
        """The citations in an answer as annotations; those of pages there never were are left out."""
        for match in _CITATION.finditer(text):
            if (cursor := int(match.group(1))) < len(self.pages):
                page = self.pages[cursor]
                yield {
                    "type": "url_citation",
                    "start_index": match.start(),
                    "end_index": match.end(),
                    "url": page.url,
                    "title": page.title,
                }

    async def _search(self, wanted: Search) -> str:
        if not wanted.query.strip():
            raise ToolError("The query is empty.")
        found = await self._backend.search(wanted.query, min(max(wanted.topn, 1), 20))
        text = "\n\n".join(f"{_mark(i, each.title, each.url)}\n{each.text}" for i, each in enumerate(found))
        page = Page("", f"Search results for `{wanted.query}`", _lines(text or "No results."), [Link(d.url) for d in found])
        return self._show(page)

    async def _open(self, wanted: Open) -> str:
        target = self._target(wanted)
        page = self._page(wanted.cursor) if _stays(wanted) else _page(await self._backend.fetch(target.url))
        line = wanted.loc if wanted.loc >= 0 else max(target.line - 4, 0)
        if line >= len(page.lines):
            raise ToolError(f"loc {line} is beyond the page, whose last line is {len(page.lines) - 1}.")
        return self._show(page, line, wanted.num_lines)

    def _find(self, wanted: Find) -> str:
        page = self._page(wanted.cursor)
        if not page.url:
            raise ToolError("find needs an opened page, not search results: open one first.")
        shown: list[str] = []
        links: list[Link] = []
        pattern, line = wanted.pattern.lower(), 0
        while pattern and line < len(page.lines) and len(links) < MATCHES:
            if pattern in page.lines[line].lower():
                shown += [f"# 【{len(links)}†match at L{line}】", *page.lines[line : line + 4], ""]
                links.append(Link(page.url, line))
                line += 3
            line += 1
        title = f"Find results for `{wanted.pattern}` in `{page.title}`"
        return self._show(Page(page.url, title, shown or [f"No match for `{wanted.pattern}`."], links))

    def _page(self, cursor: int) -> Page:
        if not self.pages:
            raise ToolError("No page was opened yet: search first.")
        if not -1 <= cursor < len(self.pages):
            raise ToolError(f"There is no cursor {cursor}; the last one is {len(self.pages) - 1}.")
        return self.pages[cursor]

    def _target(self, wanted: Open) -> Link:
        if isinstance(wanted.id, str) and not wanted.id.isdecimal():
            return Link(wanted.id)
        page, number = self._page(wanted.cursor), int(wanted.id)
        if number < 0:
            return Link(page.url)
        if number >= len(page.links):
            raise ToolError(f"There is no link {number} on that page.")
        return page.links[number]

    def _show(self, page: Page, start: int = 0, count: int = -1) -> str:
        """Number the page and show the lines from `start`, as many as wanted, or as fit a view."""
        self.pages.append(page)
        end, size = start, 0
        for line in page.lines[start : start + count if count > 0 else None]:
            size += len(line) + 8
            if end > start and size > (4 * VIEW if count > 0 else VIEW):
                break
            end += 1
        body = "\n".join(f"L{start + i}: {line}" for i, line in enumerate(page.lines[start:end]))
        where = f" ({page.url})" if page.url else ""
        last = len(page.lines) - 1
        return f"[{len(self.pages) - 1}] {page.title}{where}\n**viewing lines [{start} - {end - 1}] of {last}**\n\n{body}"


class RemoteBrowser(Browser):
    """The browser of an MCP server, which keeps the pages; only what the calls themselves say is known of them here."""

    def __init__(self, call: Callable[[str, str], Awaitable[str]]) -> None:
        self.pages = []
        self._call = call

    def action(self, function: str, arguments: str) -> dict[str, Any]:
        match parsed := _parse(function, arguments):
            case Find():
                return {"type": "find_in_page", "pattern": parsed.pattern, "url": ""}
            case Open():
                return {"type": "open_page"} | ({"url": parsed.id} if isinstance(parsed.id, str) else {})
        return super().action(function, arguments)

    async def call(self, function: str, arguments: str) -> str:
        return await self._call(function, arguments)


def _stays(wanted: Open) -> bool:
    return isinstance(wanted.id, int) and wanted.id < 0


def _parse(function: str, arguments: str) -> Search | Open | Find:
    kinds: dict[str, type[Search] | type[Open] | type[Find]] = {"search": Search, "open": Open, "find": Find}
    if function not in kinds:
        raise ToolError(f"browser has no function {function[:60]!r}; it has search, open and find.")
    try:
        return kinds[function].model_validate_json(arguments or "{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ToolError(f"Bad arguments of browser.{function}: {where + ': ' if where else ''}{first['msg']}.") from None


def _page(document: Document) -> Page:
    """A document with its links numbered."""
    links: list[Link] = []

    def number(match: re.Match[str]) -> str:
        links.append(Link(urljoin(document.url, match.group(2))))
        return _mark(len(links) - 1, match.group(1), links[-1].url)

    return Page(document.url, document.title, _lines(_MARKDOWN_LINK.sub(number, document.text)), links)


def _mark(number: int, text: str, url: str) -> str:
    site = urlsplit(url).netloc
    return f"【{number}†{text}†{site}】" if site else f"【{number}†{text}】"


def _lines(text: str) -> list[str]:
    wrapped = (textwrap.wrap(line, WIDTH, replace_whitespace=False) or [""] for line in text.splitlines())
    return [line for lines in wrapped for line in lines] or [""]
