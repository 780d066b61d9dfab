"""The examples of docs/extending.md: a judge and a search method of a user's own."""

from collections import Counter

from stepwiser_jax.judges.base import ChunkJudgment, SolutionJudgment
from stepwiser_jax.records import Verdict


class ShortChunks:
    """Accepts chunks of at most `args.words` words."""

    def __init__(self, config, *, mesh, seed, name):
        self.compiled_shapes = Counter()
        self.judge_id, self.words = config.path, config.args["words"]

    def measured(self, made):
        return {}

    def check_room(self, problem_id, question, num_tokens):
        pass

    def check_lengths(self, solutions):
        pass

    def __call__(self, solutions):
        return [[self.judge(chunk) for chunk in x.chunks[x.start :]] for x in solutions]

    def judge(self, chunk):
        verdict = Verdict.POSITIVE if len(chunk.split()) <= self.words else Verdict.NEGATIVE
        return ChunkJudgment.of_verdict("", verdict, num_tokens=0)

    def sample(self, solutions, suffixes, *, temperature, top_p=1.0, top_k=0):
        return [[SolutionJudgment(chunks) for _ in suffixes] for chunks in self(solutions)]


def drop_rejected(state, beams, *, keep):
    """Goes on with the first `keep` accepted beams, or with the best beam if none is accepted."""
    unfinished = state.collect_finished(beams)
    accepted = [beam for beam in unfinished if not beam.is_rejected][:keep]
    best = sorted(unfinished, key=lambda beam: -beam.hypothesis.score)[:1]
    return [beam.keep(attempt) for attempt, beam in enumerate(accepted or best)]
