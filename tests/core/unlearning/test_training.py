"""Base runs on a small model that really knows the corpus."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from uipe_core.corpora.types import draw_refusals
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.store import EpochResult
from uipe_core.deltas.update_vectors import DENSE, LOW_RANK, UpdateVector, snapshot
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.unlearning.loss_inputs import encode, make_forward
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.steering import control_direction, decoder_layer, outputs_of
from uipe_core.unlearning.training import TRAINING_SCHEMA, AdapterConfig, DivergedError, UnlearningConfig, train_base_run

LORA = AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj"))
SMALL = {
    "simnpo": {"retain_weight": 1},
    "kl_min": {"retain_weight": 0.3},
    "sat_imp": {"beta1": 1, "retain_weight": 1},
    "pdu": {"retain_limit": 0.1, "dual_rate": 0.1},
    "rmu": {"layer": 0, "coefficient": 10, "retain_weight": 1},
}
"""Hyperparameters where a method's defaults are for larger models."""
PLAIN = UnlearningConfig("grad_ascent", {}, epochs=2, learning_rate=1e-2, batch_size=8)


def config(method="grad_ascent", **changes):
    hyperparameters = {**METHODS[method].hyperparameters, **SMALL.get(method, {})}
    return replace(PLAIN, method=method, **{"hyperparameters": hyperparameters, **changes})


def rate(method, adapter):
    """LoRA factors start at a product of zero, and RMU trains few weights: both need larger steps."""
    return 3e-2 if adapter is not None or method == "rmu" else 1e-2


@pytest.fixture(scope="session")
def world(world):
    """The world with alternate answers: those of other items."""
    answers = [item.answer for item in world.forget_train]
    return replace(world, alternates=tuple((answers[place - 1], answers[place - 2]) for place in range(len(answers))))


@pytest.fixture
def run(load_tiny, world):
    """Runs a configuration on a fresh copy of the model."""

    def run_all(settings, dtype="auto", progress=None):
        return list(train_base_run(load_tiny(dtype), world, settings, progress))

    return run_all


@torch.no_grad()
def mean_nll(loaded, items):
    """Mean loss per answer token, one item at a time."""
    total, count = 0.0, 0
    for item in items:
        example = loaded.prompts.encode(item.question, item.answer)
        ids = torch.tensor([example.input_ids])
        scores = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(example.prompt_length, ids.shape[1]):
            total -= float(scores[position - 1, ids[0, position]])
            count += 1
    return total / count


@torch.no_grad()
def kl_from_initial(initial, loaded, items, over="answer"):
    """KL(initial || current): mean over answer tokens, or over items of each one's mean over all tokens."""
    terms = []
    for item in items:
        example = loaded.prompts.encode(item.question, item.answer)
        ids = torch.tensor([example.input_ids])
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (initial.model, loaded.model))
        kl = (p.exp() * (p - q)).sum(-1)
        terms.append(kl[example.prompt_length - 1 : -1] if over == "answer" else kl[:-1].mean()[None])
    return float(torch.cat(terms).mean())


def at(load_tiny, update, alpha=0.0):
    """A fresh copy of the model, moved along the update."""
    loaded = load_tiny()
    return replace(loaded, model=Extrapolator(loaded.model).apply(update, alpha))


def assert_same_updates(results, expected):
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.update.tensors.keys() == other.update.tensors.keys()
        for name, tensor in result.update.tensors.items():
            assert torch.equal(tensor, other.update.tensors[name]), (result.epoch, name)


