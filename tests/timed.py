"""A scripted decoder with a scripted clock, which its passes move."""

import scripted

from layerskip.decoding import language_model
from layerskip.tune import costs


class TimedDecoder(scripted.ScriptedDecoder):
    """Layers and head take seconds of a clock that nothing else moves.

    Args:
        layer: seconds of a layer over one position.
        row: seconds of a layer for each further position.
        context: seconds of a layer for each committed token.
        head: seconds of the head, for any number of positions.
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
        """Replace the clock of answers and of measured costs with this one."""
        for module in (costs, language_model):
            monkeypatch.setattr(module, "device_clock", lambda device: lambda: self.now)
