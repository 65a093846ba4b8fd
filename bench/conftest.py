"""Says in every saved benchmark on what it ran."""

from typing import Any

import pytest

from .machine import describe


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["fastrnn"] = describe()
