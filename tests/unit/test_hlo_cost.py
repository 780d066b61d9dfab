"""Costs of programs against arithmetic done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepwiser_jax.commands.plan.hlo_cost import Collective, Cost, program_cost
from stepwiser_jax.commands.plan.hlo_text import Shape

# What the TPU compiler makes of (1024, 512) @ (512, 2048) on four devices that hold a quarter of
# the columns each, and return all of them.
PRODUCT = """\
HloModule jit_f, is_scheduled=true

%fused_computation (param_0: bf16[1024,512], param_1: bf16[512,2048]) -> bf16[1024,2048] {
  %param_0 = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[1024,2048]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
dim_labels=bf_io->bf, metadata={op_name="jit(f)/dot_general" stack_frame_id=2}
}

ENTRY %main.0_spmd (param: bf16[1024,512], param.1: bf16[512,512]) -> bf16[1024,2048] {
  %param = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %copy-start = (bf16[1024,512]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%param), cross_program_prefetch_index=0
  %param.1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1), sharding={devices=[1,4]<=[4]}
  %all-gather.5 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} all-gather(%param.1), channel_id=1, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
  %copy-done = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %fusion = bf16[1024,2048]{1,0:T(8,128)(2,1)} fusion(%copy-done, %all-gather.5), \
kind=kOutput, calls=%fused_computation, metadata={op_name="jit(f)/dot_general" stack_frame_id=2}
}
"""

# Adds up the rows of a matrix, one slice at a time, in place; 12 of them at a step of 2.
LOOP = """\
HloModule jit_g

%sliced (x: f32[12,128], i: s32[], total: f32[8,128]) -> f32[8,128] {
  %x = f32[12,128]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[2,128]{1,0:T(2,128)} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={2,128}
  %total = f32[8,128]{1,0:T(8,128)} parameter(2)
  ROOT %put = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%total, %slice, %zero, %zero)
}

