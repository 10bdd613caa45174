"""Commands and ranks that are killed at random, begun again, end with what they give unharmed."""

from pathlib import Path

import pytest

from hostile.deaths import WORK, deaths
from hostile.kills import COMMANDS, killed

# of each command; `python -m hostile.kills` runs more, and writes docs/kills.md
KILLS = 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_ends_as_it_would_have(command: str, tmp_path: Path) -> None:
    found = killed(command, range(KILLS), tmp_path / "kills")
    assert not [str(kill) for kill in found if kill.fault]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_is_killed_is_named_and_the_job_ends_as_it_would_have(
    world: int, tmp_path: Path
) -> None:
    found = deaths(world, range(len(WORK)), tmp_path)
    assert found == {"identical": len(WORK)}
