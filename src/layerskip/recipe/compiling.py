"""What torch.compile leaves alone: it compiles the model's own layers, not what goes on between them.

Compiled too, the recipe's code would be compiled anew for every layer, draw and step, until
torch.compile gives up and runs all of it, layers included, as it stands.
"""

import functools
from typing import Any

import torch

not_compiled: Any = torch.compiler.disable  # torch leaves it untyped
# The function runs as it stands, and what it calls may be compiled again.
compiled_below: Any = functools.partial(torch.compiler.disable, recursive=False)
