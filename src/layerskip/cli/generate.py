"""`layerskip generate`: answer one prompt or a file of prompts."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import click

from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    GENERATE_ONLY,
    ModelConfig,
    answer_options,
    config_from_flags,
    config_options,
    datastore_file,
    note_idle_sampling,
    note_length,
    note_without_effect,
)
from layerskip.cli.data import read_prediction, read_prompts
from layerskip.cli.output import (
    bash_quoted,
    check_outputs,
    deliver,
    log_stderr,
    show_legend,
    show_pieces,
    show_stats,
    track,
)
from layerskip.decoding import Answer, DecodingConfig, Generation
from layerskip.decoding.prompt import named, with_variables
from layerskip.decoding.sampling import nth_seed
from layerskip.model.checkpoint import PromptForm


@click.command("generate")
@click.option(
    "--prompt",
    metavar="TEXT",
    help="The prompt; without it standard input is one prompt, less one line break at its end.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='File of prompts: .jsonl with a field "prompt" or "messages", else one prompt a line.',
)
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@config_options(DecodingConfig, only=GENERATE_ONLY)
@answer_options
def command(
    prompt: str | None,
    prompts_file: Path | None,
    chat: bool,
    prediction: str | None,
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
      layerskip generate --prompt "The capital of France is" --max-new-tokens 64
      layerskip generate --chat --prompt "What is photosynthesis?" --stats
      layerskip generate --mode self-speculative --exit-layer 4 --draft-tokens 2 \\
          --prompt "def fib(n):" --show-draft
      echo "Once upon a time" | layerskip generate --json
      layerskip generate --chat --prompt "$(cat edit.txt)" --prediction module.py
      layerskip generate --chat --prompt "A good name for a cat?" --regex "[A-Z][a-z]+"
      layerskip generate --prompts prompts.jsonl --output answers.json
    """
    if prompt is not None and prompts_file is not None:
        raise click.UsageError("--prompt and --prompts exclude each other")
    stdin_is_taken = prompt is None and prompts_file is None
    flags["prediction"] = read_prediction(prediction, stdin_is_taken=stdin_is_taken)
    decoding = config_from_flags(DecodingConfig, flags)
    model_config = config_from_flags(ModelConfig, flags)
    inputs = (model_config.model, prompts_file, datastore_file(), prediction)
    check_outputs({"--output": output}, beside=inputs)
    note_idle_sampling(decoding.temperature, "seed")
    prompts = read_prompts(prompt, prompts_file, "--prompts", chat=chat)
    prompts = _with_variables(prompts, chat_template_kwargs)
    model = config_flags.load_model(model_config)
    _warn_of_form(prompts, model.settings.prompt_form)
    quiet = as_json or output is not None
    if quiet:
        note_without_effect(("show_draft",), "a document has no colours")
    elif show_draft:
        show_legend()
    several = prompts_file is not None
    generations: list[Generation] = []
    answer: Answer | None = None
    try:
        for i, one in enumerate(track(prompts, "answering") if quiet else prompts):
            config = dataclasses.replace(decoding, seed=nth_seed(decoding.seed, i))
            with named(i + 1) if several else contextlib.nullcontext():
                answer = model.answer(one, config)
            if not quiet:
                if i:
                    print()
                show_pieces(answer, show_draft=show_draft, as_ids=model.tokenizer is None)
            generations.append(answer.complete())
            answer = None
            if not quiet:
                note_length(generations[-1], config)
            if stats:
                show_stats(generations[-1])
    finally:  # Ctrl-C or a later failure keeps the answers so far
        if answer is not None and answer.generation.token_ids:
            generations.append(answer.generation)
        results = [generation.to_dict() for generation in generations]
        if quiet and results:
            _deliver(results if several else results[0], as_json, output)


def _warn_of_form(prompts: list[Any], form: PromptForm | None) -> None:
    """Warn once if a prompt is not of the form that the checkpoint was trained for."""
    if form is not None and not all(form.fits(p) for p in prompts if isinstance(p, str)):
        log_stderr(
            f"this checkpoint was trained for prompts of one form, {form.text}, such as"
            f" --prompt {bash_quoted(form.example)}; answers to others are poor"
        )


def _deliver(result: Any, as_json: bool, output: Path | None) -> None:
    """Deliver answers; print them where they cannot be stored, since nobody has seen them yet."""
    try:
        deliver(result, as_json=as_json, output=output)
    except OSError:
        if not as_json:
            deliver(result, as_json=True, output=None)
        raise


def _with_variables(prompts: list[Any], variables: dict[str, Any] | None) -> list[Any]:
    """Return prompts with variables of the chat template; note where no prompt uses them."""
    if not variables:
        return prompts
    results = [with_variables(prompt, variables) for prompt in prompts]
    if all(result is prompt for result, prompt in zip(results, prompts, strict=True)):
        note_without_effect(("chat_template_kwargs",), "no prompt is a conversation")
    return results
