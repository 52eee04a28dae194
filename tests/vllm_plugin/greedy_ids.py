"""Write the greedy token ids, accepted draft tokens and proposer's class of several engines.

python greedy_ids.py '[[{engine options}, ...], [[prompt token ids], ...]]' [--break-plugin]
"""

import json
import sys


def main():
    if "--break-plugin" in sys.argv:
        sys.modules["layerskip.vllm_plugin.hooks"] = None  # importing it fails
    from vllm import LLM, SamplingParams

    engines, prompts = json.loads(sys.argv[1])
    results = []
    for options in engines:
        engine = LLM(**options)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=24, detokenize=False),
            use_tqdm=False,
        )
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        proposer = engine.collective_rpc(proposer_class)[0]
        accepted = sum(
            metric.value
            for metric in engine.get_metrics()
            if metric.name == "vllm:spec_decode_num_accepted_tokens"
        )
        results.append({"token_ids": token_ids, "accepted": accepted, "proposer": proposer})
        del engine
    sys.stdout.write("\n" + json.dumps(results) + "\n")


def proposer_class(worker):
    return type(getattr(worker.model_runner, "drafter", None)).__name__


if __name__ == "__main__":
    main()
