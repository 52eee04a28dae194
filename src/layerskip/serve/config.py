"""`ServeConfig`: every option of the HTTP server, spelled once."""

import dataclasses
import ipaddress

from layerskip.options import check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of `layerskip serve`.

    Raises:
        ValueError: a value is out of range, or the server would be open to other machines.
    """

    host: str = option("127.0.0.1", "Address to listen on.", metavar="HOST")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65535)
    api_key: str | None = option(
        None,
        "Key that requests have to send; better set it as LAYERSKIP_API_KEY.",
        metavar="KEY",
        repr=False,
    )
    auth: bool = option(
        True, "Without authentication anybody who reaches the address may use the server."
    )
    allow_origin: tuple[str, ...] = option(
        (),
        "Origin whose web pages may use the server, such as https://chat.example (repeatable).",
        metavar="ORIGIN",
    )
    served_model_name: str | None = option(
        None,
        "Name of the model in the API. Default: --model, of a path its last part.",
        metavar="NAME",
    )
    max_num_seqs: int = option(16, "Maximum number of answers computed at once.", at_least=1)
    max_queue: int = option(
        256, "Maximum number of waiting requests; more are refused with 429.", at_least=0
    )
    kv_cache_tokens: int | None = option(
        None,
        "Positions of the KV cache. Default: what fits in a share of the free memory.",
        at_least=2,
    )
    prefill_chunk: int = option(
        256, "Prompt tokens computed between two rounds of running answers.", at_least=1
    )
    default_max_tokens: int = option(
        1024, "New tokens of a chat answer whose request names no limit.", at_least=1
    )
    max_tokens: int = option(32768, "Maximum of max_tokens in a request.", at_least=1)
    max_prompt_tokens: int | None = option(
        None, "Maximum number of prompt tokens. Default: the model's context.", at_least=1
    )
    max_n: int = option(16, "Maximum number of answers to one request.", at_least=1)
    max_stop: int = option(16, "Maximum number of stop strings of a request.", at_least=0)
    max_body_bytes: int = option(
        1 << 22, "Maximum size of a request's body; more is refused with 413.", at_least=1
    )
    header_timeout: float = option(
        10.0, "Seconds that a client may take to send a request's headers.", above=0.0
    )
    body_timeout: float = option(
        30.0, "Seconds that a client may take to send a request's body.", above=0.0
    )
    drain_seconds: float = option(
        30.0, "Seconds that running answers may take to finish after SIGTERM.", at_least=0.0
    )
    log_prompts: bool = option(False, "Print prompts to stderr.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.api_key is not None and not self.api_key:
            raise ValueError("the API key is empty; set one, or none at all")
        if self.api_key and not self.auth:
            raise ValueError("--no-auth contradicts an API key; leave out one of them")
        if self.auth and not self.api_key and not self.is_loopback:
            raise ValueError(
                f"other machines can reach {self.host}: set LAYERSKIP_API_KEY (or --api-key), or pass"
                " --no-auth to serve everybody"
            )

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
