"""Base runs on a small model that really knows the corpus."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from uipe_core.losses import METHODS
from uipe_core.models import LoadedModel
from uipe_core.training import AdapterConfig, DivergedError, UnlearningConfig, train_base_run
from uipe_core.update_vectors import DENSE, LOW_RANK, Extrapolator, snapshot

LORA = AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj"))
PLAIN = UnlearningConfig("grad_ascent", {}, epochs=2, learning_rate=1e-2, batch_size=8)


def config(method="grad_ascent", **changes):
    return replace(PLAIN, method=method, hyperparameters=METHODS[method].hyperparameters, **changes)


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
    # LoRA factors start at a product of zero and need larger steps.
    results = run(config(method, adapter=adapter, learning_rate=1e-2 if adapter is None else 3e-2, epochs=3))
    assert [result.epoch for result in results] == [1, 2, 3]
    assert {result.update.kind for result in results} == {DENSE if adapter is None else LOW_RANK}
    losses = [mean_nll(load_tiny(), world.forget_train)]
    losses += [mean_nll(at(load_tiny, result.update), world.forget_train) for result in results]
    losses.append(mean_nll(at(load_tiny, results[-1].update, alpha=0.5), world.forget_train))
    assert losses == sorted(losses)
    assert losses[-2] > losses[0] + 0.1


@pytest.mark.parametrize("method", ["grad_diff", "kl_min"])
def test_a_retain_term_holds_the_rest(method, run, load_tiny, world):
    settings = {"epochs": 3, "learning_rate": 1e-2}
    plain = at(load_tiny, run(config("grad_ascent", **settings))[-1].update)
    held = at(load_tiny, run(config(method, **settings))[-1].update)
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
    accumulated = run(replace(config("npo"), batch_size=batch_size, gradient_accumulation=accumulation, **common))
    whole = run(replace(config("npo"), batch_size=batch_size * accumulation, **common))
    for result, other in zip(accumulated, whole, strict=True):
        assert difference(result, other) < 1e-3


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["kl_min", "npo"])
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
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_defaults_stand_in_for_hyperparameters_not_given(run):
    assert_same_updates(run(replace(config("grad_diff"), hyperparameters={})), run(config("grad_diff")))


def test_inputs_for_the_store_tell_every_setting_apart():
    inputs = [config().as_inputs(), config(adapter=LORA).as_inputs(), config(seed=1).as_inputs(), config("npo").as_inputs()]
    assert all(inputs[i] != inputs[j] for i in range(4) for j in range(i))


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_the_device_of_its_model(method, adapter, load_tiny, world):
    loaded = load_tiny()
    loaded.model.to("cuda")
    result = next(train_base_run(loaded, world, config(method, adapter=adapter)))
    assert result.update.norm > 0
    assert all(tensor.device.type == "cpu" for tensor in result.update.tensors.values())
