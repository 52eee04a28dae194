"""The engine, whose answers can be held and made to fail."""

import dataclasses
import threading

from layerskip.serve.engine import Engine, Handle, Tokens


def broken_mask(*arguments):
    raise RuntimeError("/a/secret/path is broken")


class HeldEngine(Engine):
    """See `Engine`.

    Attributes:
        resumed: while it is not set, no answer goes on.
        fail: the next request fails.
    """

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.resumed, self.fail = threading.Event(), False
        self.resumed.set()

    def submit(self, request, on_event):
        cancelled = threading.Event()

        def held(event):
            while isinstance(event, Tokens) and not cancelled.is_set():
                if self.resumed.wait(0.01):
                    break
            on_event(event)

        if self.fail:
            self.fail = False
            request = dataclasses.replace(request, logits_mask=broken_mask)
        handle = super().submit(request, held)

        def cancel():
            cancelled.set()
            handle.cancel()

        return Handle(handle.request_id, cancel)
