"""Loaders, batches, the train step and checkpoints."""

import functools
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from stepwiser_jax.config import Optimizer
from stepwiser_jax.config_files import load_config
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.loading import load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import SftExample
from stepwiser_jax.rl.rollouts import pack_groups
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.training.batches import (
    Document,
    TokenBatch,
    document_loader,
    example_loader,
    fitting_documents,
    num_batches,
)
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.loop import MAX_SKIPPED_IN_A_ROW, TrainingRun
from stepwiser_jax.training.optimizer import make_optimizer, make_schedule
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens
from stepwiser_jax.training.step import (
    TrainState,
    accumulate,
    create_train_state,
    join_rows,
    make_train_step,
    mean_metrics,
    split_rows,
)
from tiny import rollout_group, tiny_config

EXAMPLES = [SftExample(f"e{i}", "p", "x" * (1 + i % 5), "y" * (1 + i % 7)) for i in range(23)]


def document(example):
    number = int(example.example_id[1:]) + 2
    prompt, completion = len(example.prompt), len(example.completion)
    mask = [False] * prompt + [True] * completion
    return Document(np.full(prompt + completion, number, np.int32), np.array(mask))


DOCUMENTS = [document(example) for example in EXAMPLES]


def loader(packing, seed=0):
    return document_loader(DOCUMENTS, batch_size=2, max_length=16, seed=seed, packing=packing)


@pytest.mark.parametrize("packing", [False, True])
def test_loader_goes_on_where_its_state_says(packing):
    undisturbed = loader(packing)
    batches = [next(undisturbed) for _ in range(9)]
    stopped = loader(packing)
    for _ in range(4):
        next(stopped)
    resumed = loader(packing)
    resumed.set_state(stopped.get_state())
    for expected in batches[4:]:
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(next(resumed)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = next(loader(packing, seed=1))
    assert not np.array_equal(batches[0].tokens_BT, other.tokens_BT)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_give_every_document_so_many_times_in_a_number_of_batches_known_before(
    packing, epochs
):
    settings = {"batch_size": 7, "max_length": 16, "seed": 0, "packing": packing, "epochs": epochs}
    batches = list(document_loader(DOCUMENTS, **settings))
    assert len(batches) == num_batches(DOCUMENTS, **settings)
    assert {batch.tokens_BT.shape for batch in batches} == {(7, 16)}
    seen = Counter(
        int(batch.tokens_BT[row, batch.segment_ids_BT[row] == segment][0]) - 2
        for batch in batches
        for row in range(7)
        for segment in range(1, batch.segment_ids_BT[row].max() + 1)
    )
    assert seen == dict.fromkeys(range(len(EXAMPLES)), epochs)
    last = batches[-1]
    empty = last.segment_ids_BT.max(axis=1) == 0
    assert empty.any() and not last.tokens_BT[empty].any() and not last.target_mask_BT[empty].any()


def test_batches_are_counted_as_they_are_packed():
    """Rows that are filled together, and closed together when a document fits none of them."""
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    documents = [Document(np.ones(n, np.int32), np.ones(n, bool)) for n in lengths]
    settings = {"batch_size": 2, "max_length": 32, "seed": 0, "packing": True, "epochs": 2}
    batches = len(list(document_loader(documents, **settings)))
    assert num_batches(documents, **settings) == batches
    assert batches > 1.05 * 2 * lengths.sum() / (2 * 32), "rows that are not full"


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_go_on_where_the_state_says(packing):
    settings = {"batch_size": 5, "max_length": 16, "seed": 0, "packing": packing, "epochs": 2}
    batches = list(document_loader(DOCUMENTS, **settings))
    for done in (1, len(batches) - 1):
        stopped, resumed = (document_loader(DOCUMENTS, **settings) for _ in range(2))
        for _ in range(done):
            next(stopped)
        resumed.set_state(stopped.get_state())
        rest = list(resumed)
        assert len(rest) == len(batches) - done
        for a, b in zip(jax.tree.leaves(batches[done:]), jax.tree.leaves(rest), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packing", [False, True])
def test_every_document_is_whole_and_learned_where_it_should(packing):
    seen = []
    batches = loader(packing)
    for _ in range(12):
        batch = next(batches)
        for row in range(2):
            segments = batch.segment_ids_BT[row]
            for segment in set(segments.tolist()) - {0}:
                inside = segments == segment
                (number,) = set(batch.tokens_BT[row][inside].tolist())
                expected = DOCUMENTS[number - 2].target_mask_T.tolist()
                assert batch.target_mask_BT[row][inside].tolist() == expected
                assert batch.positions_BT[row][inside].tolist() == list(range(len(expected)))
                seen.append(number)
            assert not batch.target_mask_BT[row][segments == 0].any()
    if not packing:
        assert sorted(seen[:23]) == list(range(2, 25))
    assert len(seen) > (24 if packing else 23)


def test_documents_that_do_not_fit_are_counted_and_none_is_refused():
    fitting, dropped = fitting_documents(DOCUMENTS, 7)
    assert 0 < len(fitting) < 23 and len(fitting) + dropped == 23
    with pytest.raises(UserError, match="no example fits max_length 1"):
        fitting_documents(DOCUMENTS, 1)


def test_example_loader_shows_everything_once_per_epoch_in_new_orders():
    batches = example_loader(EXAMPLES, batch_size=23, seed=0)
    first, second = next(batches), next(batches)
    assert sorted(e.example_id for e in first) == sorted(e.example_id for e in EXAMPLES)
    assert sorted(e.example_id for e in second) == sorted(e.example_id for e in EXAMPLES)
    assert first != second


def test_packed_groups_by_hand():
    group = rollout_group([7, 8], [[1, 2], [3]], [[-0.1, -0.2], [-0.3]])
    advantages = [[0.5, -0.5]]
    batch = pack_groups([group], advantages, num_rows=1, row_lengths=[4, 6])
    assert batch.tokens_BT.tolist() == [[7, 8, 1, 2, 3, 0]]
    assert batch.segment_ids_BT.tolist() == [
        [1 << 16, 1 << 16, (1 << 16) + 1, (1 << 16) + 1, (1 << 16) + 2, 0]
    ]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert batch.predictor_BT.tolist() == [[0, 0, 1, 2, 1, 0]]
    assert batch.target_mask_BT.tolist() == [[False, False, True, True, True, False]]
    np.testing.assert_allclose(batch.sampler_logprobs_BT, [[0, 0, -0.1, -0.2, -0.3, 0]])
    np.testing.assert_allclose(batch.advantages_BT, [[0, 0, 0.5, 0.5, -0.5, 0]])
    with pytest.raises(ValueError, match="exceeds a row"):
        pack_groups([group], advantages, num_rows=1, row_lengths=[4])
    with pytest.raises(ValueError, match="do not fit 1 rows"):
        pack_groups([group, group], advantages * 2, num_rows=1, row_lengths=[6])


# --- the train step -----------------------------------------------------------------------------

SETTINGS = Optimizer(
    learning_rate=1e-2, schedule="cosine", warmup_steps=2, end_fraction=0.1, weight_decay=0.1
)
SCHEDULE = make_schedule(SETTINGS, 8)
OPTIMIZER = make_optimizer(SETTINGS, SCHEDULE)


def new_state():
    model = Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0))
    return create_train_state(model, OPTIMIZER, make_mesh())


