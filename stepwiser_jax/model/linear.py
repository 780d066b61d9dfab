"""Matrix products: operands in the compute type, sums in float32, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import qwix

from stepwiser_jax.model import cpu


def linear(x: jax.Array, weight_OI: jax.Array | qwix.QArray) -> jax.Array:
    """Returns x (..., I) times the transpose of a weight (O, I), in the type of x.

    The weight's gradient is summed in float32, and has the weight's type. Quantized weights have
    none.
    """
    if isinstance(weight_OI, qwix.QArray):
        return _quantized_linear(x, weight_OI)
    return _linear(x, weight_OI)


# --- logits -------------------------------------------------------------------------------------

NEVER = -1e30
"""The logit of an id without a token. Its probability is 0, and 0 times it is finite."""


def output_logits(
    hidden: jax.Array, head_VD: jax.Array, unknown_ids: tuple[range, ...]
) -> jax.Array:
    """Returns logits (..., V), float32, of hidden states (..., D); `NEVER` at `unknown_ids`."""
    logits = product(hidden, head_VD.astype(hidden.dtype), (hidden.ndim - 1, 1))
    for unknown in unknown_ids:
        # Compared, not indexed: the vocabulary may be split over devices.
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where((ids >= unknown.start) & (ids < unknown.stop), NEVER, logits)
    return logits


def pair_logits(hidden: jax.Array, head_VD: jax.Array, pair: tuple[int, int]) -> jax.Array:
    """Returns logits (..., 2), float32, of two tokens alone."""
    rows_2D = head_VD[jnp.array(pair)].astype(hidden.dtype)
    return product(hidden, rows_2D, (hidden.ndim - 1, 1))


# --- int8 weights -------------------------------------------------------------------------------


def quantize(weight_IO: jax.Array) -> qwix.QArray:
    """Returns 8-bit integers with a float32 scale for each output: its largest weight is 127."""
    return qwix.quantize(
        weight_IO.astype(jnp.float32), jnp.int8, channelwise_axes=(1,), calibration_method="absmax"
    )


def _quantized_linear(x: jax.Array, weight_OI: qwix.QArray) -> jax.Array:
    # Without a barrier XLA casts the weights before a decode loop, which then reads the casts.
    # Products are in floating point: int8 activations triple the distance to the model.
    x, weight_OI = jax.lax.optimization_barrier((x, weight_OI))
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    out = qwix.dot_general(
        x, weight_OI.astype(x.dtype), dimensions, preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype)


# --- products that are differentiated -----------------------------------------------------------


@jax.custom_vjp
def _linear(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    weight = weight_OI.astype(x.dtype)
    return product(x, weight, (x.ndim - 1, 1)).astype(x.dtype)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Returns the product over one axis of each, in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _linear_forward(
    x: jax.Array, weight_OI: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x, weight_OI), (x, weight_OI)


def _linear_backward(
    residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = residuals
    x_grad = product(grad, weight_OI.astype(grad.dtype), (grad.ndim - 1, 0))
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if x_TI.shape[1] < grad_TO.shape[1]:  # the narrower is the cheaper to transpose
        weight_grad_OI = product_over_rows(x_TI, grad_TO).T
    else:
        weight_grad_OI = product_over_rows(grad_TO, x_TI)
    return x_grad.astype(x.dtype), weight_grad_OI.astype(weight_OI.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def product_over_rows(a_TI: jax.Array, b_TO: jax.Array) -> jax.Array:
    """Returns the sum over rows of their outer products, (I, O), in float32."""

    def plain(a_TI: jax.Array, b_TO: jax.Array) -> jax.Array:
        return product(a_TI, b_TO, (0, 0))

    if a_TI.dtype != jnp.bfloat16:
        return plain(a_TI, b_TO)
    # By the platform that the program is lowered for: a gradient does not know its mesh.
    return jax.lax.platform_dependent(a_TI, b_TO, cpu=cpu.product_over_rows, default=plain)