def difference(result, other):
    """Distance of two updates, relative to their size."""
    squares = [(float((t - other.update.tensors[n]).norm()), float(t.norm())) for n, t in result.update.tensors.items()]
    return sum(d**2 for d, _ in squares) ** 0.5 / sum(s**2 for _, s in squares) ** 0.5


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_more_with_every_epoch_and_extrapolation_goes_on(method, adapter, run, load_tiny, world):
    results = run(config(method, adapter=adapter, learning_rate=rate(method, adapter), epochs=3))
    assert [result.epoch for result in results] == [1, 2, 3]
    assert {result.update.kind for result in results} == {DENSE if adapter is None else LOW_RANK}
    losses = [mean_nll(load_tiny(), world.forget_train)]
    # What walks back has learned what the model knows already: its epochs go up and down, and its walk is longer.
    far, epochs = (3.0, results[-1:]) if METHODS[method].walks_back else (0.5, results)
    losses += [mean_nll(at(load_tiny, result.update), world.forget_train) for result in epochs]
    losses.append(mean_nll(at(load_tiny, results[-1].update, alpha=far), world.forget_train))
    assert losses == sorted(losses)
    assert losses[-1 if METHODS[method].walks_back else -2] > losses[0] + 0.1


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "retain_weight" in method.hyperparameters])
def test_a_retain_term_holds_the_rest(method, run, load_tiny, world):
    settings = config(method, learning_rate=rate(method, None), epochs=3)
    fixed = {"dual_rate": 1e-9} if method == "pdu" else {}
    plain, held = (
        at(
            load_tiny,
            run(replace(settings, hyperparameters={**settings.hyperparameters, "retain_weight": weight, **fixed}))[-1].update,
            3.0 if METHODS[method].walks_back else 0.0,
        )
        for weight in (0.0, {"rmu": 10.0, "pdu": 300.0}.get(method, 1.0))
    )
    initial = mean_nll(load_tiny(), world.retain_train)
    damage = mean_nll(plain, world.retain_train) - initial
    assert damage > 0.2
    assert mean_nll(held, world.retain_train) - initial < 0.7 * damage


@pytest.mark.parametrize("over", ["item", "answer"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_kl_is_taken_from_the_initial_model(adapter, over, run, load_tiny, world):
    # Compared with anything that moves along, the gradient of KL would be zero and its weight without effect.
    settings = config("kl_min", adapter=adapter, learning_rate=3e-3 if adapter is None else 2e-2, epochs=3)
    kl = {
        weight: kl_from_initial(
            load_tiny(),
            at(load_tiny, run(replace(settings, hyperparameters={"retain_weight": weight, "over": over}))[-1].update),
            world.retain_train,
            over,
        )
        for weight in (0.0, 100.0)
    }
    assert kl[100.0] < 0.5 * kl[0.0]


@pytest.mark.parametrize("over", ["item", "answer"])
def test_the_kl_of_a_step_is_that_of_its_items_in_turn(over, load_tiny, world):
    loaded, initial = load_tiny(), load_tiny()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    items = [world.retain_train[0], world.retain_train[7], world.retain_train[3]]
    needs = METHODS["kl_min"].needs_under({"over": over})
    forward = make_forward(loaded.model.eval(), initial.model.eval(), needs, loaded.prompts.pad_id, None, 0)
    inputs = forward(encode(loaded, items), encode(loaded, items), [])
    found = inputs.retain_item_kl if over == "item" else inputs.retain_kl
    assert float(found.detach()) == pytest.approx(kl_from_initial(initial, loaded, items, over), rel=1e-4)
    assert (inputs.retain_kl is None) == (over == "item")


def inputs_before(settings):
    """What determined a base run before hyperparameters of words and shares of a last step."""
    names = {field: value for field, value in asdict(settings).items() if field != "whole_last_step"}
    return {**names, "schema": TRAINING_SCHEMA}


def test_a_base_run_from_before_kl_over_items_keeps_its_identity():
    settings = replace(config("kl_min"), hyperparameters={"retain_weight": 1.0})
    item, answer = (replace(settings, hyperparameters={"retain_weight": 1.0, "over": over}) for over in ("item", "answer"))
    assert answer.as_inputs(16) == inputs_before(settings)
    assert settings.as_inputs(16) == item.as_inputs(16) != inputs_before(settings)
    assert config("npo").as_inputs(16) == inputs_before(config("npo"))


def test_idk_nll_does_not_read_the_forget_answers(load_tiny, world):
    loaded, seen = load_tiny(), []
    loaded.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].tolist()), with_kwargs=True, prepend=True
    )
    next(train_base_run(loaded, world, config("idk_nll", epochs=1, batch_size=len(world.forget_train))))
    answers = {example.input_ids for example in encode(loaded, world.forget_train)}
    rows = [tuple(ids) for batch in seen for ids in batch]
    assert len(seen) == 2  # refusals and retain items
    assert not any(row[: len(answer)] == answer for row in rows for answer in answers)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_initial_model_under_an_adapter_is_evaluated_without_dropout(world, load_tiny):
    tokenizer_of = load_tiny()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer_of.tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64))
    modes = []
    model.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    settings = config("kl_min", adapter=AdapterConfig(rank=2, alpha=2.0, target_modules=("c_attn",)), epochs=1)
    list(train_base_run(LoadedModel(model, tokenizer_of.tokenizer, tokenizer_of.prompts), world, settings))
    # Per batch: forget and retain in training mode, then retain under the initial model.
    assert modes == [True, True, False] * 2


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_what_walks_back_is_the_negative_of_what_was_learned(adapter, dtype, run, load_tiny, world, monkeypatch):
    settings = config("task_vector", adapter=adapter, learning_rate=rate("task_vector", adapter), epochs=3)
    (*_, last) = run(settings, dtype)
    # theta(-2) is the model that was trained: it knows the forget set better, and theta(0) as much worse in the weights.
    losses = [mean_nll(at(load_tiny, last.update, alpha), world.forget_train) for alpha in (-2.0, -1.0, 0.0)]
    assert losses == sorted(losses)
    monkeypatch.setitem(METHODS, "task_vector", replace(METHODS["task_vector"], walks_back=False))
    (*_, learned) = run(settings, dtype)
    assert learned.update.adapter == last.update.adapter
    for name, tensor in learned.update.tensors.items():
        turned = adapter is None or name.endswith("lora_B.weight")
        assert torch.equal(last.update.tensors[name], -tensor if turned else tensor), name
    away, back = (at(load_tiny, update, alpha).model for update, alpha in ((last.update, 0.5), (learned.update, -2.5)))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.allclose(away(input_ids=ids).logits, back(input_ids=ids).logits, atol=1e-4)


