"""Cases of `tiny_models.CASES` that are exported: one for each mechanism."""

WRITTEN = [
    "llama2",
    "llama3.2",  # tied head, scaled rotary embedding
    "llama-linear",
    "llama-biases",
    "llama-mqa",
    "llama-narrow-heads",
    "mistral",
    "mistral-unlimited",
    "qwen2-tied",
    "qwen3",
]
