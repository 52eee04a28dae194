"""The recipe on real (tiny, random) models of every family, float32."""

import copy
import dataclasses
import inspect
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional
from transformers.utils.output_capturing import OutputRecorder

from causal_lms import FAMILIES, LAYERS, batch_of, build
from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.recipe.attach import ForwardPass
from layerskip.recipe.model_parts import find_model_parts

ALL = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.0)
DROPPING = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.6)
families = pytest.mark.parametrize("family", FAMILIES)
# Full attention and scaled logits, a sliding window and soft caps, learned positions, experts.
kinds = pytest.mark.parametrize("family", ["granite", "gemma2", "gpt2", "mixtral"])


def attached(model, recipe=ALL, step=0):
    handle = attach(model, recipe)
    handle.set_step(step, 100)
    return handle


def step_of(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def same(actual, expected, rtol=1e-4, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol)


def row_by_row(model, handle, recipe, batch):
    """The recipe's loss by the definition: each row alone, without the layers it skips."""
    handle.set_step(0, 100)
    skipped = handle._sample_skipped({"input_ids": batch["input_ids"]})
    logits = {e: [] for e in range(1, LAYERS + 1)}
    for row in range(len(batch["input_ids"])):
        inputs = {k: v[row : row + 1] for k, v in batch.items() if k != "labels"}
        only_row = None if skipped is None else skipped[:, row : row + 1]
        with handle._running(ForwardPass(only_row, frozenset(logits))) as this:
            handle._plain_forward(**inputs, use_cache=False, **handle._without_balancing())
            for exit_layer in logits:
                logits[exit_layer].append(handle._parts.shared_exit(this.states[exit_layer]))
    labels = batch["labels"][:, 1:].flatten()
    losses = [
        functional.cross_entropy(torch.cat(rows)[:, :-1].flatten(0, 1), labels)
        for rows in logits.values()
    ]
    return sum(losses) / LAYERS


@families
def test_a_batch_trains_as_its_rows_alone(family):
    model = build(family, output_router_logits=False)
    handle = attached(model, DROPPING)
    padding = "left" if family in ("llama", "gpt2", "phi3") else "right"
    batch = batch_of(padding=padding)
    loss, gradients = step_of(model, **batch)
    assert handle._pass.skipped.any()
    model.zero_grad()
    expected = row_by_row(model, handle, DROPPING, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    same(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@kinds
def test_the_last_exit_alone_is_plain_training(family):
    model = build(family)
    batch = batch_of()
    loss, gradients = step_of(model, **batch)
    attached(model, RecipeConfig(curriculum="none", p_max=0.0))
    attached_loss, attached_gradients = step_of(model, **batch)
    torch.testing.assert_close(attached_loss, loss)
    same(attached_gradients, gradients)
    items = (batch["labels"][:, 1:] != -100).sum()
    with_items = model(**batch, num_items_in_batch=items).loss
    # As one of two batches it adds its half, routers' balance and all.
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * items).loss, with_items / 2)
    detach(model)
    torch.testing.assert_close(with_items, model(**batch, num_items_in_batch=items).loss)


@kinds
def test_gradient_checkpointing_replays_the_same_rows(family):
    model = build(family)
    attached(model, DROPPING)
    batch, calls = batch_of(), []
    for layer in find_model_parts(model).layers:
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = step_of(model, **batch)
    layers_run = len(calls)
    for reentrant in (False, True):
        calls.clear()
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        attached_handle = model._layerskip_recipe
        attached_handle.set_step(0, 100)
        checkpointed_loss, checkpointed = step_of(model, **batch)
        torch.testing.assert_close(checkpointed_loss, loss)
        assert len(calls) == 2 * layers_run
        if family not in ("mixtral", "qwen3_moe") or not reentrant:
            # The reentrant kind has no gradient for the routers' balance, in transformers too.
            same(checkpointed, gradients)


@pytest.mark.parametrize(("family", "items"), [("mixtral", 0), ("qwen3_moe", torch.tensor(0))])
def test_a_step_without_a_label_teaches_a_mixture_nothing(family, items):
    model = build(family, output_router_logits=True)
    attached(model, DROPPING)
    batch = batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = step_of(model, **batch, num_items_in_batch=items)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@kinds
def test_attach_and_detach_leave_no_trace(family):
    model = build(family).eval()
    names = list(model.state_dict())
    batch = batch_of()
    before = model(**batch)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    attached(model, DROPPING)
    assert list(model.state_dict()) == names
    inside = model(**batch)
    assert torch.equal(inside.logits, before.logits)
    assert torch.equal(inside.loss, before.loss)
    detach(model)
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    assert not model.training


def test_checkpoints_are_the_plain_ones(llama, tmp_path):
    attached(llama, DROPPING)
    llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(llama.state_dict())
    for name, value in again.state_dict().items():
        assert torch.equal(value, llama.state_dict()[name])


@pytest.mark.parametrize("exit_layer", [2, LAYERS])
def test_an_exit_trains_exactly_the_layers_below_it(llama, exit_layer, monkeypatch):
    handle = attached(llama)
    weights = {e: float(e == exit_layer) for e in range(1, LAYERS + 1)}
    monkeypatch.setattr(type(handle), "exit_weights", property(lambda _: weights))
    step_of(llama, **batch_of())
    for number, layer in enumerate(llama.model.layers):
        reached = [bool(p.grad.any()) if p.grad is not None else False for p in layer.parameters()]
        assert set(reached) == {number < exit_layer}
    assert llama.lm_head.weight.grad.any()
    assert llama.model.norm.weight.grad.any()


def test_work_of_a_skipped_row_is_saved(llama):
    seen = []
    handle = attached(llama, DROPPING)
    for layer in llama.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    llama(**batch_of(rows=8))
    kept = (~handle._pass.skipped).sum(1).tolist()
    assert seen == [n for n in kept if n]
    assert sum(seen) < 8 * LAYERS


def test_no_layer_is_skipped_in_evaluation_or_without_gradients(llama):
    handle = attached(llama, DROPPING)
    with torch.no_grad():
        expected = llama(**batch_of()).loss
    assert torch.equal(llama.eval()(**batch_of()).loss, expected)
    assert handle._micro_batch == 0


@pytest.mark.parametrize("variant", ["LD+EE", "LD", "EE"])
def test_each_part_of_the_recipe_can_be_turned_off_alone(llama, variant):
    handle = attached(llama, RecipeConfig(curriculum="all", p_max=0.6, variant=variant))
    rows = []
    for layer in llama.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    llama(**batch_of(rows=8))
    assert (sum(rows) < 8 * LAYERS) == ("LD" in variant)
    assert handle.last.exits == ((2, 3, 4) if "EE" in variant else (4,))


def test_steps_and_seeds_draw_other_rows_and_rates_follow_the_step(llama):
    handle = attached(llama, DROPPING)

    def drawn(step, seed=0):
        handle.recipe = dataclasses.replace(DROPPING, seed=seed)
        handle.set_step(step, 100)
        llama(**batch_of(rows=8))
        return handle._pass.skipped

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0), drawn(0, seed=1))
    handle.recipe = RecipeConfig(p_max=0.4, dropout_over_steps="exponential", curriculum="none")
    for step, last in ((0, 0.0), (4, 0.4)):
        handle.set_step(step, 5)
        assert handle.skip_rates[-1] == pytest.approx(last)