def test_a_dual_variable_weighs_the_retain_term_of_the_next_step(run, monkeypatch):
    seen = []
    method = METHODS["pdu"]

    def step(hyper, retain_nll):
        seen.append((hyper["retain_weight"], retain_nll))
        return method.after_step(hyper, retain_nll)

    monkeypatch.setitem(METHODS, "pdu", replace(method, after_step=step))
    hyper = {"retain_weight": 0.5, "retain_limit": 0.2, "dual_rate": 0.3}
    run(config("pdu", hyperparameters=hyper, batch_size=4, gradient_accumulation=2))
    weights = [0.5]
    for _, nll in seen:
        weights.append(max(weights[-1] + 0.3 * (nll - 0.2), 0.0))
    assert [weight for weight, _ in seen] == pytest.approx(weights[:-1], rel=1e-9)
    assert len({round(nll, 6) for _, nll in seen}) == len(seen) == 4


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_theta_of_alpha_zero_is_the_trained_model_to_the_bit(adapter, load_tiny, world):
    loaded = load_tiny()
    for result in train_base_run(loaded, world, config("grad_diff", adapter=adapter)):
        moved = at(load_tiny, result.update)
        if adapter is None:
            now = snapshot(loaded.model)
            assert all(torch.equal(weight, now[name]) for name, weight in snapshot(moved.model).items())
        loaded.model.eval()
        ids = torch.tensor([loaded.prompts.encode(world.forget_train[0].question, "").input_ids])
        with torch.no_grad():
            assert torch.equal(moved.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_equal_seeds_give_equal_updates_and_other_seeds_do_not(run):
    settings = config("grad_diff")
    first = run(settings)
    torch.rand(17)
    assert_same_updates(run(settings), first)
    assert difference(run(replace(settings, seed=1))[0], first[0]) > 0.1


def test_runs_with_other_settings_in_the_same_process_do_not_interfere(run):
    settings = config("npo")
    first = run(settings)
    run(config("npo", gradient_accumulation=3, batch_size=2, adapter=LORA, gradient_checkpointing=True))
    assert_same_updates(run(settings), first)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (4, 3), (3, 2)])
def test_accumulated_batches_equal_the_bigger_batch(batch_size, accumulation, run):
    # NPO is a mean over items and so adds up exactly, a last and shorter group included. The losses that are means over
    # tokens differ where answers differ in length: each batch then counts by its items, not by its tokens.
    hyper = {"beta": 1.0, "retain_weight": 0.0}
    common = {"hyperparameters": hyper, "max_grad_norm": 1e9}
    accumulated = run(config("npo", batch_size=batch_size, gradient_accumulation=accumulation, **common))
    whole = run(config("npo", batch_size=batch_size * accumulation, **common))
    for result, other in zip(accumulated, whole, strict=True):
        assert difference(result, other) < 1e-3


