import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import causal_lms
from layerskip.recipe import RecipeConfig, attach
from layerskip.recipe.exit_loss import ExitLosses
from layerskip.training import LayerSkipMixin, LayerSkipTrainer, RecipeCallback, callbacks
from layerskip.training.callbacks import check_sharding
from layerskip.training.data import Collator
from layerskip.training.trainer import ExitTotals
from trainer_setup import arguments, rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
RECIPE = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.0)


def trainer_of(kind, model_folder, folder, recipe=RECIPE, **changes):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return kind(
        model=model,
        args=arguments(folder, **changes),
        data_collator=Collator(0),
        train_dataset=rows(),
        eval_dataset=rows(10),
        **({} if kind is Trainer else {"recipe": recipe}),
    )


def test_accumulation_gives_the_same_steps(model_folder, tmp_path):
    norms = []
    for batch, accumulation in ((32, 1), (8, 4)):
        trainer = trainer_of(
            LayerSkipTrainer,
            model_folder,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        norms.append([(log["loss"], log["grad_norm"], log["loss_exit_2"]) for log in logs])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-5)


def test_the_curriculum_counts_optimizer_steps(model_folder, tmp_path):
    recipe = RecipeConfig(rotation=3, exit_weighting="equal", p_max=0.3)
    seen = []
    trainer = trainer_of(
        LayerSkipTrainer,
        model_folder,
        tmp_path,
        recipe,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    plain = trainer.compute_loss

    def watched(*args, **kwargs):
        loss = plain(*args, **kwargs)
        if trainer.model.training:
            seen.append((tuple(trainer.attached.last.exits), trainer.attached._micro_batch))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    exits = [(1, 4), (2, 4), (3, 4), (1, 4)]
    assert seen == [(e, micro) for e in exits for micro in (1, 2)]


def test_totals_are_those_of_all_batches():
    totals = ExitTotals(4, torch.device("cpu"))
    none = torch.zeros(2)
    for tokens, exits, loss_sums, correct in (
        (10, (2, 4), [20.0, 5.0], [3, 9]),
        (30, (3, 4), [60.0, 15.0], [6, 21]),
    ):
        totals.add(
            ExitLosses(
                torch.tensor(0.0),
                exits,
                torch.tensor(loss_sums),
                torch.tensor(correct),
                none,
                tokens,
            )
        )
    assert totals.take(lambda sums: sums) == {2: (2.0, 0.3), 3: (2.0, 0.2), 4: (0.5, 0.75)}
    assert totals.take(lambda sums: sums) == {}


def test_evaluation_reports_every_exit_of_all_tokens(model_folder, tmp_path):
    trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert {f"eval_loss_exit_{e}" for e in (1, 2, 3, 4)} <= {*metrics}
    plain = trainer_of(Trainer, model_folder, tmp_path, per_device_eval_batch_size=10).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert metrics["eval_loss_exit_1"] != metrics["eval_loss_exit_4"]
    trainer.args.prediction_loss_only = False
    trainer.compute_metrics = lambda prediction: {"accuracy": -1.0}
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == -1.0
    assert "eval_accuracy_exit_4" in metrics


def test_a_plain_trainer_with_the_callback_does_the_same(model_folder, tmp_path):
    ours = trainer_of(LayerSkipTrainer, model_folder, tmp_path)
    ours.train()
    plain = trainer_of(Trainer, model_folder, tmp_path)
    plain.add_callback(RecipeCallback(attach(plain.model, RECIPE)))
    plain.train()
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("max_steps", [4, 30])
def test_rows_that_teach_nothing_end_the_run(model_folder, tmp_path, max_steps):
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in rows()]
    trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path, max_steps=max_steps)
    trainer.train_dataset = ignored
    with pytest.raises(ValueError, match=f"the first {min(10, max_steps)} steps had a label"):
        trainer.train()
    trainer.train_dataset = ignored[:2] + rows()[:4]
    trainer.train()