%body (state: (s32[], f32[12,128], f32[8,128])) -> (s32[], f32[12,128], f32[8,128]) {
  %state = (s32[], /*index=1*/f32[12,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[12,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %total = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %fusion = f32[8,128]{1,0:T(8,128)} fusion(%x, %i, %total), kind=kLoop, calls=%sliced
  ROOT %tuple = (s32[], f32[12,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %x, \
%fusion)
}

%condition (state.1: (s32[], f32[12,128], f32[8,128])) -> pred[] {
  %limit = s32[] constant(LIMIT)
  %state.1 = (s32[], f32[12,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[12,128], total: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[12,128]{1,0:T(8,128)} parameter(0)
  %total.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %start = s32[] constant(0)
  %state.2 = (s32[], f32[12,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%start, %x.1, \
%total.1)
  %while = (s32[], f32[12,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) while(%state.2), \
condition=%condition, body=%body, metadata={op_name="jit(g)/while" stack_frame_id=3}
  ROOT %result = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=2
}
"""

KERNEL = """\
HloModule jit_k

ENTRY %main (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %kernel.1 = f32[8,128]{1,0:T(8,128)} custom-call(%q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, backend_config={"custom_call_config":{"body":"abc"COST}}
}
"""


def test_a_product_and_an_all_gather_on_tpu():
    cost = program_cost(PRODUCT)
    assert cost.flops == 2 * 1024 * 512 * 2048
    # Of the other three quarters of the columns.
    assert cost.collectives == {Collective("all-gather", (0, 1, 2, 3)): 3 * 512 * 512 * 2}
    # The left operand and the own columns are read, the result is written; the rest is on the chip.
    assert cost.hbm_bytes == 2 * (1024 * 512 + 512 * 512 + 1024 * 2048)


def test_a_loop_counts_its_body_and_its_slices():
    slice_bytes = 4 * 2 * 128  # read once, written once
    counter = 4 + 3 * 4 + 2 * 4 + 1  # where the slice begins, the sum, the test
    cost = program_cost(LOOP.replace("LIMIT", "12"))
    assert cost.hbm_bytes == 6 * (2 * slice_bytes + counter)
    assert cost.hbm_bytes * 2 == program_cost(LOOP.replace("LIMIT", "24")).hbm_bytes


def test_a_loop_bound_by_data_is_asked_for():
    text = LOOP.replace("constant(LIMIT)", "get-tuple-element(%state.1), index=0")
    text = text.replace("%limit = s32[] get", "%limit = s32[] negate(%i.1)\n  %unused = s32[] get")
    with pytest.raises(ValueError, match=r"jit\(g\)/while"):
        program_cost(text)
    once = program_cost(text, trips=lambda _: 1.0).hbm_bytes
    assert program_cost(text, trips={"jit(g)/while": 5.0}.get).hbm_bytes == 5 * once > 0


def test_kernels_state_their_cost_or_are_asked_for():
    stated = ',"cost_estimate":{"flops":"10","transcendentals":"1","bytes_accessed":"30"}'
    cost = program_cost(KERNEL.replace("COST", stated))
    assert (cost.flops, cost.hbm_bytes) == (10, 30)
    silent = KERNEL.replace("COST", "")
    with pytest.raises(ValueError, match=r"kernel\.1"):
        program_cost(silent)
    cost = program_cost(silent, kernel=lambda i, q: Cost(float(q[0].shapes[0].elements)))
    assert cost.flops == 8 * 128


def test_batch_axes_of_products_are_windows():
    """Eight products of (16, 32) and (32, 64), as the TPU compiler writes them."""
    text = """\
ENTRY %main (a: f32[8,16,32], b: f32[8,32,64]) -> f32[8,16,64] {
  %a = f32[8,16,32]{2,1,0} parameter(0)
  %b = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,64]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0io->0bf
}
"""
    assert program_cost(text).flops == 8 * 2 * 16 * 32 * 64


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", tuple(range(8))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
    ],
)
def test_groups_of_devices(written, group):
    text = f"""\
ENTRY %main (x: f32[4,128]) -> f32[4,128] {{
  %x = f32[4,128]{{1,0}} parameter(0)
  ROOT %sum = f32[4,128]{{1,0}} all-reduce(%x), replica_groups={written}, to_apply=%add
}}
"""
    size = len(group)
    received = 2 * (size - 1) / size * 4 * 128 * 4  # reduced in parts, then gathered
    assert program_cost(text).collectives == {Collective("all-reduce", group): received}


def test_an_operand_is_read_through_a_nested_fusion():
    text = """\
%nested (in: bf16[512,128]) -> bf16[512,128] {
  %in = bf16[512,128]{1,0} parameter(0)
  ROOT %seen = bf16[512,128]{1,0} bitcast(%in)
}

%outer (x: bf16[64,512], w: bf16[512,128]) -> bf16[64,128] {
  %x = bf16[64,512]{1,0} parameter(0)
  %w = bf16[512,128]{1,0} parameter(1)
  %weights = bf16[512,128]{1,0} fusion(%w), kind=kLoop, calls=%nested
  ROOT %product = bf16[64,128]{1,0} convolution(%x, %weights), dim_labels=bf_io->bf
}

ENTRY %main (x.1: bf16[64,512], w.1: bf16[512,128]) -> bf16[64,128] {
  %x.1 = bf16[64,512]{1,0} parameter(0)
  %w.1 = bf16[512,128]{1,0} parameter(1)
  ROOT %fusion = bf16[64,128]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%outer
}
"""
    assert program_cost(text).hbm_bytes == 2 * (64 * 512 + 512 * 128 + 64 * 128)


def test_a_layout_pads_to_whole_tiles():
    assert Shape("bf16", (3, 5, 56), "{2,1,0:T(8,128)(2,1)}").bytes == 3 * 8 * 128 * 2
    assert Shape("f32", (5, 56), "{0,1:T(8,128)}").bytes == 128 * 56 * 4  # columns are minor
    assert Shape("f32", (5, 56), "").bytes == 5 * 56 * 4


# --- programs compiled here ---------------------------------------------------------------------


def test_a_scan_on_cpu_counts_by_its_length():
    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    compiled = jax.jit(scan).lower(jnp.ones((64, 32)), jnp.ones((7, 32, 32))).compile()
    assert program_cost(compiled.as_text()).flops == 7 * 2 * 64 * 32 * 32


def test_an_all_gather_on_cpu():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    compiled = jax.jit(lambda x: x, out_shardings=whole).lower(rows).compile()
    (collective,) = program_cost(compiled.as_text()).collectives.items()
    assert collective == (Collective("all-gather", (0, 1, 2, 3)), 3 * 16 * 32 * 4)
