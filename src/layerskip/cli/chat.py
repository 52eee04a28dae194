"""`layerskip chat`: a conversation with a model."""

import sys
from pathlib import Path
from typing import Any

import click

from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli import show
from layerskip.cli.output import log_stderr
from layerskip.decoding import LayerSkipModel, Prefix, PromptError
from layerskip.decoding.sampling import nth_seed
from layerskip.model.hub import DEFAULT_MODEL

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
_NO_TALKER = (
    f"{DEFAULT_MODEL} was taught commands, summaries and Python; to talk, take --model smollm2-135m"
)


@click.command("chat")
@click.option("--system", help="A system message at the head of the conversation.")
@options.answering_options
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

    /reset forgets the conversation, /quit or Ctrl-D ends it. Ctrl-C stops an answer, and ends the
    program where no answer is being written.

    \b
    Examples:
      layerskip chat
      layerskip chat --system "Answer in one sentence." --temperature 0.7 --seed 1 --stats
      layerskip chat --model Qwen/Qwen3-0.6B --chat-template-kwargs '{"enable_thinking": false}'
    """
    values.check_decoding(flags)
    read = (flags["model"], values.draft_text_file())
    outputs.check_outputs({"--output": output}, beside=read)
    options.note_idle_sampling(flags, "seed")
    model = options.load_model(flags)
    if not model.has_chat_template:
        raise ValueError(
            f"{flags['model']} has no chat template and cannot chat; use layerskip generate"
        )
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP, file=sys.stderr)
        if flags["model"] == DEFAULT_MODEL:
            print(_NO_TALKER, file=sys.stderr)
    if as_json:
        options.note_without_effect(("show_draft",), "a document has no colours")
    elif show_draft:
        show.show_legend()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    results: list[dict[str, Any]] = []
    refused = 0
    prefix = Prefix()
    try:
        while (text := _next_line(interactive)) is not None:
            if not text.strip():
                continue
            if text.strip() == "/quit":
                break
            if text.strip() == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": text})
            drawn_apart = {**flags, "seed": nth_seed(flags["seed"], len(results))}
            asked = {"messages": messages, "chat_template_kwargs": chat_template_kwargs}
            try:
                result = _answer(
                    model, asked, prefix, drawn_apart, stats, show_draft, quiet=as_json
                )
            except PromptError as error:
                messages.pop()
                can_forget = len(messages) > len(opening)
                log_stderr(
                    f"{error} (/reset forgets the conversation)" if can_forget else f"{error}"
                )
                refused += 1
                continue
            messages.append({"role": "assistant", "content": result["text"]})
            results.append(result)
    finally:  # Ctrl-C and whatever goes wrong later leave the answers so far
        outputs.deliver(results, as_json=as_json, output=output if results else None)
    if refused and not (results or interactive):  # a script has nothing but the status to go by
        raise ValueError("none of the turns could be answered")


def _answer(
    model: LayerSkipModel,
    asked: dict[str, Any],
    prefix: Prefix,
    flags: dict[str, Any],
    stats: bool,
    show_draft: bool,
    quiet: bool,
) -> dict[str, Any]:
    answer = model.answer(asked, prefix=prefix, **options.decoding_arguments(flags))
    try:
        if quiet:
            with options.waiting("answering"):
                answer.complete()
        else:
            show.show_pieces(answer, show_draft=show_draft)
    except KeyboardInterrupt:  # the part that was written stays in the conversation
        print("\n(stopped)", file=sys.stderr)
    generation = answer.generation
    if not quiet:
        options.note_cut(generation)
    if stats:
        show.show_stats(generation)
    return generation.to_dict()


def _next_line(interactive: bool) -> str | None:
    try:
        if interactive:  # on stderr, as stdout may be a file of answers
            print("> ", end="", file=sys.stderr, flush=True)
        return input().removeprefix("\ufeff")  # a byte order mark before the first
    except EOFError:
        if interactive:
            print(file=sys.stderr)
        return None
