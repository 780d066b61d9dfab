"""Imports math-verify, and builds the tables that its parser makes at its first expressions.

Workers of `tasks.verifier` are forked from a server that imports this once. So a worker is ready at
once, and its deadline is for the answer alone.
"""

from __future__ import annotations

import logging

from stepwiser_jax.tasks.mathematics import is_equivalent

# math-verify warns at every call that its time-outs are off. `tasks.verifier` sets deadlines.
logging.getLogger("math_verify").setLevel(logging.ERROR)
for _answer, _reference in [("\\frac{2}{4}", "\\frac{1}{2}"), ("(1, x^2]", "\\sqrt{2} + 3x")]:
    is_equivalent(_answer, _reference)
