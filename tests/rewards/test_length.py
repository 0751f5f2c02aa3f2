import pytest

from prl_lightning.rewards import RewardLimits, RewardSum, SoftLengthPunishment


@pytest.mark.parametrize(("max_length", "buffer"), [(20480, 4096), (12, 5), (7, 7), (3, 1)])
def test_it_is_the_papers_equation(max_length: int, buffer: int) -> None:
    """DAPO, Eq. 13, case by case, around both ends of the buffer."""
    reward = SoftLengthPunishment(max_length, buffer)
    free = max_length - buffer
    for length in {0, 1, free - 1, free, free + 1, max_length - 1, max_length, max_length + 9}:
        if length <= free:
            want = 0.0
        elif length <= max_length:
            want = (free - length) / buffer
        else:
            want = -1.0
        if length >= 0:
            assert reward(completion_ids=[[0] * length]) == [want]


def test_it_is_added_to_another_reward() -> None:
    def right(completions: list[str], **_: object) -> list[float]:
        return [1.0 for _ in completions]

    rewards = RewardSum([right, SoftLengthPunishment(6, 4)], weights=[1.0, 0.5])
    ids = [[1], [1] * 4, [1] * 6]
    got = rewards.score(["?"] * 3, ["x"] * 3, {"completion_ids": ids})
    assert got.total.tolist() == [1.0, 0.75, 0.5]


@pytest.mark.process
def test_it_runs_under_limits() -> None:
    rewards = RewardSum([SoftLengthPunishment(6, 4)], limits=RewardLimits(workers=1, seconds=60.0))
    ids = [[1], [1] * 4, [1] * 9]
    got = rewards.score(["?"] * 3, ["x"] * 3, {"completion_ids": ids})
    rewards.stop()
    assert got.total.tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parametrize(("max_length", "buffer"), [(10, 0), (10, 11), (0, 0)])
def test_a_buffer_outside_the_limit_is_an_error(max_length: int, buffer: int) -> None:
    with pytest.raises(ValueError, match=f"buffer={buffer} with max_length={max_length}"):
        SoftLengthPunishment(max_length, buffer)
