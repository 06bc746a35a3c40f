"""Before any test imports SGLang: on a machine without a GPU it has to be in CPU mode from its first import on."""

import logging

import pytest
from hypothesis import settings

from sgl_lmcache import cpu

if not cpu.has_gpu():
    cpu.enable()

settings.register_profile("no clock", deadline=None)  # a busy machine fails no test
settings.load_profile("no clock")


@pytest.fixture(autouse=True)
def _log_lines_of_other_tests_do_not_count() -> None:
    """What one test has made a place in the code say would leave the next without a line."""
    from hicache.logs import RateLimit

    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and any(isinstance(one, RateLimit) for one in logger.filters):
            logger.filters[:] = [RateLimit()]
