"""What OpenAI's clients send and read, as far as this server speaks it.

A field that is not here is refused by name. `IGNORED` lists those that clients send by habit and
that have no meaning here; they are accepted and ignored. Fields that would change the reply, and
that cannot be obeyed, accept only the value that means nothing: `presence_penalty: 0`.

Source: OpenAI's API reference (chat, completions, embeddings, models); `reasoning_content` as
DeepSeek, vLLM and llama.cpp have it; `top_k`, `min_p`, `repetition_penalty` as vLLM.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from phikit.generate.language_model import MAX_TOP

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Accepted and ignored: bookkeeping of OpenAI's own service. (`parallel_tool_calls: false` is
obeyed where a call is forced, and is a wish elsewhere.)"""

Zero = Annotated[float | None, Field(ge=0, le=0)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
One = Annotated[int | None, Field(ge=1, le=1)]


class Wire(BaseModel):
    """Part of a request: closed to unknown fields, and to numbers that JSON does not have."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,  # "5" is no number, and 0.0 is not false
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class TextPart(Wire):
    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    type: Literal["refusal"]
    refusal: str


class ImageURL(Wire):
    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageURL


class InputAudio(Wire):
    data: str
    format: Literal["wav", "flac", "ogg", "mp3"]


class InputAudioPart(Wire):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioURL(Wire):
    url: str


class AudioPart(Wire):
    type: Literal["audio_url"]
    audio_url: AudioURL


TextParts = list[TextPart]
UserPart = Annotated[TextPart | ImagePart | InputAudioPart | AudioPart, Field(discriminator="type")]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: str | TextParts
    name: None = None


class UserMessage(Wire):
    role: Literal["user"]
    content: str | list[UserPart]
    name: None = None


class CalledFunction(Wire):
    name: str
    arguments: str
    """A JSON object, as text."""


class SentCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: str | list[AssistantPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[SentCall] | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    name: None = None


class ToolMessage(Wire):
    role: Literal["tool"]
    content: str | TextParts
    tool_call_id: str


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionTool(Wire):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Wire):
    type: Literal["text"]


class JSONObjectFormat(Wire):
    type: Literal["json_object"]


class JSONSchema(Wire):
    model_config = ConfigDict(populate_by_name=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Drawing(Wire):
    """What chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Without one, every request draws anew."""
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    """1 unless given."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    adapter: str | None = None
    """Of the model; by default the one its media call for."""
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class ChatRequest(Drawing):
    """A chat completion that is asked for."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Drawing):
    """A text that is to go on."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """16 unless given, as OpenAI has it."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    echo: Literal[False] | None = None
    best_of: One = None
    suffix: None = None


class EmbeddingRequest(Wire):
    """Texts, or their token ids, whose meaning is wanted as numbers."""

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None


# --- answers -------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class MadeCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Routing(BaseModel):
    """Which side answered, and why."""

    route: Literal["local", "cloud"]
    reason: Literal["absent", "context", "failure", "unsure"] | None
    confidence: float | None
    cost: float
    note: str | None


class ChatCompletion(BaseModel):
    """A finished chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    routing: Routing | None = None
    """Of a routed model alone."""


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """A finished text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Vectors of length 1, one for each input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that this server has, loaded or not."""

    object: Literal["list"]
    data: list[ModelEntry]
