"""The bodies of requests: OpenAI's fields, and vLLM's beside them. Others are kept in `model_extra`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Real = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Short = Annotated[str, Field(max_length=1024)]


class Body(BaseModel):
    """What all have."""

    model_config = ConfigDict(extra="allow")

    model: Short | None = None


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(BaseModel):
    """What the answer must follow: exactly one of these (vLLM's names)."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(BaseModel):
    """A schema and its name."""

    name: Short = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampled(Body):
    """What chats and completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[Annotated[str, Field(max_length=10)], Real] | None = None
    presence_penalty: Real | None = None
    frequency_penalty: Real | None = None
    user: Short | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Real | None = None
    repetition_penalty: Real | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Short | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None


class Function(BaseModel):
    """What a model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function, in OpenAI's wrapping."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """A function by its name."""

    name: Short


class ToolChoice(BaseModel):
    """The one that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Message(BaseModel):
    """One of a conversation. What else it has, the model's template may read."""

    model_config = ConfigDict(extra="allow")

    role: Short
    content: str | list[dict[str, Any]] | None = None
    name: Short | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Short | None = None


class ChatBody(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampled):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: Count | None = None
    logprobs: Count | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: list[Token]


# Fields that would change the answer, and that can't be done: ignoring them would be a lie. What they may be: nothing.
REFUSED = {
    "chat_template": "templates come from the model's own files only",
    "suffix": "this model continues text and fills nothing in",
    "use_beam_search": "ask for n answers instead",
    "prompt_logprobs": "use echo and logprobs at /v1/completions",
    "prompt_embeds": "prompts are texts or token ids",
    "continue_final_message": "send the text to /v1/completions",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
    "guided_json": "use structured_outputs or response_format",
    "guided_regex": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "logits_processors": "no request brings code",
    "include_stop_str_in_output": "answers end before their stop texts",
    "truncate_prompt_tokens": "shorten the prompt",
    "return_token_ids": "use logprobs",
}

# Known and without effect here: nothing is said about them.
IDLE = frozenset(
    (
        "store", "metadata", "service_tier", "reasoning_effort", "verbosity", "safety_identifier", "modalities",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction", "request_id",
        "spaces_between_special_tokens", "best_of", "skip_special_tokens",
    )
)  # fmt: skip
