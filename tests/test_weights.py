"""The hooks around releasing the weights' memory, which only a GPU has: whoever looks at it then ends the server."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from sgl_lmcache import weights


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Mock:
    cache = Mock(["begin_weight_session", "end_weight_session", "weights_updated"])
    monkeypatch.setattr(weights, "_cache_of", lambda updater: cache)
    return cache


def updater(*away: str, saves: bool = True, session: object = None) -> SimpleNamespace:
    """As SGLang's is after the call. away: what has no memory."""
    return SimpleNamespace(
        offload_tags=set(away),
        memory_saver_adapter=SimpleNamespace(enabled=saves),
        is_fully_idle=lambda ignore_waiting: True,
        _session=session,
    )


LIFTED = [call.end_weight_session(), call.weights_updated(is_idle=True)]


def test_nobody_may_look_at_weights_that_have_no_memory(cache: Mock) -> None:
    weights.after_release(None, updater("weights", "kv_cache"), None)
    assert cache.mock_calls == [call.begin_weight_session()]


def test_weights_that_have_memory_again_are_new_ones(cache: Mock) -> None:
    weights.after_resume(None, updater("kv_cache"), None)
    assert cache.mock_calls == LIFTED


def test_other_memory_does_not_matter(cache: Mock) -> None:
    weights.after_release(None, updater("kv_cache"), None)
    weights.after_resume(None, updater("weights"), None)
    assert cache.mock_calls == []


def test_an_update_session_goes_on_to_its_end(cache: Mock) -> None:
    weights.after_resume(None, updater(session=object()), None)
    assert cache.mock_calls == []


def test_a_server_that_cannot_release_memory_keeps_its_weights(cache: Mock) -> None:
    weights.after_release(None, updater("weights", saves=False), None)
    assert cache.mock_calls == []
