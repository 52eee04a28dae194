"""`layerskip chat`: a conversation with a model."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import click

from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    answer_options,
    config_from_flags,
    datastore_file,
    note_idle_sampling,
    note_length,
    note_without_effect,
)
from layerskip.cli.output import (
    Terminated,
    check_outputs,
    deliver,
    log_stderr,
    show_legend,
    show_pieces,
    show_stats,
    waiting,
)
from layerskip.decoding import DecodingConfig, LayerSkipModel, PrefixCache, PromptError
from layerskip.decoding.sampling import nth_seed
from layerskip.model.hub import DEFAULT_MODEL

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


@click.command("chat")
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@answer_options
def command(
    system: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    stats: bool,
    show_draft: bool,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Talk with a model; the conversation so far is part of every prompt.

    /reset forgets the conversation, /quit or Ctrl-D ends it. Ctrl-C stops an answer, and between
    answers it ends the program.

    \b
    Examples:
      layerskip chat
      layerskip chat --system "Answer in one sentence." --temperature 0.7 --seed 1 --stats
      layerskip chat --model Qwen/Qwen3-0.6B --chat-template-kwargs '{"enable_thinking": false}'
    """
    decoding = config_from_flags(DecodingConfig, flags)
    model_config = config_from_flags(ModelConfig, flags)
    check_outputs({"--output": output}, beside=(model_config.model, datastore_file()))
    note_idle_sampling(decoding.temperature, "seed")
    model = config_flags.load_model(model_config)
    if not model.has_chat_template:
        raise ValueError(
            f"{model_config.model} has no chat template and cannot chat; use layerskip generate"
        )
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP, file=sys.stderr)
    if (form := model.settings.prompt_form) is not None:
        log_stderr(
            f"this checkpoint was trained for prompts of one form, {form.text}, and not to talk;"
            f" take --model {DEFAULT_MODEL}"
        )
    if as_json:
        note_without_effect(("show_draft",), "a document has no colours")
    elif show_draft:
        show_legend()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    results: list[dict[str, Any]] = []
    refused = 0
    prefix = PrefixCache()
    try:
        while (text := _next_line(interactive)) is not None:
            if not text.strip():
                continue
            if text.strip() == "/quit":
                break
            if text.strip() == "/help":
                print(_HELP, file=sys.stderr)
                continue
            if text.strip() == "/reset":
                messages = list(opening)
                continue
            if re.fullmatch(r"/\w+", text.strip()):
                log_stderr(f"there is no command {text.strip()}: {_HELP}")
                continue
            messages.append({"role": "user", "content": text})
            config = dataclasses.replace(decoding, seed=nth_seed(decoding.seed, len(results)))
            prompt = {"messages": messages, "chat_template_kwargs": chat_template_kwargs}
            try:
                result = _answer(model, prompt, prefix, config, stats, show_draft, quiet=as_json)
            except PromptError as error:
                messages.pop()
                can_reset = len(messages) > len(opening)
                log_stderr(
                    f"{error} (/reset forgets the conversation)" if can_reset else f"{error}"
                )
                refused += 1
                continue
            messages.append({"role": "assistant", "content": result["text"]})
            results.append(result)
    finally:  # Ctrl-C or a later failure keeps the answers so far
        deliver(results, as_json=as_json, output=output if results else None)
    if refused and not (results or interactive):  # a script sees the status alone
        raise ValueError("none of the turns could be answered")


def _answer(
    model: LayerSkipModel,
    prompt: dict[str, Any],
    prefix: PrefixCache,
    config: DecodingConfig,
    stats: bool,
    show_draft: bool,
    quiet: bool,
) -> dict[str, Any]:
    answer = model.answer(prompt, config, prefix=prefix)
    try:
        if quiet:
            with waiting("answering"):
                answer.complete()
        else:
            show_pieces(answer, show_draft=show_draft)
    except Terminated:
        raise
    except KeyboardInterrupt:  # the part that was written stays in the conversation
        print("\n(stopped)", file=sys.stderr)
    generation = answer.generation
    if not quiet:
        note_length(generation, config)
    if stats:
        show_stats(generation)
    return generation.to_dict()


def _next_line(interactive: bool) -> str | None:
    try:
        if interactive:  # on stderr, as stdout may be a file of answers
            print("> ", end="", file=sys.stderr, flush=True)
        return input().removeprefix("\ufeff")  # a byte order mark before the first line
    except EOFError:
        if interactive:
            print(file=sys.stderr)
        return None
