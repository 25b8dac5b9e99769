"""What a turn may be, as a grammar over tokens: from tools, tool_choice and response_format to masks of the vocabulary.

    turn    = { thought | preamble }, ( answer | calls )
    thought = <|channel|>analysis<|message|> text <|end|><|start|>assistant
    answer  = <|channel|>final<|message|> JSON by the schema, or text <|return|>
    calls   = call { <|end|><|start|>assistant call } <|call|>
    call    = <|channel|>commentary to=functions.NAME <|constrain|>json<|message|> JSON by the function's parameters

A tool whose input is free text may have a grammar for it. The header of a call may also name the recipient before the
channel, and the channel may be analysis. A turn that must call has no answer, and neither that nor one whose answer is JSON
has a preamble (its text would stand before the JSON). Without parallel calls there is one call.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from gptoss_compile.runtime.api.errors import ApiError, bad_request
from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from gptoss_compile.runtime.api.json_schema import Budget, Schema, SchemaError, enforceable, locate
from gptoss_compile.runtime.api.tokenizer import FIRST_SPECIAL, VOCABULARY, Tokenizer
from gptoss_compile.runtime.executor import Floats

ANY_OBJECT: Schema = {"type": "object"}
_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_LIMITS = LLParserLimits(
    max_grammar_size=50_000,
    max_items_in_row=10_000,
    max_lexer_states=50_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    verbose_errors=False,
)
_OPTIONAL = "functions."  # in recipients, which the model at times leaves out
_SPACING = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}  # more could go on for ever
_ENDOFTEXT = 199999  # llguidance's end; a turn ends before it, with <|return|> or <|call|>


@dataclass(frozen=True)
class Callee:
    """Whom a turn may call. parameters: the schema of its JSON arguments. text: it takes any text instead of JSON, or, with
    a grammar (in Lark), such text.

    path: the field of the request that holds the schema or grammar. strict: refuse what the grammar cannot enforce, instead
    of leaving it out.
    """

    recipient: str
    parameters: Schema | None = None
    path: str = "tools"
    strict: bool = False
    text: bool = False
    grammar: str | None = None


@dataclass(frozen=True)
class TurnRules:
    """must_call: one of `callees` has to be called. answer: the schema of the final message, None for any text."""

    callees: Sequence[Callee] = ()
    must_call: bool = False
    parallel: bool = True
    answer: Schema | None = None
    answer_path: str = "response_format"


class Grammars:
    """Compiles rules. The newest grammars are kept, since every turn of a conversation has the same."""

    KEPT = 32

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="gptoss-grammar")

    def compile(self, rules: TurnRules, copies: int) -> list[TurnGrammar]:
        """That many grammars of one turn each. Takes up to 0.2 s: call it in a thread. Raises ApiError."""
        source = _Source(rules)
        with self._lock:
            matcher = self._compiled.pop(source.text, None)
        if matcher is None:
            matcher = self._matcher(source)
        with self._lock:
            self._compiled[source.text] = matcher
            while len(self._compiled) > self.KEPT:
                self._compiled.popitem(last=False)
        return [TurnGrammar(matcher.deep_copy(), self._workers) for _ in range(copies)]

    def _matcher(self, source: _Source) -> LLMatcher:
        matcher = LLMatcher(llguidance_tokenizer(self._tokenizer), source.text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise source.refusal(matcher.get_error())
        for header, place in source.headers.items():
            probe = matcher.deep_copy()
            start = [*self._tokenizer.encode(header[0]), CHANNEL, *self._tokenizer.encode(header[1]), MESSAGE]
            probe.try_consume_tokens(start)
            mask = probe.compute_bitmask()
            if probe.is_error() or not any(mask):
                raise place.refused("nothing can satisfy it, or it is too complex")
        return matcher


class TurnGrammar:
    """A logits processor that lets a turn be only what its grammar allows.

    Masks are computed in another thread, one token ahead, while the executor runs. Where all that the grammar allows is
    forbidden otherwise (min_tokens, where only the end can follow), the grammar has its way. `error` says why it could not
    go on, should it become too complex on the way; the turn ends then, and is not to be shown as an answer.
    """

    def __init__(self, matcher: LLMatcher, workers: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._workers = workers
        self._consumed = 0
        self.error: str | None = None
        self._forbidden: Future[npt.NDArray[np.bool_]] = workers.submit(self._mask, ())

    def prepare(self, generated: Sequence[int]) -> None:
        """Begin with the mask of the token that follows these."""
        if len(generated) > self._consumed:
            self._forbidden.result()
            new, self._consumed = generated[self._consumed :], len(generated)
            self._forbidden = self._workers.submit(self._mask, new)

    def __call__(self, generated: Sequence[int], scores_V: Floats) -> None:
        assert len(generated) >= self._consumed, "tokens were taken back"
        self.prepare(generated)
        forbidden_V = self._forbidden.result()[: scores_V.size]
        np.copyto(scores_V, np.float32(-np.inf), where=forbidden_V)
        if scores_V.max() == -np.inf:
            scores_V[~forbidden_V] = 0

    def _mask(self, new: Sequence[int]) -> npt.NDArray[np.bool_]:
        """True for every id that cannot follow, once `new` were chosen. Fails closed: after an error only the end can."""
        forbidden_V = np.ones(VOCABULARY, np.bool_)
        try:
            for token in new:
                self._matcher.consume_token(token)
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if not self._matcher.is_error() and bits.any():
                return np.unpackbits(~bits, count=VOCABULARY, bitorder="little").view(np.bool_)
            self.error = _reason(self._matcher.get_error()) or "nothing can follow"
        except BaseException as failure:  # a panic in Rust is no Exception
            self.error = type(failure).__name__
        forbidden_V[RETURN] = False
        return forbidden_V


@dataclass(frozen=True)
class _Place:
    """A schema or a custom tool's grammar in llguidance's own form, and the field of the request that it came from."""

    path: str
    source: str
    schema: Schema | None = None

    def refused(self, reason: str) -> ApiError:
        return refused(self.path, reason, "invalid_grammar" if self.schema is None else "invalid_json_schema")


@dataclass
class _Source:
    """The grammar in llguidance's dialect of Lark. headers: how messages with a schema or a grammar begin, for a trial."""

    rules: TurnRules
    headers: dict[tuple[str, str], _Place] = field(default_factory=dict)
    _budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        """Raises ApiError for schemas that are refused at sight."""
        rules = self.rules
        opening = "analysis" if rules.must_call or rules.answer is not None else "(analysis | commentary)"
        lines = [
            "start: opening* (" + ("calls" if rules.must_call else "answer | calls" if rules.callees else "answer") + ")",
            f"opening: {_t(CHANNEL)} {opening} {_t(MESSAGE)} TEXT {_NEXT}",
            'analysis: "analysis"',
            'commentary: "commentary"',
            f'content_type: " "? {_t(CONSTRAIN)} ("json" | "code") | " json" | " code"',
            "TEXT: /(?s:.*)/",
        ]
        if not rules.must_call:
            lines.append(f'answer: {_t(CHANNEL)} "final" content_type? {_t(MESSAGE)} answer_body {_t(RETURN)}')
            lines.append("answer_body: " + self._body(rules.answer, rules.answer_path, True, ("", "final")))
        if rules.callees:
            more = f"({_NEXT} call)*" if rules.parallel else ""
            lines.append(f"calls: call {more} {_t(CALL)}")
            lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(rules.callees))))
        grammars = []
        for i, callee in enumerate(rules.callees):
            name = callee.recipient.removeprefix(_OPTIONAL)
            to = '" to="' + (f' "{_OPTIONAL}"?' if name != callee.recipient else "") + f' "{name}"'
            channel = f"{_t(CHANNEL)} (commentary | analysis)"
            lines.append(f"call_{i}: ({to} {channel} | {channel} {to}) content_type? {_t(MESSAGE)} body_{i}")
            header = (f" to={callee.recipient}", "commentary")
            if callee.grammar is not None:
                self.headers[header] = _Place(callee.path, callee.grammar)
                grammars.append({"name": f"text_{i}", "lark_grammar": callee.grammar})
                lines.append(f"body_{i}: @text_{i}")
            else:
                parameters = None if callee.text else _arguments(callee.parameters)
                lines.append(f"body_{i}: " + self._body(parameters, callee.path, callee.strict, header))
        self.text = json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *grammars]})

    def _body(self, schema: Schema | None, path: str, strict: bool, header: tuple[str, str]) -> str:
        if schema is None:
            return "TEXT"
        try:
            schema = enforceable(schema, path, self._budget)
        except SchemaError as error:
            raise refused(error.path, error.reason) from None
        options = _SPACING | ({} if strict else {"lenient": True, "coerce_one_of": True})
        schema = {**schema, "x-guidance": options}
        body = f"%json {json.dumps(schema)}"
        self.headers[header] = _Place(path, f"start: {body}", schema)
        return body

    def refusal(self, message: str) -> ApiError:
        """What to answer when llguidance refuses the whole: the part that it refuses by itself, too."""
        for place in self.headers.values():
            if error := _compile_error(place.source):
                path = _part(place.schema, place.path) if place.schema else place.path
                return replace(place, path=path).refused(_reason(error))
        return refused("tools" if self.rules.callees else self.rules.answer_path, _reason(message))