def test_the_recipes_own_settings_of_the_loss_are_used(llama):
    handle = attached(llama, dataclasses.replace(ALL, distillation_weight=0.5, chunk_tokens=8))
    sizes, batch = [], batch_of()
    llama.lm_head.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape))
    loss, last = llama(**batch).loss.detach(), handle.last
    assert max(shape[0] for shape in sizes if len(shape) == 2) <= 8
    assert {shape[1] for shape in sizes if len(shape) == 3} == {1}  # the model's own: one position
    assert (last.divergence_sums[:-1] > 0).all()
    expected = (last.loss_sums + 0.5 * last.divergence_sums).mean() / last.tokens
    torch.testing.assert_close(loss, expected)
    shifted = functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(llama(**batch, shift_labels=shifted).loss.detach(), loss)


def test_the_decoder_itself_is_unchanged(llama):
    """A loss computed from its states must not get rows that skipped layers."""
    batch = {"input_ids": batch_of()["input_ids"]}
    expected = llama.model(**batch).last_hidden_state
    handle = attach(llama, DROPPING)
    torch.testing.assert_close(llama.model(**batch).last_hidden_state, expected)
    handle.set_step(0, 100)
    llama(**batch_of()).loss.backward()
    assert handle._pass.skipped.any()
    torch.testing.assert_close(llama.model(**batch).last_hidden_state, expected)
    llama.eval()
    torch.testing.assert_close(llama.model(**batch).last_hidden_state, expected)
    llama.train()
    with pytest.raises(ValueError, match="LayerSkipMixin"):
        llama(**batch_of(), fused_lm_head=True)


