"""From an artifact to a running server: gptoss-serve."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import uvicorn

from gptoss_compile.artifact import Artifact
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.grammar import llguidance_tokenizer
from gptoss_compile.runtime.api.logs import configure
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.protocol import HEAD_BYTES, LimitedProtocol
from gptoss_compile.runtime.api.tokenizer import FILE, VOCABULARY, Tokenizer
from gptoss_compile.runtime.api.tool_server.server import ToolServer
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import load_executor

DRAIN_SECONDS = 60  # how long answers may take to finish after SIGTERM
DEATH_TICKS = 3  # tenths of a second for which /health tells of the engine's death before the server goes


class EngineDiedError(RuntimeError):
    """The engine failed while serving; the message says how."""


def serve(
    artifact: Artifact | str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | Sequence[str] | None = None,
    served_model_name: str | Sequence[str] | None = None,
    kv_pages: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    enable_prefix_caching: bool = True,
    system_date: str | None = None,
    responses_dialect: Literal["openai", "open-responses"] = "openai",
    allowed_origins: Sequence[str] = (),
    tool_server: str | None = None,
    search_corpus: str | None = None,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> None:
    """Serve an artifact until SIGTERM or SIGINT, which let running answers finish. It takes as many GPUs as the artifact has
    ranks, the first that are visible.

    kv_pages: pages of the KV cache, by default as many as the memory holds. max_num_seqs and max_num_batched_tokens
    bound one step; by default the artifact's buckets do. system_date, responses_dialect and allowed_origins are described
    at ServerOptions, tool_server and search_corpus at ToolServer.load. ssl_certfile (with the key in it or in ssl_keyfile)
    makes it HTTPS.
    Raises ValueError for an artifact or settings that cannot be served, OSError for an address that cannot be listened
    on, and EngineDiedError.
    """
    if not isinstance(artifact, Artifact):
        artifact = Artifact.open(artifact)
    _check_certificate(ssl_certfile, ssl_keyfile)
    options = ServerOptions(
        _strings(served_model_name) or (artifact.path.name,),
        _strings(api_key),
        system_date=system_date,
        allowed_origins=tuple(allowed_origins),
        responses_dialect=responses_dialect,
    )
    sequences = max_num_seqs or max(bucket.sequences for bucket in artifact.buckets)
    tokens = max_num_batched_tokens or max(bucket.tokens for bucket in artifact.buckets)
    tools = ToolServer.load(tool_server, search_corpus)
    with closing(_listen(host, port)) as listener:
        tokenizer = Tokenizer.load(artifact.file(f"tokenizer/{FILE}").parent) if artifact.has_tokenizer else None
        grammars = threading.Thread(target=llguidance_tokenizer, args=(tokenizer,), daemon=True)
        if tokenizer:
            grammars.start()  # takes seconds, in which nothing could be served
        if artifact.ranks > 1 and artifact.target != "cpu":
            print(f"Taking {artifact.ranks} GPUs, one for each rank of {artifact.path.name}", flush=True)
        executor = load_executor(artifact, num_pages=kv_pages, max_num_seqs=sequences)
        engine = Engine(
            executor,
            max_num_seqs=sequences,
            max_num_batched_tokens=tokens,
            enable_prefix_caching=enable_prefix_caching,
            vocab_limit=VOCABULARY if tokenizer else None,
        )
        engine.start()
        try:
            if tokenizer:
                grammars.join()
            run(engine, tokenizer, options, listener, tools, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
        finally:
            engine.shutdown(drain=False)


def run(
    engine: Engine,
    tokenizer: Tokenizer | None,
    options: ServerOptions,
    listener: socket.socket,
    tool_server: ToolServer | None = None,
    **settings: Any,
) -> None:
    """Serve a started engine on a listening socket until a signal. Raises EngineDiedError. settings: uvicorn's."""
    app = build_app(engine, tokenizer, options, tool_server)
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ws="websockets-sansio",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=65,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
        **settings,
    )
    server = _Server(config, engine, listener)
    with _signals_already_handled():
        server.run(sockets=[listener])
    if not engine.healthy:
        raise EngineDiedError(str(engine.error or "the engine's thread ended"))


class _Server(uvicorn.Server):
    """Says when it is ready, and ends with its engine."""

    def __init__(self, config: uvicorn.Config, engine: Engine, listener: socket.socket) -> None:
        super().__init__(config)
        self._engine = engine
        self._url = _url(listener, "https" if config.ssl_certfile else "http")
        self._ticks_dead = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"Ready: {self._url}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if not self._engine.healthy:
            self._ticks_dead += 1
            self.should_exit |= self._ticks_dead > DEATH_TICKS
        return await super().on_tick(counter)


@contextmanager
def _signals_already_handled() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more for whoever came before; nobody needs to act on them again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_certificate(certfile: str | None, keyfile: str | None) -> None:
    """Refuse before the weights are loaded what uvicorn would refuse afterwards."""
    if keyfile and not certfile:
        raise ValueError("--ssl-keyfile needs --ssl-certfile")
    if certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
        except OSError as error:
            files = f"{certfile} with {keyfile}" if keyfile else certfile
            raise OSError(f"cannot use the certificate {files}: {error.strerror or error}") from None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the weights are loaded so that a busy port is told at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from None


def _url(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{scheme}://{host}:{port}"


def _strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def main(argv: Sequence[str] | None = None) -> int:
    """The command gptoss-serve. Exit code 2: could not start; 1: the engine died."""
    arguments = vars(_parser().parse_args(argv))
    configure(arguments.pop("log_level"))
    try:
        serve(arguments.pop("artifact"), **arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"gptoss-serve: error: {error}", file=sys.stderr)
        return 2
    except EngineDiedError as error:
        print(f"gptoss-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptoss-serve", description="Serve an artifact through OpenAI's API.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="the directory that gptoss-compile -o wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="port to listen on, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument("--api-key", nargs="+", metavar="KEY", help="accept only requests that carry one of these keys")
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="name of the model, and aliases (default: the artifact's directory)",
    )
    parser.add_argument(
        "--kv-pages", type=_positive, metavar="N", help="pages of the KV cache (default: as many as the memory holds)"
    )
    parser.add_argument("--max-num-seqs", type=_positive, metavar="N", help="most sequences in one step")
    parser.add_argument("--max-num-batched-tokens", type=_positive, metavar="N", help="most tokens in one step")
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the KV cache of equal beginnings (default: on)",
    )
    parser.add_argument(
        "--responses-dialect",
        choices=("openai", "open-responses"),
        default="openai",
        help="names of the reasoning events in /v1/responses (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        default=(),
        metavar="ORIGIN",
        help="web origins that may call the API from a browser, or * (default: none)",
    )
    parser.add_argument(
        "--tool-server",
        metavar="LIST",
        help="tools that run on the server, comma separated: demo (browser and python), and MCP servers as host:port, "
        "URL or stdio:COMMAND (default: none)",
    )
    parser.add_argument("--search-corpus", metavar="DIR", help="the demo's browser searches these text files, not the web")
    parser.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, if that is in a file of its own")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what to log to stderr, as JSON lines; info has one for each request (default: %(default)s)",
    )
    parser.add_argument("--system-date", metavar="YYYY-MM-DD", help="pin the date in prompts (default: today)")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, found {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port number, found {text!r}")
    return int(text)
