"""OpenAI's wire format as pydantic models: what is accepted, within which limits, and what is sent back.

Unknown fields are refused, because a field that is ignored in silence changes what the client gets. A
short list of fields that cannot change the answer is accepted and not used. Every limit is written here,
so that /openapi.json, the validation and the error messages cannot disagree.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from ..engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SEED, SamplingParams, Structure
from .errors import BadRequest

MAX_STOPS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 128
MAX_MESSAGES = 4096

# Fields of OpenAI's that would change the answer in a way this server cannot, and what to do instead.
UNSUPPORTED = {
    "audio": "this server answers in text; leave it out",
    "function_call": "functions are not supported; leave it out",
    "functions": "functions are not supported; describe them in a message and use response_format",
    "prediction": "predicted outputs are not supported; leave it out",
    "reasoning_effort": "the effort cannot be set here; leave it out",
    "suffix": "inserting before a suffix is not supported; put all text into prompt",
    "tools": "tools are not supported; describe them in a message and use response_format",
    "verbosity": "the verbosity cannot be set here; ask for it in a message",
    "web_search_options": "this server does not search; leave it out",
}

BEST_OF = "decode so many; if they are more than n, the n best are sent, each whole, when all have ended"
MIN_TOKENS = (
    "no end of text, stop token or stop string before so many tokens; a grammar (response_format) that is "
    "finished ends the answer before"
)
USE_BEAM_SEARCH = (
    "best_of is the beam width; temperature must be 0 or unset, top_p, top_k and min_p off. logit_bias and "
    "penalties change the log-probabilities by which beams are ranked, as in transformers"
)

# Fields that take several types, and which, for error messages.
ALTERNATIVES = {
    "content": "a string or a list of text parts",
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
    "stop": "a string or a list of strings",
}


def _few(value: Any) -> Any:
    """Refuse a huge object at once; pydantic counts only after it has looked at every entry."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError(
            "too_long",
            "{have} entries; at most {most} are allowed",
            {"have": len(value), "most": MAX_LOGIT_BIAS},
        )
    return value


StopString = Annotated[str, Field(min_length=1, max_length=256)]
T = TypeVar("T", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# fail_fast: a million bad items must not become a million errors.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class Strict(BaseModel):
    """Exact types, no fields that are not named here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        """Stop at the first unknown field; pydantic alone would list them all, however many there are."""
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next((name for name in data if name not in known), None)
            if unknown is not None:
                raise PydanticCustomError("unknown_field", "{name}", {"name": unknown})
        return data


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
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description=BEST_OF)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None,
        description="the answer ends before the first of these strings that comes after min_tokens tokens",
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS, description="token id -> what is added to its logit"),
            BeforeValidator(_few),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, under vLLM's names.
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description=MIN_TOKENS)
    ignore_eos: bool | None = Field(None, description="go on after an end of text; not after a grammar's end")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    use_beam_search: bool | None = Field(None, description=USE_BEAM_SEARCH)
    length_penalty: float | None = Field(None, ge=-10, le=10, description="only with use_beam_search")
    early_stopping: bool | None = Field(None, description="only with use_beam_search")
    priority: int | None = Field(None, ge=-1000, le=1000, description="lower is served sooner")
    cache_salt: str | None = Field(
        None, max_length=256, description="share cached prefixes only with equal salts"
    )
    # Accepted and not used: they do not change the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def params(
        self, *, max_tokens: int, logprobs: int | None, structure: Structure | None = None
    ) -> SamplingParams:
        """The engine's view; what is unset gets OpenAI's defaults."""
        n = self.n or 1
        temperature = (
            self.temperature if self.temperature is not None else 0.0 if self.use_beam_search else 1.0
        )
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
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            structure=structure,
            beam_search=bool(self.use_beam_search),
            length_penalty=_or(self.length_penalty, 1.0),
            early_stopping=bool(self.early_stopping),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="send the prompt's text first; not together with logprobs")
    add_special_tokens: bool | None = Field(None, description="let the tokenizer add what it adds to a text")
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt: its text, or its token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(Strict):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "text") != "text":
            raise PydanticCustomError(
                "part_kind", "only parts of type text are supported; leave the others out"
            )
        return data


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: str | None = None

    def rendered(self) -> dict[str, str]:
        """As chat templates expect it; what is unset is left out."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        extras = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        role = "system" if self.role == "developer" else self.role
        return {
            "role": role,
            "content": text,
            **{key: value for key, value in extras.items() if value is not None},
        }


class JsonSchema(Strict):
    name: str = Field("schema", max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structure(self) -> Structure | None:
        if self.json_schema is not None and self.type != "json_schema":
            raise BadRequest(
                f"response_format.json_schema needs type json_schema (type is {self.type})",
                param="response_format",
            )
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure("json_object")
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise BadRequest(
                "response_format.json_schema.schema is missing; type json_schema needs it",
                param="response_format",
            )
        return Structure("json_schema", json.dumps(self.json_schema.json_schema))


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    # Accepted only with the values that ask for nothing.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class TokenizeRequest(Strict):
    """Either a prompt or messages."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: Messages | None = None
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


def parse(model: type[T], body: bytes) -> T:
    """A request from its bytes. BadRequest names the first field at fault, its limit, and what was sent."""
    try:
        # Also refuses NaN, infinities, lone surrogates and deep nesting, wherever they are.
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest(f"the body must be a JSON object (got {_shorten(data)})", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _bad_field(error) from None


def _bad_field(error: ValidationError) -> BadRequest:
    first = max(error.errors(include_url=False), key=_progress)
    parts = [str(part) for part in first["loc"] if not _is_branch(part)]
    if first["type"] == "unknown_field":
        path = ".".join([*parts, _shorten_text(first["ctx"]["name"])])
        remedy = UNSUPPORTED.get(path)
        message = f"{path}: {remedy}" if remedy else f"{path} is not a field this server knows; leave it out"
        return BadRequest(
            message, param=path, code="unsupported_parameter" if remedy else "unknown_parameter"
        )
    path = ".".join(parts)
    if path in UNSUPPORTED:
        return BadRequest(f"{path}: {UNSUPPORTED[path]}", param=path, code="unsupported_parameter")
    if parts and parts[-1] in ALTERNATIVES and first["type"].endswith("_type"):
        return BadRequest(
            f"{path} must be {ALTERNATIVES[parts[-1]]} (got {_shorten(first['input'])})", param=path
        )
    got = "" if first["type"] == "missing" else f" (got {_shorten(first['input'])})"
    return BadRequest(f"{path}: {first['msg']}{got}", param=path)


def _progress(error: ErrorDetails) -> tuple[bool, int, int]:
    """Of the branches of a union, report the one that came furthest: right type, or most items valid."""
    path = error["loc"]
    index = path[-1] if path and isinstance(path[-1], int) else 0
    return not error["type"].endswith("_type"), len(path), index


def _is_branch(part: str | int) -> bool:
    """Union branches show up in pydantic's paths under their type's name."""
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str", "none"))


def _shorten(value: object) -> str:
    """A value for an error message; the work is bounded, however long the value is."""
    if isinstance(value, str):
        return repr(_shorten_text(value))
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    return _shorten_text(json.dumps(value))


def _shorten_text(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
