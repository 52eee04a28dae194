"""Requests and responses of the API, as OpenAI and vLLM define them.

A field that would change the answer and is not supported is refused by its name. Values that ask for
nothing, such as `"tools": []`, are dropped first: clients send them out of habit.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Name -> values with which a field that is not supported changes nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "best_of": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Response(BaseModel):
    pass


class StreamOptions(_Request):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, data: Any) -> Any:
        """Drop what an assistant's message has beside its text, where it is empty."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value not in (None, [], {})}

    def to_dict(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class PredictedOutput(_Request):
    """OpenAI's predicted output: a text that much of the answer is expected to repeat."""

    type: Literal["content"]
    content: str | list[TextPart]


class JsonObjectFormat(_Request):
    """OpenAI's JSON mode: any object."""

    type: Literal["json_object"]


class JsonSchema(_Request):
    """The schema of a response format; it always holds, as with OpenAI's `strict`."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(_Request):
    """OpenAI's structured outputs."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class DraftOptions(_Request):
    """Decoding options of this request; see docs/reference/config.md."""

    mode: Literal["auto", "plain", "early-exit", "self-speculative"] | None = None
    exit_layer: Annotated[int, Field(ge=1, le=10_000)] | None = None
    draft_tokens: Annotated[int, Field(ge=0, le=10_000)] | None = None
    draft_from: str | None = None
    sources: Annotated[bool, Field(description="Report the source of each piece of text.")] = False

    def options(self) -> dict[str, Any]:
        """Return the options of `DecodingConfig`."""
        return self.model_dump(exclude={"sources"}, exclude_none=True)


class _AnswerRequest(_Request):
    """Fields that chats and completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="-1 or 0: all tokens.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = (
        None
    )
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    prediction: PredictedOutput | None = None
    response_format: (
        Annotated[JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    layerskip: DraftOptions = DraftOptions()
    # These do not change the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_values(cls, data: Any) -> Any:
        """Drop null and values that ask for nothing."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and value not in NEUTRAL_VALUES.get(name, ())
        }

    @model_validator(mode="after")
    def check_grammars(self) -> "_AnswerRequest":
        """Refuse several grammars."""
        grammars = (self.response_format, self.guided_json, self.guided_regex, self.guided_choice)
        if sum(grammar is not None for grammar in grammars) > 1:
            raise ValueError(
                "give one of response_format, guided_json, guided_regex and guided_choice"
            )
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Maximum number of new tokens."""
        return self.max_tokens

    def options(self) -> dict[str, Any]:
        """Return the options of `DecodingConfig` that the request names."""
        top_k = self.top_k if self.top_k is not None and self.top_k > 0 else None
        prediction = None if self.prediction is None else _text(self.prediction.content)
        options = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty or None,
            "presence_penalty": self.presence_penalty or None,
            "seed": self.seed,
            "stop": self.stop_strings or None,
            "ignore_eos": self.ignore_eos,
            "prediction": prediction or None,
            "json_schema": self._json_schema(),
            "regex": self._regex(),
            **self.layerskip.options(),
        }
        return {name: value for name, value in options.items() if value is not None}

    def _json_schema(self) -> str | dict[str, Any] | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return self.guided_json if self.response_format is None else {"type": "object"}

    def _regex(self) -> str | None:
        if self.guided_choice is not None:
            return "|".join(map(re.escape, self.guided_choice))
        return self.guided_regex


class ChatRequest(_AnswerRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> "ChatRequest":
        """Refuse top_logprobs without logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def limit(self) -> int | None:
        """Maximum number of new tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position; None = no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class CompletionRequest(_AnswerRequest):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def check_echo(self) -> "CompletionRequest":
        """Refuse log probabilities of the prompt."""
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported; leave one of them out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position; None = no log probabilities."""
        return self.logprobs


AnswerRequest = ChatRequest | CompletionRequest


class TokenizeRequest(_Request):
    """`POST /tokenize`: a text, or messages with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_one_of_both(self) -> "TokenizeRequest":
        """Refuse both, and neither."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


class DetokenizeRequest(_Request):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ErrorObject(_Response):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(_Response):
    """The body of every error."""

    error: ErrorObject


class PromptTokensDetails(_Response):
    """Details of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(_Response):
    """Details of the new tokens."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(_Response):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class SourceText(_Response):
    """A piece of an answer and the drafter that proposed it, or "model"."""

    text: str
    source: str
    tokens: int


class DraftReport(_Response):
    """Drafting and speed of an answer, or of all answers of a request together."""

    mode: str
    rounds: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    mean_accepted_length: float | None
    by_source: dict[str, tuple[int, int]]
    ttft_s: float
    tokens_per_s: float | None
    plain_tokens_per_s: float | None
    sources: list[list[SourceText]] | None = None


class TopLogprob(_Response):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A chosen token, and the most likely ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    """Log probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswerMessage(_Response):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(_Response):
    """One answer of a chat."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Answer(_Response):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer):
    """Answer of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    layerskip: DraftReport


class Delta(_Response):
    """The part of a message in a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Response):
    """The part of one answer in a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChunkSources(_Response):
    """Sources of the text of a chunk."""

    sources: list[SourceText]


class ChatChunk(_Answer):
    """Chunk of a streamed chat answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    layerskip: DraftReport | ChunkSources | None = None


class CompletionLogprobs(_Response):
    """Log probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Response):
    """One answer to a plain prompt, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(_Answer):
    """Answer of `POST /v1/completions`, or a chunk of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    layerskip: DraftReport | ChunkSources | None = None


class ModelDetails(_Response):
    """Facts about the model that only this server reports."""

    num_hidden_layers: int
    exit_layer: int | None
    weights: str
    dtype: str
    has_chat_template: bool
    plain_tokens_per_s: float | None


class ModelCard(_Response):
    """A model of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "layerskip"
    max_model_len: int
    layerskip: ModelDetails


class ModelList(_Response):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenization(_Response):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


class Detokenization(_Response):
    """Answer of `POST /detokenize`."""

    prompt: str


class Health(_Response):
    """Answer of `GET /health`."""

    status: Literal["loading", "ready", "draining"]


class Version(_Response):
    """Answer of `GET /version`."""

    version: str