def make_step(micro_batches=1, loss=cross_entropy_loss):
    return make_train_step(
        loss, num_target_tokens, OPTIMIZER, SCHEDULE, micro_batches=micro_batches
    )


def batches(count):
    source = document_loader(DOCUMENTS, batch_size=4, max_length=16, seed=0, packing=False)
    return [jax.tree.map(jnp.asarray, next(source)) for _ in range(count)]


def test_schedule_by_hand():
    rates = [float(SCHEDULE(step)) for step in (0, 1, 2, 5, 8, 20)]
    np.testing.assert_allclose(rates, [5e-3, 7.5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5)


def test_training_lowers_the_loss():
    state, step = new_state(), make_step()
    (batch,) = batches(1)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_micro_batches_give_the_whole_batchs_gradient():
    model = Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0))
    (batch,) = batches(1)
    lengths = batch.target_mask_BT.sum(axis=1)
    assert len(set(lengths.tolist())) > 1, "equal rows would not show a mean of means"
    whole, metrics = accumulate(cross_entropy_loss, num_target_tokens, model, batch, 1)
    parts, part_metrics = accumulate(cross_entropy_loss, num_target_tokens, model, batch, 4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], part_metrics["loss"], rtol=1e-5)


def test_gradients_are_added_in_place():
    """Beside their sum, the gradients of one micro-batch are never in memory whole."""
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8}
    model = Transformer(tiny_config("qwen2", **fields), rngs=nnx.Rngs(0))
    (batch,) = batches(1)

    @jax.jit
    def gradients(model, batch):
        return accumulate(cross_entropy_loss, num_target_tokens, model, batch, 4)[0]

    memory = gradients.lower(model, batch).compile().memory_analysis()
    of_blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
    assert memory.temp_size_in_bytes < of_blocks


def test_rows_are_split_and_joined():
    rows = jnp.arange(12).reshape(6, 2)
    parts = split_rows(rows, 3)
    assert parts[1].tolist() == [[2, 3], [8, 9]]
    np.testing.assert_array_equal(join_rows(parts), rows)


