"""The model's own answers to everyday questions, so that it goes on answering as it did.

Finetuning on few kinds of rows makes a model forget how to chat. What it says before any training is the
best row to keep that with: it learns nothing new, and its exits learn what its last layer says.
"""

import itertools
import random

from mixture_sources import MOST_CHARACTERS, Rows, Source

from layerskip import LayerSkipModel

MODEL = "smollm2-135m"
QUESTIONS = 3400
MAX_NEW_TOKENS = 160  # answers that are longer are left out
BATCH = 32
FORMS = (
    "What is {}?",
    "Explain {} in one sentence.",
    "Explain {} to a child in two sentences.",
    "Why does {} matter? Answer briefly.",
    "Give me three short facts about {}.",
    "Name three things that have to do with {}.",
    "Write one friendly sentence about {}.",
    "Write a two-line poem about {}.",
    "How would you describe {} to somebody who never heard of it?",
    "What should a beginner know about {}? Keep it short.",
    "Give one tip for people who are interested in {}.",
    "Is {} something new or something old? Say why in one sentence.",
    "Ask me a question about {}.",
    "What is a common mistake people make with {}?",
    "Give a title for an article about {}.",
    "Which jobs have to do with {}?",
    "Hi! Can you tell me something about {}?",
    "I have to write a paragraph about {}. How should it begin?",
    "Compare {} and {} in one sentence.",
    "Which is older, {} or {}?",
    "Write a short email to a friend about {}.",
    "Make a list of four words that go with {}.",
)
_TOPICS = """
bread, rain, bicycles, volcanoes, honey, chess, glass, libraries, tides, coffee, bridges, paper,
maps, penguins, snow, trains, clocks, football, rice, music, the moon, batteries, lighthouses,
cats, gardening, salt, the sea, democracy, photography, gravity, swimming, tea, the alphabet,
earthquakes, markets, vaccines, sleep, friendship, deserts, cheese, rockets, bees, castles, the
heart, electricity, dictionaries, forests, money, painting, bananas, computers, cooking, the
weather, whales, mountains, running, wool, telescopes, rivers, Paris, Japan, Africa, the Roman
Empire, the Olympic Games, programming, the internet, recycling, kindness, autumn, a library, a
compiler, photosynthesis, evolution, the printing press, an orchestra, a healthy breakfast,
probability, a budget, public transport, a school garden, solar power, history, London, India,
Brazil, the United States, the Great Wall, the Second World War, the French language, poetry, the
theatre, jazz, the guitar, dinosaurs, spiders, horses, elephants, roses, oak trees, the desert fox,
clouds, thunder, winter, the sun, Mars, black holes, atoms, oxygen, iron, gold, diamonds, plastic,
the brain, blood, teeth, a fever, running shoes, tennis, basketball, yoga, breakfast, pizza, soup,
chocolate, apples, tomatoes, a birthday party, a wedding, travel, hotels, airports, cars, ships,
taxes, banks, a job interview, teamwork, time management, homework, mathematics, geometry, prime
numbers, algorithms, databases, passwords, robots, video games, smartphones, newspapers, elections,
laws, human rights, happiness, fear, courage, honesty, dreams
"""
TOPICS = " ".join(_TOPICS.split()).split(", ")


def own_answers(data: str | None = None, questions: int = QUESTIONS) -> tuple[Rows, Rows]:
    """Questions with the greedy answers that end by themselves; nothing is held back.

    Args:
        data: not used; the questions stand above.
        questions: how many to ask.
    """
    model = LayerSkipModel.from_pretrained(MODEL)
    asked = [[{"role": "user", "content": text}] for text in random_questions(questions)]
    rows: Rows = []
    for start in range(0, len(asked), BATCH):
        chats = asked[start : start + BATCH]
        prompts = [model.tokenize(chat) for chat in chats]
        answers = model.generate(prompts, mode="plain", max_new_tokens=MAX_NEW_TOKENS)
        for chat, answer in zip(chats, answers, strict=True):
            text = answer.text.strip()
            if answer.finish_reason == "stop" and 0 < len(text) <= MOST_CHARACTERS:
                rows.append({"messages": [*chat, {"role": "assistant", "content": text}]})
    return rows, []


def random_questions(number: int) -> list[str]:
    """Forms and topics put together, each question once, the same ones every time."""
    pairs = list(itertools.product(FORMS, TOPICS))
    chance = random.Random(0)
    chosen = chance.sample(pairs, min(number, len(pairs)))
    return [form.format(topic, chance.choice(TOPICS)) for form, topic in chosen]


SOURCE = Source(
    "SmolLM2-135M-Instruct's own answers to everyday questions", "Apache-2.0", own_answers
)
