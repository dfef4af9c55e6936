"""What Ollama's clients send and read, as far as this server speaks it.

Fields and options are treated as OpenAI's are: unknown ones are refused by name, those that cannot
be obeyed accept only the value that means nothing. `IGNORED_OPTIONS` are wishes about the hardware
and the loading of a model, which this server decides by itself; so is `keep_alive`.

Source: docs/api.md of ollama/ollama, and the types of its Python client.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from phikit.serve.openai_schema import Wire, Zero

IGNORED_OPTIONS = (
    "num_batch",
    "num_gpu",
    "main_gpu",
    "low_vram",
    "f16_kv",
    "use_mmap",
    "use_mlock",
    "num_thread",
    "numa",
    "num_keep",
)
"""`num_keep` says what to keep when a context is cut, and none is cut here."""


class Options(Wire):
    """How tokens are drawn. Defaults are Ollama's own: temperature 0.8, top_k 40, top_p 0.9."""

    num_ctx: int | None = Field(default=None, ge=1, lt=2**31)
    """A bound on prompt and reply together. A prompt beyond it is an error, never cut."""
    num_predict: int | None = Field(default=None, ge=-2, lt=2**31)
    """Longest reply; -1 and -2 leave it to the context."""
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    """0 keeps all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = (
        None
    )
    repeat_penalty: float | None = Field(default=None, gt=0, le=100)
    """Of all tokens so far; see `repeat_last_n`."""
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=-1)] = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    mirostat: Annotated[int | None, Field(ge=0, le=0)] = None
    typical_p: Annotated[float | None, Field(ge=1, le=1)] = None
    tfs_z: Annotated[float | None, Field(ge=1, le=1)] = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    num_thread: int | None = None
    numa: bool | None = None
    num_keep: int | None = None


class CalledFunction(Wire):
    name: str
    arguments: dict[str, Any]


class Call(Wire):
    function: CalledFunction


class Message(Wire):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    """In base64; they stand before the text."""
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    """Which tool answers; accepted, and not shown to the model."""


class FunctionTool(Wire):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(Wire):
    type: Literal["function"] = "function"
    function: FunctionTool


class Drawing(Wire):
    """What chat and generate share."""

    model: str
    stream: bool | None = None
    """True unless given."""
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: float | str | None = None
    think: bool | None = None
    """False leaves thinking out of the answer; whether a model thinks is its own matter."""


class ChatRequest(Drawing):
    """A conversation to be answered. Without messages the model is loaded."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[Tool] | None = Field(default=None, max_length=128)


class GenerateRequest(Drawing):
    """A prompt to be answered. Without one the model is loaded."""

    prompt: str = ""
    system: str | None = None
    images: list[str] | None = None
    raw: bool | None = None
    """The prompt goes on as it is, through no template."""
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None


class ShowRequest(BaseModel):
    """Which model to show; older clients write `name`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


# --- answers -------------------------------------------------------------------------------------


class Version(BaseModel):
    version: str


class Details(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(BaseModel):
    """The models that this server has."""

    models: list[Tag]


class RunningModel(BaseModel):
    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: Details
    expires_at: str
    context_length: int
    running: int
    """Replies under way; this and the next are not Ollama's."""
    waiting: int
    """Requests without a first token."""


class Running(BaseModel):
    """The models in memory."""

    models: list[RunningModel]


class Shown(BaseModel):
    """One model."""

    model_config = ConfigDict(protected_namespaces=())

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Finished(BaseModel):
    """What the last object of an answer has beside; durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatReply(Finished):
    """An answer, or the next characters of one."""

    message: ReplyMessage


class GenerateReply(Finished):
    """An answer, or the next characters of one."""

    response: str
    thinking: str | None = None
