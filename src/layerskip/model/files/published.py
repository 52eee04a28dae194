"""The checkpoints that the paper's authors published, and where they exit best, as far as is known.

Their files name no exit layer. Sources: the paper (arXiv 2404.16710), its tables for summarization on
CNN/DM; and the article on these checkpoints at huggingface.co/blog/layerskip, which gives an exit layer
for summarization and no draft length.
"""

import dataclasses

from layerskip.model.files.settings import Settings

# An exit layer E and a draft length d, as far as a source gives them.
PUBLISHED = {
    "facebook/layerskip-llama2-7B": Settings(exit_layer=8, draft_tokens=12),  # the paper
    "facebook/layerskip-llama2-13B": Settings(exit_layer=15, draft_tokens=12),  # the paper
    "facebook/layerskip-llama2-70B": Settings(exit_layer=10),  # the article
    "facebook/layerskip-codellama-7B": Settings(),
    "facebook/layerskip-codellama-34B": Settings(),
    "facebook/layerskip-llama3-8B": Settings(exit_layer=4),  # the article
    "facebook/layerskip-llama3.2-1B": Settings(exit_layer=4),  # the article
}


def with_defaults(name: str, settings: Settings) -> Settings:
    """A checkpoint's settings; what they leave open of a published one is filled in.

    Args:
        name: what the checkpoint was loaded by; only a hub id of `PUBLISHED` changes anything.
        settings: what its own files say.
    """
    known = PUBLISHED.get(name)
    if known is None or settings.exit_layer is not None:
        return settings
    draft_tokens = settings.draft_tokens or known.draft_tokens
    return dataclasses.replace(settings, exit_layer=known.exit_layer, draft_tokens=draft_tokens)