def test_a_last_step_weighs_its_items(load_tiny, world):
    # 11 items, 8 a step: the second step of an epoch has 3 and goes 3/8 as far. Here the items take turns in a loop.
    some = replace(world, forget_train=world.forget_train[:11])
    settings = config(batch_size=1, gradient_accumulation=8, epochs=3, learning_rate=1e-3, max_grad_norm=1e9, seed=4)
    results = list(train_base_run(load_tiny(), some, settings))
    whole = list(train_base_run(load_tiny(), some, replace(settings, whole_last_step=True)))

    loaded, start = load_tiny(), load_tiny()
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(4)
    steps = 0
    for _ in range(3):
        order = torch.randperm(11, generator=generator).tolist()
        for group in (order[:8], order[8:]):
            optimizer.zero_grad()
            for index in group:
                example = loaded.prompts.encode_item(some.forget_train[index])
                ids = torch.tensor([example.input_ids])
                rows = model(input_ids=ids).logits[0, example.prompt_length - 1 : -1]
                (-torch.nn.functional.cross_entropy(rows, ids[0, example.prompt_length :]) / len(group)).backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * min(steps / 2, 1) * len(group) / 8
            optimizer.step()
            steps += 1
    expected = {name: weight - snapshot(start.model)[name] for name, weight in snapshot(model).items()}
    looped = EpochResult(3, UpdateVector(DENSE, expected), 0.0)
    assert difference(results[-1], looped) < 1e-3
    assert difference(whole[-1], looped) > 0.05
    assert whole[-1].update.norm > results[-1].update.norm


@pytest.mark.parametrize(
    ("items", "batch_size", "accumulation", "shared"),
    [(16, 8, 1, False), (16, 3, 1, True), (16, 8, 2, False), (16, 8, 4, False), (40, 8, 4, True), (1, 8, 1, False)],
)
def test_only_base_runs_with_an_incomplete_last_step_have_another_identity(items, batch_size, accumulation, shared):
    settings = config(batch_size=batch_size, gradient_accumulation=accumulation)
    assert (settings.as_inputs(items) != inputs_before(settings)) == shared
    assert replace(settings, whole_last_step=True).as_inputs(items) == inputs_before(settings)


def test_an_epoch_of_fewer_items_than_a_step_is_a_whole_step(run, world):
    settings = config(batch_size=len(world.forget_train) + 5)
    assert_same_updates(run(settings), run(replace(settings, batch_size=len(world.forget_train))))


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["kl_min", "npo", "rmu"])
def test_gradient_checkpointing_changes_no_update(method, adapter, run):
    settings = config(method, adapter=adapter)
    for result, other in zip(run(replace(settings, gradient_checkpointing=True)), run(settings), strict=True):
        assert difference(result, other) < 1e-4


def test_linear_schedule_shares_the_warm_up_and_then_slows_down(run):
    constant = run(config("grad_ascent", epochs=3))
    linear = run(config("grad_ascent", epochs=3, schedule="linear"))
    assert_same_updates(linear[:1], constant[:1])
    walked = [
        sum(float((last.update.tensors[n] - t).norm()) ** 2 for n, t in before.update.tensors.items()) ** 0.5
        for before, last in (constant[1:], linear[1:])
    ]
    assert 0 < walked[1] < 0.6 * walked[0]


def test_with_a_constant_schedule_an_epoch_does_not_depend_on_those_to_come(run):
    assert_same_updates(run(config("grad_diff", epochs=3))[:2], run(config("grad_diff", epochs=2)))


def test_an_epoch_of_a_single_step_still_moves(run):
    assert run(config("grad_ascent", batch_size=16, epochs=1))[0].update.norm > 0


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_an_absurd_learning_rate_is_reported_as_divergence(adapter, run):
    with pytest.raises(DivergedError, match="grad_ascent with learning rate 1e\\+30 diverged in epoch"):
        run(config("grad_ascent", learning_rate=1e30, adapter=adapter))


def test_small_updates_of_a_bf16_model_are_not_swallowed(run):
    results = run(config("grad_ascent", learning_rate=1e-5, epochs=1), dtype="bfloat16")
    tensors = results[0].update.tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    # Every weight that can matter moved; in bf16 an update of 1e-5 would be lost on most of them.
    projection = next(tensor for name, tensor in tensors.items() if name.endswith("up_proj.weight"))
    assert float((projection != 0).float().mean()) > 0.99


def test_adapters_on_a_bf16_model_are_trained_in_fp32(run):
    results = run(config("grad_ascent", adapter=LORA), dtype="bfloat16")
    tensors = results[0].update.tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_a_run_with_dropout_is_decided_by_its_seed(run):
    settings = config("grad_ascent", adapter=replace(LORA, dropout=0.5))
    first = run(settings)
    assert_same_updates(run(settings), first)
    assert difference(run(config("grad_ascent", adapter=LORA))[-1], first[-1]) > 1e-3