def _part(schema: Schema, path: str) -> str:
    """The path of the smallest part of a schema that llguidance refuses."""

    def fails(part: Schema) -> bool:
        error = _compile_error(f"start: %json {json.dumps(part | {'x-guidance': schema['x-guidance']})}")
        return error is not None and "does not exist" not in error  # a pointer to what was cut off

    return locate(schema, path, fails)


def _compile_error(source: str) -> str | None:
    return LLMatcher.validate_grammar(source, limits=_LIMITS) or None


def refused(path: str, reason: str, code: str = "invalid_json_schema") -> ApiError:
    return bad_request(f"{path} cannot be enforced: {reason}.", path, code)


def _reason(message: str) -> str:
    """The gist of llguidance's message: neither the grammar nor where in it."""
    message = re.sub(r"(\n +\d+ \| |<state>).*", "", message, flags=re.DOTALL).replace("<non-verbose/>", "")
    message = message.rpartition("failed to compile JSON schema: ")[2]
    if "regex parse error" in message:
        message = "the pattern cannot be used: " + message.rpartition("error: ")[2]
    return " ".join(message.split()).rstrip(".")[:200]


def _arguments(parameters: Schema | None) -> Schema:
    if not parameters:
        return _NO_ARGUMENTS
    alternatives = {"type", "$ref", "anyOf", "oneOf", "allOf"} & parameters.keys()
    return parameters if alternatives else {**parameters, "type": "object"}


def _t(token: int) -> str:
    return f"<[{token}]>"


_NEXT = f'{_t(END)} {_t(START)} "assistant"'


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    eos_token_id = _ENDOFTEXT
    bos_token_id = None
    special_token_ids = range(FIRST_SPECIAL, VOCABULARY)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = (b"<|%d|>" % token for token in self.special_token_ids)
        self.tokens = [*map(tokenizer.token_bytes, range(FIRST_SPECIAL)), *special]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


_building = threading.Lock()
_built: dict[int, tuple[Tokenizer, LLTokenizer]] = {}


def llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """llguidance's form of a tokenizer, built once.

    Building takes seconds, all of which hold the interpreter's lock, so a server does it before it serves.
    """
    with _building:
        known = _built.get(id(tokenizer))
        if known is None:
            wrapper = TokenizerWrapper(_Vocabulary(tokenizer))
            slices = LLTokenizer.json_slices()
            known = tokenizer, LLTokenizer(wrapper, n_vocab=VOCABULARY, eos_token=_ENDOFTEXT, slices=slices)
            _built.clear()
            _built[id(tokenizer)] = known
        return known[1]
