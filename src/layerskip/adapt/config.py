"""`AdaptConfig`: the settings of the training of an exit adapter, whose fields are the flags."""

import dataclasses
from pathlib import Path

from layerskip.model.publish import check_upload
from layerskip.options import check_options, option

PYTHON_TEXTS = "python"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Settings of `adapt`.

    Raises:
        ValueError: a value is out of range.
    """

    output: Path = option(
        Path("exit-adapter"), "Folder of the adapter, its checkpoints and the data of the run."
    )
    data: tuple[str, ...] = option(
        (PYTHON_TEXTS,),
        "Prompts (rows with prompt or messages) and texts to train on: files, hub ids, or python for"
        " what every Python installation has (repeatable).",
        metavar="DATA",
    )
    max_minutes: float = option(
        60.0,
        "Time of the run, with that before it was resumed.",
        above=0.0,
        at_most=1e6,
        metavar="MINUTES",
    )
    resume: bool = option(False, "Go on with the run in the output folder.")
    exit_layer: int = option(
        0, "Number of layers that run for each drafted token (0 or more).", at_least=0, metavar="E"
    )
    draft_vocabulary: int = option(
        4096, "Number of tokens that the adapter drafts besides those of the prompt.", at_least=2
    )
    depths: int = option(
        2, "Number of tokens drafted one after another in training.", at_least=1, at_most=8
    )
    learning_rate: float = option(1e-3, "Peak learning rate; it falls linearly.", above=0.0)
    ce_weight: float = option(
        0.3, "Weight of the cross-entropy, added to the KL divergence.", at_least=0.0
    )
    epochs: float = option(3.0, "Passes over each token on average.", above=0.0)
    own_share: float = option(
        1.0,
        "Share of tokens of answers that the model writes; the rest are texts.",
        at_least=0.0,
        at_most=1.0,
    )
    max_length: int = option(512, "Number of tokens of a text at most.", at_least=16)
    max_new_tokens: int = option(192, "Number of tokens of an answer at most.", at_least=1)
    batch_tokens: int = option(2048, "Number of positions of an optimizer step.", at_least=1)
    round_tokens: int = option(
        32_768, "Number of new tokens between two evaluations.", at_least=1, at_most=10**7
    )
    buffer_tokens: int = option(
        400_000,
        "Number of tokens whose states are kept on disk for further passes.",
        at_least=1,
        at_most=10**9,
    )
    eval_prompts: int = option(
        48, "Number of prompts held out for early stopping and the last table.", at_least=1
    )
    patience: int = option(
        20, "Number of evaluations without a better agreement that end the run.", at_least=1
    )
    save_minutes: float = option(5.0, "Time between two checkpoints.", above=0.0)
    seed: int = option(0, "Seed of everything random.", at_least=0, at_most=2**31)
    push_to_hub: str | None = option(
        None,
        "Upload adapter and model card to this repository of the Hugging Face hub; needs HF_TOKEN or"
        " hf auth login.",
        metavar="ORG/NAME",
    )
    private: bool = option(False, "Make that repository private.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output).expanduser())
        check_options(self)
        check_upload(self.push_to_hub, self.private)