def test_labels_need_no_name(llama):
    handle = attached(llama, DROPPING)
    batch = batch_of()
    named = llama(**batch)
    handle.set_step(0, 100)
    places = list(inspect.signature(llama.forward).parameters)
    given = [batch.get(name) for name in places[: places.index("labels") + 1]]
    assert torch.equal(llama(*given).loss, named.loss)
    handle.set_step(0, 100)
    outputs = llama(*given, return_dict=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], named.loss)
    assert len(handle.last.exits) > 1


def test_evaluation_between_accumulated_batches_changes_nothing(llama):
    handle = attached(llama, DROPPING)
    batch = batch_of()
    expected = [llama(**batch).loss.item() for _ in range(2)]
    assert expected[0] != expected[1]
    handle.set_step(0, 100)
    first = llama(**batch).loss.item()
    llama.eval()(**batch)
    losses = handle.evaluate((2,), batch)
    assert losses.exits == (2, LAYERS)
    with torch.no_grad():
        torch.testing.assert_close(losses.loss_sums[-1] / losses.tokens, llama(**batch).loss)
    with pytest.raises(ValueError, match="no labels"):
        handle.evaluate((1,), {"input_ids": batch["input_ids"]})
    second = llama.train()(**batch).loss.item()
    assert [first, second] == expected
    handle.set_step(0, 100)
    assert llama(**batch).loss.item() == first


def test_evaluate_has_the_models_own_dropout_off_too():
    model = build("gpt2", resid_pdrop=0.5)
    handle = attached(model, DROPPING)
    model.transformer.h[1].eval()
    losses = [handle.evaluate((2,), batch_of()).loss_sums for _ in range(2)]
    assert torch.equal(*losses)
    modes = [layer.training for layer in model.transformer.h]
    assert (modes[:2], model.training) == ([True, False], True)  # as they were


@kinds
def test_packed_sequences(family):
    """Two documents in a row, told apart by their positions, train as two rows."""
    model = build(family, output_router_logits=False)
    attached(model, ALL)
    rows = batch_of(rows=4, tokens=8)
    rows["labels"][:, 3:] = rows["input_ids"][:, 3:]
    del rows["attention_mask"]
    _, expected = step_of(model, **rows)
    packed = {name: value.reshape(2, 16) for name, value in rows.items()}
    packed["position_ids"] = torch.arange(8).repeat(2, 2)
    loss, gradients = step_of(model, **packed)
    same(gradients, expected)
    detach(model)
    # With rows skipped: the same as each pack alone.
    handle = attached(model, DROPPING)
    loss, _ = step_of(model, **packed)
    assert handle._pass.skipped.any()
    torch.testing.assert_close(loss, row_by_row(model, handle, DROPPING, packed).detach())


def test_a_layer_of_tuples_that_all_rows_skip(monkeypatch):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPTNeoForCausalLM(config)
    handle = attached(model, DROPPING)
    monkeypatch.setattr(handle, "_sample_skipped", lambda *_: torch.ones(4, 1, dtype=torch.bool))
    ids = torch.arange(5, 14)[None]
    loss, _ = step_of(model, input_ids=ids, labels=ids)
    exits = handle.last.loss_sums / handle.last.tokens  # every exit says what the embedding says
    torch.testing.assert_close(exits, loss.expand(4))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers renamed
@pytest.mark.parametrize("order", ["attach first", "PEFT first"])
def test_lora(llama, order):
    import peft

    targets = ["q_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    if order == "attach first":
        handle = attached(llama, DROPPING)
        model = peft.get_peft_model(llama, config)
    else:
        model = peft.get_peft_model(llama, config)
        handle = attached(model, DROPPING)
    _, gradients = step_of(model, **batch_of())
    assert handle._pass.skipped.any()
    assert len(gradients) == 2 * (2 * LAYERS + 1)
    assert all(gradient.any() for gradient in gradients.values())
    model.zero_grad()
    row_by_row(model, handle, DROPPING, batch_of()).backward()
    same(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    # With layers that are computed again in backward, in 16 bits.
    steps = []
    for _ in range(2):
        handle.set_step(0, 100)
        with torch.autocast("cpu", torch.bfloat16):
            steps.append(step_of(model, **batch_of())[1])
        enable = getattr(llama, "activation_checkpointing_enable", None)
        (enable or llama.gradient_checkpointing_enable)({"use_reentrant": False})
    same(steps[1], steps[0])
    detach(model)


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES if f != "llama")],
)
def test_compiled(family):
    torch.compiler.reset()  # families share code, and a limit of its compiled versions
    model = build(family)
    handle = attached(model, DROPPING)
    plain = [step_of(model, **batch_of(seed=seed)) for seed in range(2)]
    handle.set_step(0, 100)
    compiled = torch.compile(model, backend="aot_eager")
    for seed, (loss, gradients) in enumerate(plain):
        model.zero_grad()
        compiled_loss = compiled(**batch_of(seed=seed)).loss
        compiled_loss.backward()
        torch.testing.assert_close(compiled_loss.detach(), loss)
        same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
