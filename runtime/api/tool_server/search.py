"""Where the browser's pages come from: the web through Exa, or a folder of text files."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.browser import Document

EXA = "https://api.exa.ai"
SECONDS = 30.0
EXCERPT = 300  # characters of a search result
MAX_FILES = 10_000
MAX_TEXT = 1_000_000  # characters of one page or file
SUFFIXES = (".md", ".markdown", ".txt", ".rst")


class Exa:
    """Exa's search API, with the key of EXA_API_KEY. transport: httpx's, for tests."""

    source = "web"

    def __init__(self, key: str, transport: Any = None) -> None:
        import httpx  # an extra

        self._client = httpx.AsyncClient(
            base_url=EXA, headers={"x-api-key": key}, timeout=SECONDS, transport=transport, trust_env=True
        )

    async def search(self, query: str, count: int) -> list[Document]:
        contents = {"text": {"maxCharacters": EXCERPT}}
        return await self._ask("/search", {"query": query, "numResults": count, "contents": contents})

    async def fetch(self, url: str) -> Document:
        found = await self._ask("/contents", {"urls": [url], "text": {"maxCharacters": MAX_TEXT}})
        if not found:
            raise ToolError(f"Could not load {url[:300]}.")
        return found[0]

    async def _ask(self, path: str, body: dict[str, Any]) -> list[Document]:
        import httpx

        try:
            answer = await self._client.post(path, json=body)
            answer.raise_for_status()
            results = answer.json()["results"]
            return [Document(each["url"], each.get("title") or each["url"], each.get("text") or "") for each in results]
        except httpx.HTTPStatusError as error:
            raise ToolError(f"The search service answered {error.response.status_code}.") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ToolError(f"The search service failed: {type(error).__name__}.") from None


class Corpus:
    """The text files of a folder, read once. A page's address is `file:///` and its path within the folder.

    Search ranks by BM25 over words: score = Σ idf(w) · f·(k+1) / (f + k·(1 - b + b·length/mean length)).
    """

    source = "files"
    K, B = 1.2, 0.75

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ValueError for a folder without text files."""
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise ValueError(f"the search corpus {root} holds no text files ({', '.join(SUFFIXES)})")
        if len(files) > MAX_FILES:
            raise ValueError(f"the search corpus {root} holds {len(files)} files; {MAX_FILES} are the most")
        self._documents = {doc.url: doc for doc in (_read(path, root) for path in files)}
        self._words = {url: Counter(_words(f"{doc.title} {doc.text}")) for url, doc in self._documents.items()}
        self._having = Counter(word for words in self._words.values() for word in words)
        self._mean = sum(words.total() for words in self._words.values()) / len(self._words) or 1.0

    async def search(self, query: str, count: int) -> list[Document]:
        return await asyncio.to_thread(self._search, query, count)

    async def fetch(self, url: str) -> Document:
        document = self._documents.get(url) or self._documents.get(f"file:///{url.lstrip('/')}")
        if document is None:
            raise ToolError(f"There is no page {url[:300]!r} here.")
        return document

    def _search(self, query: str, count: int) -> list[Document]:
        asked = _words(query)
        scores = {url: self._score(asked, words) for url, words in self._words.items()}
        best = sorted((url for url in scores if scores[url] > 0), key=lambda url: -scores[url])[:count]
        return [Document(url, self._documents[url].title, self._excerpt(url, asked)) for url in best]

    def _score(self, asked: list[str], words: Counter[str]) -> float:
        length = self.K * (1 - self.B + self.B * words.total() / self._mean)
        return sum(self._weight(word) * words[word] * (self.K + 1) / (words[word] + length) for word in asked)

    def _weight(self, word: str) -> float:
        having = self._having[word]
        return math.log(1 + (len(self._documents) - having + 0.5) / (having + 0.5))

    def _excerpt(self, url: str, asked: list[str]) -> str:
        """The paragraph with the most of what was asked for."""
        paragraphs = [part.strip() for part in self._documents[url].text.split("\n\n") if part.strip()] or [""]
        best = max(paragraphs, key=lambda part: len(set(asked) & set(_words(part))))
        return " ".join(best.split())[:EXCERPT]


def _read(path: Path, root: Path) -> Document:
    text = path.read_text(errors="replace")[:MAX_TEXT]
    heading = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")
    return Document(f"file:///{path.relative_to(root).as_posix()}", heading or path.stem, text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