def test_metrics_of_several_updates():
    updates = [
        {"loss": jnp.float32(x), "gap_max": jnp.float32(x), "skipped": jnp.int32(x == 1)}
        for x in (1.0, 4.0, 1.0)
    ]
    found = mean_metrics(updates)
    found = {name: float(value) for name, value in found.items()}
    assert found == {"loss": 2.0, "gap_max": 4.0, "skipped": 2.0, "updates": 3.0}
    assert mean_metrics([]) == {"updates": 0.0}


def test_metrics_named_max_are_maximised():
    def loss(model, batch, normalizer):
        value, metrics = cross_entropy_loss(model, batch, normalizer)
        return value, metrics | {"token_max": jnp.max(batch.tokens_BT).astype(jnp.float32)}

    (batch,) = batches(1)
    _, metrics = accumulate(loss, num_target_tokens, new_state().model, batch, 4)
    assert float(metrics["token_max"]) == float(batch.tokens_BT.max())


def test_a_non_finite_update_is_skipped_and_counted():
    def poisoned(model, batch, normalizer):
        loss, metrics = cross_entropy_loss(model, batch, normalizer)
        return jnp.where(batch.tokens_BT[0, 0] == 1, jnp.nan, 1.0) * loss, metrics

    step, state = make_step(loss=poisoned), new_state()
    good = batches(1)[0]
    bad = TokenBatch(
        good.tokens_BT.at[0, 0].set(1),
        good.segment_ids_BT,
        good.positions_BT,
        good.target_mask_BT,
    )
    state, _ = step(state, good)
    before = jax.device_get((state.model, state.opt_state))
    state, metrics = step(state, bad)
    assert float(metrics["skipped"]) == 1
    assert (int(state.step), int(state.skipped)) == (2, 1)
    after = jax.device_get((state.model, state.opt_state))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    _, metrics = step(state, good)
    assert float(metrics["learning_rate"]) == pytest.approx(float(SCHEDULE(1)))


def test_norms_and_biases_do_not_decay():
    model = Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0))
    transform = make_optimizer(SETTINGS, SCHEDULE)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = transform.update(zeros, transform.init(model), model)
    for path, variable in nnx.to_flat_state(nnx.state(updates)):
        moved = bool(jnp.any(variable.get_value() != 0))
        assert moved == (path[-1] in {"embed", "q", "k", "v", "o", "gate", "up", "down"}), path


def test_by_default_an_update_is_that_of_verls_adamw():
    """Against the formula, for a matrix: betas 0.9 and 0.999, decay 0.01, epsilon 1e-8."""
    model = Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0))
    transform = make_optimizer(Optimizer(learning_rate=1e-2), lambda _: 1e-2)
    state, weights = transform.init(model), np.array(model.embed[...], np.float64)
    first = second = np.zeros_like(weights)
    for t, scale in enumerate((1e-4, -3e-5, 2e-4), 1):
        grads = jax.tree.map(lambda x, scale=scale: scale * (x + 0.1), model)
        updates, state = transform.update(grads, state, model)
        grad = scale * (np.array(model.embed[...], np.float64) + 0.1)
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        expected = -1e-2 * (step + 0.01 * np.array(model.embed[...], np.float64))
        np.testing.assert_allclose(updates.embed[...], expected, rtol=1e-4, atol=1e-8)
        model = optax.apply_updates(model, updates)


def test_an_update_clips_to_norm_1_in_place():
    """The clipped gradients are not written to memory, where they take as much as the weights."""
    model = Transformer(tiny_config("qwen2", vocab_size=4096), rngs=nnx.Rngs(0))
    transform = make_optimizer(SETTINGS, SCHEDULE)
    state = transform.init(model)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(model, state, grads):
        updates, state = transform.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    compiled = update.lower(model, state, model).compile()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * weights

    for norm, clipped in ((0.5, 0.5), (4.0, 1.0)):
        grads = jax.tree.map(lambda x, norm=norm: x * (norm / optax.tree.norm(model)), model)
        _, (_, (adam, *_)) = transform.update(grads, state, model)
        assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * clipped)  # 1 - B1


