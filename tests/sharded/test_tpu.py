"""The judge's train step, compiled for TPUs that are not there: needs libtpu, runs nothing."""

import re

import pytest

from tiny import tiny_config

pytest.importorskip("libtpu", reason="needs the extra tpu: pip install '.[tpu]'")

from stepwiser_jax.commands.programs import lower_update
from stepwiser_jax.config import Judge
from stepwiser_jax.model.attention import Attention, attention, segment_mask
from stepwiser_jax.runtime.aot import abstract_model, tpu_topology
from stepwiser_jax.runtime.data import Group, rollout_batch
from stepwiser_jax.runtime.loading import attention_of
from stepwiser_jax.runtime.mesh import make_mesh
from tpu_step import JUDGE

LENGTH = 1000
KERNELS = {f"splash_mha_{phase}" for phase in ("fwd", "dq", "dkv")}


def compiled(attention_for, *, head_dim, sizes, rows):
    config = tiny_config(
        "qwen2",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        head_dim=head_dim,
        max_length=LENGTH,
    )
    mesh = make_mesh(*sizes, devices=tpu_topology("v5e:2x2").devices)
    group = Group([1] * 300, [[1] * 200] * 3, [[0.0] * 200] * 3, [1.0, -1.0, 0.0])
    batch = rollout_batch([group] * rows, num_rows=rows, row_length=LENGTH)
    model = abstract_model(config, mesh, attention_for(config, mesh))
    return lower_update(Judge.model_validate(JUDGE), model, batch, mesh).compile()


def with_two_axes_of_positions(text: str) -> set[str]:
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
    return {str(shape) for shape in shapes if sum(size >= LENGTH for size in shape) > 1}


# Several rows a device; small heads, and key/value heads that four devices cannot share.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "sizes", "rows"), [(128, (1, 2, 2), 4), (64, (1, 1, 4), 1)], ids=str
)
def test_the_train_step_runs_splash_attention_on_tpu(head_dim, sizes, rows, capsys):
    step = compiled(attention_of, head_dim=head_dim, sizes=sizes, rows=rows)
    text = step.as_text()
    assert {name for name in KERNELS if name in text} == KERNELS
    assert text.count('custom_call_target="tpu_custom_call"') == 4  # forward, again by remat
    assert not with_two_axes_of_positions(text)
    with capsys.disabled():
        print(step.memory_analysis())


@pytest.mark.slow
def test_dense_attention_would_make_such_an_array():
    """That the search above finds what it looks for."""
    text = compiled(
        lambda *_: Attention(segment_mask, attention), head_dim=128, sizes=(1, 1, 1), rows=1
    ).as_text()
    assert with_two_axes_of_positions(text)
