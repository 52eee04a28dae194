from layerskip import figures as plots

LOGS = [
    {"step": 10, "loss": 2.5, "loss_exit_2": 3.0, "accuracy_exit_2": 0.1},
    {"step": 10, "eval_loss_exit_2": 2.9, "eval_accuracy_exit_2": 0.2, "eval_accuracy_exit_4": 0.3},
    {"step": 20, "loss": 1.5, "loss_exit_4": 1.0, "loss_exit_2": 2.0, "accuracy_exit_2": 0.4},
    {"step": 20, "eval_loss_exit_2": 1.9, "eval_accuracy_exit_2": 0.5, "eval_accuracy_exit_4": 0.6},
]


def drawn(logs, tmp_path, monkeypatch):
    """Of each line: its label, where it has one of its own, and its points."""
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    names = [path.name for path in plots.plot_run(logs, tmp_path)]
    assert names == ["loss_per_exit.png", "accuracy_over_layers.png"]
    lines = [
        [(one.get_label(), one.get_xydata().tolist()) for one in f.axes[0].lines] for f in figures
    ]
    return lines[0], lines[1][0][1]


def test_every_exit_has_its_steps_and_values():
    assert plots.exit_series(LOGS, "loss") == {2: ([10, 20], [3.0, 2.0]), 4: ([20], [1.0])}
    assert plots.exit_series(LOGS, "eval_loss") == {2: ([10, 20], [2.9, 1.9])}
    assert plots.exit_series(LOGS, "accuracy") == {2: ([10, 20], [0.1, 0.4])}


def test_what_is_drawn_is_the_loss_over_steps_and_the_last_evaluation(tmp_path, monkeypatch):
    losses, accuracies = drawn(LOGS, tmp_path, monkeypatch)
    assert losses == [("exit 2", [[10, 3.0], [20, 2.0]]), ("exit 4", [[20, 1.0]])]
    assert accuracies == [[2, 0.5], [4, 0.6]]


def test_without_an_evaluation_it_is_the_accuracy_in_training(tmp_path, monkeypatch):
    _, accuracies = drawn(LOGS[::2], tmp_path, monkeypatch)
    assert accuracies == [[2, 0.4]]
