import pytest
import yaml

from layerskip.training import TrainConfig
from layerskip.training.config import read_settings

NEEDED = {"model": "m", "data": "d", "output": "o"}


def make(**values):
    return TrainConfig.from_mapping({**NEEDED, **values})


def test_flat_names_reach_the_recipe():
    config = make(regime="task", p_max="0.1", fixed_exits="4, 8", seed=3)
    assert config.recipe.p_max == 0.1
    assert config.recipe.fixed_exits == (4, 8)
    assert config.recipe.curriculum == "gradual"
    assert config.recipe.seed == config.seed == 3
    assert config.effective_learning_rate == 1e-4


def test_the_learning_rate_is_the_regime_s():
    rates = {"pretrain": 8e-4, "continual": 3e-5, "domain": 1e-4, "task": 1e-4}
    assert {name: make(regime=name).effective_learning_rate for name in rates} == rates
    assert make(regime="task", learning_rate=0.5).effective_learning_rate == 0.5


def test_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: m\ndata: d\noutput: o\nlearning-rate: 1e-4\nexits: [2, 4]\ncompile: true\n"
    )
    config = TrainConfig.from_yaml(path, output="other", data=None)
    assert (config.learning_rate, config.output, config.data) == (1e-4, "other", "d")
    assert config.compile
    assert config.recipe.exits == (2, 4)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="name: value"):
        TrainConfig.from_yaml(path)
    for content, message in (
        (b"a: [", r"a\.yaml is not YAML"),
        ("model: m".encode("utf-16"), r"a\.yaml is not YAML"),
        (b"seed: 2024-13-45", r"a\.yaml is not YAML"),
        (b"model: " + b"[" * 3000, r"a\.yaml is nested too deeply"),
        (b"1: x", "there is no setting '1'"),
        (b"model: m", "data, output must be given"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            TrainConfig.from_yaml(path)
        assert "\n" not in str(error.value)


def test_an_older_name_of_a_setting(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: m\ndata: d\noutput: o\nkeep-draft-text: true\n")
    assert TrainConfig.from_yaml(path) == make(keep_draft_text=True) == make(keep_datastore=True)
    assert TrainConfig(**NEEDED, keep_draft_text=True).keep_datastore
    assert not TrainConfig.from_yaml(path, keep_datastore=False).keep_datastore


def test_flat_dict_makes_the_same_configuration():
    config = make(regime="domain", fixed_exits=[3], lora_rank=2)
    assert TrainConfig.from_mapping(config.as_flat_dict()) == config


def test_bad_values():
    for values, message in (
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"exits": True}, "exits is True, not a list of numbers"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', not a value of float"),
        ({"max_steps": 1.5}, "max_steps is 1.5, not a value of int"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1; it must be in 0 to 4294967295"),
        ({"compile": "perhaps"}, "compile is 'perhaps', not a value of bool"),
        ({"precision": "int1"}, "precision is 'int1'; it can be 'float32'"),
        ({"learning_rte": 1}, "no setting 'learning_rte'; did you mean 'learning_rate'"),
        ({"eval_data": "x", "eval_rows": 3}, "contradict"),
        ({"eval_exits": [2]}, "eval_exits needs rows to evaluate on"),
        ({"eval_split": "test"}, "eval_split needs eval_data"),
        ({"max_steps": 9, "epochs": 3}, "epochs and max_steps both say when to end"),
        ({"variant": "LD", "fixed_exits": [2]}, "variant LD gives no exit a loss"),
        ({"from_scratch": True, "lora_rank": 3}, "contradict"),
        ({"lora_alpha": 3}, "needs lora_rank"),
        ({"p_max": 2}, "p_max is 2"),
        ({"batch_size": True}, "batch_size is True, not a value of int"),
        ({"prompt_form": "a command"}, "prompt_form and prompt_example need each other"),
        ({"prompt_form": "a\nb", "prompt_example": "x"}, "one line of text"),
        ({"data": ["a", "b"]}, r"data is \['a', 'b'\], not a value of str"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**values)


def test_the_seed_is_that_of_the_skipped_rows_too():
    config = TrainConfig(model="m", data="d", output="o", seed=7)
    assert config.effective_recipe.seed == config.as_flat_dict()["seed"] == 7
    assert make(seed=7).effective_recipe.seed == 7


def test_a_flag_goes_before_what_contradicts_it_in_a_file(tmp_path):
    for lines, flags, expected in (
        ("max-steps: 1000", {"epochs": 3}, {"max_steps": None, "epochs": 3}),
        ("epochs: 3", {"max_steps": 9}, {"max_steps": 9, "epochs": None}),
        ("eval_rows: 9", {"eval_data": "x"}, {"eval_rows": 0, "eval_data": "x"}),
        (
            "eval_data: x\neval_split: test",
            {"eval_rows": 9},
            {"eval_rows": 9, "eval_data": None, "eval_split": None},
        ),
        ("eval_data: x\neval_split: test", {"eval_data": "y"}, {"eval_split": "test"}),
        ("exits: [4, 8]", {"exit_every": 2}, {"exits": None, "exit_every": 2}),
        ("exit_every: 2", {"exits": "4,8"}, {"exits": (4, 8), "exit_every": 1}),
    ):
        file = tmp_path / "run.yaml"
        file.write_text(f"model: m\ndata: d\noutput: o\n{lines}\n")
        found = TrainConfig.from_yaml(file, **flags).as_flat_dict()
        assert {name: found[name] for name in expected} == expected


def test_a_home_folder_is_spelled_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = make(model="~/model", output="~/out")
    assert (config.model, config.output) == ("/home/somebody/model", "/home/somebody/out")


def test_a_yaml_file_that_is_too_long_is_refused(tmp_path):
    file = tmp_path / "long.yaml"
    file.write_text("#" * 2**20 + "\nmodel: x\n")
    with pytest.raises(ValueError, match=r"long\.yaml is not YAML: it has more than 1,048,576"):
        read_settings(file)


def test_aliases_of_yaml_make_no_long_message():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    values = yaml.safe_load("\n".join(lines))
    for name in ("exits", "seed"):
        with pytest.raises(ValueError, match=f"^{name} is \\[") as caught:
            make(**{name: values["a29"]})
        assert len(str(caught.value)) < 500