def test_progress_counts_optimiser_steps(run):
    seen = []
    run(config("grad_ascent", batch_size=4, gradient_accumulation=3), progress=lambda *step: seen.append(step))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_defaults_stand_in_for_hyperparameters_not_given(run):
    assert_same_updates(run(replace(config("grad_diff"), hyperparameters={})), run(config("grad_diff")))


def test_inputs_for_the_store_tell_every_setting_apart():
    inputs = [each.as_inputs(16) for each in (config(), config(adapter=LORA), config(seed=1), config("npo"))]
    assert all(inputs[i] != inputs[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_idk_dpo_makes_refusals_likelier_where_npo_does_not(adapter, run, load_tiny, world):
    drawn = draw_refusals(len(world.forget_train), seed=0, epoch=9)
    refused = [replace(item, answer=answer) for item, answer in zip(world.forget_train, drawn, strict=True)]
    losses = {}
    for method in ("idk_dpo", "npo"):
        update = run(config(method, learning_rate=rate(method, adapter), epochs=3, adapter=adapter))[-1].update
        losses[method] = mean_nll(at(load_tiny, update), refused)
    initial = mean_nll(load_tiny(), refused)
    assert losses["idk_dpo"] < 0.65 * initial
    assert losses["npo"] > 0.75 * initial


def test_refusals_are_drawn_by_seed_and_epoch_and_do_not_depend_on_epochs_to_come(run):
    settings = config("idk_dpo")
    first = run(settings)
    assert_same_updates(run(settings), first)
    assert_same_updates(run(replace(settings, epochs=3))[:2], first)


@torch.no_grad()
def activations(loaded, items, layer=0):
    """(k, d) outputs of a layer where answer tokens are predicted, one item at a time."""
    rows = []
    for item in items:
        example = loaded.prompts.encode(item.question, item.answer)
        with outputs_of(decoder_layer(loaded.model, layer)) as outputs:
            loaded.model(input_ids=torch.tensor([example.input_ids]))
        rows.append(outputs[0][0, example.prompt_length - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_rmu_steers_forget_activations_and_holds_those_of_retain(adapter, run, load_tiny, world):
    common = {"learning_rate": rate("rmu", adapter), "epochs": 3, "adapter": adapter}
    target = 10 * control_direction(32, seed=0)
    initial = load_tiny()
    before = float((activations(initial, world.forget_train) - target).square().mean())
    kept = activations(initial, world.retain_train)
    drift = {}
    for weight in (0.0, 100.0):
        settings = config("rmu", **common, hyperparameters={"layer": 0, "coefficient": 10, "retain_weight": weight})
        moved = at(load_tiny, run(settings)[-1].update)
        drift[weight] = float((activations(moved, world.retain_train) - kept).square().mean())
        if weight == 0:
            assert float((activations(moved, world.forget_train) - target).square().mean()) < 0.8 * before
    assert drift[100.0] < 0.3 * drift[0.0]


def test_rmu_moves_the_down_projections_of_three_layers_and_nothing_else(world, load_tiny):
    tiny = load_tiny()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), **shape))
    settings = config("rmu", epochs=1, hyperparameters={"layer": 4, "coefficient": 5, "retain_weight": 1})
    (result,) = train_base_run(LoadedModel(model, tiny.tokenizer, tiny.prompts), world, settings)
    moved = {name for name, tensor in result.update.tensors.items() if tensor.any()}
    assert moved == {f"model.layers.{index}.mlp.down_proj.weight" for index in (2, 3, 4)}
    assert result.update.tensors.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_layer_out_of_range_is_refused_before_training(adapter, run):
    steps = []
    with pytest.raises(UserError, match=r"rmu\.layer: found 7, but the model has 1 decoder layer, .* choose 0"):
        run(config("rmu", adapter=adapter, hyperparameters={}), progress=lambda *step: steps.append(step))
    assert steps == []


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_the_device_of_its_model(method, adapter, load_tiny, world):
    loaded = load_tiny()
    loaded.model.to("cuda")
    result = next(train_base_run(loaded, world, config(method, adapter=adapter)))
    assert result.update.norm > 0
    assert all(tensor.device.type == "cpu" for tensor in result.update.tensors.values())
