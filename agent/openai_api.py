"""OpenAI's wire format as pydantic models: what is accepted, within which limits, and what is sent back.

Unknown fields are refused, because a field that is ignored in silence changes what the client gets. A
short list of fields that cannot change the answer is accepted and not used. Every limit is written here,
so that /openapi.json, the validation and the error messages cannot disagree.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..engine.errors import RequestError
from ..engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SEED, SamplingParams, Structure

MAX_STOPS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 128
MAX_MESSAGES = 4096

StopString = Annotated[str, Field(min_length=1, max_length=256)]
T = TypeVar("T", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class BadRequest(Exception):
    """A request that is answered with a 4xx in OpenAI's error shape."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="accepted and not used")


class Sampling(Strict):
    """What both endpoints understand."""

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="decode so many, return the n best")
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, under vLLM's names.
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    use_beam_search: bool = Field(False, description="best_of is the beam width; temperature must be 0 or unset")
    length_penalty: float | None = Field(None, ge=-10, le=10)
    early_stopping: bool = False
    priority: int = Field(0, ge=-1000, le=1000, description="lower is served sooner")
    cache_salt: str | None = Field(None, max_length=256, description="share cached prefixes only with equal salts")
    # Accepted and not used: they do not change the answer.
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def params(
        self, *, max_tokens: int, logprobs: int | None, structure: Structure | None = None
    ) -> SamplingParams:
        """The engine's view; what is unset gets OpenAI's defaults."""
        n = self.n or 1
        temperature = self.temperature if self.temperature is not None else 0.0 if self.use_beam_search else 1.0
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            n=n,
            best_of=self.best_of or (max(n, 2) if self.use_beam_search else n),
            temperature=temperature,
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=self.seed,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            structure=structure,
            beam_search=self.use_beam_search,
            length_penalty=_or(self.length_penalty, 1.0),
            early_stopping=self.early_stopping,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(False, description="send the prompt's text first; not together with logprobs")
    add_special_tokens: bool = Field(False, description="let the tokenizer add what it adds to a text")
    suffix: None = Field(None, description="not supported")

    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: str | None = None

    def rendered(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(Strict):
    name: str = Field("schema", max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structure(self) -> Structure | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure("json_object")
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise BadRequest(
                "response_format.json_schema.schema is missing; type json_schema needs it", param="response_format"
            )
        return Structure("json_schema", json.dumps(self.json_schema.json_schema))


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0, description="tools are not supported")] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeRequest(Strict):
    """Either a prompt or messages."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool = True


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "abort"]


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "abort"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "blockyard"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


def parse(model: type[T], body: bytes) -> T:
    """A request from its bytes. BadRequest names the first field at fault, its limit, and what was sent."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # Of a union, report the branch that came furthest: its path is the longest.
        first = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
        path = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        if first["type"] == "json_invalid":
            raise BadRequest(f"the body is not valid JSON in UTF-8: {first['msg']}", code="invalid_json") from None
        if first["type"] == "extra_forbidden":
            raise BadRequest(
                f"{path} is not a field this server knows; leave it out", param=path, code="unknown_parameter"
            ) from None
        got = "" if first["type"] == "missing" else f" (got {_shorten(first['input'])})"
        raise BadRequest(f"{path or 'body'}: {first['msg']}{got}", param=path) from None


def _is_branch(part: str | int) -> bool:
    """Union branches show up in pydantic's paths under their type's name."""
    return isinstance(part, str) and ("[" in part or part in ("str", "StreamOptions", "constrained-str", "[key]"))


def _shorten(value: object) -> str:
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 100 else text[:97] + "..."


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> ErrorResponse:
    return ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def from_engine(error: RequestError) -> BadRequest:
    """The engine's refusal in OpenAI's words."""
    too_long = "together" in str(error)
    return BadRequest(str(error), param=error.field, code="context_length_exceeded" if too_long else None)
