"""Bodies of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, field_validator, model_validator

from gptoss_compile.runtime.api.schemas import (
    MAX_TOP_LOGPROBS,
    Body,
    Content,
    FunctionDefinition,
    NamedSchema,
    ReasoningEffort,
    StreamOptions,
    ToolName,
)
from gptoss_compile.runtime.sampling_params import SamplingParams

INCLUDABLE = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
)
BUILT_IN = (
    "web_search",
    "web_search_preview",
    "code_interpreter",
    "mcp",
    "file_search",
    "image_generation",
    "computer_use_preview",
    "local_shell",
    "shell",
)
CLIENT_TOOLS = ("function", "custom", "namespace")
# Fields that would change what the answer means, and that this server does not have.
UNSUPPORTED = ("conversation", "prompt", "context_management", "moderation")


class InputItem(Body):
    """One item of `input`, of any type; which fields matter depends on the type."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None
    error: str | dict[str, Any] | None = None
    summary: Content | None = None
    server_label: str | None = None
    namespace: str | None = None
    input: str | None = None
    encrypted_content: str | None = None

    @property
    def kind(self) -> str | None:
        return self.type or ("message" if self.role else "item_reference" if self.id else None)


class CustomFormat(Body):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> CustomFormat:
        if self.type == "grammar" and (self.syntax is None or self.definition is None):
            raise ValueError("a format of type 'grammar' needs syntax and definition")
        return self


class CustomDefinition(Body):
    """A tool of the client's that takes free text."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class NamespaceDefinition(Body):
    """Functions and custom tools under a common name."""

    name: ToolName
    description: str | None = None
    tools: Annotated[list[ResponseTool], Field(min_length=1)]


Definition = FunctionDefinition | CustomDefinition | NamespaceDefinition
_DEFINITIONS: dict[str, type[Body]] = {
    "function": FunctionDefinition,
    "custom": CustomDefinition,
    "namespace": NamespaceDefinition,
}


class ResponseTool(Body):
    """A tool that the client runs, or one of the server's."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    type: str

    @property
    def definition(self) -> Definition | None:
        """None for one of the server's."""
        model = _DEFINITIONS.get(self.type)
        return None if model is None else cast(Definition, model.model_validate(self.model_extra or {}))

    @model_validator(mode="after")
    def _known(self) -> ResponseTool:
        if self.type.partition("_2025")[0] not in (*CLIENT_TOOLS, *BUILT_IN):
            raise ValueError(f"tools of type {self.type[:40]!r} are not supported")
        definition = self.definition  # raises for one that is incomplete
        members = definition.tools if isinstance(definition, NamespaceDefinition) else ()
        if wrong := [tool.type for tool in members if tool.type not in ("function", "custom")]:
            raise ValueError(f"a namespace cannot hold tools of type {wrong[0][:40]!r}")
        return self


class ToolChoice(Body):
    """`{"type": "function" or "custom", "name"}`, `{"type": "allowed_tools", "mode", "tools"}`, or a tool of the server by
    its type, with `server_label` and perhaps `name` for `mcp`."""

    type: str
    name: str | None = None
    server_label: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class Reasoning(Body):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(NamedSchema):
    type: Literal["text", "json_object", "json_schema"]


class Text(Body):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class PromptBody(Body):
    """What a prompt is made of: all of /v1/responses/input_tokens."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None


class CompactBody(PromptBody):
    """Null and absent are not the same here: without a model there is no answer."""

    model: str


class ResponseBody(PromptBody):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # extra: to refuse UNSUPPORTED by name

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = None

    @field_validator("include")
    @classmethod
    def _include(cls, value: list[str] | None) -> list[str] | None:
        if unknown := [name for name in value or () if name not in INCLUDABLE]:
            raise ValueError(f"{unknown[0][:60]!r} cannot be included; known are {', '.join(INCLUDABLE)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ResponseBody:
        if present := [name for name in UNSUPPORTED if (self.model_extra or {}).get(name) is not None]:
            raise ValueError(f"{present[0]} is not supported")
        if self.background and self.store is False:
            raise ValueError("background: true needs store: true")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        if self.input is None or self.input == []:
            raise ValueError("input is missing")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_encrypted(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def summarises(self) -> bool:
        return bool(self.reasoning and (self.reasoning.summary or self.reasoning.generate_summary))

    def params(self, stop_ids: tuple[int, ...]) -> SamplingParams:
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            max_tokens=self.max_output_tokens,
            stop_token_ids=stop_ids,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
        )
