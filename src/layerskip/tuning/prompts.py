"""Prompts to tune on where the user names none: short and of many kinds, in the project's own words."""

PROMPTS = (
    "Name three rivers in Europe and say where each of them ends.",
    "Write a Python function that counts the vowels in a text.",
    "Explain in two sentences why the sky is blue.",
    "Summarize in one sentence: The library opens at nine. On Sundays it is closed. Books may be"
    " kept for three weeks, and longer if nobody else has asked for them.",
    "List five things to check before a long bicycle tour.",
    "Translate into French: Where is the nearest railway station?",
    "A train leaves at 14:35 and arrives at 17:10. How long does the journey take?",
    "Write a JSON object that describes a book with title, author, year and two keywords.",
    "What is the difference between a virus and a bacterium?",
    "Rewrite politely: Send me the report now.",
    "Write an SQL query that returns the ten customers with the highest total of orders.",
    "Give me a recipe for a simple tomato soup.",
    "Write the first paragraph of a story that is set in a lighthouse.",
    "Extract the names of persons and places: Marie met Paul in Lisbon before she left for Oslo.",
    "Explain to a child how a bill becomes a law.",
    "Write a shell command that finds all files above 100 MB in a folder.",
    "What are the advantages and disadvantages of working from home?",
    "Write a short e-mail that asks a landlord to repair the heating.",
    "Is this review positive or negative, and why? The screen is bright, but the battery is empty"
    " by noon.",
    "Solve for x: 3x + 7 = 25. Show each step.",
)
