"""Which of `tiny_models.CASES` are exported, and which of them to GGUF."""

from layerskip.export import source
from tiny_models import CASES

EXPORTED = [case for case, (kind, _) in CASES.items() if kind in source.FAMILIES]
MIXED = ["qwen2-sliding", "qwen3-sliding"]  # windows that differ between layers
WRITTEN = [
    case for case in EXPORTED if case not in (*MIXED, "llama-yarn")
]  # its magnitude has no field
