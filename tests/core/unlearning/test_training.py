"""Base runs on a small model that really knows the corpus."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from uipe_core.corpora.types import draw_refusals
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.update_vectors import DENSE, LOW_RANK, snapshot
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.steering import control_direction, decoder_layer, outputs_of
from uipe_core.unlearning.training import AdapterConfig, DivergedError, UnlearningConfig, train_base_run

LORA = AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj"))
SMALL = {
    "simnpo": {"retain_weight": 1},
    "sat_imp": {"beta1": 1, "retain_weight": 1},
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
def kl_from_initial(initial, loaded, items):
    terms = []
    for item in items:
        example = loaded.prompts.encode(item.question, item.answer)
        ids = torch.tensor([example.input_ids])
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (initial.model, loaded.model))
        terms.append((p.exp() * (p - q)).sum(-1)[example.prompt_length - 1 : -1])
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
    losses += [mean_nll(at(load_tiny, result.update), world.forget_train) for result in results]
    losses.append(mean_nll(at(load_tiny, results[-1].update, alpha=0.5), world.forget_train))
    assert losses == sorted(losses)
    assert losses[-2] > losses[0] + 0.1


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "retain_weight" in method.hyperparameters])
def test_a_retain_term_holds_the_rest(method, run, load_tiny, world):
    settings = config(method, learning_rate=rate(method, None), epochs=3)
    plain, held = (
        at(load_tiny, run(replace(settings, hyperparameters={**settings.hyperparameters, "retain_weight": weight}))[-1].update)
        for weight in (0.0, 10.0 if method == "rmu" else 1.0)
    )
    initial = mean_nll(load_tiny(), world.retain_train)
    damage = mean_nll(plain, world.retain_train) - initial
    assert damage > 0.2
    assert mean_nll(held, world.retain_train) - initial < 0.7 * damage


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_kl_is_taken_from_the_initial_model(adapter, run, load_tiny, world):
    # Compared with anything that moves along, the gradient of KL would be zero and its weight without effect.
    settings = config("kl_min", adapter=adapter, learning_rate=1e-2 if adapter is None else 2e-2)
    kl = {
        weight: kl_from_initial(
            load_tiny(),
            at(load_tiny, run(replace(settings, hyperparameters={"retain_weight": weight}))[-1].update),
            world.retain_train,
        )
        for weight in (0.0, 100.0)
    }
    assert kl[100.0] < 0.5 * kl[0.0]


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
    inputs = [config().as_inputs(), config(adapter=LORA).as_inputs(), config(seed=1).as_inputs(), config("npo").as_inputs()]
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
