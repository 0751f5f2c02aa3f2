from typing import Any

import pytest

from prl_lightning.rewards import RewardLimits

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 0), ("seconds", float("inf")), ("memory_mib", -1), ("max_failures", 1.5),
     ("workers", -1), ("import_seconds", 0), ("failure_value", float("nan"))],
)  # fmt: skip
def test_limits_out_of_range(field: str, value: float) -> None:
    settings: Any = {field: value}
    with pytest.raises(ValueError, match=f"limits.{field}={value}"):
        RewardLimits(**settings)
