"""Search methods. After every step, a method decides which beams of a problem go on.

    chunk-reset (StepWiser 4.3)   one beam; a rejected chunk is taken back and written anew
    beam search (Snell et al.)    the best n / M of a problem's n beams go on, as M copies each
    DVTS (Beeching et al.)        n / M subtrees of M beams each; the best of each goes on

Beam search and DVTS follow Hugging Face's search-and-learn, with these differences:

1. Beams are ranked by an aggregate of their chunks' scores. Equals keep their order, in which the
   copies of different beams take turns, so beams stay diverse if the judge scores all alike. The
   reference ranks by the `last` score. That suits a judge of the solution up to a chunk; with a
   judge of the chunk alone, the next chunk would hide an error.
2. A beam search ends when n solutions are found or no beam is left. The reference goes on until all
   beams end, and then uses the first n. If fewer than n / M are left, each still has M copies.
3. Copies that end without another word, as after a finished answer, are one solution.
4. If the best beam of a DVTS subtree ends, the beams that ended with it are solutions. In the
   reference all M continuations of the subtree's last step are solutions, finished or not, and a
   subtree also ends if its best beam says "boxed{".
"""

from __future__ import annotations

from collections.abc import Callable

from stepwiser_jax.search.state import Beam, SearchState, best_beam

Method = Callable[[SearchState, list[Beam]], list[Beam]]
"""A function that gets a problem's state and its beams, whose new chunks are judged, and returns
the beams of the next step. It adds solutions with `state.collect_finished`."""


def chunk_reset(max_attempts: int) -> Method:
    """Returns the method that keeps the chunk of one beam, or takes it back. The last attempt is
    kept whatever its verdict."""

    def decide(state: SearchState, beams: list[Beam]) -> list[Beam]:
        (beam,) = beams
        if beam.is_rejected and beam.attempt + 1 < max_attempts:
            return [beam.without_last_chunk()]
        return state.collect_finished([beam.keep(attempt=0)])

    return decide


def beam_search(beams: int, width: int) -> Method:
    """Returns the method that keeps the best `beams / width`, as `width` copies each."""
    num_beams = beams

    def decide(state: SearchState, beams: list[Beam]) -> list[Beam]:
        unfinished = state.collect_finished(beams)
        if len(state.solutions) >= num_beams:
            return []
        ranked = sorted(unfinished, key=lambda beam: -beam.hypothesis.score)
        copies = ranked[: num_beams // width] * width
        return [beam.keep(attempt) for attempt, beam in enumerate(copies)]

    return decide


def dvts(beams: int, width: int) -> Method:
    """Returns the method that keeps the best beam of each subtree, as `width` copies.

    There are `beams / width` subtrees. A beam's subtree is its attempt modulo their number. If the
    best beam of a subtree is finished, so is the subtree, and its finished beams are solutions.
    """
    subtrees = beams // width

    def decide(state: SearchState, beams: list[Beam]) -> list[Beam]:
        kept = []
        for subtree in range(subtrees):
            members = [beam for beam in beams if beam.attempt % subtrees == subtree]
            if members and best_beam(members).hypothesis.is_finished:
                state.collect_finished(members)
            elif members:
                kept.append(best_beam(members).keep(attempt=subtree))
        return [beam.keep(beam.attempt + copy * subtrees) for copy in range(width) for beam in kept]

    return decide
