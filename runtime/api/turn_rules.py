"""From a request's tools, tool_choice and response format to the rules of the turn that answers it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gptoss_compile.runtime.api.custom_grammar import CustomGrammars, GrammarError
from gptoss_compile.runtime.api.errors import bad_request
from gptoss_compile.runtime.api.grammar import Callee, TurnRules, refused
from gptoss_compile.runtime.api.json_schema import Schema
from gptoss_compile.runtime.api.render import FunctionTool
from gptoss_compile.runtime.api.responses_declared import Declared, declared
from gptoss_compile.runtime.api.responses_prompt import forced_recipients
from gptoss_compile.runtime.api.responses_schema import ResponseBody
from gptoss_compile.runtime.api.schema_text import format_text
from gptoss_compile.runtime.api.schemas import ChatBody, NamedSchema, NamedTool
from gptoss_compile.runtime.api.tool_server.server import Toolbox
from gptoss_compile.runtime.api.tools import NAMESPACE


@dataclass(frozen=True)
class AnswerFormat:
    """The JSON that the final message must be. path: the field of the request with its schema."""

    schema: Schema
    path: str
    name: str = "json_object"
    description: str | None = None

    @property
    def text(self) -> str:
        return format_text(self.name, self.description, self.schema)


def chat_format(body: ChatBody) -> AnswerFormat | None:
    given = body.response_format
    return _format(given.type, given.json_schema, "response_format.json_schema.schema") if given else None


def response_format(body: ResponseBody) -> AnswerFormat | None:
    given = body.text.format if body.text else None
    return _format(given.type, given, "text.format.schema") if given else None


def _format(kind: str, named: NamedSchema | None, path: str) -> AnswerFormat | None:
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerFormat({"type": "object"}, path)
    if named is None or named.schema_ is None:
        raise bad_request(f"{path} is missing.", path)
    return AnswerFormat(named.schema_, path, named.name or "answer", named.description)


def chat_rules(body: ChatBody, tools: Sequence[FunctionTool], answer: AnswerFormat | None) -> TurnRules | None:
    """None where any turn will do. Raises ApiError for ignore_eos with rules that must be kept: the two contradict."""
    choice = body.tool_choice
    if body.ignore_eos:
        if answer or choice == "required" or isinstance(choice, NamedTool):
            raise bad_request("ignore_eos writes beyond the end that response_format or tool_choice asks for.", "ignore_eos")
        return None
    forced = {NAMESPACE + choice.function.name} if isinstance(choice, NamedTool) else None
    paths = {tool.function.name: f"tools[{i}].function.parameters" for i, tool in enumerate(body.tools or ())}
    callees = [_function(tool, paths[tool.name]) for tool in tools]
    if not (body.tools or answer):
        return None
    return _rules(callees, forced, choice == "required", body.parallel_tool_calls, answer)


def response_rules(
    body: ResponseBody, tools: Sequence[FunctionTool], box: Toolbox, answer: AnswerFormat | None
) -> TurnRules | None:
    """None where any turn will do: the server's own tools tell the model of its mistakes."""
    declarations = {
        each.function.name: (each, f"tools[{number}]")
        for number, tool in enumerate(body.tools or ())
        for each in declared(tool)
    }
    grammars = CustomGrammars()
    callees = [_declared(*declarations[tool.name], grammars) for tool in tools]
    for namespace in box.namespaces():
        known = namespace.name == "browser"  # MCP servers check their arguments themselves
        for tool in namespace.tools:
            callees.append(Callee(f"{namespace.name}.{tool.name}", tool.parameters if known else {"type": "object"}))
        callees += [] if namespace.tools else [Callee(namespace.name, text=True)]
    forced = forced_recipients(body, [callee.recipient for callee in callees])
    if not (declarations or answer or forced):
        return None
    return _rules(callees, forced, False, body.parallel_tool_calls, answer)


def _declared(tool: Declared, path: str, grammars: CustomGrammars) -> Callee:
    if tool.format is None:
        return _function(tool.function, f"{path}.parameters")
    path = f"{path}.format.definition"
    assert tool.format.syntax and tool.format.definition is not None
    try:
        lark = grammars.as_lark(tool.format.syntax, tool.format.definition)
    except GrammarError as error:
        raise refused(path, str(error), "invalid_grammar") from None
    return Callee(NAMESPACE + tool.function.name, path=path, text=True, grammar=lark)


def _function(tool: FunctionTool, path: str) -> Callee:
    return Callee(NAMESPACE + tool.name, tool.parameters, path, strict=bool(tool.strict))


def _rules(
    callees: Sequence[Callee],
    forced: Collection[str] | None,
    required: bool,
    parallel: bool | None,
    answer: AnswerFormat | None,
) -> TurnRules:
    """forced: the recipients one of which must be called."""
    if forced is not None:
        callees = [callee for callee in callees if callee.recipient in forced]
    must_call = bool(callees) and (required or forced is not None)
    schema, path = (answer.schema, answer.path) if answer else (None, "")
    return TurnRules(callees, must_call, parallel is not False, schema, path)
