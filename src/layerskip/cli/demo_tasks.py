"""What the demo asks: three tasks, each with its template and a few prompts in our own words."""

import dataclasses

from layerskip.decoding import LayerSkipModel
from layerskip.decoding.prompt import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A kind of prompt.

    Attributes:
        name: in tables.
        template: from {text} to the prompt that a model is trained on; no space or line break is left
            at its end that the answer's first token would want to hold.
        question: the same as a question to an assistant; None = there is no such question.
        texts: what is asked.
        max_new_tokens: tokens of an answer at most.
    """

    name: str
    template: str
    question: str | None
    texts: tuple[str, ...]
    max_new_tokens: int

    def prompt(self, text: str, model: LayerSkipModel) -> Prompt:
        """A text as this model is asked.

        A checkpoint with trained exits gets the template, which is how it was trained. Any other gets
        the question, in a chat, where the task has a question and the checkpoint a chat template, else
        the template too.
        """
        is_assistant = model.has_chat_template
        if model.settings.exit_layer is None and self.question is not None and is_assistant:
            return [{"role": "user", "content": self.question.format(text=text)}]
        return self.template.format(text=text)


TASKS = (
    DemoTask(
        name="parse",
        template="{text}\n",
        question=None,
        texts=(
            "Wake me at twenty past six on every workday",
            "How cold will it get in Oslo on Sunday night",
            "Text Mira that my train is ten minutes late",
            "Remind me to water the plants when I am home on Friday",
        ),
        max_new_tokens=64,
    ),
    DemoTask(
        name="summarize",
        template="{text}\n\nSummary:",
        question="Say in one line what this package does:\n\n{text}",
        texts=(
            "Tidemark reads the tables that ports publish and works out high and low water for"
            " any day. It knows about four hundred harbours. Results come as text, as JSON or as"
            " a calendar file, and no network is needed once the tables are there.",
            "Pocketlog writes one line for each event into a file that never grows beyond the"
            " size you choose. Old lines give way to new ones. It has no dependencies and is safe"
            " to use from several threads.",
            "Grainsort puts photographs into folders by the day and place they were taken. It"
            " reads what the camera stored and never changes a picture. Where the place is"
            " missing, it takes that of the picture before.",
            "Quillcheck looks through Markdown files for links that lead nowhere. It follows"
            " links between files and to headings, and on request those to web pages. In a build"
            " it fails with a list of what is wrong.",
        ),
        max_new_tokens=48,
    ),
    DemoTask(
        name="code",
        template="{text}",
        question="Complete this Python function:\n\n```python\n{text}\n```",
        texts=(
            'def count_words(text):\n    """Return a dict from each word of text to how often it'
            ' occurs.\n\n    Words are compared in lower case.\n    """',
            'def is_leap_year(year):\n    """Return True if year has 366 days in the Gregorian'
            ' calendar."""',
            'def chunks(items, size):\n    """Split a list into lists of size items each; the last'
            ' one may be shorter."""',
            'def read_settings(path):\n    """Read lines of the form name = value into a dict.\n\n'
            '    Empty lines and lines that begin with # are left out.\n    """',
        ),
        max_new_tokens=96,
    ),
)
