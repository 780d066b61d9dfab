"""A judge as a reward function of TRL, and the forms in which chunks become one number."""

import pytest

from stepwiser_jax.judges.check import Checker
from stepwiser_jax.judges.reward import reward_of, trl_reward

QUESTION = "start 5 ; * 3 - 7 ; * 6 - 2 ?"
RIGHT, WRONG = "5 * 3 = 5 ; 5 - 7 = 8", "8 * 6 = 8 ; 8 - 2 = 1"
FOUND = {
    "chunks": [{"p_positive": p} for p in (0.9, 0.2, 0.8, 0.7)],
    "first_error": 1,
}


def test_forms():
    assert [reward_of(FOUND, form) for form in ("min", "accepted", "right")] == [0.2, 0.25, 0.0]
    accepted = FOUND | {"first_error": -1}
    assert [reward_of(accepted, form) for form in ("min", "accepted", "right")] == [0.2, 1.0, 1.0]
    with pytest.raises(ValueError, match="expected a form of min, accepted, right, found 'mean'"):
        reward_of(FOUND, "mean")


@pytest.mark.parametrize("is_conversation", [False, True])
def test_completions_of_a_call_are_judged_together(is_conversation):
    check, calls = Checker.load(), []
    judge = check.check
    check.check = lambda solutions: calls.append(len(solutions)) or judge(solutions)
    texts = [f"<chunk> {RIGHT} </chunk> <chunk> {WRONG} </chunk>", RIGHT, " ", "5 " * 400]
    prompts = [QUESTION] * len(texts)
    completions = texts
    if is_conversation:
        prompts = [[{"role": "system", "content": "."}, {"role": "user", "content": QUESTION}]] * 4
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    of_both, of_right, empty, too_long = trl_reward(check)(
        prompts=prompts, completions=completions, completion_ids=[[1]] * 4, trainer_state=None
    )
    assert calls == [2]
    assert of_both < 0.5 < of_right <= 1
    assert (empty, too_long) == (0.0, 0.0)
    by_column = trl_reward(check, "right")(["?"] * 4, completions, question=[QUESTION] * 4)
    assert by_column == [0.0, 1.0, 0.0, 0.0]
    assert trl_reward(check)([QUESTION], [" "]) == [0.0]