def test_rows_may_be_embeddings(model_folder, tmp_path):
    losses = []
    for embedded in (False, True):
        trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path, max_steps=1)
        embed = trainer.model.get_input_embeddings()

        def collate(batch, embed=embed, embedded=embedded):
            made = Collator(0)(batch)
            if embedded:
                made["inputs_embeds"] = embed(made.pop("input_ids")).detach()
            return made

        trainer.data_collator = collate
        trainer.train()
        log = next(log for log in trainer.state.log_history if "loss" in log)
        assert log["tokens_per_s"] > 0
        losses.append((log["loss"], log["loss_exit_2"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_group_by_length_is_ours(model_folder, tmp_path):
    from datasets import Dataset

    trainer = trainer_of(
        LayerSkipTrainer, model_folder, tmp_path, train_sampling_strategy="group_by_length"
    )
    for dataset in (Dataset.from_list(rows()), rows()):
        trainer.train_dataset = dataset
        sampler = trainer._get_train_sampler()
        assert sorted(sampler) == list(range(len(rows())))
    trainer.train()


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_a_plain_trainer_that_computes_another_loss_is_refused(how, model_folder, tmp_path):
    plain = trainer_of(Trainer, model_folder, tmp_path)
    plain.add_callback(RecipeCallback(attach(plain.model, RECIPE)))
    if how == "compute_loss_func":
        plain.compute_loss_func = lambda outputs, labels, **_: outputs.logits.float().mean()
    else:
        plain.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=how):
        plain.train()


def test_arguments_are_checked(model_folder, tmp_path):
    def made():
        return AutoModelForCausalLM.from_pretrained(model_folder)

    options = {"args": arguments(tmp_path), "recipe": RECIPE}
    with pytest.raises(ValueError, match="model_init would make a model without the recipe"):
        LayerSkipTrainer(model_init=made, **options)
    with pytest.raises(ValueError, match=r"eval_exits names \[5\]"):
        LayerSkipTrainer(model=made(), eval_exits=[5], **options)
    best = {"metric_for_best_model": "eval_loss_exit_2"}
    with pytest.raises(ValueError, match="set greater_is_better=False"):
        trainer_of(LayerSkipTrainer, model_folder, tmp_path, **best)
    recipe = RecipeConfig(rotation=1, exits=(3,), fixed_exits=(2,), exit_weighting="equal")
    trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path, recipe)
    assert {2, 3} < set(trainer.eval_exits)


@pytest.mark.filterwarnings("ignore")  # of TRL and its dependencies
def test_the_mixin_gives_trl_the_recipe(model_folder, tmp_path):
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    class Mine(LayerSkipMixin, trl.SFTTrainer):
        pass

    data = Dataset.from_list(
        [{"prompt": f"{a} plus 1 is", "completion": f" {a + 1}"} for a in range(16)]
    )
    trainer = Mine(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            prediction_loss_only=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        recipe=RecipeConfig(curriculum="all", p_max=0.3),
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 2
    assert "loss_exit_2" in logged[0]
    weights = trainer.attached.exit_weights
    mean = sum(w * logged[0][f"loss_exit_{e}"] for e, w in weights.items())
    assert logged[0]["loss"] == pytest.approx(mean, rel=1e-3)
    assert "eval_loss_exit_2" in trainer.evaluate()


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def test_evaluations_and_saving_are_no_time_of_training(model_folder, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)

    def slowed(name, seconds):
        plain = getattr(LayerSkipTrainer, name)

        def call(self, *args, **kwargs):
            clock.now += seconds
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(LayerSkipTrainer, name, call)

    slowed("training_step", 1)
    slowed("prediction_step", 100)
    slowed("save_model", 100)
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path, **often)
    clock.now += 1000
    trainer.train()
    rates = [log["tokens_per_s"] for log in trainer.state.log_history if "loss" in log]
    batches = [Collator(0)(rows()[4 * step : 4 * step + 4]) for step in range(4)]
    assert rates == [batch["input_ids"].numel() for batch in batches]


def test_rows_without_labels_are_refused(model_folder, tmp_path):
    trainer = trainer_of(LayerSkipTrainer, model_folder, tmp_path)
    trainer.data_collator = lambda batch: {"input_ids": Collator(0)(batch)["input_ids"]}
    with pytest.raises(ValueError, match="the batch has no labels"):
        trainer.train()


def test_checkpoints_are_pushed_from_their_place(model_folder, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda trainer, folder: pushed.append((folder, Path(folder, "model.safetensors").exists())),
    )
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: None)
    often = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True}
    trainer_of(LayerSkipTrainer, model_folder, tmp_path, **often).train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (2, 4)]


def test_sharding_without_whole_weights_is_refused():
    for plugins, message in (
        ({"fsdp": 1}, "set fsdp_version: 2"),
        ({"tp": 2}, "tensor, context and sequence parallelism"),
        ({"regional": True}, "regional compilation runs a copy"),
        ({"fsdp": 2, "fp16": True}, "use bfloat16"),
        ({"stage": 2, "fp16": True}, "use bfloat16"),
        ({"fsdp": 2}, None),
        ({"stage": 2}, None),
        ({"fp16": True}, None),
    ):
        fsdp, stage = plugins.get("fsdp"), plugins.get("stage")
        state = SimpleNamespace(
            fsdp_plugin=fsdp and SimpleNamespace(fsdp_version=fsdp),
            dynamo_plugin=SimpleNamespace(use_regional_compilation=plugins.get("regional", False)),
        )
        parallel = SimpleNamespace(**plugins["parallel"]) if "parallel" in plugins else None
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(state=state),
            is_fsdp_enabled=fsdp is not None,
            is_deepspeed_enabled=stage is not None,
            args=SimpleNamespace(fp16=plugins.get("fp16", False), parallelism_config=parallel),
            get_tp_size=lambda plugins=plugins: plugins.get("tp", 1),
        )
        if message is None:
            check_sharding(trainer)
            continue
        with pytest.raises(ValueError, match=message):
            check_sharding(trainer)


def test_arguments_of_a_plain_trainer_are_checked(model_folder, tmp_path):
    for name, value, message in (
        ("use_liger_kernel", True, "use_liger_kernel puts another forward over the recipe's"),
        ("_n_gpu", 2, "2 GPUs in one process are not supported"),
        ("loss_type", "chunked_nll", 'set TRL\'s loss_type, .* to "nll"'),
        ("activation_offloading", True, "activation_offloading waits for a backward pass"),
        ("deepspeed_plugin", SimpleNamespace(zero_stage=3), "take stage 2"),
    ):
        plain = trainer_of(Trainer, model_folder, tmp_path)
        plain.add_callback(RecipeCallback(attach(plain.model, RECIPE)))
        setattr(plain.args, name, value)
        with pytest.raises(ValueError, match=message):
            plain.callback_handler.call_event(
                "on_train_begin", plain.args, plain.state, plain.control
            )


def test_the_best_experts_are_loaded(tmp_path):
    """transformers saves them one by one, and has them stacked in memory."""
    causal_lms.build("mixtral").save_pretrained(tmp_path / "model")
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    # At this learning rate the first step is the best.
    changes = {**often, **best, "max_steps": 3, "learning_rate": 1.0, "save_total_limit": 1}
    trainer = trainer_of(LayerSkipTrainer, tmp_path / "model", tmp_path, **changes)
    trainer.train()
    folder = Path(trainer.state.best_model_checkpoint)
    assert folder == tmp_path / "checkpoint-1"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [folder.name]
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
