"""`layerskip generate`: answer one prompt or a file of prompts."""

import contextlib
from pathlib import Path
from typing import Any

import click

from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli import show
from layerskip.cli.output import track
from layerskip.cli.prompts import asked_prompts
from layerskip.decoding import Answer, Generation
from layerskip.decoding.prompt import named, with_variables
from layerskip.decoding.sampling import nth_seed


@click.command("generate")
@click.option(
    "--prompt",
    help="The prompt; without it, standard input is one prompt, less one line break at its end.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='A file of prompts: .jsonl with a field "prompt" or "messages", else one prompt a line.',
)
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@options.answering_options
def command(
    prompt: str | None,
    prompts_file: Path | None,
    chat: bool,
    chat_template_kwargs: dict[str, Any] | None,
    stats: bool,
    show_draft: bool,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Continue a prompt; the answer is streamed to stdout.

    \b
    Examples:
      layerskip generate --prompt "Once upon a time" --max-new-tokens 64
      layerskip generate --chat --prompt "Name three rivers in Europe." --stats
      layerskip generate --mode self-speculative --exit-layer 4 --draft-tokens 2 \\
          --prompt "def fib(n):" --show-draft
      echo "Once upon a time" | layerskip generate --json
      layerskip generate --prompts prompts.jsonl --output answers.json
    """
    if prompt is not None and prompts_file is not None:
        raise click.UsageError("--prompt and --prompts exclude each other")
    values.check_decoding(flags)
    read = (flags["model"], prompts_file, values.draft_text_file())
    outputs.check_outputs({"--output": output}, beside=read)
    options.note_idle_sampling(flags, "seed")
    prompts = asked_prompts(prompt, prompts_file, "--prompts", chat=chat)
    prompts = _with_variables(prompts, chat_template_kwargs)
    model = options.load_model(flags)
    arguments = options.decoding_arguments(flags)
    quiet = as_json or output is not None
    if quiet:
        options.note_without_effect(("show_draft",), "a document has no colours")
    elif show_draft:
        show.show_legend()
    several = prompts_file is not None
    generations: list[Generation] = []
    answer: Answer | None = None
    try:
        for i, one in enumerate(track(prompts, "answering") if quiet else prompts):
            apart = {**arguments, "seed": nth_seed(arguments["seed"], i)}
            with named(i + 1) if several else contextlib.nullcontext():
                answer = model.answer(one, **apart)
            if not quiet:
                if i:
                    print()
                show.show_pieces(answer, show_draft=show_draft, as_ids=model.tokenizer is None)
            generations.append(answer.complete())
            answer = None
            if not quiet:
                options.note_cut(generations[-1])
            if stats:
                show.show_stats(generations[-1])
    finally:  # Ctrl-C and whatever goes wrong later leave the answers so far
        if answer is not None and answer.generation.token_ids:
            generations.append(answer.generation)
        results = [generation.to_dict() for generation in generations]
        if quiet and results:
            _deliver(results if several else results[0], as_json, output)


def _deliver(result: Any, as_json: bool, output: Path | None) -> None:
    """As everywhere; but nobody has seen these answers, so they are printed if they cannot be stored."""
    try:
        outputs.deliver(result, as_json=as_json, output=output)
    except OSError:
        if not as_json:
            outputs.deliver(result, as_json=True, output=None)
        raise


def _with_variables(prompts: list[Any], variables: dict[str, Any] | None) -> list[Any]:
    """The prompts with variables of the template; a line on stderr where none has a use for them."""
    if not variables:
        return prompts
    told = [with_variables(one, variables) for one in prompts]
    if all(one is before for one, before in zip(told, prompts, strict=True)):
        options.note_without_effect(("chat_template_kwargs",), "no prompt is a conversation")
    return told
