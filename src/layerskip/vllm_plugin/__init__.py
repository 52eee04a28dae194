"""vLLM plugin: the speculative method "layerskip" drafts with the target's own first layers.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
Nothing of the package outside this folder is imported.
"""

import logging


def register() -> None:
    """Make vLLM accept `{"method": "layerskip"}`; a failure is logged and leaves vLLM as it is."""
    try:
        from layerskip.vllm_plugin.hooks import install

        install()
    except Exception as error:
        logging.getLogger("vllm.layerskip").warning(
            "layerskip: plugin not loaded, vLLM runs without it: %s: %s",
            type(error).__name__,
            error,
        )