def test_every_layer_of_every_step_is_compiled():
    """torch.compile gives a function up that needs too many versions, one a layer or a step."""
    torch.compiler.reset()
    layers, ran = 2 * torch._dynamo.config.recompile_limit, []

    def backend(graph, _):
        products = sum("linear" in str(node.target) for node in graph.graph.nodes)

        def run(*inputs):
            ran.append(products)
            return graph.forward(*inputs)

        return run

    model = build("llama", num_hidden_layers=layers)
    handle = attached(model, DROPPING)
    compiled = torch.compile(model, backend=backend)
    for step in range(layers):
        handle.set_step(step, 100)
        kept = ~handle._sample_skipped({"input_ids": batch_of()["input_ids"]}).all(1)
        handle.set_step(step, 100)
        ran.clear()
        compiled(**batch_of()).loss.backward()
        assert ran.count(7) == kept.sum()  # q, k, v, o, gate, up, down


@pytest.mark.parametrize(
    ("family", "is_autocast"),
    [("llama", True), ("gemma2", False), ("gpt2", False), ("mixtral", True)],
)
def test_bfloat16(family, is_autocast):
    model = build(family)
    handle = attached(model, DROPPING)
    batch = batch_of()
    loss, gradients = step_of(model, **batch)
    if not is_autocast:
        model.bfloat16()
    handle.set_step(0, 100)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        low_loss, low_gradients = step_of(model, **batch)
    dtype = torch.float32 if is_autocast else torch.bfloat16
    assert {gradient.dtype for gradient in low_gradients.values()} == {dtype}
    torch.testing.assert_close(low_loss.float(), loss, rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        distance = (low_gradients[name].float() - gradient).norm() / gradient.norm()
        assert distance < 0.2, name  # a token near the border may go to another expert


def test_the_step_must_be_known(llama):
    handle = attach(llama, ALL)
    with pytest.raises(ValueError, match="call attach"):
        llama(**batch_of())
    with pytest.raises(ValueError, match="steps count from 0"):
        handle.set_step(-1)
    handle.recipe = RecipeConfig(curriculum="gradual")
    with pytest.raises(ValueError, match="number of training steps"):
        handle.set_step(0)


def test_attaching_twice_and_detaching_without(llama):
    with torch.device("meta"):  # the default device does not matter
        attach(llama, ALL)
    with pytest.raises(ValueError, match="already has a recipe"):
        attach(llama, ALL)
    detach(llama)
    with pytest.raises(ValueError, match="no recipe attached"):
        detach(llama)


def test_a_model_whose_exit_is_something_else_is_refused(llama):
    llama.lm_head.register_forward_hook(lambda _, __, logits: logits)
    attach(llama, ALL)
    detach(llama)
    plain = type(llama).forward

    class Odd(type(llama)):
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            outputs.logits = outputs.logits + 1
            return outputs

    llama.__class__ = Odd
    with pytest.raises(ValueError, match=r"does not fit Odd: its logits"):
        attach(llama, ALL)
    assert "forward" not in llama.__dict__
    assert not hasattr(llama, "_layerskip_recipe")


def test_other_models_are_refused():
    from transformers import BertConfig, BertModel, LlamaModel

    with pytest.raises(ValueError, match="not Linear"):
        attach(torch.nn.Linear(2, 2), ALL)
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        attach(LlamaModel(build("llama").config), ALL)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError, match="BertModel"):
        attach(BertModel(config), ALL)


def test_parts_that_are_not_found(llama):
    llama.model.layers = llama.model.layers[:2]
    with pytest.raises(ValueError, match="its list of 4 layers is not found"):
        attach(llama, ALL)
    llama = build("llama")
    llama.model.other = llama.model.norm
    del llama.model.norm
    with pytest.raises(ValueError, match="final norm is not found"):
        attach(llama, ALL)


def test_rows_that_are_not_independent_are_refused(llama):
    mlp = llama.model.layers[1].mlp
    mlp.register_forward_hook(lambda _, __, out: out + out.mean(0, keepdim=True))
    with pytest.raises(ValueError, match="rows of a batch independently"):
        attach(llama, ALL)