def test_checkpoint_resumes_to_the_bit(tmp_path):
    step, data = make_step(), batches(6)
    undisturbed = new_state()
    for batch in data:
        undisturbed, _ = step(undisturbed, batch)

    state = new_state()
    for batch in data[:3]:
        state, _ = step(state, batch)
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(3, state, {"loader": {"next_index": 3}})
    saver.close()
    del state

    saver = Checkpointer(tmp_path)
    assert saver.latest_step() == 3
    resumed, host = saver.restore(new_state())
    assert host == {"loader": {"next_index": 3}}
    for batch in data[3:]:
        resumed, _ = step(resumed, batch)
    for a, b in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    template = nnx.eval_shape(lambda: Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0)))
    model = saver.restore_model(template, 3)
    assert model.config == tiny_config("qwen2")
    with pytest.raises(UserError, match=r"checkpoint 7 .*\[3\]"):
        saver.restore_model(template, 7)


def small_state():
    return TrainState({"w": jnp.arange(999.0)}, {"m": jnp.ones(99)}, jnp.int32(4), jnp.int32(0))


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    saver = Checkpointer(directory)
    saver.save(2, small_state(), {"loader": {"next_index": 2}})
    saver.save(4, small_state(), {"loader": {"next_index": 4}})
    saver.close()
    return directory


def lose_a_directory(part):
    shutil.rmtree(part)


def cut_the_largest_file(part):
    files = (file for file in part.rglob("*") if file.is_file())
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize("harm", [lose_a_directory, cut_the_largest_file])
@pytest.mark.parametrize("part", ["model", "rest", "host"])
def test_a_part_that_is_missing_or_damaged_is_named(two_saves, tmp_path, part, harm):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_saves, directory)
    if part == "host" and harm is cut_the_largest_file:
        (directory / "4" / "host" / "metadata").write_text('{"loa')
    else:
        harm(directory / "4" / part)
    with pytest.raises(UserError, match=f"'{part}' of .*4 cannot be read") as refusal:
        Checkpointer(directory).restore(small_state())
    assert str(refusal.value).endswith("delete that directory to go on from step 2")
    shutil.rmtree(directory / "4")
    assert Checkpointer(directory).restore(small_state())[1] == {"loader": {"next_index": 2}}
    shutil.rmtree(directory / "2" / part)
    with pytest.raises(UserError, match="begin again: there is no other step"):
        Checkpointer(directory).restore(small_state())


def test_a_save_without_the_loaders_state_is_refused(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(1, small_state(), {"iterator": {}})
    assert saver.complete_step() is None or (tmp_path / "1" / "commit_success.txt").exists()
    saver.wait()
    assert saver.complete_step() == 1
    with pytest.raises(UserError, match=r"'host' of .*1 cannot .* state, found \['iterator'\]"):
        saver.restore(small_state())


# --- a run of it --------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path, request):
    config = load_config("sft", request.config.rootpath / "configs" / "smoke_policy.yaml")
    mesh = make_mesh()
    loaded = load_model("arithmetic", mesh=mesh)
    loader = example_loader([1, 2], batch_size=2, seed=0)
    directory = RunDirectory(tmp_path / "run", "sft", config)
    return TrainingRun(
        directory,
        loaded,
        mesh,
        config.training,
        total_updates=9,
        loader=loader,
        loss_fn=cross_entropy_loss,
        normalizer_fn=num_target_tokens,
    )


@pytest.mark.parametrize(
    ("iterations", "stops_at"),
    [
        ([(1, 1)] * 9, 5),
        ([(1, 1)] * 4 + [(0, 1)] + [(1, 1)] * 5, 10),
        ([(1, 1)] * 4 + [(0, 0)] + [(1, 1)] * 5, 6),
        ([(2, 2)] * 5, 3),
        ([(2, 2), (2, 2), (1, 2)] * 3, None),
    ],
    ids=["one a step", "a good one between", "none between", "two a step", "half of two"],
)
def test_skipped_updates_in_a_row_are_counted(training, iterations, stops_at):
    """Pairs of (skipped, updates) of an iteration."""
    assert MAX_SKIPPED_IN_A_ROW == 5
    stopped = None
    for step, (skipped, updates) in enumerate(iterations, 1):
        training.finish_iteration(step, {"skipped": skipped, "updates": updates})
        try:
            training.log_last()
        except UserError as error:
            assert f"{5 if updates == 1 else 6} updates in a row" in str(error)
            stopped = step
            break
    assert stopped == stops_at


def test_no_step_of_several_processes_waits_for_the_devices_of_all(training, monkeypatch):
    def gather(*_, **__):
        raise AssertionError("a collective")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    for step in (1, 2):
        training.finish_iteration(step, {"loss": jnp.ones(())})
    with pytest.raises(AssertionError, match="a collective"):
        hosts.any_process(False)


def test_parameters_that_are_not_finite_are_not_exported(training):
    norm = training.state.model.norm
    norm[...] = norm[...].at[0].set(jnp.nan)
    with pytest.raises(UserError, match="expected finite parameters after step 0"):
        training.finish({})
    assert not (training._directory.path / "model").exists()
