"""Task files of lm-evaluation-harness with local data: a choice, a text to rate, an answer to write,
and one to rate."""

import json

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
RATING = """
task: tiny_rating
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
TOLD = """
task: told_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
ROWS = [
    {"question": "Is water wet?", "choices": ["yes", "no", "sometimes"], "answer": 0},
    {"question": "Is the moon a cheese, and if not, why?", "choices": ["a", "b"], "answer": 1},
    {"question": "Which number comes after seven?", "choices": ["eight", "six"], "answer": 0},
    {"question": "Do fish fly?", "choices": ["yes", "no"], "answer": 1},
]


def write(folder):
    """Write the task files and their data."""
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    texts = {"choice": CHOICE, "writing": WRITING, "rating": RATING, "told": TOLD}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data, cache=folder / "cache"))
    return folder
