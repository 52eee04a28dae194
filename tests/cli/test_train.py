"""`layerskip train` in this process, on the tiny checkpoint."""

import io
import json
from types import SimpleNamespace

import pytest

from layerskip.cli.train import TrainProgress
from layerskip.training import LayerSkipTrainer, Progress

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def train(program, folder, tmp_path):
    """Train a few steps: (exit status, stdout, stderr)."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(9)))

    def call(*arguments):
        return program(
            *("train", "--model", folder, "--data", data, "--output", tmp_path / "out"),
            *("--rotation", 2, "--max-steps", 4, "--batch-size", 2, "--log-steps", 2),
            *("--device", "cpu", *arguments),
        )

    return call


def test_json_is_all_there_is_on_stdout(train, tmp_path):
    status, out, err = train("--json", "--eval-rows", 3)
    assert status == 0, err
    result = json.loads(out)
    assert (result["output"], result["steps"]) == (str(tmp_path / "out"), 4)
    assert "eval_loss_exit_1" in result["metrics"]
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 2/4",
        "step 4/4",
        "step 4/4",
        "step 4/4",
    ]
    assert "loss" in lines[0]
    assert "learning_rate" in lines[0]
    assert "eval exit 1 " in err


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with TrainProgress(is_shown=True) as progress:
        progress(Progress(step=3, total_steps=4, logs={"loss": 0.5}))
    assert "step 3/4: loss 0.5" in terminal.getvalue()
    assert "training" in terminal.getvalue()
    assert "3/4" in terminal.getvalue().replace("step 3/4", "")


@pytest.fixture
def trained(monkeypatch):
    """Replace the training itself; returns the list of settings that it is called with."""
    calls = []

    def train(config, progress):
        calls.append(config)
        return SimpleNamespace(output="out", steps=4, exit_layer=2, metrics={}, url=None)

    monkeypatch.setattr("layerskip.cli.train.train", train)
    return calls


@pytest.mark.usefixtures("trained")
def test_flags_without_effect_are_said(train):
    for arguments, said in (
        (("--regime", "task"), ["--rotation has no effect with --curriculum gradual"]),
        (
            ("--variant", "LD", "--e-scale", 2),
            [f"--{name} has no effect with --variant LD" for name in ("rotation", "e-scale")],
        ),
        (
            ("--variant", "EE", "--p-max", 0.1, "--regime", "task"),
            [
                "--rotation has no effect with --curriculum gradual",
                "--p-max has no effect with --variant EE",
            ],
        ),
        (
            ("--p-max", 0, "--dropout-every", 2, "--exit-weighting", "equal", "--e-scale", 2),
            [
                "--dropout-every has no effect with --p-max 0",
                "--e-scale has no effect with --exit-weighting equal",
            ],
        ),
        (
            ("--curriculum", "none", "--exits", "2,3"),
            [f"--{name} has no effect with --curriculum none" for name in ("rotation", "exits")],
        ),
        ((), []),
    ):
        status, _, err = train(*arguments)
        assert status == 0, err
        assert [line for line in err.splitlines() if "no effect" in line] == [
            f"layerskip: {line}" for line in said
        ]


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("is_control", [False, True])
def test_settings_of_a_file_without_effect_are_said(train, tmp_path, is_control):
    """Only flags are reported where they turn off parts that the file has settings for."""
    config = tmp_path / "a.yaml"
    first = "rotational" if is_control else "none"
    config.write_text(f"curriculum: {first}\nexits: [2, 3]\n")
    flags = ("--curriculum", "none", "--p-max", 0) if is_control else ()
    status, _, err = train(config, *flags)
    assert status == 0, err
    said = [line for line in err.splitlines() if "no effect" in line]
    names = ("rotation",) if is_control else ("rotation", "exits")  # the first is a flag here
    assert said == [f"layerskip: --{n} has no effect with --curriculum none" for n in names]


@pytest.mark.usefixtures("trained")
def test_only_the_first_process_prints(train, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    status, out, _ = train("--json")
    assert (status, out) == (0, "")


def test_flags_go_before_yaml(train, trained, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("epochs: 3\nfixed-exits: [2]\np_max: 0.3\n")
    status, out, _ = train(config, "--p-max", 0.2)
    assert status == 0
    assert out == "out: 4 steps, exit layer 2\n"
    used = trained[0].as_flat_dict()
    assert (used["p_max"], used["fixed_exits"]) == (0.2, (2,))
    assert (used["epochs"], used["max_steps"]) == (None, 4)  # which contradict each other


def test_ctrl_c_names_the_checkpoint_to_go_on_from(train, raise_at, tmp_path):
    raise_at(LayerSkipTrainer, "training_step", 4, KeyboardInterrupt)
    status, out, err = train("--save-steps", 2)
    assert (status, out) == (130, "")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert [line for line in err.splitlines() if line][-2:] == [
        f"layerskip: the last good checkpoint is {checkpoint}; --resume goes on",
        "layerskip: interrupted",
    ]
    status, out, _ = train("--save-steps", 2, "--resume")
    assert (status, out) == (0, f"{tmp_path / 'out'}: 4 steps, exit layer 2\n")


def test_generate_runs_the_result(train, program, tmp_path):
    assert train("--lora-rank", 2)[0] == 0
    asked = ("--prompt", "1+1=", "--max-new-tokens", 4, "--ignore-eos", "--json")
    how = ("--mode", "self-speculative", "--no-compile", "--dtype", "float32")
    status, out, err = program("generate", "--model", tmp_path / "out", *asked, *how)
    assert status == 0, err
    answer = json.loads(out)
    assert (answer["exit_layer"], answer["new_tokens"]) == (2, 4)
    plain = program("generate", "--model", tmp_path / "out", *asked, *how[2:], "--mode", "plain")[1]
    assert json.loads(plain)["token_ids"] == answer["token_ids"]


def test_bad_input_is_one_line(train, tmp_path):
    for arguments, status, message in (
        (("--learning-rate", "nan"), 2, "learning_rate is nan"),
        (("--learning-rate", "fast"), 2, "'fast' is not a valid float"),
        (("--epochs", 3), 2, "epochs and max_steps both say when to end"),
        (
            ("--exits", "1,2", "--exit-layer", 3),
            1,
            "exit_layer is 3, but the exits that have a loss are 2",
        ),
        (("--rotation", 5), 1, "rotation is 5, but there are 4 exits"),
        (("--completion", "{answer}"), 1, "rows.jsonl:1 has the fields ['completion', 'prompt']"),
        (("--regime", "best"), 2, "'best' is not one of"),
        (("--speed", 2), 2, "No such option"),
    ):
        done = train(*arguments)
        assert done[:2] == (status, "")
        assert done[2].count("\n") == 1
        assert message in done[2]
        assert not (tmp_path / "out" / "checkpoint-4").exists()