def test_layers_that_take_keys_from_other_layers_are_refused():
    """Each layer keeps other rows: keys of the rows that another layer kept are another's."""
    import transformers

    config = transformers.Gemma4TextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=6,
    )
    with pytest.raises(ValueError, match="rows of a batch independently"):
        attach(transformers.AutoModelForCausalLM.from_config(config), ALL)


def test_what_goes_wrong_in_the_trial_is_a_refusal(llama):
    def broken(*_):
        raise RuntimeError("sizes do not match\nat all")

    hook = llama.model.layers[1].mlp.register_forward_hook(broken)
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM: .*sizes do not match$"):
        attach(llama, ALL)
    hook.remove()
    attach(llama, ALL)


def test_a_copy_made_while_attached_is_refused(llama):
    """Its forward would be the first model's, with the first model's weights."""
    attach(llama, RecipeConfig.preset("task"))
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(llama)
    detach(llama)
    copy.deepcopy(llama)


@pytest.mark.parametrize(("has_sdpa", "plain"), [(True, "sdpa"), (False, "eager")])
def test_flash_attention_is_tried_as_plain_attention(llama, monkeypatch, has_sdpa, plain):
    """It takes 16 bits alone, which autocast gives it in training, and needs a GPU."""
    monkeypatch.setattr(type(llama), "_supports_sdpa", has_sdpa)  # Gemma 2 has not
    tried = []

    def take(name):
        tried.append(name)
        llama.config._attn_implementation_internal = name

    llama.config._attn_implementation_internal = "flash_attention_2"
    with mock.patch.object(llama, "set_attn_implementation", take):
        attached(llama, ALL)
    assert tried == [plain, "flash_attention_2"]


def test_routers_are_found_in_the_ways_that_transformers_names_them():
    model = build("mixtral")
    anatomy = find_model_parts(model)
    layer, decoder = anatomy.layers[0], type(model.get_decoder())
    (router, index), *others = anatomy.routers(layer)
    assert not others
    kind = type(router)
    name = next(name for name, module in layer.named_modules() if module is router)
    last = name.split(".")[-1]
    ways = [
        [kind],
        OutputRecorder(kind, index=index),
        [
            OutputRecorder(kind, index=index, layer_name=last),
            OutputRecorder(kind, layer_name="other"),
        ],
    ]
    for way in ways:
        with mock.patch.dict(decoder._can_record_outputs, {"router_logits": way}):
            assert [module for module, _ in anatomy.routers(layer)] == [router]
    model.config.output_router_logits = True
    with (
        mock.patch.dict(decoder._can_record_outputs, clear=True),
        pytest.raises(ValueError, match="its routers are not found"),
    ):
        attach(model, ALL)
    attach(model, ALL)  # nothing of the refused one was left


@pytest.mark.parametrize("stands_for", ["zero-3", "fsdp 1"])
def test_weights_that_are_held_elsewhere_are_refused(llama, stands_for):
    """DeepSpeed marks them; FSDP 1 lends a module tensors that are no parameters of it."""
    handle = attached(llama, ALL)
    norm = llama.model.norm
    if stands_for == "zero-3":
        norm.weight.ds_id = 1
    else:
        lent = norm.weight.detach().clone().requires_grad_()
        del norm.weight
        norm.weight = lent
    handle.set_step(0, 10)
    with pytest.raises(ValueError, match="no whole weights of their own"):
        llama.train()(**batch_of())


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # that of earlier tests
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # else it is that of the tests to come


def test_a_model_that_accelerate_unwraps_keeps_the_recipe(accelerator):
    """Without its autocast, `forward` is bound to the model like a method, which it was not before."""
    model = build("llama")
    before = model(**batch_of()).loss
    handle = attached(model)
    prepared = accelerator.prepare(model.train())
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    plain(**batch_of()).loss.backward()
    assert handle.last.exits == tuple(range(1, LAYERS + 1))
    detach(plain)
    assert "forward" not in plain.__dict__
    assert torch.equal(plain.eval()(**batch_of()).loss, before)


STEPS = 20


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_losses_of_all_exits_fall(family):
    model, batch = build(family), batch_of()
    handle = attach(model, RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.2))
    exits = range(1, LAYERS + 1)
    before = handle.evaluate(exits, batch).loss_sums
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        handle.set_step(step, STEPS)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = handle.evaluate(exits, batch).loss_sums
    assert (after < 0.9 * before).all(), (before, after)
