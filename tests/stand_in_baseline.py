"""Stand-in for a baseline, whose prompt tells it how to fail."""

import os
import sys

from layerskip.bench.measure import Run
from layerskip.decoding import Step

FAIL, CRASH = 7, 8


class Engine:
    def __init__(self, job):
        sys.stdout.write("chatter\n")
        os.write(1, b"chatter from below\n")
        if job.context == FAIL:
            raise RuntimeError("cannot\nload this")
        if job.context == CRASH:
            os._exit(9)
        self.job = job

    def answer(self, setting, prompt, max_new_tokens):
        sys.stdout.write("more chatter\n")
        if prompt[0] == FAIL:
            raise KeyError("no such thing")
        if prompt[0] == CRASH:
            os.write(2, b"first words\nfatal: out of luck\n")
            os._exit(3)
        steps = (Step((prompt[0],)), Step((max_new_tokens, len(self.job.settings))))
        return Run(steps=steps, text=setting.mode, ttft_s=0.5, decode_s=0.25, peak_memory_bytes=1)
