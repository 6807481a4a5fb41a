"""Runs kernel tests on compiled code: `pytest -p tests.kernels.executor.plugin`, see
`test_executed.py`. A test also fails if a launch in it breaks a rule of memory.

EXECUTED_ARCHITECTURE is the compute capability that is compiled for, 80 or 90.
"""

import os

import pytest

from . import execute

# Warps that hold copies of a number load it while the one that owns it stores the new one, and then
# store nothing: of the state in the output kernels, of du in windows. In backward of stacks the
# last barrier of a loop is covered by the first of the next turn.
HARMLESS_RACES = {"output_kernel", "output_gradient_kernel", "kept_backward_kernel"}
HARMLESS_RACES |= {"momentum_backward_kernel"}


@pytest.fixture(autouse=True, scope="session")
def executed(request):
    import mocapsnet.kernels.launch
    from mocapsnet.kernels.momentum import triton as momentum

    mocapsnet.kernels.launch.interpreting = lambda: True
    session = execute.install(int(os.environ["EXECUTED_ARCHITECTURE"]))
    request.config.stash[KEY] = session
    table = momentum.table

    def remembered(weights):
        made = table(weights)
        if not made.is_meta:
            session.tables[made.data_ptr()] = (made, list(weights))
        return made

    momentum.table = remembered
    return session


KEY = pytest.StashKey()


def broken(session):
    """What launches since the last test have done that they may not."""
    return [
        f"{kernel}: {found}"
        for kernel, findings in session.ran
        for found in findings
        if found.kind not in execute.HARMLESS
        and not (found.kind.startswith("race of warps") and kernel in HARMLESS_RACES)
    ]


@pytest.fixture(autouse=True)
def judged(executed):
    executed.clear()
    yield
    assert not broken(executed)


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash.get(KEY, None)
    if session:
        terminalreporter.write_line(f"{session.count} launches executed")
