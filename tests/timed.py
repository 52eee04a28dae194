"""A machine whose times are written down: the scripted decoder moves its own clock."""

import scripted

from layerskip.decoding import answer
from layerskip.tune import costs


class TimedDecoder(scripted.ScriptedDecoder):
    """Layers and head take seconds of a clock that nothing else moves.

    Args:
        layer: seconds of a layer over one position.
        row: of a layer, for every further position.
        context: of a layer, for every settled token.
        head: of the head, however many positions.
    """

    def __init__(self, answer, *, layer=1.0, row=0.0, context=0.0, head=0.5, **script):
        super().__init__(answer, **script)
        self.now = 0.0
        self.layer_s, self.row_s, self.context_s, self.head_s = layer, row, context, head

    def run(self, hidden, start, stop, cache):
        a_layer = self.layer_s + self.row_s * (hidden.shape[1] - 1)
        self.now += (stop - start) * (a_layer + self.context_s * int(cache.lengths[0]))
        return super().run(hidden, start, stop, cache)

    def logits(self, hidden):
        self.now += self.head_s
        return super().logits(hidden)

    def keep_time(self, monkeypatch):
        """Make this the clock of everything that is timed."""
        for module in (costs, answer):
            monkeypatch.setattr(module, "device_clock", lambda device: lambda: self.now)
