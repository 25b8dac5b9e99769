"""An application, and a server, as clients reach them."""

from __future__ import annotations

import threading
import time

import httpx
from scripted import ScriptedEngine

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer


def asgi_client(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


class Running:
    """A server in a thread; `ended` holds what ended it."""

    def __init__(self, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        listener = server._listen("127.0.0.1", 0)
        self.url = server._url(listener)
        self.servers: list[server._Server] = []
        self.ended: list[BaseException | None] = []

        def run() -> None:
            try:
                server.run(engine, tokenizer, ServerOptions(api_keys=("key",)), listener)
                self.ended.append(None)
            except BaseException as error:
                self.ended.append(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        while True:
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.01)
