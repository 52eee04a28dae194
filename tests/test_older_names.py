"""Python names until 0.1."""

from layerskip import decoding, tuning
from layerskip.lens.lens import Agreement


def test_names_of_decoding():
    assert decoding.Prefix is decoding.PrefixCache
    assert decoding.walk_exits is decoding.iter_exit_hidden_states


def test_tuning(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tuning._tune, "tune", lambda *given, **options: calls.append((given, options))
    )
    tuning.tune("model", ["a", "b"], exits=[2, 3], max_new_tokens=4)
    tuning.tune("model", ["a", "b"])
    assert calls == [
        (("model", ["a", "b"]), {"exit_layers": (2, 3), "max_new_tokens": 4}),
        (("model", ["a", "b"]), {"exit_layers": ()}),
    ]


def test_lens_names():
    total = Agreement(exits=(2, 4), prompts=1, positions=4, agreeing=(3, 4), saturating=(3, 1))
    assert total.settled_by == total.saturated_by == [3 / 4, 1]
    assert total.mean_settled_layer == total.mean_saturation_layer == 2.5
